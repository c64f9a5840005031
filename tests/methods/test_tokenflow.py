"""TokenFlow and Plug-and-Play: the authors' results, and invariants."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from fatezero import FusionSettings, PnPSettings, PromptEdit, TokenFlowSettings, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.demo.model import build_scheduler
from fatezero.diffusion import ddim
from fatezero.diffusion.denoiser import Guidance
from fatezero.diffusion.edit import edit_many
from fatezero.diffusion.parts import Edit
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.methods import tokenflow
from fatezero.methods.tokenflow import nearest
from fatezero.recipes.recipe import Recipe
from small import (
    FIXTURES,
    random_latents,
    random_text,
    reference_denoiser,
    reference_inversion,
    relative,
    small_unet,
    stepped,
)


@pytest.fixture(scope="module")
def reference() -> DiffusersDenoiser:
    return reference_denoiser()


@pytest.mark.parametrize(
    ("name", "step", "fusion"),
    [
        pytest.param("tokenflow_pnp", 0, PnPSettings(0.5, 0.8), marks=pytest.mark.slow),
        ("tokenflow_pnp", 4, PnPSettings(0.5, 0.8)),
        ("tokenflow_extended", 3, None),
    ],
)
def test_a_step_of_the_reference(reference, name, step, fusion):
    """From the reference's latents to those after the step, with and without injection. They are rounded to single
    precision (6e-8), which guidance amplifies to 1e-6 and more."""
    given = load_file(FIXTURES / f"{name}.safetensors")
    inversion = reference_inversion(reference, given, given["source"], len(given["pivots"]), ("self",))
    propagation = TokenFlowSettings(batch_frames=4, pivots=given["pivots"])
    edit = Edit(given["target"], given["uncond"], 7.5, fusion=fusion, propagation=propagation)
    after = stepped(reference, inversion, edit, step, given.get(f"edited.{step}"))
    assert relative(after, given[f"edited.{step + 1}"].double()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fusion"), [("tokenflow_pnp", PnPSettings(0.5, 0.8)), ("tokenflow_extended", None)])
def test_the_whole_reference(reference, name, fusion):
    given = load_file(FIXTURES / f"{name}.safetensors")
    steps = len(given["pivots"])
    inversion = invert(reference, given["z0"], given["source"], steps=steps, key_frames="self")
    assert relative(inversion.latents[-1], given[f"inverted.{steps}"].double()) < 1e-6
    propagation = TokenFlowSettings(batch_frames=4, pivots=given["pivots"])
    edited = edit(reference, inversion, given["target"], given["uncond"], 7.5, fusion=fusion, propagation=propagation)
    assert relative(edited, given[f"edited.{steps}"].double()) < 1e-6


# --- invariants -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoiser() -> DiffusersDenoiser:
    return DiffusersDenoiser(small_unet(), build_scheduler())


def run(denoiser, latents, propagation=None, fusion=None, **more):
    inversion = invert(denoiser, latents, random_text(2), steps=3, key_frames="self")
    return edit(
        denoiser, inversion, random_text(3), random_text(4), 3.0, fusion=fusion, propagation=propagation, **more
    )


@pytest.mark.parametrize("weights", ["authors", "paper", "linear"])
@pytest.mark.parametrize("fusion", [None, PnPSettings(0.7, 0.7)])
def test_a_still_clip_is_edited_like_single_frames(denoiser, weights, fusion):
    still = random_latents(1).expand(5, -1, -1, -1)
    flowing = run(denoiser, still, TokenFlowSettings(batch_frames=2, weights=weights), fusion)
    assert relative(flowing, run(denoiser, still, None, fusion)) < 1e-9


def test_batches_of_one_frame_equal_extended_attention(denoiser):
    """With linear weights each frame is its own pivot: equal to a plain edit with key frames `all`."""
    clip = random_latents(3)
    flowing = run(denoiser, clip, TokenFlowSettings(batch_frames=1, weights="linear"))
    inversion = invert(denoiser, clip, random_text(2), steps=3, key_frames="self")
    z = inversion.latents[-1]
    schedule = denoiser.schedule(3)

    def everyone():
        control = Control(KeyFrames(("self",)), Chunk.whole(3))
        control.extended = True
        return control

    target, negative = (Condition.of(random_text(seed), "text") for seed in (3, 4))
    with denoiser.hooked():
        for step, timestep in enumerate(schedule.timesteps):
            guidance = Guidance(negative, everyone(), 3.0)
            noise = denoiser.predict_noise(z, timestep, target, everyone(), guidance)
            z = ddim.ddim_move(z, noise, schedule.alphas[3 - step], schedule.alphas[2 - step])
    assert relative(flowing, z) < 1e-9


def test_full_injection_restores_the_source(denoiser):
    """With the source's own prompt, no guidance and single frames, the edit equals the source branch."""
    inversion = invert(denoiser, random_latents(3), random_text(2), steps=3, key_frames="self")
    plain = edit(denoiser, inversion, random_text(2), guidance_scale=1.0)
    injected = edit(denoiser, inversion, random_text(2), guidance_scale=1.0, fusion=PnPSettings(0.4, 0.4))
    assert relative(injected, plain) < 1e-9, "in the first step source and edit are the same"
    other = edit(denoiser, inversion, random_text(3), guidance_scale=1.0, fusion=PnPSettings(1.0, 1.0))
    assert relative(other, edit(denoiser, inversion, random_text(3), guidance_scale=1.0)) > 1e-3


def test_shares_of_steps():
    settings = PnPSettings()
    assert sum(settings.takes_attention(step, 50) for step in range(50)) == 25
    assert sum(settings.takes_feature(step, 50) for step in range(50)) == 40


def test_the_authors_blend_weights():
    settings = TokenFlowSettings(batch_frames=8)
    expected = [0.6225, 0.6514, 0.6792, 0.7058, 0.7311, 0.7109, 0.6971, 0.6869]
    for offset, weight in enumerate(expected):
        assert settings.mixture(8 + offset, 1, [3, 9]) == [
            (1, pytest.approx(weight, abs=5e-5)),
            (0, pytest.approx(1 - weight, abs=5e-5)),
        ]
        assert settings.mixture(offset, 0, [3, 9]) == [(0, 1.0)]
    assert TokenFlowSettings(batch_frames=1).mixture(5, 5, [*range(8)])[0] == (5, pytest.approx(0.73106, abs=5e-6))


def test_the_papers_weights_interpolate_between_two_pivots():
    linear, paper = (TokenFlowSettings(batch_frames=4, weights=w) for w in ("linear", "paper"))
    assert linear.mixture(4, 1, [2, 6]) == [(1, 0.5), (0, 0.5)]
    assert linear.mixture(3, 0, [2, 6]) == [(1, 0.25), (0, 0.75)]
    assert paper.mixture(4, 1, [2, 6])[0] == (1, pytest.approx(0.62246, abs=5e-6))
    for settings in (linear, paper):
        assert settings.mixture(6, 1, [2, 6]) == [(1, 1.0)]
        assert settings.mixture(0, 0, [2, 6]) == [(0, 1.0)]
        assert settings.mixture(7, 1, [2, 6]) == [(1, 1.0)]


def test_pivots_are_one_of_each_batch_and_repeatable():
    settings = TokenFlowSettings(batch_frames=8, seed=5)
    drawn = settings.key_frames(43, 50)
    assert drawn == settings.key_frames(43, 50) != TokenFlowSettings(batch_frames=8, seed=6).key_frames(43, 50)
    assert len({tuple(row) for row in drawn}) > 40
    assert all([frame // 8 for frame in row] == [0, 1, 2, 3, 4, 5] and max(row) < 43 for row in drawn)


def test_nearest_neighbours(monkeypatch):
    tokens = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest(tokens, tokens), torch.arange(40))
    assert torch.equal(nearest(tokens, tokens[order]), order.argsort())
    assert torch.equal(nearest(3 * tokens, 0.1 * tokens[order]), order.argsort())
    monkeypatch.setitem(tokenflow.BLOCK, "cpu", 7)
    assert torch.equal(nearest(tokens, tokens[order]), order.argsort())


def test_no_attention_is_computed_where_tokens_are_gathered(denoiser):
    """The second pass projects no queries, keys or values; rows of `to_q` count the frames."""
    layer = denoiser.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    rows = []
    handle = layer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    inversion = invert(denoiser, random_latents(6), random_text(2), steps=1, key_frames="self")
    rows.clear()
    edit(denoiser, inversion, random_text(3), random_text(4), 3.0, propagation=TokenFlowSettings(batch_frames=3))
    handle.remove()
    assert rows == [2, 2, 2], "two pivots, in three branches"


def prompt(**more) -> PromptEdit:
    tokenizer = CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer")
    return PromptEdit("a silver jeep", "a silver jeep", tokenizer, **more)


@pytest.mark.slow
def test_fatezeros_fusion_combines_with_tokenflow(denoiser):
    fusion = FusionSettings(blend_self_attention=True, blend_latents=True)
    pair = prompt(blend_words=(["jeep"], ["jeep"]))
    still = random_latents(1).expand(4, -1, -1, -1)
    flowing = run(denoiser, still, TokenFlowSettings(batch_frames=2), fusion, prompt=pair)
    assert relative(flowing, run(denoiser, still, None, fusion, prompt=pair)) < 1e-9
    moving = random_latents(4)
    flowing = run(denoiser, moving, TokenFlowSettings(batch_frames=2), fusion, prompt=pair)
    assert relative(flowing, run(denoiser, moving, None, fusion, prompt=pair)) > 1e-3


def test_edits_of_one_pass_are_independent(denoiser):
    inversion = invert(denoiser, random_latents(4), random_text(2), steps=3, key_frames="self")
    flow = TokenFlowSettings(batch_frames=2)
    edits = [
        Edit(random_text(3), random_text(4), 3.0, propagation=flow),
        Edit(random_text(5), random_text(4), 3.0, fusion=PnPSettings()),
        Edit(random_text(3), random_text(4), 3.0, prompt=prompt(), fusion=FusionSettings()),
    ]
    for one, together in zip(edits, edit_many(denoiser, inversion, edits), strict=True):
        assert torch.allclose(edit_many(denoiser, inversion, [one])[0], together)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenFlowSettings(batch_frames=0), "batch_frames is 0"),
        (lambda: TokenFlowSettings(weights="none"), "weights is 'none'"),
        (lambda: PnPSettings(attention_steps=1.5), "attention_steps is 1.5"),
        (lambda: TokenFlowSettings(2, pivots=torch.zeros(2, 2)).key_frames(4, 3), r"pivots has shape \(2, 2\)"),
        (lambda: TokenFlowSettings(2, pivots=torch.zeros(3, 2)).key_frames(4, 3), "one frame of each batch"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("fusion", [None, PnPSettings()])
def test_a_mask_preserves_the_clip_outside_with_any_method(denoiser, fusion):
    clip, mask = random_latents(4), torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    edited = run(denoiser, clip, TokenFlowSettings(2), fusion, mask=GivenMask(mask))
    half = clip.shape[-1] // 2
    assert torch.equal(edited[..., half:], clip[..., half:])
    assert relative(edited[..., :half], clip[..., :half]) > 1e-2
    with pytest.raises(ValueError, match='how="union"'):
        run(denoiser, clip, None, fusion, mask=GivenMask(mask, "union"))


def test_less_strength_starts_at_a_lower_noise_level(denoiser):
    """SDEdit with the inverted noise: the first step reverses the inversion's last step to that level."""
    inversion = invert(denoiser, random_latents(2), random_text(2), steps=4, key_frames="self")
    whole, half = (edit(denoiser, inversion, random_text(3), guidance_scale=1.0, strength=s) for s in (1.0, 0.5))
    clip = inversion.latents[0]
    assert 0 < relative(half, clip) < relative(whole, clip)
    assert Recipe(strength=0.5).calls(4) == (4, 4, 0, 0)
    with pytest.raises(ValueError, match="strength is 0.1; .* leave at least one of 4"):
        edit(denoiser, inversion, random_text(3), guidance_scale=1.0, strength=0.1)


def test_fixed_pivots_are_the_middle_frames_of_their_batches():
    assert TokenFlowSettings(4, pivot_choice="fixed").key_frames(10, 2) == [[2, 6, 9]] * 2
    with pytest.raises(ValueError, match="pivot_choice"):
        TokenFlowSettings(pivot_choice="first")
