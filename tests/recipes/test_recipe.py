"""One recipe for all doors: a preset means the same in a configuration and in Python, and is checked before it runs."""

from dataclasses import replace

import pytest
import torch

from fatezero import PRESETS, FlowEditSettings, FusionSettings, PnPSettings, Recipe, edit, invert
from fatezero.attention.masks import GivenMask
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.methods import METHODS
from small import random_latents, random_text

SOURCE, TARGET = "a red square on water", "a green square on water"
MASK = GivenMask(torch.ones(1, 8, 8))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_same_in_a_configuration(preset):
    config = with_preset(EditConfig(source=SOURCE, target=TARGET), preset)
    ours, theirs = Recipe.of_preset(preset, SOURCE, TARGET), config.recipe()
    for name in ("injection", "propagation", "noise", "guidance_scale", "strength", "mode", "smoothing"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("key_frames", "clip_norm"):
        assert getattr(ours, name) in (None, getattr(theirs, name)), name


def test_every_method_declares_itself_once():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names) and names[0] == "fatezero"
    assert set(PRESETS) == {preset for method in METHODS for preset in method.presets}
    ids = [method.node_id for method in METHODS]
    assert len(set(ids)) == len(ids)
    for method in METHODS:
        assert method.title and method.paper and method.sentence.endswith(".")
        assert isinstance(method.settings(), method.settings)


@pytest.mark.parametrize(
    ("recipe", "spans_clip", "error"),
    [
        (Recipe(injection=PnPSettings()), True, "Plug-and-Play needs a UNet"),
        (Recipe(clip_norm=True), True, "clip_norm"),
        (Recipe.of_preset("tokenflow"), True, "needs a UNet"),
        (Recipe.of_preset("kv_edit"), False, "edit mask"),
        (Recipe(injection=FusionSettings(), mask=MASK), False, "blend_self_attention or blend_latents"),
        (Recipe.of({"noise": "drawn", "injection": "none", "propagation": "tokenflow"}), False, "needs an inversion"),
    ],
)
def test_parts_that_do_not_fit_are_refused_without_a_model(recipe, spans_clip, error, tokenizer):
    recipe = Recipe(**{**vars(recipe), "source": SOURCE, "target": TARGET})
    with pytest.raises(ValueError, match=error):
        recipe.check(spans_clip, recipe.pair(tokenizer))


def test_a_prompt_pair_selects_fatezeros_fusion(denoiser, tokenizer):
    inversion = invert(denoiser, random_latents(2), random_text(0), 3)
    pair = Recipe(SOURCE, TARGET, injection=FusionSettings()).pair(tokenizer)
    by_pair = edit(denoiser, inversion, random_text(1), random_text(2), prompt=pair)
    by_name = edit(denoiser, inversion, random_text(1), random_text(2), prompt=pair, fusion=FusionSettings())
    assert torch.equal(by_pair, by_name)


def test_calls_count_the_noises_of_flow_edit():
    recipe = Recipe(noise=FlowEditSettings(draws=3), guidance_scale=5.0, strength=0.5)
    assert recipe.calls(10) == (0, 3 * 2 * 5, 3 * 2 * 5, 0)
    recipe = Recipe(noise=FlowEditSettings(draws=3, n_min=2), guidance_scale=5.0, strength=0.5)
    assert recipe.calls(10) == (0, 3 * 2 * 3 + 2 * 2, 3 * 2 * 3, 0)
    fused = replace(recipe, injection=FusionSettings(cross_replace_steps=1.0, self_replace_steps=1.0))
    assert fused.calls(10) == (0, 3 * 2 * 3 + 2 * 2, 3 * 2 * 3 + 2, 0)
