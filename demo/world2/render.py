"""Pictures of world 2: frames, the visible masks of things, and exact flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..paint import COLOURS, ground, rgb, stylised, textured
from ..scenes import Clip
from .scenes import FRAMES, SIZE, Motion, Scene, Thing, Track
from .things import THINGS, Frame

INK = (0.08, 0.08, 0.10)
COARSE = 1.5
"""Scale of the ground's texture relative to the demo world's."""
CELL = 32.0
"""Side of the cells of clutter in pixels."""
REACH = 1.75
"""Radius of the circle around every shape, relative to the thing's."""


def render(scene: Scene, motion: Motion, frames: int = FRAMES, at: Sequence[float] | None = None) -> Clip:
    """Render a scene: frames, visible masks, front thing first, and exact forward flow (see `Clip`).

    at: times of the clip from -0.5 to 0.5 to render instead of its frames; flow is to a frame later.
    """
    if len(scene.things) != len(motion.tracks):
        raise ValueError(f"{len(scene.things)} things but {len(motion.tracks)} tracks")
    step = 1 / max(frames - 1, 1)
    times = torch.arange(frames) * step - 0.5 if at is None else torch.tensor(at)
    now, later = (_Moment(motion, times.view(-1, 1, 1) + ahead) for ahead in (0.0, step))
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    x, y = x.expand(len(times), -1, -1), y.expand(len(times), -1, -1)

    wx, wy = now.camera.inward(x, y)
    picture = _cluttered(
        scene.clutter, ground(scene.background, wx / COARSE, wy / COARSE, motion.phase), wx, wy, motion.phase
    )
    edge = torch.full_like(x, 99.0)
    flow = torch.stack(later.camera.outward(wx, wy), 1) - torch.stack((x, y), 1)
    masks: list[Tensor] = []
    for thing, track in zip(scene.things[::-1], motion.tracks[::-1], strict=True):
        rows, columns = _window(now, thing, track)
        place = (..., rows, columns)
        drawn = _draw(thing, track, now, later, x[place], y[place])
        picture[place] = torch.lerp(picture[place], drawn.colour, drawn.cover)
        moved = drawn.moved - torch.stack((x[place], y[place]), 1)
        flow[place] = torch.where((drawn.cover > 0.5)[:, None], moved, flow[place])
        edge[place] = torch.where(drawn.distance.abs() < edge[place].abs(), drawn.distance, edge[place])
        for mask in masks:
            mask[place] *= 1 - drawn.cover
        masks.append(torch.zeros_like(x))
        masks[-1][place] = drawn.cover
    picture = stylised(scene.style, picture, edge, x, y).clamp(0, 1)
    covered = torch.stack(masks[::-1]) if masks else x.new_zeros(0, *x.shape)
    return Clip(picture.transpose(0, 1).contiguous(), covered, flow[:-1])


class _Moment:
    """The frames of reference at times (frames, 1, 1) of a clip, from -0.5 to 0.5."""

    def __init__(self, motion: Motion, time: Tensor) -> None:
        self.time, self.camera = time, motion.camera(time)

    def body(self, thing: Thing, track: Track) -> Frame:
        return track.frame(thing, self.time)


@dataclass(frozen=True)
class _Drawn:
    """A thing by itself: colour (3, frames, H, W), coverage, distance in pixels, each pixel's place a frame later."""

    colour: Tensor
    cover: Tensor
    distance: Tensor
    moved: Tensor


def _draw(thing: Thing, track: Track, now: _Moment, later: _Moment, x: Tensor, y: Tensor) -> _Drawn:
    """Draw the parts of a thing over one another."""
    body = now.body(thing, track)
    u, v = body.inward(*now.camera.inward(x, y))
    cover, distance, shade, px, py = torch.zeros_like(x), torch.full_like(x, 99.0), torch.ones_like(x), u, v
    moved = torch.stack((u, v))
    for part in THINGS[thing.shape]:
        joint, next_joint = (part.joint(track.cycle(thing, moment.time)) for moment in (now, later))
        a, b = joint.inward(u, v)
        d = part.outline(a, b) * (now.camera.scale * body.scale)
        covers = (0.5 - d).clamp(0, 1)
        on_top = covers > 0.5
        px, py = torch.where(on_top, a, px), torch.where(on_top, b, py)
        moved = torch.where(on_top, torch.stack(next_joint.outward(a, b)), moved)
        rim = 0 * d if part.ink else 1 - 0.4 * (1 + d / 1.6).clamp(0, 1)
        shade = torch.lerp(shade, rim, covers)
        cover, distance = torch.maximum(cover, covers), torch.minimum(distance, d)
    colour = _painted(thing, px * body.scale, py * body.scale)
    lit = _lit(thing.material, colour, *Frame(body.x, body.y, 0.0, body.scale).inward(*now.camera.inward(x, y)))
    there = later.camera.outward(*later.body(thing, track).outward(*moved))
    return _Drawn(torch.lerp(rgb(INK), lit, shade), cover, distance, torch.stack(there, 1))


def _window(now: _Moment, thing: Thing, track: Track) -> tuple[slice, slice]:
    """The rows and columns of a picture that a thing can reach."""
    body = now.body(thing, track)
    reach = REACH * body.scale * torch.as_tensor(now.camera.scale)
    centre = now.camera.outward(torch.as_tensor(body.x), torch.as_tensor(body.y))
    low, high = ([sign * float((sign * (c + sign * reach)).max()) for c in centre[::-1]] for sign in (-1, 1))
    rows, columns = (
        slice(min(max(int(a), 0), SIZE - 1), max(min(int(b) + 2, SIZE), 1)) for a, b in zip(low, high, strict=True)
    )
    return rows, columns


# --- materials, light and clutter -------------------------------------------------------


def _painted(thing: Thing, px: Tensor, py: Tensor) -> Tensor:
    """A thing's material at its parts' own pixel coordinates: (3, frames, H, W)."""
    colour = rgb(COLOURS[thing.colour]).expand(3, *px.shape)
    if thing.material == "wooden":
        grain = torch.sin(0.8 * py + 1.6 * torch.sin(0.2 * px))
        return torch.lerp(colour, 0.45 * colour + 0.55 * rgb((0.25, 0.14, 0.05)), (0.4 + 0.9 * grain).clamp(0, 1))
    return textured(thing.material, colour, px, py)


def _lit(material: str, colour: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Light from the upper left on a round thing, at coordinates in radii; shiny things mirror it and the horizon."""
    lit = colour * (1.02 - 0.24 * (0.6 * u + 0.8 * v).clamp(-1, 1))
    if material != "shiny":
        return lit
    spot = torch.exp(-(((u + 0.32) / 0.26) ** 2 + ((v + 0.36) / 0.2) ** 2))
    bands = (1.2 * torch.sin(5.2 * v - 1.2) - 0.2).clamp(-1, 1)
    mirrored = torch.lerp(lit * (1 + 0.55 * bands.clamp(max=0)), rgb((1.0, 1.0, 1.0)), 0.6 * bands.clamp(min=0))
    return torch.lerp(mirrored, rgb((1.0, 1.0, 1.0)), 0.9 * spot)


def _cluttered(clutter: str, picture: Tensor, x: Tensor, y: Tensor, phase: float) -> Tensor:
    """A ground with stones or flowers, one in each cell of a grid, at scene coordinates."""
    if clutter == "bare":
        return picture
    x, y = x + 5.1 * phase, y + 3.7 * phase
    column, row = torch.floor(x / CELL), torch.floor(y / CELL)
    first, second, third = (_hash(column, row, phase + n) for n in range(3))
    dx, dy = x - CELL * (column + 0.3 + 0.4 * first), y - CELL * (row + 0.3 + 0.4 * second)
    if clutter == "stones":
        d = torch.hypot(dx, 1.3 * dy) - (3.5 + 3.5 * third)
        colour = rgb((0.62, 0.61, 0.60)) * (1 - 0.25 * (dx + 1.5 * dy) / 7)
        return torch.lerp(picture, colour, (0.5 - d / 2).clamp(0, 1))
    far, turn = torch.hypot(dx, dy), torch.atan2(dy, dx)
    petals = (0.5 - 0.5 * (far - 4.8 - 1.0 * torch.cos(4 * turn + 6 * third))).clamp(0, 1)
    picture = torch.lerp(picture, rgb((0.90, 0.86, 0.84)), petals)
    return torch.lerp(picture, rgb((0.95, 0.62, 0.12)), (1.6 - 0.6 * far).clamp(0, 1))


def _hash(column: Tensor, row: Tensor, phase: float) -> Tensor:
    """A number in 0..1 for each cell."""
    return (torch.sin(12.9898 * column + 78.233 * row + 3.7 * phase) * 437.585).frac().abs()
