"""KV-Edit: the background is preserved by the source's keys and values; 0 steps equal no method."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fatezero import (
    AttentionStore,
    Edit,
    FlowEditSettings,
    Inversion,
    StoreSettings,
    draw,
    edit,
    edit_many,
    invert,
)
from fatezero.attention.condition import Condition
from fatezero.attention.control import AttentionSite
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.diffusion.denoiser import Guidance
from fatezero.diffusion.edit_maps import EditMaps
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.methods.fatezero import FusionSettings
from fatezero.methods.kv_edit import Background, Inside, KVEditSettings, tokens_inside
from fatezero.recipes.cost import fastest_memory
from fatezero.recipes.recipe import Recipe
from fatezero.store.records import PairedBranch, Recorder
from small import random_latents, random_text, relative
from tests.wan import small_wan

STEPS = 4


def mask_of(width: int) -> GivenMask:
    """A mask of the left columns of eight."""
    mask = torch.zeros(1, 8, 8)
    mask[..., :width] = 1
    return GivenMask(mask)


@pytest.fixture
def edited(denoiser):
    inversion = invert(denoiser, random_latents(3), random_text(0), STEPS, memory=StoreSettings("queries_keys"))

    def run(settings, width=4, **more):
        return edit(
            denoiser, inversion, random_text(1), random_text(2), fusion=settings, mask=mask_of(width), **more
        )  # fmt: skip

    run.clip = inversion.latents[0]
    return run


def test_the_background_is_preserved_and_the_rest_is_edited(edited):
    plain, ours = edited(None), edited(KVEditSettings())
    half = ours.shape[-1] // 2
    assert torch.equal(ours[..., half:], edited.clip[..., half:])
    assert relative(ours[..., :half], plain[..., :half]) > 1e-3
    assert torch.equal(edited(KVEditSettings(0.0)), plain), "0 steps equal no method"
    everything = edited(KVEditSettings(), width=8)
    assert relative(everything, edited(None, width=8)) < 1e-5, "a full mask uses nothing of the source"


def test_chunks_give_the_whole_clips_result(edited):
    assert relative(edited(KVEditSettings(), chunk_frames=1), edited(KVEditSettings())) < 1e-5


def test_keys_and_values_outside_the_mask_are_the_sources():
    site = AttentionSite("down", 0, "self", 2, 4, 8, 8)
    keys, chunk = KeyFrames(("self",)), Chunk.whole(2)
    (q, k, v), (sq, sk, sv) = (torch.randn(2, 3, 2, 2, 64, 4, generator=torch.Generator().manual_seed(0))).unbind()
    recorder = Recorder(keys, chunk, {site.name}, values=True)
    recorder.self_attention(sq, sk, sv, site)
    ours = Background(recorder.step, mask_of(4), 2).self_attention(q, k, v, site)
    inside = (torch.arange(64) % 8 < 4)[:, None]
    k, v = torch.where(inside, k, sk), torch.where(inside, v, sv)
    assert relative(ours, torch.softmax(q @ k.mT / 2, -1) @ v) < 1e-6


def test_it_needs_a_mask_before_anything_runs(denoiser):
    inversion = invert(denoiser, random_latents(1), random_text(0), STEPS)
    with pytest.raises(ValueError, match="KV-Edit needs an edit mask"):
        edit(denoiser, inversion, random_text(1), random_text(2), fusion=KVEditSettings())


# --- on a video transformer --------------------------------------------------------------------


TOKENS, SIZE, GRID, FRAMES = 512, (8, 6), (4, 3), 3


@pytest.fixture(scope="module")
def wan():
    return VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))


def clip() -> torch.Tensor:
    return random_latents(FRAMES, *SIZE)


def text(seed: int) -> Condition:
    return Condition(random_text(seed, TOKENS))


def area(*box: slice, frames: int = 1) -> GivenMask:
    """A mask of a box of latents, in all frames or another in each."""
    mask = torch.zeros(frames, *SIZE)
    for frame in range(frames):
        mask[frame][tuple(slice(s.start + 2 * frame, s.stop + 2 * frame) for s in box)] = 1
    return GivenMask(mask)


ALL = GivenMask(torch.ones(1, *SIZE))
LEFT = area(slice(0, 8), slice(0, 2))
MASKS = {
    "half": LEFT,
    "one pixel": area(slice(3, 4), slice(3, 4)),
    "the rim": area(slice(7, 8), slice(0, 6)),
    "moving": area(slice(0, 2), slice(0, 2), frames=FRAMES),
}


def edited_on(denoiser, settings, mask, memory="recompute", order=1, **more):
    inversion = invert(denoiser, clip(), text(0), STEPS, memory=memory, order=order)
    return edit(denoiser, inversion, text(1), text(2), fusion=settings, mask=mask, **more)


@pytest.mark.parametrize("name", MASKS)
def test_tokens_inside_equal_all_tokens(wan, name):
    """Both branches, with the source's keys and values outside, in one call against calls of all tokens."""
    mask, keys, chunk = MASKS[name], KeyFrames(("all",)), Chunk.whole(FRAMES)
    tokens = tokens_inside(mask.at(SIZE, FRAMES)[:, None], GRID, 0)
    whole = GivenMask(tokens.double())
    names = {site.name for site in wan.sites(*SIZE) if site.kind == "self"}
    z, of_source = clip() + 1, clip()

    def predicted(control, recorder, paired):
        negative = Guidance(text(2), control(recorder.step), 5.0)
        return wan.predict_noise(z, 500.0, text(1), control(recorder.step), negative, paired)

    with torch.no_grad(), wan.hooked():
        recorder = Recorder(keys, chunk, names, values=True)
        alone = wan.predict_noise(of_source, 500.0, text(0), recorder)
        expected = predicted(lambda source: Background(source, whole, FRAMES), recorder, None)
        recorder = Recorder(keys, chunk, names, values=True)
        pair = PairedBranch(of_source, text(0), recorder)
        ours = predicted(lambda source: Inside(source, tokens, of_source), recorder, pair)
    inside = tokens.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].double()
    assert relative(inside * ours, inside * expected) < 1e-6
    assert relative((1 - inside) * ours, (1 - inside) * alone) < 1e-6, "the source's prediction outside"
    assert relative(recorder.captured.prediction, alone) < 1e-6
    assert not recorder.records
    completed = Inside(recorder.step, tokens, of_source).completed(ours)
    assert torch.equal(completed, torch.where(inside > 0, ours, of_source))


def test_records_are_forgotten_where_no_token_is_inside(wan):
    recorder = Recorder(KeyFrames(("all",)), Chunk.whole(FRAMES), {site.name for site in wan.sites(*SIZE)}, values=True)
    nothing = Inside(recorder.step, torch.zeros(FRAMES, *GRID, dtype=torch.bool), clip())
    with torch.no_grad(), wan.hooked():
        pair = PairedBranch(clip(), text(0), recorder)
        wan.predict_noise(clip(), 500.0, text(1), nothing, Guidance(text(2), nothing, 5.0), pair)
    assert not recorder.records


@pytest.mark.parametrize("name", MASKS)
def test_the_rest_is_the_sources_to_the_bit(wan, name):
    mask = MASKS[name]
    ours = edited_on(wan, KVEditSettings(grow=0), mask)
    outside = (mask.at(SIZE, FRAMES) == 0)[:, None].expand_as(ours)
    assert torch.equal(ours[outside], clip()[outside])
    assert relative(ours[~outside], clip()[~outside]) > 1e-2
    assert relative(ours, edited_on(wan, None, mask)) > 1e-5


def test_masks_of_ones_and_zeros(wan):
    assert relative(edited_on(wan, KVEditSettings(), ALL), edited_on(wan, None, ALL)) < 1e-6
    nothing = GivenMask(torch.zeros(1, *SIZE))
    assert torch.equal(edited_on(wan, KVEditSettings(grow=0), nothing), clip())
    assert torch.equal(edited_on(wan, KVEditSettings(0.0), LEFT), edited_on(wan, None, LEFT))


def test_the_mask_grows_by_patches(wan):
    tokens = [tokens_inside(MASKS["one pixel"].at(SIZE, 1)[:, None], GRID, grow) for grow in (0, 1, 2)]
    assert [int(one.sum()) for one in tokens] == [1, 9, 12]
    assert tokens[0][0, 1, 1]


@pytest.mark.parametrize("order", [1, 2])
def test_kept_keys_and_values_give_the_same(wan, order, tmp_path):
    computed = edited_on(wan, KVEditSettings(grow=0), LEFT, order=order)
    kept = edited_on(wan, KVEditSettings(grow=0), LEFT, "keys_values", order)
    assert relative(kept, computed) < 1e-6
    on_disk = StoreSettings("keys_values", "disk", path=tmp_path / "s.safetensors", keep_steps=0.5)
    assert relative(edited_on(wan, KVEditSettings(grow=0), LEFT, on_disk, order), computed) < 1e-6
    again = Inversion(AttentionStore.load(tmp_path / "s.safetensors"))
    one = Edit(text(1), text(2), fusion=KVEditSettings(grow=0), mask=LEFT)
    others = [replace(one, mask=MASKS["moving"]), replace(one, fusion=None)]
    assert relative(edit_many(wan, again, [*others, one])[-1], computed) < 1e-6


def test_all_tokens_read_the_source_in_the_targets_branch_only(wan):
    ours = edited_on(wan, KVEditSettings(tokens="all"), LEFT)
    assert torch.equal(ours[..., 2:], clip()[..., 2:])
    assert relative(ours, edited_on(wan, None, LEFT)) > 1e-4
    assert relative(ours, edited_on(wan, KVEditSettings(grow=0), LEFT)) > 1e-5


def test_calls_count_the_tokens_inside():
    recipe = Recipe(injection=KVEditSettings(0.5, grow=0), mask=area(slice(0, 2), slice(0, 6)))
    assert recipe.calls(4, spans_clip=True, grid=GRID) == (4, 2 * (2 * 0.25 + 2), 2, 0)
    kept = {"kept_steps": 4, "memory": "keys_values", "grid": GRID}
    assert recipe.calls(4, **kept) == (4, 2 * (2 * 0.25 + 2), 0, 0)
    assert recipe.calls(4, kept_steps=4, grid=GRID).source == 2, "queries and keys are not enough"
    assert recipe.calls(4) == (4, 2 * 4, 2, 0), "a UNet computes all tokens"


def test_the_memory_that_edits_gain_from():
    inside, every, fused = KVEditSettings(), KVEditSettings(tokens="all"), FusionSettings()
    assert fastest_memory([inside, None], GRID) == "keys_values"
    assert {fastest_memory(*given) for given in (([inside], None), ([every], GRID), ([inside, fused], GRID))} == {
        "queries_keys"
    }


def test_flow_edit_computes_all_tokens(wan):
    drawn = draw(wan, clip(), text(0), STEPS, FlowEditSettings(2.0, draws=2, seed=3, n_min=1))
    ours, plain = (
        edit(wan, drawn, text(1), text(2), 5.0, fusion=KVEditSettings(tokens=tokens), mask=LEFT, strength=0.75)
        for tokens in ("inside", "all")
    )
    assert torch.equal(ours, plain)
    assert torch.equal(ours[..., 2:], clip()[..., 2:])
    recipe = Recipe(injection=KVEditSettings(), noise=FlowEditSettings(), mask=LEFT)
    assert recipe.calls(4, grid=GRID).edit == 2 * 4


def test_two_transformers_share_the_steps(wan):
    """The source's keys and values are those of the transformer of the step."""
    both = VideoTransformerDenoiser(small_wan(), wan.scheduler, small_wan(1), 0.8)
    computed = edited_on(both, KVEditSettings(grow=0), LEFT)
    assert relative(edited_on(both, KVEditSettings(grow=0), LEFT, "keys_values"), computed) < 1e-6
    assert relative(edited_on(wan, KVEditSettings(grow=0), LEFT), computed) > 1e-3


def test_chunks_take_their_own_tokens(wan):
    ours = edited_on(wan, KVEditSettings(grow=0), MASKS["moving"], chunk_frames=2)
    outside = (MASKS["moving"].at(SIZE, FRAMES) == 0)[:, None].expand_as(ours)
    assert torch.equal(ours[outside], clip()[outside])
    with pytest.raises(ValueError, match="several chunks"):
        inversion = invert(wan, clip(), text(0), STEPS, memory="keys_values")
        edit(wan, inversion, text(1), text(2), fusion=KVEditSettings(), mask=LEFT, chunk_frames=2)


def test_the_heat_of_tokens_outside_is_zero(wan):
    maps = EditMaps({"a": [0], "b": [1]}, {"a": [0], "b": [1]})
    ours = edited_on(wan, KVEditSettings(grow=0), LEFT, maps=maps)
    assert torch.equal(ours, edited_on(wan, KVEditSettings(grow=0), LEFT))
    heat = maps.heats()["target"]["a"]
    assert heat.shape[-2:] == GRID and heat[..., :1].min() > 0 and not heat[..., 1:].any()
