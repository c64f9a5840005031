"""Rotation and mirroring of stored pictures."""

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
    side_data: Any = frame.side_data  # PyAV types its items as strings
    found = next((bytes(one) for one in side_data if one.type.name == "DISPLAYMATRIX"), None)
    return None if found is None or len(found) < 36 else struct.unpack("=9i", found[:36])


@dataclass(frozen=True)
class Display:
    """How stored frames are shown. aspect: width of a pixel by its height. matrix: see `display_matrix`."""

    aspect: Fraction = Fraction(1)
    matrix: tuple[int, ...] | None = None


SQUARE = Display()
