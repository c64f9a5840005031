"""A window around what an edit changes: it follows a mask smoothly, is edited at the model's size, and stitched back.

The window has one size and moves by whole pixels. In each axis its path is the smoothest among those that cover the
mask and its surroundings: the second differences of the positions are minimized over the frames under the bounds that
the mask sets, so that a still mask gets a still window, and a moving one a window without jitter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..imports import F, np
from .restore import REACH, Sides, restored_frames
from .size import resize_to_fill

if TYPE_CHECKING:
    from torch import Tensor

AROUND = 0.5
"""Surroundings of the mask in the window, as a share of the mask's longer side, split between both sides."""


@dataclass(frozen=True)
class Region:
    """A moving window on frames. size: its width and height. corners: its left and top in each frame, in pixels."""

    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.corners)

    def cut(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The window in each frame (height, width, ...)."""
        width, height = self.size
        for frame, (left, top) in zip(frames, self.corners, strict=True):
            yield frame[top : top + height, left : left + width]

    def fitted(self, frames: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """The window in each uint8 frame (height, width, 3), scaled to a width and height."""
        for frame in self.cut(frames):
            yield resize_to_fill(frame[None], *size)[0]

    def stitched(
        self,
        sources: Iterable[Tensor],
        edits: Iterable[Tensor],
        masks: Iterable[Tensor],
        reach: int = REACH,
        match: bool = True,
    ) -> Iterator[Tensor]:
        """The edited windows laid over the whole frames, see `restored_frames`. masks: of the windows, on any grid.

        Towards sides of the window inside the frame, the edit is feathered too.
        """
        width, height = self.size
        for i, (source, edit, mask) in enumerate(zip(sources, edits, masks, strict=True)):
            (left, top), result = self.corners[i], source.clone()
            place, sides = result[top : top + height, left : left + width], self.sides(i, source.shape[:2])
            place.copy_(next(restored_frames([place.clone()], [edit], [mask], reach, match, [sides])))
            yield result

    def on_frame(self, i: int, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Values of the window (..., height, width) on the whole frame of a width and height, 0 elsewhere."""
        (left, top), (width, height) = self.corners[i], self.size
        return F.pad(x, (left, size[0] - left - width, top, size[1] - top - height))

    def sides(self, i: int, size: Sequence[int]) -> Sides:
        """Which sides of the window, left, right, top and bottom, are inside a frame of (height, width)."""
        (left, top), (width, height) = self.corners[i], self.size
        return left > 0, left + width < size[1], top > 0, top + height < size[0]


def region_of(masks: Iterable[Tensor], aspect: float = 1.0, around: float = AROUND, least: int = 16) -> Region:
    """The window around masks (height, width) of frames, above 0.5 in the object.

    aspect: width by height of the window, as the model edits it; less near the frame's size. around: the surroundings,
    see `AROUND`. least: the shortest side in pixels. Frames with an empty mask take the window's path from the others.

    Raises ValueError for a mask without any object.
    """
    height = width = 0
    spans: tuple[list[tuple[int, int] | None], ...] = [], []
    for mask in masks:
        height, width = mask.shape
        for axis in (0, 1):
            at = (mask > 0.5).any(axis).nonzero()[:, 0]
            spans[axis].append((int(at[0]), int(at[-1]) + 1) if len(at) else None)
    if not any(spans[0]):
        raise ValueError("the mask is empty in all frames: there is nothing to crop to")
    extents = [max(end - begin for begin, end in filter(None, own)) for own in spans]
    more = around * max(extents)
    wide, high = (max(least, extent + more) for extent in extents)
    wide, high = max(wide, high * aspect), max(high, wide / aspect)
    size = (min(width, _even(wide)), min(height, _even(high)))
    paths = [_path(own, side, whole) for own, side, whole in zip(spans, size, (width, height), strict=True)]
    return Region(size, tuple(zip(*paths, strict=True)))


def searched_region(
    search: Callable[[Region], Iterable[Tensor]], size: tuple[int, int], count: int, aspect: float = 1.0
) -> Region:
    """The window around masks that are searched for: first in whole frames, then once more in the window found there.

    search: the mask of each frame in a region (height, width), at its size; enlarged, a window shows a small object at
    a higher resolution. size, count: of the frames. aspect: see `region_of`.

    Raises ValueError if nothing is found in the whole frames.
    """
    region = Region(size, ((0, 0),) * count)
    for _ in range(2):
        found = region_of((region.on_frame(i, mask, size) for i, mask in enumerate(search(region))), aspect)
        if prod(found.size) >= prod(region.size):
            break
        region = found
    return region


def _even(x: float) -> int:
    """The next even number: chroma has half the resolution."""
    return 2 * int(np.ceil(x / 2))


def _path(spans: Sequence[tuple[int, int] | None], side: int, whole: int) -> list[int]:
    """The whole positions of a window of a side that covers every span, as smooth as the spans allow."""
    most = whole - side
    low = np.array([0 if span is None else max(0, span[1] - side) for span in spans], float)
    high = np.array([most if span is None else min(most, span[0]) for span in spans], float)
    high = np.maximum(low, high)
    known = [i for i, span in enumerate(spans) if span is not None]
    centres = [min(max((sum(spans[i] or ()) - side) / 2, 0), most) for i in known]
    wanted = np.interp(np.arange(len(spans)), known, centres)
    return [int(at) for at in np.clip(np.round(_smoothest(wanted, low, high)), np.ceil(low), np.floor(high))]


def _smoothest(wanted: np.ndarray, low: np.ndarray, high: np.ndarray, rounds: int = 400) -> np.ndarray:
    """The path near `wanted` with the least second differences within bounds, by ADMM.

    Minimizes |x - wanted|^2 + stiffness |D^2 x|^2 with low <= x <= high.
    """
    n = len(wanted)
    if n < 3:
        return np.clip(wanted, low, high)
    second = np.diff(np.eye(n), 2, axis=0)
    weak, pull = 1e-3, 1.0
    inverse = np.linalg.inv((weak + pull) * np.eye(n) + 100 * second.T @ second)
    inside = np.clip(wanted, low, high)
    dual = np.zeros(n)
    for _ in range(rounds):
        path = inverse @ (weak * wanted + pull * (inside - dual))
        inside = np.clip(path + dual, low, high)
        dual += path - inside
    return inside
