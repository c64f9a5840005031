"""x-t slices: one row of a clip's pixels over time, in which motion is a line and flicker a ragged one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..imports import torch
from .compare import labelled, size_of

if TYPE_CHECKING:
    from torch import Tensor


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


def slices(a: Tensor, b: Tensor, row: int, stretch: int = 0, labels: tuple[str, str] = ("source", "edit")) -> Tensor:
    """The slices of two clips of one size, one below the other, with labels: uint8 (height, width, 3).

    stretch: pixels of each frame; 0 makes a slice half as high as wide, and enlarges clips narrower than 512 pixels.
    Raises ValueError for clips of different sizes, or a row that a frame does not have.
    """
    if a.shape != b.shape:
        raise ValueError(f"the clips differ: {size_of(a)} and {size_of(b)}")
    frames, width = len(a), a.shape[2]
    wider = 1 if stretch else max(1, 512 // width)
    tall = stretch or max(1, round(width * wider / 2 / frames))
    shown = [xt_slice(clip, row, tall).repeat_interleave(wider, 1)[None] for clip in (a, b)]
    return torch.cat([labelled(one, label)[0] for one, label in zip(shown, labels, strict=True)])


def slice_picture(a: Tensor, b: Tensor, row: int | None = None) -> Tensor:
    """`slices` with the row in their label; None takes the row that changes most over time."""
    row = moving_row(a, b) if row is None else row
    return slices(a, b, row, labels=(f"source, row {row}", "edit"))
