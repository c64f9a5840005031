"""Colours of video: matrix and range of a file, and tone mapping of HDR."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

_HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
_KNOWN = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601, 7: Colorspace.SMPTE240M}
_BT2020 = (9, 10)
MATRICES = (*_KNOWN, *_BT2020)
"""The matrices that files name and players know; others are read as `matrix_for` says."""
WHITE = 203.0
"""Nits of HDR reference white (ITU-R BT.2408), mapped to SDR white."""
PEAK = 1000.0
"""Nits mapped to SDR's maximum."""
_BT2020_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Linear light, ITU-R BT.2087."""
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
"""Of linear light in BT.2020."""


_ONE_THREAD = {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}
"""Several threads of swscale change pixels from run to run where their parts meet; older PyAV has one thread."""


def converted(frame: av.VideoFrame, format: str, **how: Any) -> av.VideoFrame:
    """A frame in another format, with further arguments of PyAV's `reformat`; the same bits in every run."""
    return frame.reformat(format=format, **how, **_ONE_THREAD)


def hdr_kind(frame: av.VideoFrame) -> str | None:
    """PQ or HLG for an HDR frame, else None."""
    return _HDR.get(int(frame.color_trc))


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether a frame has an alpha channel."""
    return any(component.is_alpha for component in frame.format.components)


def shows_through(frame: av.VideoFrame) -> bool:
    """Whether a frame is transparent somewhere; GIFs are always decoded with alpha."""
    return has_alpha(frame) and bool((to_rgba(frame, frame.width)[..., 3] < 255).any())


def over(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Straight-alpha uint8 RGBA (height, width, 4), composited over a colour: RGB."""
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + np.array(background, np.uint16) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def to_rgb(frame: av.VideoFrame, width: int, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """A frame as uint8 RGB (height, width, 3), scaled to a width where its pixels are not square.

    Alpha is composited over the background. Matrix and range are the file's; if it gives none, BT.709 from 720 lines
    on and BT.601 below, like players. HDR is tone-mapped.
    """
    kind = hdr_kind(frame)
    how = _how(frame, width)
    if has_alpha(frame):
        return over(_rgba(frame, kind, how), background)
    if kind is None:
        return converted(frame, "rgb24", **how).to_ndarray()
    return tone_mapped(converted(frame, "rgb48le", **how).to_ndarray(), kind)


def to_rgba(frame: av.VideoFrame, width: int) -> np.ndarray:
    """A frame with an alpha channel as straight-alpha uint8 RGBA (height, width, 4), see `to_rgb`."""
    return _rgba(frame, hdr_kind(frame), _how(frame, width))


def _rgba(frame: av.VideoFrame, kind: str | None, how: dict[str, Any]) -> np.ndarray:
    pixels = converted(frame, "rgba64le" if kind else "rgba", **how).to_ndarray()
    if not kind:
        return pixels
    return np.concatenate([tone_mapped(pixels[..., :3], kind), (pixels[..., 3:] // 256).astype(np.uint8)], -1)


def _how(frame: av.VideoFrame, width: int) -> dict[str, Any]:
    """How a frame is converted to RGB of a width."""
    how: dict[str, Any] = {"interpolation": Interpolation.BICUBIC, "width": width} if width != frame.width else {}
    if not frame.format.is_rgb:
        how |= {
            "src_colorspace": matrix_of(frame),
            "src_color_range": ColorRange.JPEG if is_full(frame) else ColorRange.MPEG,
            "dst_color_range": ColorRange.JPEG,
        }
    return how


def is_full(frame: av.VideoFrame) -> bool:
    """Whether a frame's values have full range."""
    return int(frame.color_range) == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def matrix_of(frame: av.VideoFrame) -> Colorspace:
    """The matrix by which a frame is shown."""
    matrix = int(frame.colorspace)
    if matrix in _BT2020:
        return Colorspace.BT2020
    return _KNOWN.get(matrix, matrix_for(frame.height))


def matrix_for(height: int) -> Colorspace:
    """The matrix that players assume for this height."""
    return Colorspace.ITU709 if height >= 720 else Colorspace.ITU601


def matrix_tag(height: int) -> int:
    """The number of `matrix_for` in a file's metadata."""
    return 1 if matrix_for(height) == Colorspace.ITU709 else 6  # BT.709, SMPTE 170M


def to_yuv(pixels: np.ndarray | av.VideoFrame, format: str) -> av.VideoFrame:
    """RGB, uint8 (height, width, 3) or a frame, as a frame of limited range, with the matrix of `matrix_for`."""
    if isinstance(pixels, np.ndarray):
        pixels = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    matrix = matrix_for(pixels.height)
    return converted(pixels, format, dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)


def tagged(frame: av.VideoFrame, height: int) -> None:
    """Set a frame's colour metadata to that of `to_yuv`."""
    high = matrix_for(height) == Colorspace.ITU709
    frame.colorspace, frame.color_range = matrix_tag(height), ColorRange.MPEG
    frame.color_primaries = ColorPrimaries.BT709 if high else ColorPrimaries.SMPTE170M
    frame.color_trc = ColorTrc.BT709 if high else ColorTrc.SMPTE170M


# --- high dynamic range ---------------------------------------------------------------


def tone_mapped(pixels: np.ndarray, kind: str) -> np.ndarray:
    """uint16 RGB of PQ or HLG in BT.2020 to uint8 SDR RGB in BT.709.

    In units of reference white, light up to 0.6 is unchanged; above it, Reinhard's extended curve maps 1000 nits to 1.
    The curve is applied to the largest of the three channels, which preserves hues.
    """
    light = _light(kind)[pixels]
    if kind == "HLG":  # the system gamma of a display of 1000 nits acts on luminance (ITU-R BT.2100)
        light *= np.maximum(light @ _LUMINANCE, 1e-6)[..., None] ** 0.2
        light *= PEAK / WHITE
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    brightest = light.max(-1, keepdims=True)
    light *= _compressed(brightest) / np.maximum(brightest, 1e-6)
    return (np.clip(light, 0, 1) ** (1 / 2.4) * 255 + 0.5).astype(np.uint8)


_KNEE, _TOP = 0.6, (PEAK / WHITE - 0.6) / 0.4


def _compressed(x: np.ndarray) -> np.ndarray:
    over = np.maximum(x - _KNEE, 0) / (1 - _KNEE)
    return np.minimum(x, _KNEE) + (1 - _KNEE) * over * (1 + over / _TOP**2) / (1 + over)


def _expanded(x: np.ndarray) -> np.ndarray:
    """The inverse of `_compressed`."""
    y = np.maximum(x - _KNEE, 0) / (1 - _KNEE)
    over = _TOP**2 / 2 * (np.sqrt((1 - y) ** 2 + 4 * y / _TOP**2) - (1 - y))
    return np.minimum(x, _KNEE) + (1 - _KNEE) * over


def to_hdr(pixels: np.ndarray, kind: str) -> np.ndarray:
    """SDR RGB in BT.709, float in 0..255, as uint16 RGB of PQ or HLG in BT.2020: the inverse of `tone_mapped`."""
    light = (pixels.astype(np.float32) / 255) ** 2.4
    brightest = light.max(-1, keepdims=True)
    light *= _expanded(brightest) / np.maximum(brightest, 1e-6)
    light = np.maximum(light @ np.linalg.inv(_BT2020_TO_BT709).T, 0)
    if kind == "HLG":
        light *= WHITE / PEAK
        light *= np.maximum(light @ _LUMINANCE, 1e-6)[..., None] ** (1 / 1.2 - 1)
    return np.interp(light, _light(kind), np.arange(65536)).round().astype(np.uint16)


@lru_cache
def _light(kind: str) -> np.ndarray:
    """The light of every 16-bit value (ITU-R BT.2100): PQ in reference whites, HLG as scene light in 0..1."""
    x = np.arange(65536, dtype=np.float64) / 65535
    if kind == "PQ":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = x ** (1 / m2)
        nits = 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
        return (nits / WHITE).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12).astype(np.float32)
