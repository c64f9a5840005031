"""Recordings of an edit: attention to words, and masks."""

import pytest
import torch

from fatezero import (
    EditMaps,
    FlowEditSettings,
    FusionSettings,
    PnPSettings,
    PromptEdit,
    TokenFlowSettings,
    draw,
    edit,
    invert,
)
from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import Chunk
from fatezero.attention.masks import GivenMask, threshold_mask, token_heat
from fatezero.demo.scenes import SIZE, render
from fatezero.demo.show import MOTION, SCENE
from fatezero.diffusion.edit import EditPass
from fatezero.diffusion.parts import Edit
from fatezero.diffusion.source import source_heat
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.recipes.recipe import Recipe
from fatezero.store.records import Recorder
from small import random_latents, random_text

FRAMES, STEPS = 3, 4
SHAPE = FusionSettings(0.5, 0.5, blend_self_attention=True)
BOTH = FusionSettings(0.5, 0.5, blend_self_attention=True, blend_latents=True, blend_latents_until=1)
PNP = {"fusion": PnPSettings(), "propagation": TokenFlowSettings(batch_frames=2)}


@pytest.fixture
def prompt(tokenizer):
    return PromptEdit("a red circle", "a blue square", tokenizer, blend_words=(["circle"], ["square"]))


@pytest.fixture
def start(denoiser):
    return invert(denoiser, random_latents(FRAMES), random_text(0), STEPS)


def edited(denoiser, start, **parts):
    return edit(denoiser, start, random_text(1), random_text(2), 3.0, **parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"fusion": SHAPE},
        {"fusion": BOTH, "strength": 0.5},
        {"fusion": FusionSettings(blend_latents="authors"), "chunk_frames": 2},
        {"fusion": FusionSettings(blend_self_attention=True, mask_from="prompts"), "sdedit_seed": 3},
        PNP,
    ],
)  # fmt: skip
def test_recording_does_not_change_the_edit(denoiser, start, prompt, parts):
    prompts = {"prompt": prompt} if isinstance(parts["fusion"], FusionSettings) else {}
    maps = EditMaps.of(prompt)
    before = edited(denoiser, start, **parts, **prompts)
    assert torch.equal(edited(denoiser, start, **parts, **prompts, maps=maps), before)
    heats, steps = maps.heats(), STEPS // 2 if "strength" in parts else STEPS
    assert list(heats["source"]) == ["a", "red", "circle"] and list(heats["target"]) == ["a", "blue", "square"]
    assert heats["target"]["blue"].shape == (steps, FRAMES, 16, 16) and heats["source"]["red"].shape[0] == STEPS
    blends = bool(prompts) and parts["fusion"].blends
    assert bool(maps.masks()) == blends


def test_sampled_noise_is_recorded_too(denoiser):
    start = draw(denoiser, random_latents(FRAMES), random_text(0), STEPS, FlowEditSettings(draws=2))
    maps = EditMaps({"circle": [3]}, {"square": [3]})
    given = GivenMask(torch.eye(16)[None])
    found = edited(denoiser, start, mask=given, maps=maps)
    assert torch.equal(found, edited(denoiser, start, mask=given))
    assert torch.equal(maps.masks()["latents"], torch.eye(16).expand(STEPS, FRAMES, 16, 16))
    assert maps.heats()["target"]["square"].shape == (STEPS, FRAMES, 16, 16)


def test_heats_equal_the_maps_of_the_calls(denoiser, start):
    """The mean over heads and layers of the finest grid of at most 256 tokens, in the first step of a plain edit."""
    maps = EditMaps({"circle": [3, 4]}, {"square": [5]})
    edited(denoiser, start, maps=maps)
    layers = {site.name for site in denoiser.sites(16, 16) if site.kind == "cross"}
    schedule = denoiser.schedule(STEPS)
    for words, text, level, own in (("target", 1, STEPS, [5]), ("source", 0, STEPS - 1, [3, 4])):
        recorder = Recorder(start.store.key_frames, Chunk.whole(FRAMES), layers)
        with torch.no_grad(), denoiser.hooked(start.store.clip_norm):
            z = start.store.level(level)
            denoiser.predict_noise(z, schedule.timesteps[0], Condition.of(random_text(text), "text"), recorder)
        sites = [site for site in denoiser.sites(16, 16) if site.name in layers and site.tokens == 256]
        expected = token_heat(recorder.step.maps(sites, torch.float64))[:, own].sum(1)
        (found,) = maps.heats()[words].values()
        assert (found[0] - expected).abs().max() < 1e-6


def test_masks_equal_those_of_the_edit(denoiser, start, prompt):
    maps = EditMaps.of(prompt)
    edited(denoiser, start, fusion=BOTH, prompt=prompt, maps=maps)
    masks = maps.masks()
    assert masks["attention"].shape == (2, FRAMES, 16, 16), "self-attention is fused in half of the steps"
    for step, mask in enumerate(masks["attention"]):
        heat = source_heat(denoiser, start, prompt, step)
        assert torch.equal(mask, threshold_mask(heat, (16, 16), 0.3).float())
    assert len(masks["latents"]) == STEPS and bool((masks["latents"][:2] >= masks["attention"]).all())
    with EditPass(denoiser, start, [Edit(random_text(1), random_text(2), 3.0, prompt, BOTH)]) as run:
        (prediction,) = run.predict(run.start, 0)
    assert torch.equal(masks["latents"][0], prediction.mask[:, 0].float())


def test_chunks_record_the_same_as_the_whole_clip(denoiser, start, prompt):
    whole, parts = EditMaps.of(prompt), EditMaps.of(prompt)
    edited(denoiser, start, fusion=SHAPE, prompt=prompt, maps=whole)
    edited(denoiser, start, fusion=SHAPE, prompt=prompt, maps=parts, chunk_frames=2)
    for name, heats in whole.heats().items():
        assert all((heat - parts.heats()[name][word]).abs().max() < 1e-5 for word, heat in heats.items())
    assert torch.equal(whole.masks()["attention"], parts.masks()["attention"])


def test_attention_to_a_word_is_on_its_object():
    """On a scene of the demo world with a known object mask."""
    clip, model, frames = render(SCENE, MOTION, 8), Checkpoint.load("demo"), [0, 4]
    recipe = Recipe.of_preset("shape", SCENE.caption, "a red circle on water")
    texts = [model.encode_prompt(text, SIZE, SIZE) for text in (SCENE.caption, recipe.target, "")]
    latents = model.encode_clip(clip.frames[frames])
    start = invert(model.denoiser, latents, texts[0], 6, key_frames=("middle",), prompt=SCENE.caption)
    pair = recipe.pair(model.tokenizer)
    maps = EditMaps.of(pair)
    edit(model.denoiser, start, texts[1], texts[2], 5.0, pair, recipe.injection, maps=maps)
    size = maps.heats()["source"]["square"].shape[-2:]
    inside = torch.nn.functional.interpolate(clip.mask[frames][:, None], size=size, mode="area")[:, 0] > 0.5
    for prompt, word in (("source", "square"), ("target", "circle")):
        heat = maps.heats()[prompt][word].mean(0)
        assert heat[inside].mean() > 2 * heat[~inside].mean(), word
    mask = maps.masks()["attention"].mean(0)
    assert mask[inside].mean() > 0.95 > 0.6 > mask[~inside].mean()


def test_a_coarsest_grid_above_the_limit_is_used(denoiser):
    """If even the coarsest grid has more than 256 tokens, it is used."""
    start = invert(denoiser, random_latents(1, 48, 48), random_text(0), 1)
    maps = EditMaps({"circle": [3]}, {"square": [3]})
    edited(denoiser, start, maps=maps)
    assert maps.heats()["target"]["square"].shape[-1] in (24, 48)
