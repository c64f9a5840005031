"""Wan's transformer on diffusers: the plain model, the memories, masks, and what is refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from fatezero import (
    AttentionStore,
    FusionSettings,
    Inversion,
    PnPSettings,
    PromptEdit,
    StoreError,
    TokenFlowSettings,
    draw,
    edit,
    invert,
)
from fatezero.attention.capture import Captured
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask, word_heat
from fatezero.demo.model import build_scheduler
from fatezero.demo.video_model import build_tokenizer
from fatezero.diffusion.denoiser import Guidance
from fatezero.diffusion.prompt_mask import SIGMAS, levels_compared
from fatezero.diffusion.schedule import reused_steps
from fatezero.diffusion.source import source_heat
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.recipes.recipe import Recipe
from fatezero.store.records import Recorder, SourceStep
from tests.small import TEXT, in_thread, relative, small_unet
from tests.wan import CHANNELS, small_wan

SOURCE, TARGET = "a red circle on grass", "a blue striped star on grass"


def random_text(seed: int, tokens: int = 512) -> torch.Tensor:
    """Random embeddings of a few words, followed by zeros, as Wan's encoder returns them."""
    text = torch.randn(1, tokens, TEXT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    text[:, 8:] = 0
    return text


def random_latents(frames: int = 3, height: int = 8, width: int = 6, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, CHANNELS, height, width, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def denoiser() -> VideoTransformerDenoiser:
    return VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.fixture(scope="module")
def prompt() -> PromptEdit:
    return PromptEdit(SOURCE, TARGET, build_tokenizer(), blend_words=(["circle"], ["star"]))


def everyone(frames: int = 3) -> Control:
    return Control(KeyFrames(("all",)), Chunk.whole(frames))


def test_the_hooked_model_equals_the_plain_one(denoiser):
    z, text, negative = random_latents(), random_text(2), random_text(3)
    at, clip = torch.tensor([700.0]), z.transpose(0, 1)[None]
    plain = [denoiser.transformers[0](clip, at, t, return_dict=False)[0][0].transpose(0, 1) for t in (negative, text)]
    with denoiser.hooked():
        guidance = Guidance(Condition(negative), everyone(), 5.0)
        found = denoiser.predict_noise(z, 700.0, Condition(text), everyone(), guidance)
    assert relative(found, plain[0] + 5 * (plain[1] - plain[0])) < 1e-6
    again = denoiser.transformers[0](clip, at, text, return_dict=False)[0][0]
    assert torch.equal(again.transpose(0, 1), plain[1]), "the model is restored"


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
    ],
)
def test_the_schedule_equals_the_schedulers(scheduler):
    schedule = VideoTransformerDenoiser(small_wan(), scheduler).schedule(10)
    scheduler.set_timesteps(10)
    assert [schedule.sigma(level) for level in range(10, -1, -1)] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-7)
    assert schedule.timesteps == pytest.approx([1000 * s for s in scheduler.sigmas.tolist()[:-1]], abs=1e-3)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "fusion",
    [
        FusionSettings(0.7, 0.6),
        FusionSettings(0.7, 0.6, blend_self_attention=True, blend_threshold=0.9),
        FusionSettings(0.7, 0.6, blend_self_attention=True, blend_latents=True, mask_from="prompts"),
    ],
)
def test_the_memories_agree(denoiser, prompt, fusion, order):
    results = []
    for memory in ("recompute", "queries_keys", "maps"):
        inversion = invert(denoiser, random_latents(), random_text(2), 4, memory=memory, order=order)
        results.append(edit(denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, fusion))
    assert relative(results[1], results[0]) < 1e-6
    assert relative(results[2], results[0]) < 1e-6


@pytest.fixture(scope="module")
def inversion(denoiser):
    return invert(denoiser, random_latents(), random_text(2), 4)


def edited(denoiser, inversion, prompt, mask=None, **fusion):
    given = None if mask is None else GivenMask(torch.as_tensor(mask))
    settings = FusionSettings(cross_replace_steps=0.0, self_replace_steps=1.0, **fusion)
    return edit(denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, settings, mask=given)


def test_a_mask_of_ones_keeps_the_edits_attention_and_of_zeros_the_sources(denoiser, inversion, prompt):
    ones = edited(denoiser, inversion, prompt, torch.ones(1, 8, 6), blend_self_attention=True)
    none = edit(denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, FusionSettings(0.0, 0.0))
    assert relative(ones, none) < 1e-9
    zeros = edited(denoiser, inversion, prompt, torch.zeros(1, 8, 6), blend_self_attention=True)
    assert relative(zeros, edited(denoiser, inversion, prompt)) < 1e-9
    assert relative(zeros, ones) > 1e-3


def test_a_soft_mask_averages_maps_as_in_the_paper(denoiser, inversion, prompt, monkeypatch):
    """Eq. 7 with explicit maps, for rows of the edit, of the source, and of both."""
    mask = torch.zeros(1, 8, 6)
    mask[:, :4], mask[:, 4:6] = 1.0, 0.4
    by_rows = edited(denoiser, inversion, prompt, mask, blend_self_attention=True)
    kept = invert(denoiser, random_latents(), random_text(2), 4, memory="maps")
    assert relative(by_rows, edited(denoiser, kept, prompt, mask, blend_self_attention=True)) < 1e-6


def test_outside_the_mask_latents_equal_the_source(denoiser, inversion, prompt):
    mask = torch.zeros(1, 8, 6)
    mask[:, :4, :3] = 1
    settings = FusionSettings(0.5, 0.5, blend_latents=True, blend_latents_until=1.0)
    done = edit(denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, settings, mask=GivenMask(mask))
    outside = (mask == 0).expand(3, -1, -1)[:, None].expand_as(done)
    assert torch.equal(done[outside], inversion.latents[0][outside])
    assert relative(done[~outside], inversion.latents[0][~outside]) > 1e-2


def test_second_order_replays_better_at_equal_calls(denoiser):
    lost = {}
    for order in (1, 2):
        inversion = invert(denoiser, random_latents(), random_text(2), 20, order=order)
        lost[order] = relative(edit(denoiser, inversion, random_text(2), guidance_scale=1.0), random_latents())
    assert lost[2] < 0.6 * lost[1]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_reused_middle_predictions_replay_as_well_at_half_the_calls(denoiser, strength):
    """The model is called as often as counted, and a file keeps the solver."""
    lost, calls = {}, {}
    for reuse in (False, True):
        called: list[int] = []
        counted = denoiser.transformers[0].register_forward_pre_hook(lambda *_, called=called: called.append(1))
        inversion = invert(denoiser, random_latents(), random_text(2), 20, order=2, reuse_midpoint=reuse)
        done = edit(denoiser, inversion, random_text(2), guidance_scale=1.0, strength=strength)
        counted.remove()
        lost[reuse], calls[reuse] = relative(done, random_latents()), len(called)
        steps = reused_steps(denoiser.schedule(20), 2) if reuse else frozenset()
        assert len(called) == sum(Recipe(guidance_scale=1.0, strength=strength).calls(20, reused=steps))
    assert calls[True] < 0.65 * calls[False]
    assert lost[True] < 1.5 * lost[False]


def test_reused_middle_predictions_need_second_order_and_recomputed_attention(denoiser):
    with pytest.raises(ValueError, match="order 2"):
        invert(denoiser, random_latents(), random_text(2), 4, reuse_midpoint=True)
    with pytest.raises(ValueError, match="recompute"):
        invert(denoiser, random_latents(), random_text(2), 4, memory="maps", order=2, reuse_midpoint=True)


def test_two_transformers_share_a_run_at_the_boundary():
    high, low = small_wan(0), small_wan(1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pair = VideoTransformerDenoiser(high, scheduler, low, 0.8)
    z, text = random_latents(), Condition(random_text(2))
    for timestep, model in ((900.0, high), (700.0, low)):
        one = VideoTransformerDenoiser(model, scheduler)
        with one.hooked():
            expected = one.predict_noise(z, timestep, text, everyone())
        with pair.hooked():
            assert torch.equal(pair.predict_noise(z, timestep, text, everyone()), expected)
    assert not pair.identity().matches(VideoTransformerDenoiser(high, scheduler).identity())


def test_a_store_takes_the_estimated_bytes(denoiser):
    for memory in ("recompute", "queries_keys", "maps"):
        store = invert(denoiser, random_latents(), random_text(2), 3, memory=memory).store
        assert store.plan is not None
        assert store.plan.nbytes == store.nbytes


def test_a_store_survives_a_file(denoiser, prompt, tmp_path):
    """With a flow's levels and the solver's order; without stored attention, overlapping chunks approximate."""
    made = invert(denoiser, random_latents(6), random_text(2), 4, memory="queries_keys", order=2)
    made.store.save(tmp_path / "store.safetensors")
    loaded = Inversion(AttentionStore.load(tmp_path / "store.safetensors"))
    assert (loaded.store.formulation, loaded.store.order) == ("flow", 2)
    settings = (random_text(3), random_text(4), 5.0, prompt, FusionSettings(0.7, 0.6))
    whole = edit(denoiser, made, *settings)
    assert torch.equal(edit(denoiser, loaded, *settings), whole)
    with pytest.raises(ValueError, match="one attention per frame"):
        edit(denoiser, made, *settings, chunk_frames=4)
    reusing = invert(denoiser, random_latents(6), random_text(2), 6, order=2, reuse_midpoint=True)
    reusing.store.save(tmp_path / "reusing.safetensors")
    loaded = Inversion(AttentionStore.load(tmp_path / "reusing.safetensors"))
    assert torch.equal(edit(denoiser, loaded, *settings), edit(denoiser, reusing, *settings))
    latents_alone = invert(denoiser, random_latents(6), random_text(2), 4, order=2)
    assert 1e-4 < relative(edit(denoiser, latents_alone, *settings, chunk_frames=4), whole) < 1


def test_a_store_of_a_unet_is_refused(denoiser, inversion):
    broken = Inversion(replace(inversion.store, formulation="ddim"))
    with pytest.raises(StoreError, match="another schedule"):
        edit(denoiser, broken, random_text(3), guidance_scale=1.0)


def test_attention_to_words_without_maps(denoiser, inversion, prompt):
    """The same as from maps of the mask layers, the middle half of the blocks."""
    heat = source_heat(denoiser, inversion, prompt, step=1)
    store = invert(denoiser, random_latents(), random_text(2), 4, memory="maps").store
    sites = [site for site in denoiser.sites(8, 6) if site.kind == "cross"][1:3]
    chunk = Chunk.whole(store.frames)
    records = store.fetch(1, {site.name for site in sites}, chunk, torch.device("cpu"))
    kept = SourceStep(Captured(records), store.key_frames, chunk, stored=True)
    assert relative(heat, word_heat(kept.maps(sites, torch.float64), [2])) < 1e-6


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"fusion": PnPSettings()}, "Plug-and-Play needs a UNet"),
        ({"propagation": TokenFlowSettings()}, "TokenFlow needs a UNet"),
    ],
)
def test_parts_that_need_a_unet(denoiser, inversion, part, error):
    with pytest.raises(ValueError, match=error):
        edit(denoiser, inversion, random_text(3), random_text(4), 5.0, **part)


def test_unsupported_models_and_options(denoiser):
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match="a WanTransformer3DModel"):
        VideoTransformerDenoiser(small_unet(), scheduler)
    with pytest.raises(ValueError, match="I2V"):
        VideoTransformerDenoiser(small_wan(in_channels=9), scheduler)
    with pytest.raises(TypeError, match="without a flow's sigmas"):
        VideoTransformerDenoiser(small_wan(), build_scheduler())
    with pytest.raises(ValueError, match="belong together"):
        VideoTransformerDenoiser(small_wan(), scheduler, small_wan())
    with pytest.raises(ValueError, match="clip_norm"):
        invert(denoiser, random_latents(), random_text(2), 2, clip_norm=True)
    with pytest.raises(ValueError, match="multiples of 2"):
        invert(denoiser, random_latents(height=7), random_text(2), 2)
    with pytest.raises(ValueError, match="embeddings are 5 wide"):
        invert(denoiser, random_latents(), torch.zeros(1, 8, 5, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="order is 3"):
        invert(denoiser, random_latents(), random_text(2), 2, order=3)
    other = small_wan()
    other.blocks[0].attn1.processor = object()
    with pytest.raises(ValueError, match="cannot replace"):
        VideoTransformerDenoiser(other, scheduler)


def test_only_one_thread_edits_a_transformer_and_others_call_it_unhooked(denoiser, prompt, inversion):
    model, (latents, text) = denoiser.transformers[0], (random_latents(), random_text(3))

    def plain():
        clip, times = latents.transpose(0, 1)[None], torch.tensor([500.0], dtype=torch.float64)
        return model(clip, times, text, return_dict=False)[0]

    expected, others = plain(), []
    whole = edit(denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, FusionSettings(0.7, 0.6))
    during = edit(
        denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, FusionSettings(0.7, 0.6),
        progress=lambda done, of: others.append((in_thread(plain), in_thread(denoiser.hooked().__enter__))),
    )  # fmt: skip
    assert torch.equal(during, whole)
    assert all(torch.equal(found, expected) for found, _ in others)
    assert all("another edit is using this video transformer" in str(error) for _, error in others) and others


def test_the_model_is_restored_after_an_error(denoiser):
    with pytest.raises(RuntimeError, match="stop"), denoiser.hooked():
        raise RuntimeError("stop")
    model = denoiser.transformers[0]
    assert not any("forward" in vars(module) for module in model.modules())
    assert {type(block.attn1.processor).__name__ for block in model.blocks} == {"WanAttnProcessor"}


@pytest.mark.parametrize("shift", [1.0, 8.0])
def test_prompts_are_compared_at_the_same_noise_for_any_shift(shift):
    shifted = VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler(shift=shift))
    store = draw(shifted, random_latents(), random_text(2), 30).store
    sigmas = [1 - store.alphas[level] for level in levels_compared(store)]
    assert sigmas == pytest.approx(SIGMAS, abs=0.06)
    assert levels_compared(draw(shifted, random_latents(), random_text(2), 1).store) == [0]


def test_records_of_a_paired_branch_are_kept_for_one_block(denoiser, prompt, inversion, monkeypatch):
    counts, plain = [], Recorder.forget
    monkeypatch.setattr(Recorder, "forget", lambda self, layer: (counts.append(len(self.records)), plain(self, layer)))
    edit(denoiser, inversion, random_text(3), random_text(4), 5.0, prompt, FusionSettings(1.0, 1.0))
    assert max(counts) == 2, "self- and cross-attention of a block"
    assert len(counts) == 4 * 8, "each layer of each step"
