"""Where objects shall be, frame by frame: boxes and ellipses on paths with key frames, or masks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from ..diffusion.parts import Edit, check_needs_unet
from ..imports import F, torch
from .layout_guidance import LayoutGuidance, LayoutSettings, Placed

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["box", "ellipse"]
_ANY_LENGTH = 1 << 30
"""More tokens than any text has."""
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
        _check_frame(self.frame)
        if not (0 < self.width <= 2 and 0 < self.height <= 2):
            raise ValueError(f"a layout's size is {self.width:g},{self.height:g}; it must be above 0 and at most 2")
        if not (-1 <= self.x <= 2 and -1 <= self.y <= 2):
            raise ValueError(f"a layout's centre is {self.x:g},{self.y:g}; it must be near the picture, 0 to 1")


@dataclass(frozen=True)
class Move:
    """How far from its place an object is at a frame, in shares of the picture, and its growth. ValueError for none."""

    frame: int
    x: float
    y: float
    growth: float = 1.0

    def __post_init__(self) -> None:
        _check_frame(self.frame)
        if not 0.1 <= self.growth <= 10:
            raise ValueError(f"a layout's growth is {self.growth:g}; it must be from 0.1 to 10")
        if not (abs(self.x) <= 2 and abs(self.y) <= 2):
            raise ValueError(f"a layout's shift is {self.x:g},{self.y:g}; it must be in shares of the picture, to 2")


def _check_frame(frame: int) -> None:
    if frame < 0:
        raise ValueError(f"a layout's frame is {frame}; frames count from 0")


S = TypeVar("S", Stop, Move)


def _between(stops: Sequence[S], frame: int) -> S:
    """A stop at any frame: even between stops, still before the first and after the last."""
    after = bisect_right([stop.frame for stop in stops], frame)
    if after in (0, len(stops)):
        return stops[max(0, after - 1)]
    a, b = stops[after - 1 : after + 1]
    share = (frame - a.frame) / (b.frame - a.frame)
    mixed = {
        one.name: (1 - share) * getattr(a, one.name) + share * getattr(b, one.name)
        for one in fields(a)
        if one.name != "frame"
    }
    return replace(a, frame=frame, **mixed)


def _check_rising(stops: Sequence[S]) -> None:
    frames = [stop.frame for stop in stops]
    if not frames:
        raise ValueError("a layout has no place")
    if frames != sorted(set(frames)):
        raise ValueError(f"a layout's frames are {', '.join(map(str, frames))}; they must rise")


@dataclass(frozen=True)
class Path:
    """The way of an object: straight and even between stops, still before the first and after the last.

    Raises ValueError for no stop, or two of one frame.
    """

    stops: tuple[Stop, ...]
    form: Form = "box"

    def __post_init__(self) -> None:
        _check_rising(self.stops)

    @classmethod
    def parse(cls, text: str, form: Form = "box") -> Path:
        """From "0:0.1,0.5,0.3; 15:0.7,0.5,0.3": at each frame the centre and size (or width and height), as shares."""
        return cls(tuple(_stop(part) for part in text.split(";") if part.strip()), form)

    def at(self, frame: int) -> Stop:
        """The place at any frame."""
        return _between(self.stops, frame)

    def mask(self, frames: int, height: int, width: int) -> Tensor:
        """How much of each pixel is taken: (frames, height, width) in 0..1."""
        draw = _box if self.form == "box" else _ellipse
        return torch.stack([draw(self.at(frame), height, width) for frame in range(frames)])


@dataclass(frozen=True)
class Shift:
    """How an object of a clip is moved from where it is: even between stops, as a `Path`, with its errors."""

    stops: tuple[Move, ...]

    def __post_init__(self) -> None:
        _check_rising(self.stops)

    @classmethod
    def parse(cls, text: str) -> Shift:
        """From "0:0.2,0; 15:0.2,-0.1,1.5": at each frame how far right and down, as shares, and the growth."""
        return cls(tuple(_move(part) for part in text.split(";") if part.strip()))

    def at(self, frame: int) -> Move:
        """The shift at any frame."""
        return _between(self.stops, frame)


@dataclass(frozen=True)
class Wanted:
    """An object by its words, and where it shall be: a path, or a mask (frames or 1, height, width) in 0..1.

    Of an edit also a shift; source: a mask of where it is in the clip, (frames or 1, height, width).
    """

    words: str
    where: Path | Shift | Tensor
    source: Tensor | None = None

    def mask(self, frames: int, height: int, width: int) -> Tensor:
        """How much of each pixel is taken: (frames, height, width) in 0..1.

        Raises ValueError for a mask of another clip, and for a shift, which is from somewhere.
        """
        if isinstance(self.where, Shift):
            raise ValueError(f"{self.words!r} is shifted from where it is, and a new clip has it nowhere: give a place")
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
            self.columns(wanted.words, _ANY_LENGTH)

    keeps_rest = True

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """See `diffusion.parts.Layouts`; where objects are is known only in a clip (`moves_of`)."""
        check_needs_unet("A layout", spans_clip)

    def guidance(self, frames: int, height: int, width: int, text_tokens: int) -> LayoutGuidance:
        """For a clip of so many frames, with targets of a size; ValueError for masks, or a text, that do not fit."""
        placed = [
            Placed(wanted.mask(frames, height, width), self.columns(wanted.words, text_tokens))
            for wanted in self.objects
        ]
        return LayoutGuidance.of(placed, self.settings)

    def columns(self, words: str, text_tokens: int, prompt: str | None = None) -> list[int]:
        """The tokens of some words in the layout's prompt, or another; ValueError where they are not in it."""
        prompt = self.prompt if prompt is None else prompt
        return PromptEdit(prompt, prompt, self.tokenizer).token_indices(prompt, words, text_tokens, "layout")


def named_path(text: str, form: Form | Literal["shift"] = "box") -> tuple[str, Path | Shift]:
    """Words and their way: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3", or of a shift "burger: 0:0.2,0"."""
    words, found, rest = text.partition(":")
    if not found or not words.strip() or words.strip().isdigit():
        raise ValueError(f'layout {text!r} must begin with the words it is for: "burger: 0:0.1,0.5,0.3"')
    return words.strip(), Shift.parse(rest) if form == "shift" else Path.parse(rest, form)


def _stop(text: str) -> Stop:
    frame, (x, y, width, *height) = _numbers(text, (3, 4), "frame:x,y,size or frame:x,y,width,height", "0:0.1,0.5,0.3")
    return Stop(frame, x, y, width, *(height or [width]))


def _move(text: str) -> Move:
    frame, found = _numbers(text, (2, 3), "frame:right,down or frame:right,down,growth", "0:0.2,0")
    return Move(frame, *found)


def _numbers(text: str, counts: tuple[int, ...], form: str, example: str) -> tuple[int, list[float]]:
    frame, _, place = text.partition(":")
    try:
        found = [float(number) for number in place.split(",")]
        if len(found) not in counts:
            raise ValueError
        return int(frame), found
    except ValueError:
        raise ValueError(f"layout {text.strip()!r} must be {form}, such as {example}") from None


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
