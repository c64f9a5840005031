"""Where objects shall be, frame by frame: boxes and ellipses on paths with key frames, or masks."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from .layout_guidance import LayoutGuidance, LayoutSettings, Placed

Form = Literal["box", "ellipse"]
_FINE = 4
"""Points of a pixel's side, of which each counts as in or out of an ellipse."""


@dataclass(frozen=True)
class Stop:
    """A place at a frame: centre, width and height, in shares of the picture. Raises ValueError for none."""

    frame: int
    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        if self.frame < 0:
            raise ValueError(f"a layout's frame is {self.frame}; frames count from 0")
        if not (0 < self.width <= 2 and 0 < self.height <= 2):
            raise ValueError(f"a layout's size is {self.width:g},{self.height:g}; it must be above 0 and at most 2")
        if not (-1 <= self.x <= 2 and -1 <= self.y <= 2):
            raise ValueError(f"a layout's centre is {self.x:g},{self.y:g}; it must be near the picture, 0 to 1")


@dataclass(frozen=True)
class Path:
    """The way of an object: straight and even between stops, still before the first and after the last.

    Raises ValueError for no stop, or two of one frame.
    """

    stops: tuple[Stop, ...]
    form: Form = "box"

    def __post_init__(self) -> None:
        frames = [stop.frame for stop in self.stops]
        if not frames:
            raise ValueError("a layout has no place")
        if frames != sorted(set(frames)):
            raise ValueError(f"a layout's frames are {', '.join(map(str, frames))}; they must rise")

    @classmethod
    def parse(cls, text: str, form: Form = "box") -> Path:
        """From "0:0.1,0.5,0.3; 15:0.7,0.5,0.3": at each frame the centre and size (or width and height), as shares."""
        return cls(tuple(_stop(part) for part in text.split(";") if part.strip()), form)

    def at(self, frame: int) -> Stop:
        """The place at any frame."""
        after = bisect_right([stop.frame for stop in self.stops], frame)
        if after in (0, len(self.stops)):
            return self.stops[max(0, after - 1)]
        a, b = self.stops[after - 1 : after + 1]
        share = (frame - a.frame) / (b.frame - a.frame)
        x, y, width, height = (
            (1 - share) * getattr(a, name) + share * getattr(b, name) for name in ("x", "y", "width", "height")
        )
        return Stop(frame, x, y, width, height)

    def mask(self, frames: int, height: int, width: int) -> Tensor:
        """How much of each pixel is taken: (frames, height, width) in 0..1."""
        draw = _box if self.form == "box" else _ellipse
        return torch.stack([draw(self.at(frame), height, width) for frame in range(frames)])


@dataclass(frozen=True)
class Wanted:
    """An object by its words, and where it shall be: a path, or a mask (frames or 1, height, width) in 0..1."""

    words: str
    where: Path | Tensor

    def mask(self, frames: int, height: int, width: int) -> Tensor:
        """How much of each pixel is taken: (frames, height, width) in 0..1; ValueError for a mask of another clip."""
        if isinstance(self.where, Path):
            return self.where.mask(frames, height, width)
        return GivenMask(self.where).at((height, width), frames)


@dataclass(frozen=True)
class Layout:
    """Objects of a prompt, where they shall be, and how they are brought there.

    Raises ValueError for no object, or words that are not in the prompt.
    """

    prompt: str
    tokenizer: Any
    objects: tuple[Wanted, ...]
    settings: LayoutSettings

    def __post_init__(self) -> None:
        if not self.objects:
            raise ValueError("a layout has no object")
        for wanted in self.objects:
            self._columns(wanted.words, BLOCKS)

    def guidance(self, frames: int, height: int, width: int, text_tokens: int) -> LayoutGuidance:
        """For a clip of so many frames, with targets of a size; ValueError for masks, or a text, that do not fit."""
        first, *more = (
            Placed(wanted.mask(frames, height, width), self._columns(wanted.words, text_tokens))
            for wanted in self.objects
        )
        return LayoutGuidance(target=first.target, columns=first.columns, more=more, **vars(self.settings))

    def _columns(self, words: str, text_tokens: int) -> list[int]:
        pair = PromptEdit(self.prompt, self.prompt, self.tokenizer)
        return pair.token_indices(self.prompt, words, text_tokens, "layout")


BLOCKS = 1 << 30
"""More tokens than any text has."""


def named_path(text: str, form: Form = "box") -> tuple[str, Path]:
    """Words and their path: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3"."""
    words, found, rest = text.partition(":")
    if not found or not words.strip() or words.strip().isdigit():
        raise ValueError(f'layout {text!r} must begin with the words it is for: "burger: 0:0.1,0.5,0.3"')
    return words.strip(), Path.parse(rest, form)


def _stop(text: str) -> Stop:
    frame, _, place = text.partition(":")
    try:
        x, y, width, *height = (float(number) for number in place.split(","))
        if len(height) > 1:
            raise ValueError
        return Stop(int(frame), x, y, width, *(height or [width]))
    except ValueError as error:
        if str(error).startswith("a layout's"):
            raise
        raise ValueError(
            f"layout {text.strip()!r} must be frame:x,y,size or frame:x,y,width,height, such as 0:0.1,0.5,0.3"
        ) from None


def _box(stop: Stop, height: int, width: int) -> Tensor:
    down = _covered(stop.y - stop.height / 2, stop.y + stop.height / 2, height)
    across = _covered(stop.x - stop.width / 2, stop.x + stop.width / 2, width)
    return down[:, None] * across


def _covered(begin: float, end: float, count: int) -> Tensor:
    """How much of each of `count` pixels lies between two shares of a side."""
    left = torch.arange(count, dtype=torch.float64)
    return ((left + 1).clamp(max=end * count) - left.clamp(min=begin * count)).clamp(0, 1).float()


def _ellipse(stop: Stop, height: int, width: int) -> Tensor:
    y, x = ((torch.arange(n * _FINE) + 0.5) / (n * _FINE) for n in (height, width))
    inside = ((y[:, None] - stop.y) / (stop.height / 2)) ** 2 + ((x - stop.x) / (stop.width / 2)) ** 2 <= 1
    return F.avg_pool2d(inside.float()[None], _FINE)[0]
