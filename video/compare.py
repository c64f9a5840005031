"""Two clips combined into one for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from ..imports import Image, np, torch

if TYPE_CHECKING:
    from torch import Tensor

Comparison = Literal["side by side", "wipe", "split", "difference"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)


def compare(a: Tensor, b: Tensor, how: Comparison, labels: tuple[str, str] = ("", "")) -> Tensor:
    """Combine two clips, uint8 (frames, height, width, 3), into one, with labels in the frames.

    how: "side by side"; "wipe", a line that moves from left to right during the clip, with `b` left of it; "split", a
    fixed line in the middle; "difference", |a - b|, scaled to the full range over the clip.

    Raises ValueError for clips that differ in frames or size, or an unknown `how`.
    """
    if a.shape != b.shape:
        raise ValueError(f"the clips differ: {size_of(a)} and {size_of(b)}")
    if how not in COMPARISONS:
        raise ValueError(f"comparison is {how!r}; it must be one of {', '.join(COMPARISONS)}")
    frames, width = len(a), a.shape[2]
    if how == "side by side":
        return torch.cat([labelled(a, labels[0]), labelled(b, labels[1])], 2)
    if how == "difference":
        difference = (a.int() - b.int()).abs()
        peak = max(1, int(difference.max()))
        shown = (difference * 255 // peak).to(torch.uint8)
        names = " - ".join(label for label in labels if label)
        return labelled(shown, f"|{names}| x {255 / peak:.1f}" if names else "")
    edge = [width // 2] * frames if how == "split" else [round(width * (t + 0.5) / frames) for t in range(frames)]
    columns, at = torch.arange(width), torch.tensor(edge)[:, None]
    behind, line = columns < at, (columns - at).abs() < max(1, width // 400)
    shown = torch.where(behind[:, None, :, None], labelled(b, labels[1]), labelled(a, labels[0], right=True))
    return torch.where(line[:, None, :, None], torch.tensor(255, dtype=torch.uint8), shown)


def size_of(clip: Tensor) -> str:
    return f"{clip.shape[0]} frames of {clip.shape[2]}x{clip.shape[1]}"


def labelled(clip: Tensor, label: str, right: bool = False) -> Tensor:
    """A label in the upper left (or right) corner, on a dark background, at most half as wide as the frame."""
    if not label:
        return clip
    height, width = clip.shape[1:3]
    size = max(7, height // 16)
    while (tag := _tag(label, size)).width > width // 2 and size > 5:
        size -= 1
    ground = np.asarray(tag.crop((0, 0, min(tag.width, width), min(tag.height, height))))
    shown = clip.clone()
    at = width - ground.shape[1] if right else 0
    shown[:, : ground.shape[0], at : at + ground.shape[1]] = torch.from_numpy(ground.copy())
    return shown


def _tag(label: str, size: int) -> Image.Image:
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=size)
    left, top, right, bottom = font.getbbox(label)
    pad = max(1, size // 4)
    tag = Image.new("RGB", (round(right - left) + 2 * pad, round(bottom - top) + 2 * pad), (24, 24, 24))
    ImageDraw.Draw(tag).text((pad - left, pad - top), label, fill="white", font=font)
    return tag
