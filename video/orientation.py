"""How stored pictures are shown: rotation, mirroring, the shape of a pixel and the light of their master."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..imports import av, np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """One of eight: transpose (`on_its_side`), then flip left and right (`mirrored`), then top and bottom."""

    on_its_side: bool = False
    mirrored: bool = False
    upside_down: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """From a frame's display matrix: x' = a x + c y, y' = b x + d y."""
        matrix = display_matrix(frame)
        if matrix is None:
            return cls()
        a, b, _, c, d = matrix[:5]
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def applied(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (height, width, 3), upright."""
        pixels = pixels.swapaxes(0, 1) if self.on_its_side else pixels
        pixels = pixels[:, ::-1] if self.mirrored else pixels
        return np.ascontiguousarray(pixels[::-1] if self.upside_down else pixels)

    def undone(self, x: Tensor) -> Tensor:
        """The inverse of `applied`, of (..., height, width)."""
        x = x.flip(-2) if self.upside_down else x
        x = x.flip(-1) if self.mirrored else x
        return x.transpose(-1, -2) if self.on_its_side else x


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The nine numbers by which a frame is turned and mirrored."""
    found = _side_data(frame, "DISPLAYMATRIX")
    return None if len(found) < 36 else struct.unpack("=9i", found[:36])


def _side_data(frame: av.VideoFrame, name: str) -> bytes:
    """What a file says of a frame beside its pixels; empty if nothing."""
    kinds: Any = frame.side_data  # PyAV types its items as strings
    return next((bytes(one) for one in kinds if one.type.name == name), b"")


@dataclass(frozen=True)
class Mastering:
    """The display on which HDR was mastered (SMPTE ST 2086), and its content's light (CTA-861.3).

    red, green, blue, white: chromaticities x and y. nits: the display's least and greatest luminance. light: the
    brightest pixel and the highest mean of a frame, in nits; None if the file does not give them.
    """

    red: tuple[Fraction, Fraction]
    green: tuple[Fraction, Fraction]
    blue: tuple[Fraction, Fraction]
    white: tuple[Fraction, Fraction]
    nits: tuple[Fraction, Fraction]
    light: tuple[int, int] | None = None

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Mastering | None:
        """From a frame's metadata (FFmpeg's AVMasteringDisplayMetadata); None if it lacks colours or luminance."""
        display, light = _side_data(frame, "MASTERING_DISPLAY_METADATA"), _side_data(frame, "CONTENT_LIGHT_LEVEL")
        if len(display) < 88 or not all(struct.unpack("=2i", display[80:88])):
            return None
        parts = [Fraction(*pair) if pair[1] else Fraction(0) for pair in struct.iter_unpack("=2i", display[:80])]
        red, green, blue, white, nits = zip(parts[::2], parts[1::2], strict=True)
        return cls(red, green, blue, white, nits, struct.unpack("=2I", light[:8]) if len(light) >= 8 else None)

    def described(self, colour: int = 1, light: int = 1) -> str:
        """As encoders take it: G(x,y)B(x,y)R(x,y)WP(x,y)L(greatest,least). colour, light: parts of their units."""
        names = {"G": self.green, "B": self.blue, "R": self.red, "WP": self.white}
        written = [(name, x * colour, y * colour) for name, (x, y) in names.items()]
        written.append(("L", self.nits[1] * light, self.nits[0] * light))
        return "".join(f"{name}({_number(x, colour)},{_number(y, colour)})" for name, x, y in written)


def _number(x: Fraction, parts: int) -> str:
    return str(round(x)) if parts > 1 else f"{float(x):.5f}"


@dataclass(frozen=True)
class Display:
    """How stored frames are shown. aspect: width of a pixel by its height. matrix: see `display_matrix`."""

    aspect: Fraction = Fraction(1)
    matrix: tuple[int, ...] | None = None
    mastering: Mastering | None = None


SQUARE = Display()
