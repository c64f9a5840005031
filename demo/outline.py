"""Outlines of the demo scenes' things: whether they are whole, or gone; a classifier of words shows neither."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import SIZE, Clip, Scene, Track, distance_to

WHOLE = {"circle": 0.78, "square": 0.78, "triangle": 0.78, "star": 0.65}
"""The least intersection over union of a silhouette with its shape. After the autoencoder, rendered stars have 0.72 or
more, other shapes 0.89 or more; a star's tips are thin."""
TURNS = torch.linspace(-0.6, 0.6, 13)
"""Rotations that are tried, in radians, relative to the truth's."""
STANDS_OUT, LEFT_OVER = 0.15, 0.05
"""The RGB distance to all colours of the ground from which a pixel is not the ground's, and the share of such pixels
in a removed thing's place from which it is not gone."""
COLOURS = 400
"""The number of colours that stand for a thing or the ground."""


def whole_outlines(target: Scene, truth: Clip, frames: Tensor, tracks: tuple[Track, ...]) -> list[bool]:
    """Whether every thing of a target scene has a whole outline, for each frame (f, 3, SIZE, SIZE) in 0..1.

    Only the form counts: a thing may be elsewhere, larger, or turned by up to 0.6 radians. truth: the rendered target.
    """
    shapes = [thing.shape for thing in target.things]
    return [
        all(_fit(*one, t) >= WHOLE[one[1]] for one in zip(masks, shapes, tracks, strict=True))
        for t, masks in enumerate(silhouettes(truth, frames, tracks))
    ]


def removed(place: Tensor, truth: Clip, frames: Tensor) -> list[bool]:
    """Whether a thing is gone from each frame: its place (f, y, x) has the colours of the true ground.

    The ground's pattern may differ, because an edit cannot know it.
    """
    gone = []
    for t, frame in enumerate(frames):
        pixels = frame[:, place[t] > 0.5].T
        ground = _colours(truth.frames[t], truth.masks[:, t].amax(0) < 0.05)
        gone.append((torch.cdist(pixels, ground).amin(1) > STANDS_OUT).float().mean().item() < LEFT_OVER)
    return gone


def silhouettes(truth: Clip, frames: Tensor, tracks: tuple[Track, ...]) -> list[list[Tensor]]:
    """The masks (SIZE, SIZE) of each thing in each frame: pixels nearer to the thing's colours than to the ground's.

    Colours are those of the truth. A pixel belongs to the thing whose track is nearest.
    """
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    found = []
    for t, frame in enumerate(frames):
        near = torch.stack(
            [torch.hypot(x - cx, y - cy) for cx, cy in (track.centre(torch.tensor(t)) for track in tracks)]
        )
        masks, ground = truth.masks[:, t], truth.masks[:, t].amax(0) < 0.05
        found.append(
            [_like(frame, truth.frames[t], mask > 0.9, ground) & (near.argmin(0) == i) for i, mask in enumerate(masks)]
        )
    return found


def _like(frame: Tensor, truth: Tensor, thing: Tensor, ground: Tensor) -> Tensor:
    """Pixels of a frame (3, y, x) nearer to a thing's colours in the truth than to the ground's, without specks."""
    pixels = frame.flatten(1).T
    of_thing, of_ground = (torch.cdist(pixels, _colours(truth, mask)).amin(1) for mask in (thing, ground))
    nearer = (of_thing < of_ground).float().view(1, 1, SIZE, SIZE)
    return F.avg_pool2d(nearer, 3, 1, 1)[0, 0] > 0.5


def _colours(frame: Tensor, mask: Tensor) -> Tensor:
    found = frame[:, mask].T
    return found[:: max(1, len(found) // COLOURS)]


def _fit(found: Tensor, shape: str, track: Track, t: int) -> float:
    """The best intersection over union of a silhouette with a shape of its area and centroid."""
    if not found.any():
        return 0.0
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    area, cu, cv = _moments(shape)
    scale = (found.sum() / area).sqrt()
    dx, dy = (x - x[found].mean()) / scale, (y - y[found].mean()) / scale
    angle = (track.rotation(torch.tensor(t)) + TURNS).view(-1, 1, 1)
    u, v = torch.cos(angle) * dx + torch.sin(angle) * dy + cu, torch.cos(angle) * dy - torch.sin(angle) * dx + cv
    ideal = distance_to(shape, u, v) < 0
    return ((ideal & found).sum((1, 2)) / (ideal | found).sum((1, 2))).max().item()


@cache
def _moments(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Area and centroid of a shape of radius 1."""
    side = torch.linspace(-1.6, 1.6, 401)
    v, u = torch.meshgrid(side, side, indexing="ij")
    inside = distance_to(shape, u, v) < 0
    return inside.sum() * (side[1] - side[0]) ** 2, u[inside].mean(), v[inside].mean()
