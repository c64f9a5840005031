"""Frames of picture files: one per file, or all of an animation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..imports import Image, ImageOps, av, np
from .pictures import VideoError

if TYPE_CHECKING:
    from .write import Frame

TRANSPARENT = (".png", ".webp")
"""Formats of pictures that may be transparent."""
_ORIENTATION = 0x0112
"""The EXIF orientation tag."""
_ANIMATED = ("PNG", "WEBP", "AVIF", "TIFF")
"""Formats that may contain a clip; the second picture of a JPEG is a preview or a depth map."""
_PAGE = Fraction(1, 8)
"""Seconds per page of a TIFF, which has no times."""
_NO_DELAY = Fraction(1, 10)
"""Seconds that browsers show a frame of (nearly) zero duration."""
Colour = tuple[int, int, int]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except VideoError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is not a readable picture: {error}") from error


def _size(image: Image.Image) -> tuple[int, int]:
    return image.size[::-1] if image.getexif().get(_ORIENTATION, 1) >= 5 else image.size


def pictures_size(path: Path, pictures: Sequence[Path]) -> tuple[int, int]:
    """Width and height of all pictures, upright; VideoError if they differ."""
    sizes = set()
    for picture in pictures:
        with _opened(picture) as image:
            sizes.add(_size(image))
    if len(sizes) > 1:
        raise VideoError(f"the pictures in {path} differ in size")
    return sizes.pop()


def pictures_of(
    pictures: Sequence[Path], indices: Sequence[int], background: Colour = (0, 0, 0)
) -> Iterator[np.ndarray]:
    """Some pictures of a sequence or of one file: uint8 RGB (height, width, 3)."""
    if len(pictures) > 1 or max(indices) == 0:
        yield from (read_picture(pictures[i], background) for i in indices)
        return
    with _opened(pictures[0]) as image:
        for i in indices:
            image.seek(i + _first(image))
            yield _rgb(image, pictures[0], background)


def read_picture(path: Path, background: Colour = (0, 0, 0)) -> np.ndarray:
    """A picture as uint8 RGB (height, width, 3), turned upright by its EXIF, over a background."""
    with _opened(path) as image:
        image.seek(_first(image))
        return _rgb(image, path, background)


# --- with all of their values -----------------------------------------------------------------


def stored_pictures(pictures: Sequence[Path], indices: Sequence[int]) -> Iterator[av.VideoFrame]:
    """Some pictures, as `pictures_of`, in planes of red, green and blue, of 16 bits or with alpha if any has that."""
    deep, clear = (any(kinds) for kinds in zip(*map(_kind, pictures), strict=True))
    form = f"gbr{'a' * clear}p{'16le' * deep}"
    for i in indices:
        path = pictures[i] if len(pictures) > 1 else pictures[0]
        with _opened(path) as image:
            image.seek(_first(image) + (0 if len(pictures) > 1 else i))
            yield _in_planes(image, path, form)


def _kind(path: Path) -> tuple[bool, bool]:
    """Whether a picture has more than 8 bits, and whether it is transparent."""
    with _opened(path) as image:
        coded = str(getattr(image, "tile", ()))  # names the mode of the file, such as RGB;16B
        return ";16" in coded and image.getexif().get(_ORIENTATION, 1) == 1, _is_clear(image)


def _in_planes(image: Image.Image, path: Path, form: str) -> av.VideoFrame:
    from .colour import converted

    if "16" in form and _kind(path)[0]:
        with av.open(f"file:{path}") as file:  # Pillow reads 8 bits of each colour
            return converted(next(file.decode(video=0)), form)
    upright = ImageOps.exif_transpose(image)
    pixels = np.asarray(upright.convert("RGBA")) if _is_clear(upright) else _rgb(upright, path, (0, 0, 0))
    mode = "rgba" if pixels.shape[2] == 4 else "rgb24"
    return converted(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=mode), form)


def save_frame(frame: Frame, path: Path) -> None:
    """Save a frame as a picture: transparent ones as RGBA, and RGB of 16 bits as such in PNG."""
    from .colour import has_alpha
    from .planes import depth_of

    if (
        isinstance(frame, av.VideoFrame)
        and frame.format.is_rgb
        and depth_of(frame) > 8
        and path.suffix.lower() == ".png"
    ):
        path.write_bytes(_png(frame, "rgba64be" if has_alpha(frame) else "rgb48be"))
    else:
        Image.fromarray(pixels_of(frame)).save(path, quality=95)


def pixels_of(frame: Frame) -> np.ndarray:
    """A frame as uint8 RGB or RGBA (height, width, 3 or 4)."""
    from .colour import converted, has_alpha

    if isinstance(frame, av.VideoFrame):
        return converted(frame, "rgba" if has_alpha(frame) else "rgb24").to_ndarray()
    return frame.cpu().numpy()


def _png(frame: av.VideoFrame, form: str) -> bytes:
    from .colour import converted

    context = cast(av.VideoCodecContext, av.CodecContext.create("png", "w"))
    context.width, context.height, context.pix_fmt = frame.width, frame.height, form
    context.time_base = Fraction(1, 25)
    return b"".join(map(bytes, [*context.encode(converted(frame, form)), *context.encode(None)]))


# --- several in one file ----------------------------------------------------------------------


@dataclass(frozen=True)
class Animation:
    """A picture file with a clip. times: of each frame, in seconds."""

    size: tuple[int, int]
    times: tuple[Fraction, ...]
    fps: Fraction

    @classmethod
    def of(cls, path: Path) -> Animation | None:
        """None for a single picture, and for pages of several sizes, where the others are smaller copies."""
        with _opened(path) as image:
            count, first = getattr(image, "n_frames", 1), _first(image)
            if image.format not in _ANIMATED or count - first < 2:
                return None
            sizes, seconds = set(), []
            for i in range(first, count):
                image.seek(i)
                if image.format != "TIFF":
                    image.load()  # some formats give a frame's time only with its pixels
                sizes.add(_size(image))
                seconds.append(_seconds(image))
        if len(sizes) > 1:
            return None
        times = tuple(accumulate(seconds, initial=Fraction(0)))
        return cls(sizes.pop(), times[:-1], (len(seconds) / times[-1]).limit_denominator(1001))


def _first(image: Image.Image) -> int:
    """The first frame's number: an animated PNG may start with a picture for programs without animation."""
    return 1 if getattr(image, "default_image", False) else 0


def _seconds(image: Image.Image) -> Fraction:
    if image.format == "TIFF":
        return _PAGE
    duration = Fraction(image.info.get("duration", 0)).limit_denominator(1000) / 1000
    return duration if duration > Fraction(1, 100) else _NO_DELAY


# --- pixel values -----------------------------------------------------------------------------


def _rgb(image: Image.Image, path: Path, background: Colour) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        return _grey(255 * _within(np.asarray(upright), 2, path, "floats", "0 to 1"))
    if upright.mode.startswith("I"):
        return _grey(_within(np.asarray(upright).astype(np.float32), 65535, path, "whole numbers", "0 to 65535") / 257)
    if _is_clear(upright):
        from .colour import over

        return over(np.asarray(upright.convert("RGBA")), background)
    return np.array(upright.convert("RGB"))


def _is_clear(image: Image.Image) -> bool:
    return image.mode.endswith(("A", "a")) or "transparency" in image.info


def _within(values: np.ndarray, most: float, path: Path, what: str, expected: str) -> np.ndarray:
    """The values; VideoError if their range is not the expected one."""
    if not np.isfinite(values).all() or values.max() > most:
        raise VideoError(f"{path} has {what} up to {values.max():g}: scale them to {expected}")
    return values


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat((np.clip(values, 0, 255) + 0.5).astype(np.uint8)[..., None], 3, axis=2)
