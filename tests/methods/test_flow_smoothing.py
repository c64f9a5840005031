"""Flow smoothing: what it preserves, what it averages, and that it needs the clip's own motion."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from wan import small_wan

from fatezero import FlowSmoothing, PnPSettings, TokenFlowSettings, edit, invert
from fatezero.demo.model import build_scheduler
from fatezero.hosts.diffusers import DiffusersDenoiser, VideoTransformerDenoiser
from fatezero.video.motion import Motion, averaged_along, smooth_along, visible
from small import random_latents, random_text, relative, small_unet


def moving(frames: int, dx: float, size: int = 8) -> Motion:
    """Motion of everything to the right by dx cells a frame."""
    flow = torch.zeros(frames - 1, 2, size, size)
    flow[:, 0] = dx
    visible = torch.ones(frames - 1, size, size)
    visible[..., size - int(dx) :] = 0 if dx else 1
    before = visible.flip(-1)
    return Motion(flow, -flow, visible, before)


def test_content_that_follows_the_motion_is_preserved_and_other_is_averaged():
    clip = torch.zeros(4, 1, 8, 8)
    for i in range(4):
        clip[i, :, :, 1 + i] = 1
    assert torch.allclose(averaged_along(clip, moving(4, 1.0), 0.8), clip, atol=1e-6)
    flicker = clip * torch.tensor([1.0, 1.4, 0.6, 1.2]).view(4, 1, 1, 1)
    even = averaged_along(flicker, moving(4, 1.0), 0.9)
    strengths = [even[i, 0, 0, 1 + i].item() for i in range(4)]
    assert max(strengths) - min(strengths) < 0.3 < 0.8
    still = averaged_along(flicker, moving(4, 0.0), 0.9)
    assert relative(still, flicker) > 0.5, "another motion blurs it"
    assert torch.equal(averaged_along(flicker, moving(4, 1.0), 0.0), flicker)


def test_occluded_pixels_are_not_used():
    values = torch.randn(3, 2, 8, 8)
    motion = moving(3, 0.0)
    hidden = Motion(motion.forward, motion.backward, 0 * motion.visible, 0 * motion.visible)
    assert torch.equal(averaged_along(values, hidden, 0.9), values)


def test_a_texture_removed_by_the_edit_is_not_restored():
    """With a wrong flow, smoothing the difference restores the texture; smoothing the edit itself does not."""
    texture = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    source = torch.cat([texture.roll(i, -1) for i in range(4)])
    plain = torch.zeros_like(source)
    wrong = moving(4, 0.0)
    by_difference = source + averaged_along(plain - source, wrong, 0.8)
    assert by_difference.abs().mean() > 0.3
    assert smooth_along(source, plain, wrong, 0.8).abs().max() < 1e-5
    coloured = source + 2
    assert relative(smooth_along(source, coloured, wrong, 0.8), coloured) < 1e-5, (
        "the source stays sharp where it is preserved"
    )


def test_ground_that_a_smaller_outline_reveals_does_not_move_with_the_object():
    """A square that moves two cells a frame becomes a smaller one, whose brightness flickers."""
    ground = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    frames, shades = 5, (1.0, 1.3, 0.7, 1.2, 0.8)

    def clip(shades, margin):
        shown, objects = ground.repeat(frames, 1, 1, 1), torch.zeros(frames, 1, 32, 32)
        for i, shade in enumerate(shades):
            at = (i, 0, slice(8 + margin, 20 - margin), slice(4 + 2 * i + margin, 16 + 2 * i - margin))
            shown[at], objects[at] = 2 * shade, 1
        return shown, objects

    source, large = clip([1.0] * frames, 0)
    edited, small = clip(shades, 3)
    forward = torch.cat([2 * large[:-1], 0 * large[:-1]], 1)
    backward = torch.cat([-2 * large[1:], 0 * large[1:]], 1)
    motion = Motion(forward, backward, visible(forward, backward).float(), visible(backward, forward).float())
    steady = smooth_along(source, edited, motion, 0.8)
    revealed, truth = (large * (1 - small)).bool(), clip([1.0] * frames, 3)[0]
    dragged = (averaged_along(edited, motion, 0.8) - truth)[revealed].abs().mean()
    assert (steady - truth)[revealed].abs().mean() < 0.5 * dragged
    inside = small.bool()
    assert (steady - truth)[inside].abs().mean() < 0.6 * (edited - truth)[inside].abs().mean()


def test_motion_on_a_coarser_grid_is_in_units_of_its_cells():
    coarse = moving(3, 2.0, 16).at((8, 8))
    assert coarse.forward.shape == (2, 2, 8, 8)
    assert torch.allclose(coarse.forward[:, 0], torch.tensor(1.0)) and coarse.visible.max() == 1


@pytest.fixture(scope="module")
def denoiser() -> DiffusersDenoiser:
    return DiffusersDenoiser(small_unet(), build_scheduler())


def run(denoiser, smoothing, **more):
    clip = random_latents(4)
    inversion = invert(denoiser, clip, random_text(2), steps=3, key_frames="self")
    return edit(denoiser, inversion, random_text(3), random_text(4), 3.0, smoothing=smoothing, **more), clip


@pytest.mark.parametrize("more", [{}, {"fusion": PnPSettings(), "propagation": TokenFlowSettings(2)}])
def test_the_edits_difference_is_smoother_and_no_difference_is_exact(denoiser, more):
    size = random_latents(1).shape[-1]
    plain, clip = run(denoiser, None, **more)
    assert torch.equal(run(denoiser, FlowSmoothing(0.0), **more)[0], plain)
    steady, _ = run(denoiser, FlowSmoothing(0.8, moving(4, 0.0, size)), **more)

    def unrest(result):
        return (result - clip).diff(dim=0).norm().item()

    assert unrest(steady) < 0.6 * unrest(plain)


def test_motion_between_the_latents_of_a_causal_autoencoder():
    """Frames 0, 2 and 6 are the middles of latents of 1, 4 and 4 frames."""
    motion = moving(9, 0.5, 16).of_latents(3)
    middle = motion.forward[:, 0, :, 4:8], motion.backward[:, 0, :, 8:12]
    for found, sign in zip(middle, (1, -1), strict=True):
        assert torch.allclose(found[0], torch.tensor(sign * 1.0)) and torch.allclose(found[1], torch.tensor(sign * 2.0))
    assert motion.visible[1, :, :13].min() > 0.99 and motion.visible[1, :, -1].max() < 0.05
    same = moving(9, 1.0)
    assert torch.equal(same.of_latents(9).forward, same.forward)


def test_it_smooths_the_latents_of_a_video_transformer():
    wan = VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    inversion = invert(wan, random_latents(4, 8, 8), random_text(2, 512), steps=3)

    def edited(smoothing):
        return edit(wan, inversion, random_text(3, 512), random_text(4, 512), 3.0, smoothing=smoothing)

    plain, steady = edited(None), edited(FlowSmoothing(0.9, moving(13, 0.0)))
    unrest = [(result - inversion.latents[0]).diff(dim=0).norm() for result in (plain, steady)]
    assert unrest[1] < 0.7 * unrest[0]
    with pytest.raises(ValueError, match="4 frames, but has that of 3"):
        edited(FlowSmoothing(0.9, moving(3, 0.0)))


def test_another_clips_motion_is_refused(denoiser):
    with pytest.raises(ValueError, match="4 frames, but has that of 3"):
        run(denoiser, FlowSmoothing(0.8, moving(3, 0.0)))
    with pytest.raises(ValueError, match="4 frames, but has none"):
        run(denoiser, FlowSmoothing(0.8))
    with pytest.raises(ValueError, match="amount is 1.5"):
        FlowSmoothing(1.5)
