"""Which encoder writes frames to a file, and frames as it takes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange

from ..imports import torch
from .colour import converted, has_alpha, hdr_kind, tagged, to_rgba, to_yuv
from .orientation import Mastering
from .planes import depth_of, frame_of, planes_of, retagged

if TYPE_CHECKING:
    from .write import Frame

_H264 = (".mp4", ".mov", ".mkv")
"""Formats that have H.264."""
ALPHA = {".webm": "libvpx-vp9", ".mkv": "ffv1", ".mov": "prores_ks"}
"""Encoders of transparent frames, by the formats that can be transparent."""
_TRANSPARENT = {"libvpx-vp9": {"yuva420p"}}
"""The transparent formats that an encoder really takes, where it names more."""
_NO_ODD_SIZES = ("libx264", "libx265")
os.environ.setdefault("SVT_LOG", "1")  # only errors of SVT-AV1, which prints on its own


def encoder_for(suffix: str, given: Frame, lossless: bool) -> str:
    """The encoder of a file format for frames like one.

    H.264, or VP9 in WebM; FFV1 for lossless .mkv. HEVC for HDR, AV1 for more than 8 bits in WebM, and VP9 or AV1 for
    odd sizes of stored frames, which H.264 and HEVC lack in 4:2:0. Transparent frames: VP9, FFV1, and ProRes 4444, or
    PNG if lossless.
    """
    plain = "libx264" if suffix in _H264 else "libvpx-vp9"
    if suffix == ".mkv" and lossless:
        return "ffv1"
    if isinstance(given, torch.Tensor):
        return plain
    if has_alpha(given):
        return "png" if suffix == ".mov" and lossless else ALPHA.get(suffix, plain)
    deep, hdr = depth_of(given) > 8 and not given.format.is_rgb, hdr_kind(given) is not None
    found = "libx265" if hdr and plain == "libx264" else plain
    if suffix == ".webm" or (_odd(given) and suffix != ".mov"):
        found = "libsvtav1" if deep else "libvpx-vp9"
    return found if found in av.codecs_available else plain


def encodable(given: Frame, codec: str) -> av.VideoFrame:
    """A frame in a format that a codec takes: its own if possible, else the nearest; padded for H.264 and HEVC."""
    if isinstance(given, torch.Tensor):
        return _of_rgb(given.cpu().numpy(), codec)
    formats = {kind.name for kind in av.Codec(codec, "w").video_formats or ()}
    if has_alpha(given):
        formats = _TRANSPARENT.get(codec, formats)
        return given if given.format.name in formats else _with_alpha(given, codec)
    if given.format.is_rgb and (codec != "ffv1" or given.format.name not in formats):
        return _of_rgb(converted(given, "rgb24").to_ndarray(), codec)
    made = given
    if given.format.name not in formats:
        ten_bits = f"{given.format.name.partition('p')[0]}p10le"
        made = converted(given, ten_bits if depth_of(given) > 8 and ten_bits in formats else "yuv420p")
        retagged(made, given)
    return _padded(made) if codec in _NO_ODD_SIZES else made


def _of_rgb(pixels: np.ndarray, codec: str) -> av.VideoFrame:
    """uint8 RGB (height, width, 3)."""
    if codec == "ffv1":
        found = converted(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), "bgr0")
        found.colorspace, found.color_range = 0, ColorRange.JPEG
        return found
    if codec in _NO_ODD_SIZES:
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), "edge")
    found = to_yuv(pixels, "yuv420p")
    tagged(found, found.height)
    return found


def _with_alpha(given: av.VideoFrame, codec: str) -> av.VideoFrame:
    """A transparent frame in the nearest format."""
    deep, rgb = depth_of(given) > 8, codec in ("ffv1", "png")
    if rgb and not given.format.is_rgb:
        return av.VideoFrame.from_ndarray(to_rgba(given, given.width), format="rgba")
    to = {"ffv1": ("bgra", "gbrap16le")[deep], "png": ("rgba", "rgba64be")[deep], "prores_ks": "yuva444p10le"}
    if rgb or not given.format.is_rgb:
        made = converted(given, to.get(codec, "yuva420p"))
        retagged(made, given)
        return made
    made = to_yuv(given, to.get(codec, "yuva420p"))
    tagged(made, made.height)
    return made


def tag(context: av.VideoCodecContext, frame: av.VideoFrame) -> None:
    """Set a stream's colour metadata to those of its frames."""
    context.colorspace, context.color_range = frame.colorspace, frame.color_range
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc


def _missing(frame: av.VideoFrame) -> tuple[int, int]:
    """Columns and rows that a frame lacks to whole cells of chroma."""
    smallest = min(frame.planes, key=lambda plane: plane.width * plane.height)
    return -frame.width % -(-frame.width // smallest.width), -frame.height % -(-frame.height // smallest.height)


def _padded(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame whose sides are multiples of the chroma's cells, as H.264 and HEVC need them."""
    columns, rows = _missing(frame)
    if not (columns or rows):
        return frame
    luma, *chroma = planes_of(frame)
    found = frame_of([np.pad(luma, ((0, rows), (0, columns)), "edge"), *chroma], frame.format.name)
    retagged(found, frame)
    return found


def _odd(frame: av.VideoFrame) -> bool:
    """Whether H.264 and HEVC lack the size of a frame. RGB becomes 4:2:0."""
    return any((frame.width % 2, frame.height % 2) if frame.format.is_rgb else _missing(frame))


def pads(suffix: str, frame: av.VideoFrame) -> bool:
    """Whether frames like one get a row or column more in a file format, which lacks odd sizes."""
    return encoder_for(suffix, frame, False) in _NO_ODD_SIZES and _odd(frame)


def options(codec: str, crf: int | None, mastering: Mastering | None = None, frames: int = 3) -> dict[str, str]:
    """An encoder's options for a quality of H.264; None for lossless. mastering: of HDR, for HEVC and AV1. frames: the
    clip's number, or 3 for more.
    """
    lossless = crf is None
    if codec in ("ffv1", "png", "prores_ks"):
        return {"ffv1": {"level": "3", "slicecrc": "1"}, "prores_ks": {"profile": "4444"}}.get(codec, {})
    if codec == "libx264":
        return {**({"qp": "0"} if lossless else {"crf": str(crf)}), "preset": "medium", **_steady_x264()}
    if codec == "libx265":
        how = ["log-level=none", "lossless=1" if lossless else f"crf={crf}", *_light(codec, mastering)]
        how += ["bframes=0"] * (frames < 3)  # a busy x265 may give two frames with B-frames no timestamps
        return {"preset": "medium", "x265-params": ":".join(how)}
    if codec == "libsvtav1":
        how = ["lossless=1"] * lossless + _light(codec, mastering)
        quality = {} if lossless else {"crf": str(2 * (crf or 0))}
        return {"preset": "6", **quality, **({"svtav1-params": ":".join(how)} if how else {})}
    return {**({"lossless": "1"} if lossless else {"crf": str(2 * (crf or 0)), "b": "0"}), "row-mt": "1"}


_LIGHT = {
    "libx265": ("master-display", "max-cll", 50000, 10000),
    "libsvtav1": ("mastering-display", "content-light", 1, 1),
}
"""Encoders' names of mastering metadata, and the parts in which they count chromaticities and nits."""


def _light(codec: str, mastering: Mastering | None) -> list[str]:
    """An encoder's parameters for mastering metadata."""
    if mastering is None:
        return []
    display, light, *parts = _LIGHT[codec]
    found = [f"{display}={mastering.described(*parts)}"]
    return found if mastering.light is None else [*found, "{}={},{}".format(light, *mastering.light)]


def _steady_x264() -> dict[str, str]:
    """Options that disable AVX-512 in x264, whose output may vary from run to run with it.

    x264 does not check that the CPU supports `asm`; a CPU with AVX-512 supports AVX2.
    """
    return {"x264-params": "asm=AVX2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}
