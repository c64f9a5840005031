"""Scenes of world 2: what captions describe, and the motion that they leave open.

As in the demo world, another scene rendered with the same motion is the ground truth of an edit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from random import Random

import torch
from torch import Tensor

from ..paint import BACKGROUNDS, COLOURS
from ..scenes import STYLES, Place
from .things import THINGS, Frame

SIZE = 128
"""Height and width of a frame in pixels."""
FRAMES = 17
"""Frames of a clip, unless others are given."""

SHAPES = tuple(THINGS)
MATERIALS = ("plain", "striped", "dotted", "wooden", "shiny")
SIZES: dict[str, float] = {"small": 14.0, "medium": 20.0, "big": 28.0}
"""Radii in pixels."""
ACTIONS = ("resting", "gliding", "jumping", "spinning")
PLACES: dict[str, float] = {"left": -30.0, "middle": 0.0, "right": 30.0}
"""Distances from the middle of the scene in pixels."""
CLUTTER = ("bare", "stones", "flowers")

WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "material": MATERIALS,
    "size": tuple(SIZES),
    "action": ACTIONS,
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
    "clutter": CLUTTER,
    "style": tuple(STYLES),
}
"""The words of every kind."""
SILENT = {"material": "plain", "size": "medium", "action": "resting", "place": "middle", "clutter": "bare"}
"""The words that captions leave out."""
MAY_LACK = ("size", "action", "place")
"""Kinds of words that a training caption may lack."""

_FRONT, _ON, _WITH, _AT = " in front of ", " on ", " with ", " at "
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*["a", "in", "front", "of", "on", "with", "at", "painting", "drawing", "watercolor", "comic"]]
        + [word for kind, words in WORDS.items() if kind != "style" for word in words if word != SILENT.get(kind)]
    )
)
"""Every word of the captions."""


@dataclass(frozen=True)
class Thing:
    """One object: the words that describe it."""

    colour: str
    shape: str
    material: str = "plain"
    size: str = "medium"
    action: str = "resting"
    place: str = "middle"

    def phrase(self, without: tuple[str, ...] = ()) -> str:
        """The words, without those of some kinds."""
        size, material, action, place = (
            "" if kind in without or getattr(self, kind) == SILENT[kind] else getattr(self, kind)
            for kind in ("size", "material", "action", "place")
        )
        words = ("a", size, material, self.colour, self.shape, action)
        return " ".join(filter(None, words)) + (_AT + place if place else "")

    @classmethod
    def parse(cls, phrase: str) -> Thing:
        pattern = r"a (?:({size}) )?(?:({material}) )?({colour}) ({shape})(?: ({action}))?(?: at ({place}))?"
        found = re.fullmatch(pattern.format(**{kind: "|".join(words) for kind, words in WORDS.items()}), phrase)
        if not found:
            raise ValueError(f"not a thing of world 2: {phrase!r}")
        size, material, colour, shape, action, place = found.groups()
        return cls(colour, shape, material or "plain", size or "medium", action or "resting", place or "middle")


@dataclass(frozen=True)
class Scene:
    """What a caption describes. Things are listed from front to back."""

    things: tuple[Thing, ...]
    background: str
    style: str = "photo"
    clutter: str = "bare"

    @property
    def caption(self) -> str:
        return self.caption_without(())

    def caption_without(self, kinds: tuple[str, ...]) -> str:
        """The caption without the words of some kinds."""
        return " ".join(word for word, _ in self.described(kinds))

    def described(self, without: tuple[str, ...] = ()) -> list[tuple[str, str | None]]:
        """The caption's words, without those of some kinds, and what each describes: a thing, by its shape, "" the
        ground, None nothing of these.
        """
        found: list[tuple[str, str | None]] = [(word, None) for word in STYLES[self.style].split()]
        for n, thing in enumerate(self.things):
            found += [(word, None) for word in _FRONT.split() if n]
            found += [(word, thing.shape) for word in thing.phrase(without).split()]
        ground = self.background + ("" if self.clutter == "bare" else _WITH + self.clutter)
        return [*found, (_ON.strip(), None), *((word, "") for word in ground.split())]

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene of a caption; ValueError for one outside the closed grammar."""
        style = next(name for name in reversed(STYLES) if caption.startswith(STYLES[name]))
        head, _, ground = caption[len(STYLES[style]) :].strip().rpartition(_ON)
        background, _, clutter = ground.partition(_WITH)
        if background not in BACKGROUNDS or (clutter or "bare") not in CLUTTER:
            raise ValueError(f"not a caption of world 2: {caption!r}")
        return cls(tuple(map(Thing.parse, head.split(_FRONT))), background, style, clutter or "bare")

    def with_thing(self, index: int = 0, **words: str) -> Scene:
        """This scene with words of one thing replaced, e.g. `colour="blue"`."""
        things = list(self.things)
        things[index] = replace(things[index], **words)
        return replace(self, things=tuple(things))

    def with_word(self, place: Place, word: str) -> Scene:
        """This scene with the word at a place replaced."""
        index, kind = place
        return replace(self, **{kind: word}) if index is None else self.with_thing(index, **{kind: word})  # type: ignore[arg-type]

    def word(self, place: Place) -> str:
        index, kind = place
        found: str = getattr(self if index is None else self.things[index], kind)
        return found

    @property
    def places(self) -> list[Place]:
        """All words of the scene."""
        of_things: list[Place] = [(i, field.name) for i in range(len(self.things)) for field in fields(Thing)]
        return of_things + [(None, kind) for kind in ("background", "clutter", "style")]

    def changed_from(self, other: Scene) -> list[Place]:
        """The words in which this scene differs from one with as many things."""
        return [place for place in self.places if self.word(place) != other.word(place)]

    @property
    def held_out(self) -> bool:
        """Whether this caption is excluded from training: about one in eight combinations of a thing's colour, shape
        and material, so that edits of anything else keep a scene held out.
        """
        numbers = (
            list(COLOURS).index(thing.colour) + 2 * SHAPES.index(thing.shape) + 3 * MATERIALS.index(thing.material)
            for thing in self.things
        )
        return any(n % 8 == 3 for n in numbers)


@dataclass(frozen=True)
class Track:
    """What words leave open of a thing's path: its distance from its place in pixels, its size relative to its word,
    its direction (1 right, -1 left), its tilt in radians, and the phase and rate of its parts in cycles (per clip).
    """

    dx: float
    dy: float
    size: float = 1.0
    heading: int = 1
    tilt: float = 0.0
    phase: float = 0.0
    rate: float = 1.28

    def frame(self, thing: Thing, time: Tensor) -> Frame:
        """The thing's frame in the scene at times (frames, 1, 1), in clips from -0.5 to 0.5."""
        x, y, angle = PLACES[thing.place] + self.dx + 0 * time, self.dy + 0 * time, self.tilt + 0 * time
        if thing.action == "gliding":
            x = x + self.heading * 44 * time
        elif thing.action == "jumping":
            y = y + 12 - 24 * torch.sin(math.pi * (2 * time + self.phase)).abs()
        elif thing.action == "spinning":
            angle = angle + self.heading * 2 * math.pi * 0.7 * time
        return Frame(x, y, angle, SIZES[thing.size] * self.size, float(self.heading))

    def cycle(self, thing: Thing, time: Tensor) -> Tensor:
        """The cycles of the thing's parts at times; a resting thing's do not move."""
        return self.phase + self.rate * (time + 0.5 if thing.action != "resting" else 0 * time)


@dataclass(frozen=True)
class Motion:
    """What the caption leaves open: tracks, the camera's pan in pixels and zoom as a share, both per clip, a phase."""

    tracks: tuple[Track, ...]
    pan: tuple[float, float] = (0.0, 0.0)
    zoom: float = 0.0
    phase: float = 0.0

    def camera(self, time: Tensor) -> Frame:
        """The scene's frame in the picture, at times in clips from -0.5 to 0.5."""
        return Frame(SIZE / 2 + self.pan[0] * time, SIZE / 2 + self.pan[1] * time, 0.0, torch.exp(self.zoom * time))

    def without(self, index: int) -> Motion:
        """The motion of the scene without one of its things."""
        return replace(self, tracks=tuple(track for i, track in enumerate(self.tracks) if i != index))


# --- sampling -------------------------------------------------------------------------


def random_thing(random: Random, place: str) -> Thing:
    return Thing(
        random.choice(list(COLOURS)),
        random.choice(SHAPES),
        random.choice(MATERIALS if random.random() < 0.6 else ("plain",)),
        random.choice(list(SIZES)),
        random.choice(ACTIONS),
        place,
    )


def random_scene(random: Random, things: int | None = None) -> Scene:
    """A scene of random words with one to three things at different places, no two of one shape."""
    count = things or random.choices((1, 2, 3), (0.4, 0.4, 0.2))[0]
    places = random.sample(list(PLACES), count)
    while True:
        found = tuple(random_thing(random, place) for place in places)
        if len({thing.shape for thing in found}) == count and sum(thing.size == "big" for thing in found) < 2:
            break
    style = random.choice(list(STYLES) if random.random() < 0.5 else ["photo"])
    return Scene(found, random.choice(list(BACKGROUNDS)), style, random.choice(CLUTTER))


def random_motion(random: Random, scene: Scene) -> Motion:
    """Tracks whose things pass before one another, but are mostly visible; a pan and a zoom."""
    angle, far = random.uniform(0, 2 * math.pi), random.uniform(0, 22)
    pan, zoom = (far * math.cos(angle), far * math.sin(angle)), random.uniform(-0.25, 0.25)
    phase = random.uniform(0, 100)
    while True:
        tracks = tuple(
            Track(
                random.uniform(-6, 6),
                random.uniform(-26, 26),
                random.uniform(0.93, 1.07),
                random.choice((-1, 1)),
                random.uniform(-0.15, 0.15),
                random.random(),
                random.uniform(0.96, 1.6),
            )
            for _ in scene.things
        )
        if mostly_visible(scene, tracks):
            return Motion(tracks, pan, zoom, phase)


def mostly_visible(scene: Scene, tracks: tuple[Track, ...]) -> bool:
    """Whether, by circles, things lie apart at the mean of a clip, and never one wholly behind another."""
    time = torch.linspace(-0.5, 0.5, 5).view(-1, 1, 1)
    frames = [track.frame(thing, time) for thing, track in zip(scene.things, tracks, strict=True)]
    for i, front in enumerate(frames):
        for back in frames[i + 1 :]:
            far = torch.hypot(torch.as_tensor(front.x - back.x), torch.as_tensor(front.y - back.y))
            reach = far / (front.scale + back.scale)
            if reach.mean() < 0.75 or reach.min() < 0.3:
                return False
    return True


def scenes(seed: int, held_out: bool, things: int | None = None) -> Iterator[tuple[Scene, Motion]]:
    """An endless, repeatable stream of scenes for training, or of held-out ones."""
    random = Random(f"world 2, {seed}")
    while True:
        scene = random_scene(random, things)
        if scene.held_out == held_out:
            yield scene, random_motion(random, scene)
