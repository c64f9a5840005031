"""Procedural scenes, which give every edit a ground truth.

A `Scene` is what a caption describes; a `Motion` is the rest: positions, speeds, texture phases.
`render(scene, motion, frames)` returns the frames with exact object masks and optical flow. Rendering another scene
with the same motion gives the ground truth of an edit, which differs only in what the words changed.

Objects are signed distance functions, so edges are antialiased in closed form and a pixel's colour does not depend on
the batch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from ..video.motion import inside, warp
from .paint import BACKGROUNDS, COLOURS, corners, ground, polygon, rgb, stylised, textured

SIZE = 64
"""Height and width of a frame in pixels."""

SHAPES = ("circle", "square", "triangle", "star")
TEXTURES = ("plain", "striped", "dotted")
STYLES: dict[str, str] = {
    "photo": "",
    "watercolor": "watercolor painting of ",
    "comic": "comic drawing of ",
}

_GLUE = ("a", "and", "on", "of", "painting", "drawing", "watercolor", "comic")
VOCABULARY: tuple[str, ...] = (*_GLUE, *COLOURS, *SHAPES, *TEXTURES[1:], *BACKGROUNDS)
"""Every word of the captions."""


@dataclass(frozen=True)
class Thing:
    """One object: the words that describe it."""

    colour: str
    shape: str
    texture: str = "plain"

    def __str__(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {texture}{self.colour} {self.shape}"


Place = tuple[int | None, str]
"""A word of a scene: the index of its thing, None for the whole picture, and its kind."""


@dataclass(frozen=True)
class Scene:
    """What a caption describes. Things are listed from left to right."""

    things: tuple[Thing, ...]
    background: str
    style: str = "photo"

    @property
    def caption(self) -> str:
        things = " and ".join(map(str, self.things))
        return f"{STYLES[self.style]}{things} on {self.background}"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene of a caption; ValueError for one outside the closed grammar."""
        style, rest = "photo", caption.strip()
        for name, prefix in STYLES.items():
            if prefix and rest.startswith(prefix):
                style, rest = name, rest[len(prefix) :]
        head, _, background = rest.rpartition(" on ")
        things = []
        for phrase in head.split(" and "):
            found = re.fullmatch(r"a (?:(\w+) )?(\w+) (\w+)", phrase)
            texture, colour, shape = found.groups() if found else ("?", "?", "?")
            if (texture or "plain") not in TEXTURES or colour not in COLOURS or shape not in SHAPES:
                raise ValueError(f"not a caption of the demo scenes: {caption!r}")
            things.append(Thing(colour, shape, texture or "plain"))
        if background not in BACKGROUNDS or not 1 <= len(things) <= 2:
            raise ValueError(f"not a caption of the demo scenes: {caption!r}")
        return cls(tuple(things), background, style)

    def with_thing(self, index: int = 0, **words: str) -> Scene:
        """This scene with words of one thing replaced, e.g. `colour="blue"`."""
        things = list(self.things)
        things[index] = replace(things[index], **words)
        return replace(self, things=tuple(things))

    def changed_from(self, other: Scene) -> list[Place]:
        """The words in which this scene differs from one with as many things."""
        places: list[Place] = [
            (i, word)
            for i, (a, b) in enumerate(zip(other.things, self.things, strict=True))
            for word in ("colour", "shape", "texture")
            if getattr(a, word) != getattr(b, word)
        ]
        return places + [(None, w) for w in ("background", "style") if getattr(other, w) != getattr(self, w)]

    @property
    def held_out(self) -> bool:
        """Whether this caption is excluded from training: one in eight combinations of words.

        Depends on the things only, so edits of background or style of a held-out thing are held out too.
        """
        numbers = [
            list(COLOURS).index(t.colour) + 2 * SHAPES.index(t.shape) + 3 * TEXTURES.index(t.texture)
            for t in self.things
        ]
        return any(n % 8 == 3 for n in numbers)


@dataclass(frozen=True)
class Track:
    """The affine path of one thing: its position at frame t, in pixels and radians."""

    x: float
    y: float
    radius: float
    vx: float = 0.0
    vy: float = 0.0
    growth: float = 0.0  # as a share of the radius, per frame
    angle: float = 0.0
    spin: float = 0.0  # radians per frame

    def centre(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.x + self.vx * t, self.y + self.vy * t

    def scale(self, t: Tensor) -> Tensor:
        return self.radius * (1 + self.growth * t)

    def rotation(self, t: Tensor) -> Tensor:
        return self.angle + self.spin * t


@dataclass(frozen=True)
class Motion:
    """What the caption leaves open: tracks, the camera's pan (pixels per frame), a phase."""

    tracks: tuple[Track, ...]
    pan: tuple[float, float] = (0.0, 0.0)
    phase: float = 0.0


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    frames: (frames, 3, SIZE, SIZE) in 0..1.
    masks: (things, frames, SIZE, SIZE), visible coverage in 0..1.
    flow: (frames - 1, 2, SIZE, SIZE), (dx, dy) in pixels from frame t to frame t + 1.
    """

    frames: Tensor
    masks: Tensor
    flow: Tensor

    @property
    def mask(self) -> Tensor:
        """The union of the masks: (frames, SIZE, SIZE)."""
        return self.masks.sum(0).clamp(max=1)


# --- sampling scenes ------------------------------------------------------------------


def random_scene(random: Random, things: int | None = None) -> Scene:
    """A scene of random words; one in four has two things, unless `things` is given."""
    count = things or (2 if random.random() < 0.25 else 1)
    return Scene(
        tuple(
            Thing(
                random.choice(list(COLOURS)),
                random.choice(SHAPES),
                random.choice(TEXTURES if random.random() < 0.6 else ("plain",)),
            )
            for _ in range(count)
        ),
        random.choice(list(BACKGROUNDS)),
        random.choice(list(STYLES) if random.random() < 0.6 else ["photo"]),
    )


def random_motion(random: Random, things: int = 1, frames: int = 8) -> Motion:
    """Tracks that keep every thing inside the frame, without overlap, for `frames` frames."""

    def track(low: float, high: float, radius: float) -> Track:
        x0, x1 = (random.uniform(low, high) for _ in range(2))
        y0, y1 = (random.uniform(radius + 3, SIZE - radius - 3) for _ in range(2))
        steps = max(frames - 1, 1)
        reach = min(1.0, 2.0 * steps / max(math.hypot(x1 - x0, y1 - y0), 1e-6))
        return Track(
            x0,
            y0,
            radius,
            vx=(x1 - x0) * reach / steps,
            vy=(y1 - y0) * reach / steps,
            growth=random.uniform(-0.06, 0.06) / steps,
            angle=random.uniform(-0.15, 0.15),
            spin=random.uniform(-0.2, 0.2) / steps,
        )

    if things == 1:
        radius = random.uniform(14, 19)
        tracks: tuple[Track, ...] = (track(radius + 4, SIZE - radius - 4, radius),)
    else:
        tracks = tuple(track(middle - 1.5, middle + 1.5, random.uniform(11.0, 13.0)) for middle in (15.5, 48.5))
    angle, speed = random.uniform(0, 2 * math.pi), random.uniform(0, 1.2)
    pan = (speed * math.cos(angle), speed * math.sin(angle))
    return Motion(tracks, pan, random.uniform(0, 100))


def scenes(seed: int, held_out: bool, things: int | None = None) -> Iterator[tuple[Scene, Motion]]:
    """An endless, repeatable stream of scenes for training, or of held-out ones."""
    random = Random(seed)
    while True:
        scene = random_scene(random, things)
        if scene.held_out == held_out:
            yield scene, random_motion(random, len(scene.things))


# --- outlines, in units of the thing's radius -----------------------------------------


_POLYGONS = {
    "square": corners(4, (1.19,), -math.pi / 4),
    "triangle": [(x, y + 0.22) for x, y in corners(3, (1.28,))],
    "star": corners(10, (1.25, 0.52)),
}


def distance_to(shape: str, u: Tensor, v: Tensor) -> Tensor:
    if shape == "circle":
        return torch.hypot(u, v) - 1
    return polygon(u, v, _POLYGONS[shape])


# --- the picture ----------------------------------------------------------------------


def render(scene: Scene, motion: Motion, frames: int = 8) -> Clip:
    """Render a scene: frames, visible masks and exact forward flow (see `Clip`)."""
    if len(scene.things) != len(motion.tracks):
        raise ValueError(f"{len(scene.things)} things but {len(motion.tracks)} tracks")
    t = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    x, y = x.expand(frames, -1, -1), y.expand(frames, -1, -1)

    picture = ground(scene.background, x - motion.pan[0] * t, y - motion.pan[1] * t, motion.phase)
    edge = torch.full_like(x, 99.0)
    masks: list[Tensor] = []
    flow = torch.tensor(motion.pan).view(1, 2, 1, 1).expand(frames, 2, SIZE, SIZE).clone()
    for thing, track in zip(scene.things, motion.tracks, strict=True):
        cx, cy = track.centre(t)
        scale, angle = track.scale(t), track.rotation(t)
        dx, dy = x - cx, y - cy
        u = (torch.cos(angle) * dx + torch.sin(angle) * dy) / scale
        v = (-torch.sin(angle) * dx + torch.cos(angle) * dy) / scale
        distance = distance_to(thing.shape, u, v) * scale
        coverage = (0.5 - distance).clamp(0, 1)
        paint = textured(thing.texture, rgb(COLOURS[thing.colour]), u * track.radius, v * track.radius)
        picture = picture * (1 - coverage) + paint * coverage
        masks = [m * (1 - coverage) for m in masks] + [coverage]
        edge = torch.where(distance.abs() < edge.abs(), distance, edge)

        nx, ny = track.centre(t + 1)
        grown, turned = track.scale(t + 1), track.rotation(t + 1)
        moved_x = nx + grown * (torch.cos(turned) * u - torch.sin(turned) * v) - x
        moved_y = ny + grown * (torch.sin(turned) * u + torch.cos(turned) * v) - y
        flow = torch.where((coverage > 0.5)[:, None], torch.stack([moved_x, moved_y], 1), flow)

    picture = stylised(scene.style, picture, edge, x, y).clamp(0, 1)
    covered = torch.stack(masks) if masks else x.new_zeros(0, *x.shape)
    return Clip(picture.transpose(0, 1).contiguous(), covered, flow[:-1])


def visible_pixels(clip: Clip) -> Tensor:
    """Pixels of frame t still visible in frame t + 1: the flow stays inside the frame and on the same thing."""
    moved = warp(clip.mask[1:, None], clip.flow)[:, 0]
    return inside(clip.flow) & ((moved - clip.mask[:-1]).abs() < 0.25)
