"""Crops and sizes of frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from einops import rearrange

from ..imports import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def crop(frames: Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> Tensor:
    """Cut pixels off the sides of (frames, height, width, 3).

    Raises ValueError if nothing is left.
    """
    height, width = frames.shape[1:3]
    check_crop(width, height, left, top, right, bottom)
    return frames[:, top : height - bottom, left : width - right]


def check_crop(width: int, height: int, left: int, top: int, right: int, bottom: int) -> None:
    """Raise ValueError if cropping these pixels leaves nothing of a picture."""
    if min(left, top, right, bottom) < 0 or left + right >= width or top + bottom >= height:
        raise ValueError(f"crop {left},{top},{right},{bottom} (left, top, right, bottom) does not fit {width}x{height}")


def crop_on(cut: tuple[int, int, int, int], clip: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A crop of frames of the size `clip` as one of pictures of another size that show the same: (width, height)."""
    x, y = size[0] / clip[0], size[1] / clip[1]
    left, top, right, bottom = cut
    return round(left * x), round(top * y), round(right * x), round(bottom * y)


def fit_size(width: int, height: int, short: int, multiple: int) -> tuple[int, int]:
    """(width, height) with this short side, the nearest aspect ratio, multiples of `multiple`.

    The short side itself is rounded down to a multiple; 300 wide and 200 high at short side
    64 and multiple 8 give (96, 64).
    """
    scale = short / min(width, height)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (width, height))  # type: ignore[return-value]


def check_size(width: int, height: int, multiple: int) -> None:
    """Raise ValueError, naming the nearest sizes, unless both sides are multiples."""
    if width % multiple or height % multiple or min(width, height) < multiple:
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise ValueError(
            f"size {width}x{height}: both sides must be multiples of {multiple}, e.g. {nearest[0]}x{nearest[1]}"
        )


def scaling_bytes(source: tuple[int, int], size: tuple[int, int]) -> int:
    """Peak bytes of `resize_to_fill` for one frame of a size (width, height), input and result included."""
    (w, h), (width, height) = source, size
    inner_height, inner_width = covering(w, h, width, height)
    plane = 4 * (w * h + h * inner_width + 2 * inner_height * inner_width)
    return 3 * (w * h + width * height) + (plane if source != size else 0)


def covering(w: int, h: int, width: int, height: int) -> tuple[int, int]:
    """The height and width at which w x h covers width x height."""
    scale = max(width / w, height / h)
    return max(height, round(h * scale)), max(width, round(w * scale))


def resize_to_fill(frames: Tensor, width: int, height: int) -> Tensor:
    """Scale to cover the size and crop to its centre: uint8 (frames, height, width, 3)."""
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    inner = covering(w, h, width, height)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    filled = torch.empty((len(frames), height, width, 3), dtype=torch.uint8)
    for frame, result in zip(frames, filled, strict=True):
        for channel in range(3):  # one at a time: a large frame takes much memory as floats
            plane = frame[None, None, ..., channel].float()
            scaled = F.interpolate(plane, size=inner, mode="bicubic", antialias=True)[0, 0]
            result[..., channel] = scaled[top : top + height, left : left + width].round().clamp(0, 255)
    return filled


def to_unit(frames: Tensor) -> Tensor:
    """uint8 (frames, height, width, 3) to float (frames, 3, height, width) in 0..1."""
    return rearrange(frames, "f y x c -> f c y x").float() / 255


def to_bytes(frames: Tensor) -> Tensor:
    """The inverse of `to_unit`, rounded."""
    return rearrange((frames.clamp(0, 1) * 255).round().to(torch.uint8), "f c y x -> f y x c").contiguous()
