"""Windows of latents that pack a video with its sound."""

import pytest
import torch

from fatezero.attention.key_frames import KeyFrames, Windows, ramp
from fatezero.attention.packed import PackedChunk, Packing
from fatezero.diffusion.denoiser import joined
from fatezero.models.h3 import packing

EVERYONE = KeyFrames(("all",))
SHAPES = ((1, 3, 7, 2, 2), (1, 2, 17, 4))
PROPORTIONAL = Packing(SHAPES, 2, tuple(frame * 17 / 7 for frame in range(8)))


def chunks_of(packing: Packing, windows: Windows) -> list[PackedChunk]:
    chunks = EVERYONE.chunks(packing.frames, windows, True)
    sound = EVERYONE.around(packing.sound_windows(chunks), packing.sound)
    pairs = zip(chunks, sound, strict=True)
    return [PackedChunk(**vars(chunk), packing=packing, of_sound=of_sound) for chunk, of_sound in pairs]


def flat(*streams: torch.Tensor) -> torch.Tensor:
    return torch.cat([stream.reshape(-1) for stream in streams])[None, None, None]


def test_windows_cut_both_streams_and_blend_each():
    chunks = chunks_of(PROPORTIONAL, Windows(4, 2))
    video, sound = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES))
    parts = [chunk.cut(flat(video, sound)) for chunk in chunks]
    assert [list(chunk.frame_indices) for chunk in chunks] == [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert [list(chunk.of_sound.frame_indices) for chunk in chunks] == [
        list(range(10)), list(range(5, 15)), list(range(7, 17)),
    ]  # fmt: skip
    for chunk, part in zip(chunks, parts, strict=True):
        own = video[:, :, list(chunk.frame_indices)], sound[:, :, list(chunk.of_sound.frame_indices)]
        assert chunk.shapes == [one.shape for one in own]
        assert torch.equal(part, flat(*own))
    assert torch.allclose(joined(chunks, parts), flat(video, sound), atol=1e-6)
    ones = [torch.full_like(part, i) for i, part in enumerate(parts)]
    found = joined(chunks, ones).flatten()[-SHAPES[1][1] * 17 * 4 :].view(SHAPES[1])
    weights = torch.zeros(3, 17)
    for weight, chunk in zip(weights, chunks, strict=True):
        weight[list(chunk.of_sound.frame_indices)] = torch.tensor(ramp(10))
    expected = (weights[1] + 2 * weights[2]) / weights.sum(0)
    assert torch.allclose(found, expected[:, None].expand(SHAPES[1]), atol=1e-6)


def test_values_for_each_frame_of_the_video_are_blended_too():
    chunks = chunks_of(PROPORTIONAL, Windows(4, 2))
    heat = torch.randn(7, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(joined(chunks, [chunk.cut(heat) for chunk in chunks]), heat, atol=1e-6)


@pytest.mark.parametrize(
    ("windows", "clip", "starts", "advance"),
    [
        (Windows(12, 4), 24, [0, 5, 10, 15], 5),
        (Windows(10, 5), 12, [0, 5], 5),
        (Windows(7), 12, [0, 5, 10], 5),
        (Windows(105, 52), 120, [0, 15], 55),
    ],
)
def test_windows_in_groups(windows, clip, starts, advance):
    grouped = windows.in_groups(5)
    assert grouped.frames % 5 == 0 and grouped.advance == advance
    assert grouped.starts(clip) == starts
    assert all(start % 5 == 0 for start in grouped.starts(clip))
    chunks = EVERYONE.chunks(clip, grouped, True)
    assert {frame for chunk in chunks for frame in chunk.frame_indices} == set(range(clip))
    assert max(len(chunk.frame_indices) for chunk in chunks) <= grouped.frames


def test_the_sound_of_h3_follows_the_time_of_its_frames():
    """A group of five latents holds 17 frames, during which the sound has 28 1/3 latents."""
    found = packing(((1, 24, 12, 4, 6), (1, 32, 2, 65)))
    assert [found.sound_of(range(at, min(at + 5, 12)))[0] for at in (0, 5, 10)] == [0, 28, 57]
    assert found.sound_of(range(12)) == list(range(65))


@pytest.mark.parametrize("sound", [1, 30, 65, 66, 100])
def test_every_latent_of_the_sound_has_a_window(sound):
    """Also where it is shorter or longer than the video."""
    chunks = chunks_of(packing(((1, 24, 12, 4, 6), (1, 32, 2, sound))), Windows(10, 5, 5))
    of_sound = [chunk.of_sound for chunk in chunks]
    assert {latent for one in of_sound for latent in one.frame_indices} == set(range(sound))
