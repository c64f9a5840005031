"""The mask of differences between two prompts' predictions (DiffEdit), and latents blended to the last step."""

import pytest
import torch

from fatezero import FusionSettings, PromptEdit, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import Chunk
from fatezero.attention.masks import GivenMask, mask_sites, soft_mask
from fatezero.diffusion.prompt_mask import difference_levels, prompt_heat
from fatezero.recipes.recipe import Recipe
from small import random_latents, random_text, relative

SOURCE, TARGET = "a red circle on sand", "a blue square on sand"
PROMPTS = {"mask_from": "prompts", "blend_latents": True, "blend_latents_until": 1.0}


@pytest.fixture
def prompt(tokenizer):
    return PromptEdit(SOURCE, TARGET, tokenizer)


@pytest.fixture
def worded(tokenizer):
    return PromptEdit(SOURCE, TARGET, tokenizer, blend_words=(["circle"], ["blue", "square"]))


def test_a_soft_mask_ramps_from_half_the_threshold_to_one_and_a_half():
    heat = torch.zeros(2, 9, 9)
    heat[0, 3:6, 3:6] = 1.0
    heat[1] = torch.arange(9.0)
    mask = soft_mask(heat, 0.5)
    assert mask[0, 4, 4] == 1 and mask[0, 0, 0] == 0
    assert mask[0, 3, 3] == pytest.approx(4 / 9 / 0.5 - 0.5), "a corner, of whose nine cells four are hot"
    assert mask[0, 2, 4] == pytest.approx(3 / 9 / 0.5 - 0.5)
    assert torch.allclose(soft_mask(7 * heat, 0.5), mask), "each frame's heat is divided by its maximum"
    assert (soft_mask(heat, 0.0) == 1).all()
    assert (soft_mask(torch.zeros(1, 4, 4), 0.5) == 0).all()


def heat(denoiser, columns, text=1, levels=5):
    store = invert(denoiser, random_latents(), random_text(0), steps=levels).store
    sites = mask_sites(denoiser.sites(16, 16), 256)
    with denoiser.hooked():
        chunks = [[Chunk.whole(3)]] * levels
        return prompt_heat(denoiser, store, Condition(random_text(text)), columns, sites, chunks).edit


def test_without_words_it_is_the_difference_of_predictions(denoiser):
    difference = heat(denoiser, ([], []))
    assert difference.shape == (3, 16, 16)
    assert torch.allclose(difference.amax((1, 2)), torch.ones(3, dtype=torch.float64))
    assert (heat(denoiser, ([], []), text=0) == 0).all(), "equal prompts have no difference"


def test_words_of_either_prompt_are_used(denoiser):
    difference = heat(denoiser, ([], []))
    of_source, of_target, of_both = (heat(denoiser, c) for c in (([1], []), ([], [2]), ([1], [2])))
    assert not torch.equal(of_source, of_target)
    assert torch.allclose(of_both, torch.maximum(of_source, of_target)), "the greater attention is used"
    assert (of_both <= difference).all()


def test_a_threshold_of_zero_selects_everything(denoiser, prompt):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=5)
    texts = random_text(1), random_text(2), 7.5
    all_of_it = edit(denoiser, inversion, *texts, prompt, FusionSettings(blend_threshold=0.0, **PROMPTS))
    assert relative(all_of_it, edit(denoiser, inversion, *texts, prompt, FusionSettings())) < 1e-12


def test_outside_the_mask_the_inversion_is_preserved_bit_for_bit(denoiser, prompt):
    latents = random_latents()
    inversion = invert(denoiser, latents, random_text(0), steps=5)
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    settings = FusionSettings(0.5, 0.5, **PROMPTS)
    edited = edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, settings, mask=GivenMask(left))
    assert torch.equal(edited[..., 8:], latents[..., 8:])
    assert relative(edited[..., :8], latents[..., :8]) > 0.01
    until = FusionSettings(0.5, 0.5, blend_latents=True)
    paper = edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, until, mask=GivenMask(left))
    assert not torch.equal(paper[..., 8:], latents[..., 8:]), "the authors stop at 0.8"


def test_no_blend_words_are_needed(denoiser, prompt):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=5)
    texts = random_text(1), random_text(2), 7.5
    masked = edit(denoiser, inversion, *texts, prompt, FusionSettings(blend_self_attention=True, **PROMPTS))
    plain = edit(denoiser, inversion, *texts, prompt, FusionSettings(mask_from="prompts"))
    assert relative(masked, plain) > 1e-3
    with pytest.raises(ValueError, match="blend_words"):
        edit(denoiser, inversion, *texts, prompt, FusionSettings(blend_self_attention=True))


@pytest.mark.parametrize("memory", ["queries_keys", "maps"])
def test_memories_and_chunks_agree(denoiser, worded, memory):
    settings = FusionSettings(0.5, 0.5, True, blend_threshold=0.6, separate_words=0.8, **PROMPTS)
    arguments = (random_text(1), random_text(2), 7.5, worded, settings)
    whole = edit(denoiser, invert(denoiser, random_latents(3), random_text(0), steps=5), *arguments)
    kept = invert(denoiser, random_latents(3), random_text(0), steps=5, memory=memory, chunk_frames=2)
    assert relative(edit(denoiser, kept, *arguments, chunk_frames=2), whole) < 1e-9


def test_words_are_separated_only_inside_the_mask(denoiser, worded):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=5)

    def run(share, mask=None):
        settings = FusionSettings(0.5, 0.5, blend_self_attention=True, mask_from="prompts", separate_words=share)
        return edit(denoiser, inversion, random_text(1), random_text(2), 7.5, worded, settings, mask=mask)

    nowhere = GivenMask(torch.zeros(1, 16, 16), "intersection")
    assert relative(run(0.8), run(0.0)) > 1e-3
    assert relative(run(0.8), run(0.4)) > 1e-4
    assert relative(run(0.8, nowhere), run(0.0, nowhere)) < 1e-12


def test_without_words_of_the_source_nothing_is_separated(denoiser, tokenizer):
    prompt = PromptEdit("a circle on sand", "a red circle on sand", tokenizer, blend_words=([], ["red"]))
    inversion = invert(denoiser, random_latents(), random_text(0), steps=5)
    texts = random_text(1), random_text(2), 7.5, prompt
    separate, plain = (
        edit(denoiser, inversion, *texts, FusionSettings(separate_words=s, **PROMPTS)) for s in (1.0, 0.0)
    )
    assert torch.equal(separate, plain)


@pytest.mark.parametrize("how", ["replace", "union", "intersection"])
def test_a_given_mask_replaces_extends_or_limits_it(denoiser, prompt, how, unet):
    inversion = invert(denoiser, random_latents(), random_text(0), steps=5)
    settings = FusionSettings(0.0, 0.0, blend_threshold=0.7, **PROMPTS)

    def run(fill, settings=settings):
        given = GivenMask(torch.full((1, 16, 16), fill), how)
        return edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, settings, mask=given)

    single = edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, settings)
    unmasked = edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, FusionSettings(0.0, 0.0))
    expected = {
        "replace": (inversion.latents[0], unmasked),
        "union": (single, unmasked),
        "intersection": (inversion.latents[0], single),
    }
    for fill, target in zip((0.0, 1.0), expected[how], strict=True):
        assert relative(run(fill), target) < 1e-12


@pytest.mark.parametrize(
    ("steps", "levels"), [(1, [0]), (5, [1, 2, 3, 4]), (20, [7, 10, 13, 16]), (50, [17, 25, 32, 40])]
)
def test_calls_match_the_estimate(denoiser, unet, prompt, steps, levels):
    assert difference_levels(steps) == levels
    settings = FusionSettings(blend_self_attention=True, **PROMPTS)
    plain = Recipe(injection=FusionSettings()).calls(steps)
    assert Recipe(injection=settings).calls(steps) == plain._replace(prepare=2 * len(levels))
    single, joined = (GivenMask(torch.ones(1, 16, 16), how) for how in ("replace", "union"))
    assert Recipe(injection=settings, mask=single).calls(steps) == plain
    assert Recipe(injection=settings, mask=joined).calls(steps) == Recipe(injection=settings).calls(steps)
    if steps == 5:
        inversion, calls = invert(denoiser, random_latents(), random_text(0), steps), []
        handle = unet.register_forward_hook(lambda *_: calls.append(1))
        edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, settings)
        handle.remove()
        cost = Recipe(injection=settings).calls(steps)
        assert len(calls) == cost.edit + cost.source + cost.prepare


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="mask_from is 'words'"):
        FusionSettings(mask_from="words")
    with pytest.raises(ValueError, match="blend_latents_until is 1.5"):
        FusionSettings(blend_latents_until=1.5)
    with pytest.raises(ValueError, match="separate_words needs a mask of both prompts"):
        FusionSettings(blend_latents=True, separate_words=0.5)
