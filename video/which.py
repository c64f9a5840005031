"""Settings for choosing and cropping a video's frames."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..settings import setting

Moment = int | str
"""A frame by its number, or a time: "2.5s" or "1:02.5"."""
GROUP = "Which frames"


@dataclass(frozen=True)
class ClipSettings:
    """Which frames of a video to use, and how to crop them."""

    start: int | str = setting(0, "First frame, a number from 0 or a time: 48, 2.5s, 1:02.", least=0, group=GROUP)
    end: int | str | None = setting(None, "Frame or time to stop before.", shown="the end", group=GROUP)
    stride: int = setting(1, "Use every Nth frame.", least=1, most=1000, group=GROUP)
    count: int | None = setting(
        None,
        "Number of frames. Fails if the video has fewer; 0 uses all that follow.",
        least=0, most=100_000, shown="all", group=GROUP,
    )  # fmt: skip
    fps: float | None = setting(
        None, "Resample a video to this rate; for pictures, their rate.", shown="its own; pictures: 8",
        unit="frames per second", group=GROUP,
    )  # fmt: skip
    crop: tuple[int, int, int, int] = setting(
        (0, 0, 0, 0), "Pixels to crop: left,top,right,bottom.", unit="pixels", shown="0,0,0,0", group=GROUP
    )
    size: tuple[int, int] | None = setting(
        None, "Size to edit at, WIDTHxHEIGHT.", unit="pixels", shown="short side as the model's", group=GROUP
    )

    background: str = setting("black", "Colour behind transparent pixels: a name or #rrggbb.", group=GROUP)

    @property
    def frame_rate(self) -> Fraction | None:
        """`fps` as a fraction; 29.97 gives 30000/1001, likewise 23.976 and 59.94."""
        if self.fps is None:
            return None
        whole = round(self.fps)
        return Fraction(1000 * whole, 1001) if abs(self.fps - whole / 1.001) < 5e-4 else Fraction(str(self.fps))


def colour_of(text: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour name or "#rrggbb"; ValueError for anything else."""
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ValueError(f"unknown colour {text!r}: use a name such as white, or #rrggbb") from None
    return red, green, blue


def seconds_of(text: str) -> Fraction:
    """Seconds of a time such as "2.5s", "1:02" or "1:00:02.5"; ValueError for anything else."""
    found = re.fullmatch(r"(?:(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)s)", text.strip())
    if not found:
        raise ValueError(f"invalid time {text!r}: use a frame number, or a time such as 2.5s or 1:02.5")
    hours, minutes, seconds, plain = found.groups()
    return Fraction(plain) if plain else 3600 * int(hours or 0) + 60 * int(minutes) + Fraction(seconds)
