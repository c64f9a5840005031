"""A video's frames, cropped and scaled as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ..files.memory import check_room, free_bytes
from ..imports import torch
from .read import SoundTrack, Video, VideoSource
from .size import check_crop, crop, resize_to_fill, scaling_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FittedVideo:
    """A source cropped (left, top, right, bottom) and scaled to fill a size (width, height)."""

    source: VideoSource
    cut: tuple[int, int, int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, source: VideoSource, cut: tuple[int, int, int, int], size: tuple[int, int]) -> FittedVideo:
        """Raises ValueError for a crop that leaves nothing, and for a size that needs more memory than is free."""
        check_crop(*source.size, *cut)
        left, top, right, bottom = cut
        shown = source.size[0] - left - right, source.size[1] - top - bottom
        what = f"{source.path}: a frame of {shown[0]}x{shown[1]} scaled to {size[0]}x{size[1]}"
        check_room(what, scaling_bytes(shown, size), free_bytes(), "crop it, or choose a smaller --size")
        return cls(source, cut, size)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fps(self) -> Fraction:
        return self.source.fps

    @property
    def times(self) -> tuple[Fraction, ...] | None:
        """Each frame's time in seconds from the first; None if evenly spaced."""
        return None if self.source.even else self.source.times

    def frames(self) -> Iterator[Tensor]:
        """One uint8 frame (height, width, 3) at a time."""
        for frame in self.source.frames():
            yield resize_to_fill(crop(frame[None], *self.cut), *self.size)[0]

    def sound(self) -> SoundTrack | None:
        return self.source.sound()

    def read(self) -> Video:
        """The whole video at once."""
        sound = self.sound()
        return Video(torch.stack(list(self.frames())), self.fps, sound.read() if sound else None, self.times)
