"""The shapes of world 2: rigid parts on joints, each a signed distance in units of the thing's radius, facing right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..paint import corners, polygon

Outline = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    """A moving frame of reference in an outer one: its origin, rotation, scale, and whether it faces left (flip -1).

    Values are numbers, or tensors of shape (frames, 1, 1).
    """

    x: Tensor | float = 0.0
    y: Tensor | float = 0.0
    angle: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    flip: float = 1.0

    def inward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Outer coordinates in this frame."""
        cos, sin = self._turn()
        dx, dy = (x - self.x) / self.scale, (y - self.y) / self.scale
        return self.flip * (cos * dx + sin * dy), cos * dy - sin * dx

    def outward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of this frame in the outer one."""
        cos, sin = self._turn()
        u = self.flip * u
        return self.x + self.scale * (cos * u - sin * v), self.y + self.scale * (sin * u + cos * v)

    def _turn(self) -> tuple[Tensor, Tensor]:
        angle = torch.as_tensor(self.angle)
        return angle.cos(), angle.sin()


@dataclass(frozen=True)
class Part:
    """A rigid part: its outline, its joint in the thing's frame, and the joint's angle in the course of a cycle.

    swing: amplitude of the angle in radians; lag: the swing's phase, in cycles; turns: full turns per cycle;
    ink: whether the part is dark whatever the thing's colour.
    """

    outline: Outline
    x: float = 0.0
    y: float = 0.0
    rest: float = 0.0
    swing: float = 0.0
    lag: float = 0.0
    turns: float = 0.0
    ink: bool = False

    def joint(self, cycle: Tensor) -> Frame:
        angle = self.rest + self.swing * torch.sin(2 * math.pi * (cycle + self.lag)) + 2 * math.pi * self.turns * cycle
        return Frame(self.x, self.y, angle)


def disc(radius: float) -> Outline:
    return lambda u, v: torch.hypot(u, v) - radius


def ring(radius: float, width: float) -> Outline:
    """A circle of a half width."""
    return lambda u, v: (torch.hypot(u, v) - radius).abs() - width


def bar(start: float, end: float, width: float) -> Outline:
    """A bar with round ends along u, of a half width."""
    return lambda u, v: torch.hypot(u - u.clamp(start, end), v) - width


def lens(length: float, height: float) -> Outline:
    """The intersection of two discs, of a half length along u and a half height."""
    off = (length**2 - height**2) / (2 * height)
    radius = off + height

    def distance(u: Tensor, v: Tensor) -> Tensor:
        u, v = u.abs(), v.abs()
        arc = torch.hypot(u, v + off) - radius
        return torch.where(v * length > (u - length) * off, arc, torch.hypot(u - length, v))

    return distance


def cut(*points: tuple[float, float]) -> Outline:
    """A polygon."""
    return lambda u, v: polygon(u, v, list(points))


EYE = disc(0.13)


def _blade(side: int) -> tuple[Part, ...]:
    """One half of the scissors: a blade, its shank beyond the joint, and the ring of its handle."""
    handle = ring(0.3, 0.1)
    outlines: tuple[Outline, ...] = (
        lambda u, v: handle(u + 0.95, v),
        bar(-0.7, 0, 0.1),
        cut((-0.15, -0.13), (0.5, -0.13), (1.4, 0.0), (0.5, 0.13), (-0.15, 0.13)),
    )
    return tuple(Part(outline, x=-0.1, rest=side * 0.34, swing=side * 0.22) for outline in outlines)


def _limb(x: float, y: float, lag: float, swing: float) -> Part:
    return Part(bar(0, 0.58, 0.13), x, y, rest=math.pi / 2, swing=swing, lag=lag)


THINGS: dict[str, tuple[Part, ...]] = {
    "ball": (Part(disc(1.0)), Part(bar(-0.91, 0.91, 0.09))),
    "block": (Part(cut(*corners(4, (1.19,), -math.pi / 4))),),
    "star": (Part(cut(*corners(10, (1.25, 0.52)))),),
    "fish": (
        Part(cut((0.15, 0), (-0.6, -0.55), (-0.42, 0), (-0.6, 0.55)), x=-0.68, swing=0.5),
        Part(cut((-0.45, 0.1), (-0.4, -0.85), (0.4, -0.2))),
        Part(lens(1.05, 0.58), x=0.12),
        Part(EYE, x=0.66, y=-0.14, ink=True),
    ),
    "wheel": (
        *(Part(bar(-0.95, 0.95, 0.1), rest=math.pi * n / 3, turns=0.5) for n in range(3)),
        Part(ring(0.98, 0.13)),
        Part(disc(0.22)),
    ),
    "robot": (
        _limb(0.14, 0.42, 0.5, 0.6),
        _limb(0.0, -0.2, 0.0, 0.8),
        _limb(-0.14, 0.42, 0.0, 0.6),
        Part(cut((-0.36, -0.38), (0.36, -0.38), (0.36, 0.5), (-0.36, 0.5))),
        Part(bar(0, 0.3, 0.07), y=-1.0, rest=-math.pi / 2, swing=0.3),
        Part(cut((-0.36, -1.08), (0.42, -1.08), (0.42, -0.46), (-0.36, -0.46))),
        Part(EYE, x=0.2, y=-0.8, ink=True),
        _limb(0.0, -0.2, 0.5, 0.8),
    ),
    "scissors": (*_blade(1), *_blade(-1)),
    "bird": (
        Part(cut((0.1, -0.12), (-0.62, -0.3), (-0.62, 0.22), (0.1, 0.14)), x=-0.7, swing=0.12),
        Part(cut((0.0, -0.14), (0.42, 0.02), (0.0, 0.16)), x=0.95, y=-0.3),
        Part(lens(0.98, 0.46)),
        Part(disc(0.34), x=0.74, y=-0.34),
        Part(EYE, x=0.82, y=-0.42, ink=True),
        Part(cut((0.36, 0.0), (0.05, -1.15), (-0.72, -1.3), (-0.4, 0.06)), x=-0.05, y=-0.08, swing=0.65),
    ),
}
"""The parts of every shape, from back to front."""
