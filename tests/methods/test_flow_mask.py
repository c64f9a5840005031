"""The mask from predictions for both prompts."""

import pytest
import torch

from fatezero import Edit, Recipe, draw, edit_many, invert
from fatezero.attention.masks import GivenMask
from fatezero.diffusion.edit import EditPass
from fatezero.methods.flow_mask import FlowMaskSettings, mask_from, otsu
from small import random_latents, random_text

SETTINGS = FlowMaskSettings(0.6, grow=0, still=0)


def edited(denoiser, start, settings, mask=None):
    one = Edit(random_text(1), random_text(2), 3.0, fusion=settings, mask=mask)
    return edit_many(denoiser, start, [one])[0]


@pytest.fixture(params=["inverted", "drawn"])
def start(request, denoiser):
    clip, text = random_latents(3), random_text(0)
    return invert(denoiser, clip, text, 3) if request.param == "inverted" else draw(denoiser, clip, text, 3)


def test_otsus_threshold_separates_two_classes():
    values = torch.cat([0.2 + 0.05 * torch.randn(900), 0.8 + 0.05 * torch.randn(100)]).clamp(0, 1)
    assert 0.35 < otsu(values) < 0.65
    exact = torch.tensor([0.1] * 5 + [0.9] * 5)
    assert 0.1 < otsu(exact) < 0.9


def test_the_mask_is_smoothed_over_time_and_grown():
    heat = torch.zeros(5, 8, 8)
    heat[2, 4, 4] = 1.0
    assert mask_from(heat, FlowMaskSettings(0.5, grow=0, still=0)).sum() == 1
    assert mask_from(heat, FlowMaskSettings(0.5, grow=1, still=0)).sum() == 9
    calm = mask_from(heat, FlowMaskSettings(0.3, grow=0, still=1))
    assert calm[:, 4, 4].tolist() == [0, 1, 1, 1, 0]


def test_the_clip_is_preserved_where_the_predictions_agree(denoiser, start):
    with EditPass(denoiser, start, [Edit(random_text(1), random_text(2), 3.0, fusion=SETTINGS)]) as run:
        mask = run._runs[0].injected._inside
    assert mask.shape == (3, 1, *start.store.levels.shape[-2:]) and 0 < mask.mean() < 1
    found, clip = edited(denoiser, start, SETTINGS), start.store.level(0)
    kept = (mask == 0).expand_as(clip)
    assert torch.equal(found[kept], clip[kept])
    assert (found - clip)[~kept].abs().min() > 0


def test_the_same_prompt_changes_nothing(denoiser, start):
    one = Edit(random_text(0), random_text(2), 3.0, fusion=FlowMaskSettings(grow=0))
    (found,) = edit_many(denoiser, start, [one])
    assert torch.equal(found, start.store.level(0))


@pytest.mark.parametrize(
    ("how", "within"), [("replace", False), ("union", False), ("intersection", False), ("replace", True)]
)
def test_a_given_mask_replaces_extends_or_limits_it(denoiser, start, how, within):
    height, width = start.store.levels.shape[-2:]
    left = torch.zeros(1, height, width)
    left[..., : width // 2] = 1
    given = GivenMask(left, how)
    settings = SETTINGS.inside() if within else SETTINGS

    def inside(mask, settings):
        with EditPass(denoiser, start, [Edit(random_text(1), random_text(2), 3.0, fusion=settings, mask=mask)]) as run:
            return run._runs[0].injected._inside[:, 0]

    single, both = inside(None, SETTINGS), inside(given, settings)
    own = left.expand_as(single).to(single)
    expected = {"replace": own, "union": torch.maximum(own, single), "intersection": own * single}
    assert torch.equal(both, own * single if within else expected[how])


def test_calls_are_counted():
    recipe = Recipe.of_preset("flow_mask")
    assert recipe.calls(10)[1:] == (2 * 7, 2 * 7, 8)
