"""Latents of a video that are packed with its sound into one tensor, and the windows of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..imports import torch
from .key_frames import Chunk, ramp

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Latents (1, 1, 1, n) of a video and its sound.

    shapes: of the video, (1, c, frames, h, w), and of the sound. axis: the sound's dimension of time. begins: the
    sound's latent at which each frame of the video begins, as a real number, and that at which the last one ends.
    group: windows start at a multiple of so many frames.
    """

    shapes: tuple[tuple[int, ...], ...]
    axis: int
    begins: tuple[float, ...]
    group: int = 1

    @property
    def frames(self) -> int:
        return self.shapes[0][2]

    @property
    def sound(self) -> int:
        """The number of the sound's latents."""
        return self.shapes[1][self.axis]

    def sound_of(self, frames: Sequence[int]) -> list[int]:
        """The sound's latents during some frames of the video: at least one for each."""
        found = dict[int, None]()
        for frame in frames:
            start = min(round(self.begins[frame]), self.sound - 1)
            found |= dict.fromkeys(range(start, max(start + 1, min(round(self.begins[frame + 1]), self.sound))))
        return list(found)

    def sound_windows(self, chunks: Sequence[Chunk]) -> list[tuple[list[int], list[float]]]:
        """The sound's latents during the frames of each chunk that have a weight, with weights of their own."""
        parts = (zip(chunk.frame_indices, chunk.weights, strict=True) for chunk in chunks)
        windows = [self.sound_of([frame for frame, weight in part if weight]) for part in parts]
        return [(window, ramp(len(window))) for window in windows]


@dataclass(frozen=True)
class PackedChunk(Chunk):
    """The frames of a video in one call, with those of its sound."""

    packing: Packing
    of_sound: Chunk

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the chunk's video and sound."""
        (video, sound), axis = self.packing.shapes, self.packing.axis
        lengths = len(self.frame_indices), len(self.of_sound.frame_indices)
        return [(*video[:2], lengths[0], *video[3:]), (*sound[:axis], lengths[1], *sound[axis + 1 :])]

    def cut(self, x: Tensor) -> Tensor:
        """The chunk's part of packed latents, or of rows for each frame of the video."""
        if not _is_packed(x, self.packing.shapes):
            return super().cut(x)
        video, sound = self._streams(x, self.packing.shapes)
        parts = super().cut(video).movedim(0, 2), self.of_sound.cut(sound).movedim(0, self.packing.axis)
        return torch.cat([part.reshape(-1) for part in parts])[None, None, None]

    def zeros(self, part: Tensor) -> Tensor:
        if not _is_packed(part, self.shapes):
            return super().zeros(part)
        return part.new_zeros(1, 1, 1, sum(map(math.prod, self.packing.shapes)))

    def add(self, part: Tensor, whole: Tensor) -> None:
        if not _is_packed(part, self.shapes):
            super().add(part, whole)
            return
        (video, sound), all_streams = self._streams(part, self.shapes), self._streams(whole, self.packing.shapes)
        super().add(video, all_streams[0])
        self.of_sound.add(sound, all_streams[1])

    def _streams(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The streams of packed latents, time first; views of contiguous ones."""
        parts, axes = x.reshape(-1).split([math.prod(shape) for shape in shapes]), (2, self.packing.axis)
        return [part.view(*shape).movedim(at, 0) for part, shape, at in zip(parts, shapes, axes, strict=True)]


def _is_packed(x: Tensor, shapes: Sequence[Sequence[int]]) -> bool:
    return x.shape == (1, 1, 1, sum(map(math.prod, shapes)))
