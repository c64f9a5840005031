"""The loops on small real UNets in float64."""

from dataclasses import replace

import pytest
import torch

from fatezero import Condition, Edit, FusionSettings, PromptEdit, StoreError, edit, invert
from fatezero.attention.key_frames import Chunk
from fatezero.diffusion.branches import EditRun
from fatezero.diffusion.edit import EditPass
from fatezero.diffusion.invert import Inversion
from fatezero.diffusion.reconstruction import reconstructed
from fatezero.diffusion.source import source_heat
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.recipes.recipe import Recipe
from fatezero.store.records import MEMORIES
from fatezero.store.store import AttentionStore
from small import THREE_LEVELS, random_latents, random_text, relative, small_unet

SOURCE, TARGET = "a red circle on sand", "a blue square on sand"


def replace_edit(tokenizer, **options):
    words = (["red", "circle"], ["blue", "square"])
    return PromptEdit(SOURCE, TARGET, tokenizer, mode="replace", blend_words=words, **options)


BLENDED = FusionSettings(0.5, 0.5, blend_self_attention=True, blend_latents=True, blend_threshold=0.9)


def run(denoiser, tokenizer, latents, memory="recompute", fusion=BLENDED, condition=random_text, **options):
    keys = options.pop("key_frames", ("self", "middle"))
    norm = options.pop("clip_norm", False)
    inversion = invert(denoiser, latents, condition(0), steps=5, key_frames=keys, clip_norm=norm, memory=memory)
    return edit(
        denoiser, inversion, condition(1), condition(2), prompt=replace_edit(tokenizer), fusion=fusion, **options
    )


@pytest.mark.parametrize(
    ("shape", "clip_norm"),
    [((3, 16, 16), False), ((2, 12, 20), True), ((1, 16, 16), False), ((2, 10, 14), False), ((3, 16, 16), True)],
)
def test_the_three_memories_agree(denoiser, tokenizer, shape, clip_norm):
    latents = random_latents(*shape)
    edits = [run(denoiser, tokenizer, latents, memory, clip_norm=clip_norm) for memory in MEMORIES]
    assert edits[0].shape == latents.shape
    assert max(relative(other, edits[0]) for other in edits[1:]) < 1e-9


def test_words_with_shares_of_their_own(denoiser, tokenizer):
    latents = random_latents(2)
    plain = run(denoiser, tokenizer, latents, fusion=FusionSettings(0.5, 0.5))
    same = run(denoiser, tokenizer, latents, fusion=FusionSettings(0.5, 0.5, cross_replace_words={"blue": 0.5}))
    assert relative(same, plain) < 1e-12, "the usual share for a word changes nothing"
    for changed in ({"cross_replace_words": {"blue": 0.0}}, {"self_replace_from": 0.4}, {"cross_replace_from": 0.4}):
        assert relative(run(denoiser, tokenizer, latents, fusion=FusionSettings(0.5, 0.5, **changed)), plain) > 1e-6


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_attention_of_the_reconstruction(denoiser, tokenizer, guidance):
    """The step from level L reads what guided sampling of the source has at L, one level noisier than the inversion."""
    inversion = invert(denoiser, random_latents(2), random_text(0), steps=5)
    store, negative = inversion.store, random_text(2)
    steps = [[Chunk.whole(2)]] * 5
    with denoiser.hooked(), torch.no_grad():
        replay = reconstructed(denoiser, store, negative, guidance, steps)
    sampled = edit(denoiser, inversion, random_text(0), negative, guidance)
    assert torch.equal(replay.level(0), sampled) and torch.equal(replay.level(5), store.level(5))
    shifted = replace(replay, levels=torch.cat([replay.levels[1:], replay.levels[-1:]]))
    arguments = (random_text(1), negative, guidance, replace_edit(tokenizer))
    expected = edit(denoiser, Inversion(shifted), *arguments, FusionSettings(0.5, 0.5))
    of_replay = FusionSettings(0.5, 0.5, attention_from="reconstruction")
    assert relative(edit(denoiser, inversion, *arguments, of_replay), expected) < 1e-12
    assert relative(edit(denoiser, inversion, *arguments, FusionSettings(0.5, 0.5)), expected) > 1e-6


def test_cross_attention_is_stored_as_maps_where_that_is_smaller(scheduler, tokenizer):
    """One head of 80 channels takes more than a map of 77 columns."""
    unet = small_unet(block_out_channels=(8, 80), attention_head_dim=1)
    denoiser = DiffusersDenoiser(unet, scheduler)
    edits = [run(denoiser, tokenizer, random_latents(2), memory) for memory in MEMORIES]
    assert max(relative(other, edits[0]) for other in edits[1:]) < 1e-9
    store = invert(denoiser, random_latents(2), random_text(0), 1, memory="queries_keys").store
    parts = {name: set(tensors) for name, tensors in store.backend.tensors(0).items()}
    assert (parts["down.0.cross"], parts["mid.0.cross"], parts["mid.0.self"]) == ({"q", "k"}, {"map"}, {"q", "k"})
    assert store.nbytes == store.plan.nbytes


def test_a_store_from_disk_gives_the_same_edit(denoiser, tokenizer, tmp_path):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=3, memory="queries_keys")
    arguments = (random_text(1), random_text(2), 7.5, replace_edit(tokenizer), BLENDED)
    before = edit(denoiser, inversion, *arguments)
    loaded = type(inversion)(AttentionStore.load(inversion.store.save(tmp_path / "s.safetensors")))
    assert torch.equal(edit(denoiser, loaded, *arguments), before)


def test_sd2_predicting_v_inverts_and_replays(tokenizer):
    from diffusers import DDIMScheduler

    from fatezero.demo.model import build_scheduler

    scheduler = DDIMScheduler.from_config(build_scheduler().config, prediction_type="v_prediction")
    denoiser = DiffusersDenoiser(small_unet(use_linear_projection=True, attention_head_dim=(2, 4)), scheduler)
    edits = [run(denoiser, tokenizer, random_latents(2), memory) for memory in MEMORIES]
    assert max(relative(other, edits[0]) for other in edits[1:]) < 1e-9


def test_prediction_kinds_agree_on_the_same_noise(unet):
    """A UNet read as predicting v or the sample gives the epsilon those imply."""
    from diffusers import DDIMScheduler

    from fatezero.attention.control import Control
    from fatezero.attention.key_frames import Chunk, KeyFrames
    from fatezero.demo.model import build_scheduler

    z, text = random_latents(1), Condition(random_text(0))
    raw = unet(z, 500, text.embeddings).sample
    a = build_scheduler().alphas_cumprod[500].double()
    expected = {
        "epsilon": raw,
        "v_prediction": a.sqrt() * raw + (1 - a).sqrt() * z,
        "sample": (z - a.sqrt() * raw) / (1 - a).sqrt(),
    }
    for kind, noise in expected.items():
        scheduler = DDIMScheduler.from_config(build_scheduler().config, prediction_type=kind)
        denoiser = DiffusersDenoiser(unet, scheduler)
        with denoiser.hooked():
            plain = Control(KeyFrames(("self",)), Chunk.whole(1))
            assert relative(denoiser.predict_noise(z, 500, text, plain), noise) < 1e-6


def test_sdxl_shaped_unets_with_several_transformer_layers(tokenizer, scheduler):
    unet = small_unet(
        **THREE_LEVELS,
        transformer_layers_per_block=(1, 2, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    denoiser = DiffusersDenoiser(unet, scheduler)

    def condition(seed):
        extras = {"text_embeds": torch.randn(1, 12).double(), "time_ids": torch.zeros(1, 6).double()}
        return Condition(random_text(seed), extras)

    torch.manual_seed(0)
    conditions = {seed: condition(seed) for seed in range(3)}
    edits = [run(denoiser, tokenizer, random_latents(2), memory, condition=conditions.get) for memory in MEMORIES]
    assert max(relative(other, edits[0]) for other in edits[1:]) < 1e-9
    with pytest.raises(ValueError, match="text_embeds and time_ids"):
        invert(denoiser, random_latents(2), random_text(0), steps=1)


@pytest.mark.parametrize("key_frames", [("self",), ("self", "middle"), ("first", "last"), ("middle",)])
def test_chunks_give_the_whole_clips_result(denoiser, tokenizer, key_frames):
    latents, whole = random_latents(3), None
    for chunk, memory in ((None, "recompute"), (1, "queries_keys"), (2, "recompute"), (2, "queries_keys"), (2, "maps")):
        inversion = invert(
            denoiser, latents, random_text(0), 3, key_frames=key_frames, memory=memory, chunk_frames=chunk
        )
        edited = edit(
            denoiser, inversion, random_text(1), random_text(2), prompt=replace_edit(tokenizer),
            fusion=BLENDED, chunk_frames=chunk,
        )  # fmt: skip
        whole = edited if whole is None else whole
        assert relative(edited, whole) < 1e-9


@pytest.mark.parametrize(("key_frames", "clip_norm"), [(("previous", "first"), False), (("self", "middle"), True)])
def test_other_key_frames_use_overlapping_chunks_and_approximate(denoiser, tokenizer, key_frames, clip_norm):
    """Frames that change slowly, as in a video."""
    latents = random_latents(1) + 0.02 * random_latents(7).cumsum(0)

    def edited(chunk):
        inversion = invert(denoiser, latents, random_text(0), 3, key_frames, clip_norm, chunk_frames=chunk)
        prompt = replace_edit(tokenizer)
        return edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, chunk_frames=chunk)

    whole = edited(None)
    single = edit(
        denoiser, invert(denoiser, latents, random_text(0), 3, "self"), random_text(1), random_text(2), 7.5,
        replace_edit(tokenizer),
    )  # fmt: skip
    error = relative(edited(5), whole)
    assert 0 < error < 0.5 * relative(single, whole)


@pytest.mark.parametrize("memory", ["queries_keys", "maps"])
@pytest.mark.parametrize(("key_frames", "clip_norm"), [(("first", "previous"), False), (("self",), True)])
def test_attention_between_frames_is_stored_only_for_the_whole_clip(denoiser, tokenizer, memory, key_frames, clip_norm):
    """Each chunk has its own attention, but a store keeps one."""
    latents, refused = random_latents(5), f'memory "{memory}" stores one attention per frame'

    def inverted(memory, chunk):
        return invert(denoiser, latents, random_text(0), 2, key_frames, clip_norm, memory, chunk)

    with pytest.raises(ValueError, match=refused):
        inverted(memory, 3)
    assert inverted("auto", 3).store.memory == "recompute"
    assert inverted("auto", None).store.memory == "queries_keys"
    prompt = replace_edit(tokenizer)
    with pytest.raises(ValueError, match=refused):
        edit(denoiser, inverted(memory, None), random_text(1), random_text(2), 7.5, prompt, BLENDED, chunk_frames=3)


def test_a_chunk_too_short_is_refused(denoiser):
    with pytest.raises(ValueError, match=r"chunk_frames is 0; it must be at least 1"):
        invert(denoiser, random_latents(4), random_text(0), 1, chunk_frames=0)
    with pytest.raises(ValueError, match=r"chunk_frames is 1; .*at least 2"):
        invert(denoiser, random_latents(4), random_text(0), 1, key_frames=("previous",), chunk_frames=1)


def test_noise_independent_of_the_latent_is_replayed_exactly(unet, denoiser):
    torch.nn.init.zeros_(unet.conv_out.weight)
    latents = random_latents(2)
    inversion = invert(denoiser, latents, random_text(0), steps=20)
    assert torch.equal(inversion.latents[0], latents)
    assert inversion.latents.shape == (21, *latents.shape)
    replay = edit(denoiser, inversion, random_text(0), guidance_scale=1)
    assert relative(replay, latents) < 1e-6, "coefficients are the schedulers, in single precision"


def test_a_still_clip_stays_still(denoiser, tokenizer):
    still = random_latents(1).expand(4, -1, -1, -1)
    edited = run(denoiser, tokenizer, still)
    assert relative(edited[1:], edited[:1].expand(3, -1, -1, -1)) < 1e-12


def test_fusion_of_no_steps_is_plain_ddim(denoiser, tokenizer):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=3)
    arguments = (random_text(1), random_text(2), 7.5)
    plain = edit(denoiser, inversion, *arguments)
    assert torch.equal(edit(denoiser, inversion, *arguments, replace_edit(tokenizer), FusionSettings(0, 0)), plain)
    fused = edit(denoiser, inversion, *arguments, replace_edit(tokenizer), FusionSettings(1, 1))
    assert relative(fused, plain) > 1e-3


def test_an_empty_mask_keeps_the_sources_latents_and_a_full_one_the_edits(denoiser, tokenizer):
    """Blended self-attention at threshold 0 is no self fusion; at 1 it is all of it."""
    inversion = invert(denoiser, random_latents(), random_text(0), steps=3)
    arguments = (random_text(1), random_text(2), 7.5, replace_edit(tokenizer))

    def blended(threshold):
        return edit(
            denoiser, inversion, *arguments,
            FusionSettings(0.5, 1.0, blend_self_attention=True, blend_threshold=threshold),
        )  # fmt: skip

    assert relative(blended(0.0), edit(denoiser, inversion, *arguments, FusionSettings(0.5, 0.0))) < 1e-9
    assert relative(blended(1.0), edit(denoiser, inversion, *arguments, FusionSettings(0.5, 1.0))) < 1e-9


@pytest.mark.parametrize(("blends", "noisier"), [(True, 0), ("authors", 1)])
def test_outside_an_empty_mask_blended_latents_equal_the_inversion(denoiser, tokenizer, monkeypatch, blends, noisier):
    """At the matching level, or at the noisier one of the authors' index."""

    moved = []
    move = EditRun.move
    monkeypatch.setattr(EditRun, "move", lambda *given: moved.append(move(*given)) or moved[-1])
    inversion = invert(denoiser, random_latents(), random_text(0), steps=5)
    fusion = FusionSettings(0.5, 0.5, blend_latents=blends, blend_threshold=1.0)
    edit(denoiser, inversion, random_text(1), random_text(2), 7.5, replace_edit(tokenizer), fusion)
    for step in fusion.latent_steps(5):
        assert torch.equal(moved[step], inversion.latents[5 - step - 1 + noisier])
    assert not torch.equal(moved[0], inversion.latents[4])


def test_latents_blended_as_the_authors_do_in_chunks(denoiser, tokenizer):
    """The sum of a frame's maps does not depend on the chunks."""
    fusion = replace(BLENDED, blend_latents="authors")
    whole, chunks = (run(denoiser, tokenizer, random_latents(5), fusion=fusion, chunk_frames=n) for n in (None, 2))
    assert relative(chunks, whole) < 1e-9
    assert relative(whole, run(denoiser, tokenizer, random_latents(5))) > 1e-3
    with pytest.raises(ValueError, match="blend_latents"):
        FusionSettings(blend_latents="paper")


def test_reweighting_a_word_by_one_changes_nothing_and_by_ten_something(denoiser, tokenizer):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=3)

    def weighted(weight):
        prompt = replace_edit(tokenizer, reweight={"blue": weight})
        return edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt)

    plain = edit(denoiser, inversion, random_text(1), random_text(2), 7.5, replace_edit(tokenizer))
    assert torch.equal(weighted(1.0), plain)
    assert relative(weighted(10.0), plain) > 1e-4


def test_prompts_of_two_blocks(denoiser, tokenizer):
    long = TARGET + " and a red star" * 30
    inversion = invert(denoiser, random_latents(2), random_text(0), steps=2)
    prompt = PromptEdit(SOURCE, long, tokenizer)
    edited = edit(denoiser, inversion, random_text(1, 154), random_text(2), prompt=prompt)
    assert edited.isfinite().all()


def test_unet_calls_match_the_estimate(denoiser, tokenizer):
    calls = []
    counted = denoiser.unet.register_forward_hook(lambda *_: calls.append(1))
    for fusion, memory in ((BLENDED, "recompute"), (BLENDED, "queries_keys"), (FusionSettings(0.2, 0.4), "recompute")):
        calls.clear()
        run(denoiser, tokenizer, random_latents(1), memory, fusion)
        assert len(calls) == sum(Recipe(injection=fusion).calls(5, 0 if memory == "recompute" else 5))
    counted.remove()


def test_the_last_steps_can_leave_out_guidance(denoiser, tokenizer):
    """They have no negative prompt's call, and their results are those of guidance 1."""
    inversion, calls = invert(denoiser, random_latents(1), random_text(0), 5), list[int]()

    def after(steps, **guidance):
        one = Edit(random_text(1), random_text(2), prompt=replace_edit(tokenizer), fusion=BLENDED, **guidance)
        with EditPass(denoiser, inversion, [one]) as run:
            zs = run.start
            for step in range(steps):
                zs = run.move(zs, step, run.predict(zs, step))
        return zs[0]

    assert torch.equal(after(2, guidance_until=0.4), after(2))
    assert relative(after(3, guidance_until=0.4), after(3)) > 1e-3
    assert torch.equal(after(5, guidance_until=0.0), after(5, guidance_scale=1.0))
    counted = denoiser.unet.register_forward_hook(lambda *_: calls.append(1))
    run(denoiser, tokenizer, random_latents(1), "recompute", BLENDED, guidance_until=0.4)
    counted.remove()
    assert len(calls) == sum(Recipe(injection=BLENDED, guidance_until=0.4).calls(5))


def test_heat_of_the_source_words_is_a_share_of_attention(denoiser, tokenizer):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=2)
    heat = source_heat(denoiser, inversion, replace_edit(tokenizer), step=1)
    assert heat.shape == (3, 16, 16)
    assert (heat > 0).all()
    assert (heat < 1).all()


# --- bad input --------------------------------------------------------------------------


def test_a_store_of_another_model_is_refused(denoiser, scheduler):
    inversion = invert(denoiser, random_latents(1), random_text(0), steps=1)
    for other in (small_unet(seed=7), small_unet(block_out_channels=(8, 8))):
        with pytest.raises(StoreError, match="another model"):
            edit(DiffusersDenoiser(other, scheduler), inversion, random_text(1), guidance_scale=1)


def test_a_store_of_another_schedule_is_refused(unet, denoiser):
    from diffusers import DDIMScheduler

    inversion = invert(denoiser, random_latents(1), random_text(0), steps=2)
    for change in ({"beta_end": 0.02}, {"steps_offset": 0}):
        other = DDIMScheduler.from_config(denoiser.scheduler.config, **change)
        with pytest.raises(StoreError, match="another schedule"):
            edit(DiffusersDenoiser(unet, other), inversion, random_text(1), guidance_scale=1)


def test_a_store_of_another_prompt_is_refused(denoiser, tokenizer):
    inversion = invert(denoiser, random_latents(1), random_text(0), steps=1, prompt="a red star on sand")
    with pytest.raises(StoreError, match="a red star on sand"):
        edit(denoiser, inversion, random_text(1), random_text(2), prompt=replace_edit(tokenizer))


@pytest.mark.parametrize(
    ("latents", "text", "message"),
    [
        (torch.zeros(4, 16, 16), random_text(0), r"latents has shape \(4, 16, 16\)"),
        (torch.zeros(0, 4, 16, 16), random_text(0), "at least one frame"),
        (torch.zeros(1, 9, 16, 16), random_text(0), "9 channels; this UNet takes 4"),
        (torch.zeros(1, 4, 16, 16), torch.zeros(1, 77, 5), "5 wide; this UNet takes 16"),
        (torch.zeros(1, 4, 16, 16), torch.zeros(2, 77, 16), "source_embeddings has shape"),
    ],
)
def test_wrong_shapes_are_refused(denoiser, latents, text, message):
    with pytest.raises(ValueError, match=message):
        invert(denoiser, latents.double(), text.double(), steps=1)


def test_options_that_need_each_other(denoiser, tokenizer):
    inversion = invert(denoiser, random_latents(1), random_text(0), steps=1)
    with pytest.raises(ValueError, match="needs negative_embeddings"):
        edit(denoiser, inversion, random_text(1))
    with pytest.raises(ValueError, match="blend_words"):
        edit(denoiser, inversion, random_text(1), random_text(2), fusion=FusionSettings(blend_latents=True))
    with pytest.raises(ValueError, match="blend_words"):
        prompt = PromptEdit(SOURCE, TARGET, tokenizer)
        fusion = FusionSettings(blend_self_attention=True)
        edit(denoiser, inversion, random_text(1), random_text(2), prompt=prompt, fusion=fusion)
