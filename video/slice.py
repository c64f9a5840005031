"""x-t slices: one row of a clip's pixels over time, in which motion is a line and flicker a ragged one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..imports import torch
from .compare import labelled, size_of

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("source", "edit")
"""The labels of two clips."""


def moving_row(*clips: Tensor) -> int:
    """The row of pixels that changes most over time in clips, uint8 (f, h, w, 3); the middle of stills."""
    changes = sum(clip.int().diff(dim=0).abs().sum((0, 2, 3)) for clip in clips)
    assert isinstance(changes, torch.Tensor)
    return int(changes.argmax()) if changes.any() else clips[0].shape[1] // 2


def check_row(row: int, height: int) -> None:
    """Raise ValueError for a row that a frame does not have."""
    if not 0 <= row < height:
        raise ValueError(f"row is {row}; frames of {height} rows have 0 to {height - 1}")


def xt_slice(clip: Tensor, row: int, stretch: int = 1) -> Tensor:
    """A row of every frame, time downwards: (frames, height, width, 3) to (frames * stretch, width, 3).

    stretch: pixels of each frame. Raises ValueError for a row that a frame does not have.
    """
    check_row(row, clip.shape[1])
    return clip[:, row].repeat_interleave(stretch, 0)


def slices(clips: Sequence[Tensor], row: int, stretch: int = 0, labels: Sequence[str] = LABELS) -> Tensor:
    """The slices of clips of one size, one below the other, with labels if there are two: uint8 (height, width, 3).

    stretch: pixels of each frame; 0 makes a slice half as high as wide, and enlarges clips narrower than 512 pixels.
    Raises ValueError for clips of different sizes, or a row that a frame does not have.
    """
    first, *others = clips
    for other in others:
        if first.shape != other.shape:
            raise ValueError(f"the clips differ: {size_of(first)} and {size_of(other)}")
    frames, width = len(first), first.shape[2]
    wider = 1 if stretch else max(1, 512 // width)
    tall = stretch or max(1, round(width * wider / 2 / frames))
    shown = [xt_slice(clip, row, tall).repeat_interleave(wider, 1)[None] for clip in clips]
    return torch.cat([labelled(one, label if others else "")[0] for one, label in zip(shown, labels, strict=False)])


def slice_picture(a: Tensor, b: Tensor, row: int | None = None) -> Tensor:
    """`slices` with the row in their label; None takes the row that changes most over time."""
    row = moving_row(a, b) if row is None else row
    return slices((a, b), row, labels=(f"source, row {row}", "edit"))
