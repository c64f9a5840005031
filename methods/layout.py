"""Layouts: where objects should be in each frame, as boxes or ellipses on paths with stops, or as masks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from ..diffusion.parts import Edit, check_needs_unet
from ..imports import F, torch
from .layout_guidance import LayoutGuidance, LayoutSettings, ObjectTarget
from .own_attention import OwnLayout, OwnTarget

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["box", "ellipse"]
_ANY_LENGTH = 1 << 30
"""A number of tokens above that of any text."""
_FINE = 4
"""Supersampling of ellipses, in points per pixel side."""


@dataclass(frozen=True)
class Stop:
    """A place at a frame: centre, width and height, as shares of the frame's size. Raises ValueError out of range."""

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
    """An object's shift at a frame, as shares of the frame's size, and growth. Raises ValueError out of range."""

    frame: int
    x: float
    y: float
    growth: float = 1.0

    def __post_init__(self) -> None:
        _check_frame(self.frame)
        if not 0.1 <= self.growth <= 10:
            raise ValueError(f"a layout's growth is {self.growth:g}; it must be from 0.1 to 10")
        if not (abs(self.x) <= 2 and abs(self.y) <= 2):
            raise ValueError(
                f"a layout's shift is {self.x:g},{self.y:g}; it must be from -2 to 2 (shares of the frame)"
            )


def _check_frame(frame: int) -> None:
    if frame < 0:
        raise ValueError(f"a layout's frame is {frame}; it must be at least 0")


S = TypeVar("S", Stop, Move)


def _between(stops: Sequence[S], frame: int) -> S:
    """The stop at any frame: linear between stops, constant before the first and after the last."""
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


def _check_increasing(stops: Sequence[S]) -> None:
    frames = [stop.frame for stop in stops]
    if not frames:
        raise ValueError("a layout needs at least one stop")
    if frames != sorted(set(frames)):
        raise ValueError(f"a layout's frames are {', '.join(map(str, frames))}; they must be increasing")


@dataclass(frozen=True)
class Path:
    """The path of an object: linear between stops, constant before the first and after the last.

    Raises ValueError for no stops, or two at one frame.
    """

    stops: tuple[Stop, ...]
    form: Form = "box"

    def __post_init__(self) -> None:
        _check_increasing(self.stops)

    @classmethod
    def parse(cls, text: str, form: Form = "box") -> Path:
        """Parse "0:0.1,0.5,0.3; 15:0.7,0.5,0.3": frame:x,y,size or frame:x,y,width,height, as shares of the frame."""
        return cls(tuple(_stop(part) for part in text.split(";") if part.strip()), form)

    def at(self, frame: int) -> Stop:
        """The place at any frame."""
        return _between(self.stops, frame)

    def mask(self, frames: int, height: int, width: int) -> Tensor:
        """The coverage of each pixel: (frames, height, width) in 0..1."""
        render = _box if self.form == "box" else _ellipse
        return torch.stack([render(self.at(frame), height, width) for frame in range(frames)])


@dataclass(frozen=True)
class Shift:
    """A shift of an object from its place in the clip, interpolated like a `Path`, with the same errors."""

    stops: tuple[Move, ...]

    def __post_init__(self) -> None:
        _check_increasing(self.stops)

    @classmethod
    def parse(cls, text: str) -> Shift:
        """Parse "0:0.2,0; 15:0.2,-0.1,1.5": frame:right,down or frame:right,down,growth, as shares of the frame."""
        return cls(tuple(_move(part) for part in text.split(";") if part.strip()))

    def at(self, frame: int) -> Move:
        """The shift at any frame."""
        return _between(self.stops, frame)


APPEARANCE = "appearance: has an effect only with a shift or swap in a new clip: set it to 0"


@dataclass(frozen=True)
class Swap:
    """The place of another object in the clip without guidance. words: that object's."""

    words: str


@dataclass(frozen=True)
class LayoutObject:
    """An object's words, and where it should be: a path, a shift, or a mask (frames or 1, height, width) in 0..1.

    In a new clip also a swap; source: in an edit, a mask of its place in the clip, (frames or 1, height, width).
    """

    words: str
    where: Path | Shift | Swap | Tensor
    source: Tensor | None = None

    def mask(self, frames: int, height: int, width: int) -> Tensor:
        """The coverage of each pixel: (frames, height, width) in 0..1.

        Raises ValueError for a mask with another number of frames, and for a shift or swap, which have none.
        """
        if isinstance(self.where, (Shift, Swap)):
            raise ValueError(f"{self.words!r}: a shift or swap has no mask")
        if isinstance(self.where, Path):
            return self.where.mask(frames, height, width)
        return GivenMask(self.where).at((height, width), frames)


@dataclass(frozen=True)
class Layout:
    """Objects of a prompt, where they should be, and the guidance's settings.

    Raises ValueError for no objects, or words that are not in the prompt.
    """

    prompt: str
    tokenizer: Any
    objects: tuple[LayoutObject, ...]
    settings: LayoutSettings

    def __post_init__(self) -> None:
        if not self.objects:
            raise ValueError("a layout needs at least one object")
        for one in self.objects:
            self.columns(one.words, _ANY_LENGTH)
            if isinstance(one.where, Swap):
                self.columns(one.where.words, _ANY_LENGTH)

    keeps_rest = True

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """See `diffusion.parts.Layouts`; where objects are is known only in a clip (`moves_of`)."""
        check_needs_unet("A layout", spans_clip)

    def guidance(self, frames: int, height: int, width: int, text_tokens: int) -> LayoutGuidance | OwnLayout:
        """The guidance of a clip, with targets of height x width; ValueError for masks or a text that do not fit."""
        own: list[OwnTarget] = []
        fixed: list[ObjectTarget] = []
        for one in self.objects:
            columns = self.columns(one.words, text_tokens)
            if isinstance(one.where, Swap):
                own.append(OwnTarget(columns, self.columns(one.where.words, text_tokens)))
            elif isinstance(one.where, Shift):
                own.append(OwnTarget(columns, one.where))
            else:
                fixed.append(ObjectTarget(one.mask(frames, height, width), columns))
        if self.settings.appearance and not own:
            raise ValueError(APPEARANCE)
        if not own:
            return LayoutGuidance.of(fixed, self.settings)
        return OwnLayout(own=own, fixed=fixed, **self.settings.values())

    def columns(self, words: str, text_tokens: int, prompt: str | None = None) -> list[int]:
        """The columns of some words in the layout's prompt, or another; ValueError for words that are not in it."""
        prompt = self.prompt if prompt is None else prompt
        return PromptEdit(prompt, prompt, self.tokenizer).token_indices(prompt, words, text_tokens, "layout")


def named_path(text: str, form: Form | Literal["shift", "swap"] = "box") -> tuple[str, Path | Shift | Swap]:
    """Words and their path: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3", their shift: "burger: 0:0.2,0", or the object
    whose place they take: "burger: plate".
    """
    words, colon, rest = text.partition(":")
    if not colon or not words.strip() or words.strip().isdigit():
        raise ValueError(f'layout {text!r} must start with an object of the prompt: "burger: 0:0.1,0.5,0.3"')
    if form == "swap":
        if not rest.strip():
            raise ValueError(f'layout {text!r} must name the object whose place it takes: "burger: plate"')
        return words.strip(), Swap(rest.strip())
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
        raise ValueError(f"layout {text.strip()!r} must be {form}, e.g. {example}") from None


def _box(stop: Stop, height: int, width: int) -> Tensor:
    down = _covered(stop.y - stop.height / 2, stop.y + stop.height / 2, height)
    across = _covered(stop.x - stop.width / 2, stop.x + stop.width / 2, width)
    return down[:, None] * across


def _covered(begin: float, end: float, count: int) -> Tensor:
    """The coverage of each of `count` pixels by an interval, given as shares of the side."""
    left = torch.arange(count, dtype=torch.float64)
    return ((left + 1).clamp(max=end * count) - left.clamp(min=begin * count)).clamp(0, 1).float()


def _ellipse(stop: Stop, height: int, width: int) -> Tensor:
    y, x = ((torch.arange(n * _FINE) + 0.5) / (n * _FINE) for n in (height, width))
    inside = ((y[:, None] - stop.y) / (stop.height / 2)) ** 2 + ((x - stop.x) / (stop.width / 2)) ** 2 <= 1
    return F.avg_pool2d(inside.float()[None], _FINE)[0]
