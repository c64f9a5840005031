"""MiniMax H3 in windows on diffusers: groups of latents, the sound of their frames, and memory."""

import pytest
import torch
from diffusers import MiniMaxH3Scheduler

from fatezero import FusionSettings, PromptEdit, Windows, edit, invert
from fatezero.hosts.diffusers.h3 import JointDenoiser
from fatezero.hosts.diffusers.memory import LiveBytes
from small import relative
from tests.joint import random_text, small_h3

PROMPT = PromptEdit("a red circle", "a blue star", tokenizer=None)
STEPS = 2


@pytest.fixture(scope="module")
def transformer():
    return small_h3()


def run(transformer, frames: int, windows: Windows | None, parts=(slice(None), slice(None))):
    """The edit's streams, and the most bytes of it, for a part of a clip's video and sound."""
    generator = torch.Generator().manual_seed(0)
    sound = {12: 65, 20: 113, 40: 227}[frames]
    whole = (torch.randn(1, 24, frames, 4, 4, generator=generator), torch.randn(1, 32, 2, sound, generator=generator))
    video, sound = (one.double() for one in (whole[0][:, :, parts[0]], whole[1][..., parts[1]]))
    denoiser = JointDenoiser(transformer, MiniMaxH3Scheduler(12.0), (video.shape, sound.shape))
    latents = denoiser.packed(video, sound)
    with LiveBytes(transformer) as live:
        inversion = invert(denoiser, latents, random_text(0), STEPS, windows=windows)
        done = edit(denoiser, inversion, random_text(1), random_text(2), 2.0, PROMPT, FusionSettings())
    return denoiser.unpacked(done), live.most


def test_windows_without_overlap_are_edits_of_their_parts(transformer):
    found, _ = run(transformer, 12, Windows(5, 0))
    for part, sound in ((slice(0, 5), slice(0, 28)), (slice(5, 10), slice(28, 57)), (slice(10, 12), slice(57, 65))):
        own, _ = run(transformer, 12, None, (part, sound))
        assert relative(found[0][:, :, part], own[0]) < 1e-6
        assert relative(found[1][..., sound], own[1]) < 1e-6
    for windows in (None, Windows(12), Windows(13, 4)):
        whole, _ = run(transformer, 12, windows)
        assert relative(whole[0], found[0]) > 1e-3
        assert torch.equal(whole[0], run(transformer, 12, None)[0][0])


def test_memory_follows_the_window():
    """Apart from the latents of all levels, which are small beside a wide layer's activations."""
    wide, windows = small_h3(ffn_dim=4096, num_layers=2), Windows(10, 5)
    short, long = (run(wide, frames, windows)[1] for frames in (20, 40))
    assert long < 1.3 * short
    assert run(wide, 40, None)[1] > 2 * long
