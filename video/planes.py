"""Frames as video files store them: planes of any depth and subsampling, read, written, and with an edit over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange

from ..imports import F, torch
from .colour import MATRICES, converted, has_alpha, hdr_kind, is_full, matrix_of, matrix_tag, to_hdr, to_rgb, to_rgba
from .orientation import Orientation
from .restore import SHIFT, Feather, laid_over, matched

if TYPE_CHECKING:
    from torch import Tensor

    from .stills import Colour

Box = tuple[int, int, int, int]
"""Pixels cut off a frame: left, top, right and bottom."""

_REPACKED = {
    "nv12": "yuv420p", "nv16": "yuv422p", "yuyv422": "yuv422p", "uyvy422": "yuv422p", "p010le": "yuv420p10le",
    "p210le": "yuv422p10le", "gray16be": "gray16le", "ya8": "gbrap", "ya16be": "gbrap16le", "ya16le": "gbrap16le",
    **dict.fromkeys(("rgb24", "bgr24", "rgb0", "bgr0", "0rgb", "0bgr"), "gbrp"),
    **dict.fromkeys(("rgba", "bgra", "argb", "abgr"), "gbrap"),
    **dict.fromkeys(("rgb48le", "rgb48be"), "gbrp16le"), **dict.fromkeys(("rgba64le", "rgba64be"), "gbrap16le"),
}  # fmt: skip
"""Packed formats, with those of the same values in planes."""


def planar(frame: av.VideoFrame) -> av.VideoFrame | None:
    """A frame with the same values in planes of 8 to 16 bits, on which an edit can be laid; None if there is none."""
    name = frame.format.name
    if name in _REPACKED:
        made = converted(frame, _REPACKED[name])
        retagged(made, frame)
        return made
    plain = name.startswith(("yuv4", "yuva4", "yuvj4", "gray", "gbrp", "gbrap")) and name[-2:] not in ("be", "pf")
    depths = {component.bits for component in frame.format.components}
    turns = Orientation.of(frame) == Orientation() or hasattr(av.VideoStream, "set_display_matrix")
    return frame if plain and depths <= set(range(8, 17)) and turns else None


def in_planes(pixels: Tensor) -> av.VideoFrame:
    """uint8 RGB (height, width, 3) in planes."""
    return frame_of([pixels[..., i].numpy() for i in (1, 2, 0)], "gbrp")


def depth_of(frame: av.VideoFrame) -> int:
    """Bits of a frame's values."""
    return max(component.bits for component in frame.format.components)


def planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    """A frame's planes, (height, width) each, uint8 or uint16."""
    kind = np.uint8 if depth_of(frame) == 8 else np.dtype("<u2")
    rows = [np.frombuffer(bytes(plane), kind).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes]
    return [np.array(plane) for plane in rows]


def frame_of(planes: Sequence[np.ndarray], name: str) -> av.VideoFrame:
    """A frame of a format from its planes, the inverse of `planes_of`."""
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], name)
    for plane, values in zip(frame.planes, planes, strict=True):
        padded = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    return frame


def _range(frame: av.VideoFrame) -> ColorRange:
    return ColorRange.JPEG if frame.format.is_rgb or is_full(frame) else ColorRange.MPEG


def retagged(made: av.VideoFrame, like: av.VideoFrame) -> None:
    """Give a frame the range, matrix, primaries and curve of another, as `to_rgb` reads them."""
    made.color_range = _range(like)
    known = like.format.is_rgb or like.colorspace in MATRICES
    made.colorspace = like.colorspace if known else matrix_tag(like.height)
    made.color_primaries, made.color_trc = like.color_primaries, like.color_trc


def with_edit(
    frame: av.VideoFrame, edited: Tensor, weights: Feather, background: Colour = (0, 0, 0), box: Box | None = None
) -> av.VideoFrame:
    """An edit laid over a frame as it is stored, plane by plane; values outside its feather stay, and so does alpha.

    edited: float (3, height, width) in 0..255, SDR, upright with square pixels, over the background. weights: of the
    same size. box: what is left of the frame, see `box_of`.
    """
    shown, stored = Orientation.of(frame), planar(frame)
    assert stored is not None
    size, before = (frame.height, frame.width), planes_of(stored)
    picture = _resized(shown.undone(edited)[None], size)[0].clamp(0, 255)
    inside, rim = (_resized(shown.undone(x)[None, None], size) for x in weights)
    most, mixed, alpha = 2 ** depth_of(stored) - 1, list[np.ndarray](), list[np.ndarray]()
    shift = 0 if hdr_kind(frame) else SHIFT * most
    if has_alpha(stored):
        *before, opaque = before
        alpha, share = [opaque], torch.from_numpy(opaque.astype(np.float32) / most)
        behind = torch.tensor(background, dtype=torch.float32)[:, None, None]
        picture = ((picture - (1 - share) * behind) / share.clamp(min=1 / 255)).clamp(0, 255)
        rim = rim * share
    if hdr_kind(frame):  # colours are compared as SDR, because tone mapping loses what is brighter
        sdr = to_rgba(stored, frame.width)[..., :3] if alpha else to_rgb(stored, frame.width)
        picture = matched(torch.from_numpy(sdr).movedim(-1, 0).float(), picture, rim[0, 0], SHIFT * 255).clamp(0, 255)
    for plane, own in zip(before, _converted(picture, stored), strict=False):
        cells = [-(-side // count) for side, count in zip(size, plane.shape, strict=True)]
        least = -F.max_pool2d(-inside, cells, ceil_mode=True)[0, 0]
        around = F.avg_pool2d(rim, cells, ceil_mode=True, count_include_pad=False)[0, 0]
        source, edit = (torch.from_numpy(x.astype(np.float32))[None] for x in (plane, own))
        made = laid_over(source, edit, Feather(least, around * (least == 0)), shift)[0].round().clamp(0, most)
        mixed.append(np.where(least.numpy() > 0, made.numpy().astype(plane.dtype), plane))
    left = [_cut(plane, size, box) for plane in (*mixed, *alpha)]
    found = frame_of(left, stored.format.name.replace("yuvj", "yuv"))
    retagged(found, stored)
    return found


def box_of(frame: av.VideoFrame, cut: Box, size: tuple[int, int]) -> Box | None:
    """A crop (left, top, right, bottom) of a frame shown at a width and height, on the stored frame.

    None if its left and top are not at the edges of stored pixels and cells of chroma.
    """
    shown, (width, height) = Orientation.of(frame), size
    if sorted(size) != sorted((frame.width, frame.height)):
        return cut if not any(cut) else None
    inside = torch.zeros(height, width)
    inside[cut[1] : height - cut[3], cut[0] : width - cut[2]] = 1
    rows, columns = (x.nonzero()[:, 0] for x in (shown.undone(inside).amax(1), shown.undone(inside).amax(0)))
    left, top = int(columns[0]), int(rows[0])
    found = planar(frame)
    if found is None or any(
        left % -(-frame.width // p.width) or top % -(-frame.height // p.height) for p in found.planes
    ):
        return None
    return left, top, frame.width - 1 - int(columns[-1]), frame.height - 1 - int(rows[-1])


def _cut(plane: np.ndarray, size: tuple[int, int], box: Box | None) -> np.ndarray:
    """A plane of a frame (height, width) inside a box."""
    if box is None:
        return plane
    down, across = (-(-side // count) for side, count in zip(size, plane.shape, strict=True))
    left, top, right, bottom = box
    return plane[top // down : -(-(size[0] - bottom) // down), left // across : -(-(size[1] - right) // across)]


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _converted(picture: Tensor, like: av.VideoFrame) -> list[np.ndarray]:
    """The planes of a picture (3, h, w) in 0..255 in a frame's format, matrix and range."""
    pixels, kind = picture.movedim(0, -1).numpy(), hdr_kind(like)
    wide = to_hdr(pixels, kind) if kind else (pixels * 257).round().astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(wide), format="rgb48le")
    how = {} if like.format.is_rgb else {"dst_colorspace": matrix_of(like), "dst_color_range": _range(like)}
    return planes_of(converted(frame, like.format.name, **how))
