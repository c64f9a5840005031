"""Attention control of LTX-2 on diffusers: the plain model, memories, masks, equal prompts, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fatezero import FusionSettings, PromptEdit, Windows, edit, invert
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.methods.kv_edit import KVEditSettings
from fatezero.recipes.recipe import Recipe
from fatezero.store.records import PairedBranch, Recorder
from tests.flow_models import LTX23, write_ltx2
from tests.small import in_thread, relative

SOURCE, TARGET, NEGATIVE = "a red square on water", "a bright green circle on water", "blue"
FRAMES, HEIGHT, WIDTH, STEPS = 3, 4, 6, 4


class Everyone(Control):
    """The model's own attention, computed by a control."""


def everyone(frames=FRAMES):
    return Everyone(KeyFrames(("all",)), Chunk.whole(frames))


@pytest.fixture(scope="module", params=[{}, LTX23], ids=["2", "2.3"])
def model(request, tmp_path_factory):
    found = open_model(str(write_ltx2(tmp_path_factory.mktemp("ltx2"), **request.param)))
    found.transformer.double()
    return found.for_clip(ClipFacts((FRAMES, 8, HEIGHT, WIDTH), 8.0))


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(FRAMES, 8, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def prompt(model):
    return PromptEdit(SOURCE, TARGET, model.tokenizer)


@pytest.fixture(scope="module")
def text(model):
    return {name: model.encode_prompt(name, 192, 128) for name in (SOURCE, TARGET, NEGATIVE, "a " * 400)}


@pytest.fixture(scope="module")
def inversion(model, latents, text):
    return invert(model.denoiser, latents, text[SOURCE], STEPS)


@pytest.fixture
def edited(model, inversion, text, prompt):
    def run(fusion, mask=None, of=inversion, guidance=5.0, **more):
        given = None if mask is None else GivenMask(torch.as_tensor(mask))
        matches = prompt if isinstance(fusion, FusionSettings) else None
        return edit(model.denoiser, of, text[TARGET], text[NEGATIVE], guidance, matches, fusion, mask=given, **more)

    return run


def fused(**more):
    return FusionSettings(cross_replace_steps=0.0, self_replace_steps=1.0, **more)


def test_a_control_computes_the_models_attention(model, latents, text):
    """Alone, and for several branches in any order; other threads get the plain model."""
    denoiser = model.denoiser
    prompts = (TARGET, NEGATIVE, SOURCE, "a " * 400)
    plain = {name: model.velocity(latents, 700.0, text[name].to(latents), range(FRAMES)) for name in prompts}
    with denoiser.hooked():
        for order in (prompts, prompts[::-1]):
            found = denoiser.predicted([(latents, text[name], everyone()) for name in order], 700.0)
            for name, velocity in zip(order, found, strict=True):
                assert relative(velocity, plain[name]) < 1e-6
        other = in_thread(lambda: model.velocity(latents, 700.0, text[TARGET].to(latents), range(FRAMES)))
    assert torch.equal(other, plain[TARGET])
    again = model.velocity(latents, 700.0, text[TARGET].to(latents), range(FRAMES))
    assert torch.equal(again, plain[TARGET]), "the model is restored"


def test_a_paired_source_predicts_as_alone_and_is_forgotten(model, latents, text):
    denoiser, keys, chunk = model.denoiser, KeyFrames(("all",)), Chunk.whole(FRAMES)
    recorder = Recorder(keys, chunk, {site.name for site in denoiser.sites(HEIGHT, WIDTH)})
    with denoiser.hooked():
        alone = denoiser.predict_noise(latents, 500.0, text[SOURCE], everyone())
        pair = PairedBranch(latents, text[SOURCE], recorder)
        denoiser.predict_noise(latents, 500.0, text[TARGET], everyone(), paired=pair)
    assert relative(recorder.captured.prediction, alone) < 1e-6
    assert not recorder.records


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "fusion",
    [
        FusionSettings(0.7, 0.6),
        FusionSettings(0.7, 0.6, blend_self_attention=True, blend_latents=True, mask_from="prompts"),
    ],
)
def test_the_memories_agree(model, latents, text, edited, fusion, order):
    results = [
        edited(fusion, of=invert(model.denoiser, latents, text[SOURCE], STEPS, memory=memory, order=order))
        for memory in ("recompute", "queries_keys", "maps")
    ]
    assert relative(results[1], results[0]) < 1e-6
    assert relative(results[2], results[0]) < 1e-6


def test_a_mask_of_ones_keeps_the_edits_attention_and_of_zeros_the_sources(edited):
    ones, zeros = torch.ones(1, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH)
    full = edited(fused(blend_self_attention=True), ones)
    assert relative(full, edited(FusionSettings(0.0, 0.0))) < 1e-6
    none = edited(fused(blend_self_attention=True), zeros)
    assert relative(none, edited(fused())) < 1e-6
    assert relative(none, full) > 1e-3


def test_no_share_of_steps_is_no_fusion(edited):
    assert torch.equal(edited(FusionSettings(0.0, 0.0)), edited(None))
    assert relative(edited(FusionSettings(1.0, 0.0)), edited(None)) > 1e-3


def test_kept_latents_outside_a_mask_are_the_clips(edited, latents):
    half = torch.zeros(1, HEIGHT, WIDTH)
    half[..., : WIDTH // 2] = 1
    for fusion in (fused(blend_self_attention=True, blend_latents=True, blend_latents_until=1.0), KVEditSettings()):
        found = edited(fusion, half)
        assert torch.equal(found[..., WIDTH // 2 :], latents[..., WIDTH // 2 :])
        assert relative(found[..., : WIDTH // 2], latents[..., : WIDTH // 2]) > 1e-2


def test_equal_prompts_replay_the_inversion(model, latents, text):
    """The fused edit is the inversion's replay: attention of the same prompt at the same latents is the source's."""
    same = PromptEdit(SOURCE, SOURCE, model.tokenizer)
    away = []
    for steps in (4, 16):
        inversion = invert(model.denoiser, latents, text[SOURCE], steps, order=2)
        fusion = FusionSettings(1.0, 1.0)
        found = edit(model.denoiser, inversion, text[SOURCE], guidance_scale=1.0, prompt=same, fusion=fusion)
        away.append(relative(found, latents))
    assert away[1] < 0.1 * away[0] < 0.1, "of second order in the step"


def test_chunks_of_an_odd_number_of_frames(edited, latents):
    assert edited(FusionSettings(0.7, 0.6), chunk_frames=2).shape == latents.shape


@pytest.mark.parametrize("preset", ["style", "style+", "attribute+", "shape+"])
def test_presets_without_words_run(model, inversion, text, preset, latents):
    recipe = Recipe.of_preset(preset, SOURCE, TARGET)
    pair = recipe.pair(model.tokenizer)
    assert pair is not None
    assert pair.blend_words is None
    found = edit(model.denoiser, inversion, text[TARGET], text[NEGATIVE], 5.0, pair, recipe.injection)
    assert relative(found, latents) > 1e-3


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"reweight": {"green": 2.0}}, "reweight: "),
        ({"blend_source": ("square",)}, "blend_source: "),
        ({"injection": FusionSettings(blend_self_attention=True)}, "mask_from attention: "),
        ({"injection": FusionSettings(cross_replace_words={"green": 0.2})}, "cross_replace_words: "),
    ],
)
def test_settings_of_single_words_are_refused(model, more, error):
    recipe = Recipe.of_preset("style", SOURCE, TARGET)
    with pytest.raises(ValueError, match=f"{error}.*mixes words"):
        replace(recipe, **more).pair(model.tokenizer)


def test_words_are_aligned_by_their_own_columns(model):
    """Gemma has other tokens without a space before a word. Registers are aligned by their column."""
    pair = PromptEdit("red car, by night", "a red car by night", model.tokenizer)
    columns = {word: 1 + start for word, start in (("red", 0), ("car,", 4))}
    words = pair.word_tokens("red car, by night")
    assert [len(word) for word in words] == [3, 5, 3, 6], "one token for each letter, and one for a space"
    alignment = pair.align(1024, 1024)
    assert alignment.matrix[0, 0] == alignment.matrix[1023, 1023] == 1
    assert alignment.matrix[columns["red"], 1 + 2] > 0, "red, behind 'a '"
    assert alignment.copied[1] == 0, "the new word"
    with pytest.raises(ValueError, match="mixes words"):
        pair.token_indices("red car, by night", "car", 1024)


def test_text_without_registers_is_refused(model, latents, text):
    mask = text[TARGET].extras["mask"].clone()
    mask[:, 9:] = 0
    padded = replace(text[TARGET], extras={**text[TARGET].extras, "mask": mask})
    with model.denoiser.hooked(), pytest.raises(ValueError, match="learned registers"):
        model.denoiser.predict_noise(latents, 500.0, padded, everyone())


@pytest.mark.slow
def test_longer_clips_than_those_of_training_run_in_windows(model, text):
    def of(frames):
        latents = torch.randn(frames, 8, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return invert(model.for_clip(ClipFacts(latents.shape, 8.0)).denoiser, latents, text[SOURCE], 1).store

    assert of(33).windows is None
    assert of(35).windows == Windows(33, 16)


def test_the_schedule_is_that_of_a_window(model):
    """Shifted by the tokens of a call, however long the clip is."""

    def of(frames):
        return model.for_clip(ClipFacts((frames, 8, 24, 24), 8.0)).denoiser.schedule(4)

    assert of(9).alphas.tolist() != of(33).alphas.tolist() == of(97).alphas.tolist()


def test_memory_at_full_size():
    """Of a guided step at 121 frames of 1280x704 in bfloat16, from shapes, with the weights of all 48 blocks."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from ltx2 import meta_model, peaks, weight_bytes

    model, blocks = meta_model(num_layers=3), 48
    of_block = weight_bytes(model.transformer.transformer_blocks[0])
    weights, found = weight_bytes(model.transformer) + (blocks - 3) * of_block, peaks(model)
    assert 1 < (weights + found["beside"]) / (weights + found["plain"]) < 1.05
