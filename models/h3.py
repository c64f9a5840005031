"""MiniMax H3: a transformer over one sequence of text, references, sound and video, with flows of two shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from ..attention.packed import Packing
from ..imports import torch
from .flow import FLOW

if TYPE_CHECKING:
    from torch import Tensor

H3 = replace(
    FLOW, title="MiniMax H3", network="video and sound transformer", attention=True, joint=True, trained_frames=107
)
FRAMES = (1, 4, 4, 4, 4)
"""The frames of each latent in a group of 17."""
TICKS = 5 / 3
"""Rotary time of a frame; a latent of the sound takes 1."""


def sound_sigma(sigma: Tensor, video_shift: float, sound_shift: float) -> Tensor:
    """The sound's sigma at one of the video: that of the same step before the shift, s x / (1 + (s - 1) x)."""
    even = sigma / (video_shift + sigma * (1 - video_shift))
    return sound_shift * even / (1 + (sound_shift - 1) * even)


def places(text: int, grid: Sequence[int], sound: Sequence[int]) -> Tensor:
    """The rotary time, height and width of each row: text, sound channel by channel, video, (rows, 3) in float64.

    grid: frames, rows and columns of tokens. sound: its channels and their latents.
    """
    (frames, rows, columns), (channels, latents) = grid, sound
    down, across = (_centred(side, (rows * columns) ** 0.5) for side in (rows, columns))
    time = torch.tensor(begins(frames)[:-1], dtype=torch.float64) + text
    of_text = torch.zeros(text, 3, dtype=torch.float64)
    of_text[:, 0] = torch.arange(text)
    of_sound = torch.zeros(channels, latents, 3, dtype=torch.float64)
    of_sound[..., 0] = torch.arange(latents) + text
    of_sound[:1, :, 2], of_sound[1:, :, 2] = across[0], across[-1]
    of_video = torch.cartesian_prod(time, down, across)
    return torch.cat([of_text, of_sound.flatten(0, 1), of_video])


def begins(frames: int) -> list[float]:
    """The rotary time at which each latent of the video begins, and at which the last one ends."""
    return [0.0, *accumulate(TICKS * FRAMES[i % len(FRAMES)] for i in range(frames))]


def packing(shapes: Sequence[Sequence[int]]) -> Packing:
    """That of latents with shapes of the video, (1, 24, frames, h, w), and of the sound, (1, 32, 2, n). Sound after the
    video belongs to its last frame.
    """
    *starts, end = begins(shapes[0][2])
    return Packing(tuple(map(tuple, shapes)), 3, (*starts, max(end, shapes[1][3])), len(FRAMES))


def _centred(side: int, mean: float) -> Tensor:
    """Places of tokens along a side of a frame, whose sides have a mean of 32."""
    steps = torch.arange(side, dtype=torch.float64)
    return (steps / mean + (1 - side / mean) / 2) * 32
