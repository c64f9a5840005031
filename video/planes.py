"""Frames as video files store them: planes of any depth and subsampling, read, written, and with an edit over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange

from ..imports import F, torch
from .colour import MATRICES, converted, hdr_kind, is_full, matrix_of, matrix_tag, tagged, to_yuv
from .orientation import Orientation
from .restore import SHIFT, Feather, laid_over

if TYPE_CHECKING:
    from torch import Tensor

    from .write import Frame


def is_kept(frame: av.VideoFrame) -> bool:
    """Whether an edit can be laid over a frame's stored planes: SDR, one component a plane, no alpha, 8 to 16 bits."""
    kind = frame.format
    plain = kind.name.startswith(("yuv4", "yuvj4", "gray", "gbrp")) and kind.name[-2:] not in ("be", "pf")
    depths = {component.bits for component in kind.components}
    alpha = any(component.is_alpha for component in kind.components)
    turns = Orientation.of(frame) == Orientation() or hasattr(av.VideoStream, "set_display_matrix")
    return plain and not alpha and depths <= set(range(8, 17)) and hdr_kind(frame) is None and turns


def planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    """A frame's planes, (height, width) each, uint8 or uint16."""
    kind = np.uint8 if max(component.bits for component in frame.format.components) == 8 else np.dtype("<u2")
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


def encodable(given: Frame, codec: str) -> av.VideoFrame:
    """A frame in a format that a codec takes: its own if possible, else 4:2:0 of 8 bits; padded for H.264."""
    formats = {kind.name for kind in av.Codec(codec, "w").video_formats or ()}
    if isinstance(given, av.VideoFrame):
        if given.format.name in formats:
            return _padded(given) if codec == "libx264" else given
        if not given.format.is_rgb:
            made = converted(given, "yuv420p")
            _tag(made, given)
            return _padded(made) if codec == "libx264" else made
        given = torch.from_numpy(converted(given, "rgb24").to_ndarray())
    pixels = given.cpu().numpy()
    if codec == "ffv1":
        found = converted(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), "bgr0")
        found.colorspace, found.color_range = 0, ColorRange.JPEG
        return found
    odd = ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0))
    found = to_yuv(np.pad(pixels, odd, "edge"), "yuv420p")
    tagged(found, found.height)
    return found


def tag(context: av.VideoCodecContext, frame: av.VideoFrame) -> None:
    """Set a stream's colour metadata to those of its frames."""
    context.colorspace, context.color_range = frame.colorspace, frame.color_range
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc


def _padded(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame whose sides are multiples of the chroma's cells, as H.264 needs them."""
    smallest = min(frame.planes, key=lambda plane: plane.width * plane.height)
    more = (-frame.width % -(-frame.width // smallest.width), -frame.height % -(-frame.height // smallest.height))
    if not any(more):
        return frame
    luma, *chroma = planes_of(frame)
    found = frame_of([np.pad(luma, ((0, more[1]), (0, more[0])), "edge"), *chroma], frame.format.name)
    _tag(found, frame)
    return found


def _range(frame: av.VideoFrame) -> ColorRange:
    return ColorRange.JPEG if frame.format.is_rgb or is_full(frame) else ColorRange.MPEG


def _tag(made: av.VideoFrame, like: av.VideoFrame) -> None:
    """Give a frame the range, matrix, primaries and curve of another, as `to_rgb` reads them."""
    made.color_range = _range(like)
    known = like.format.is_rgb or like.colorspace in MATRICES
    made.colorspace = like.colorspace if known else matrix_tag(like.height)
    made.color_primaries, made.color_trc = like.color_primaries, like.color_trc


def with_edit(frame: av.VideoFrame, edited: Tensor, weights: Feather) -> av.VideoFrame:
    """An edit laid over a frame as it is stored, plane by plane; values outside its feather stay.

    edited: float (3, height, width) in 0..255, upright with square pixels. weights: of the same size.
    """
    size, shown = (frame.height, frame.width), Orientation.of(frame)
    picture = _resized(shown.undone(edited)[None], size)[0].clamp(0, 255)
    inside, rim = (_resized(shown.undone(x)[None, None], size) for x in weights)
    before, after = planes_of(frame), _converted(picture, frame)
    most, mixed = 2 ** frame.format.components[0].bits - 1, []
    for plane, own in zip(before, after, strict=True):
        cells = [-(-side // count) for side, count in zip(size, plane.shape, strict=True)]
        least = -F.max_pool2d(-inside, cells, ceil_mode=True)[0, 0]
        around = F.avg_pool2d(rim, cells, ceil_mode=True, count_include_pad=False)[0, 0]
        source, edit = (torch.from_numpy(x.astype(np.float32))[None] for x in (plane, own))
        made = laid_over(source, edit, Feather(least, around * (least == 0)), SHIFT * most)[0].round().clamp(0, most)
        mixed.append(np.where(least.numpy() > 0, made.numpy().astype(plane.dtype), plane))
    found = frame_of(mixed, frame.format.name.replace("yuvj", "yuv"))
    _tag(found, frame)
    return found


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _converted(picture: Tensor, like: av.VideoFrame) -> list[np.ndarray]:
    """The planes of a picture (3, h, w) in 0..255 in a frame's format, matrix and range."""
    wide = (picture.movedim(0, -1) * 257).round().numpy().astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(wide), format="rgb48le")
    how = {} if like.format.is_rgb else {"dst_colorspace": matrix_of(like), "dst_color_range": _range(like)}
    return planes_of(converted(frame, like.format.name, **how))
