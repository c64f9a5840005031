"""The judge of edits in world 2, without weights: analysis by synthesis.

A word is read by rendering every other word in its place with the same motion; the nearest picture's word is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scenes import Clip, Place
from .render import render
from .scenes import WORDS, Motion, Scene, Thing, Track

NEEDS_TIME = ("action",)
"""Kinds of words that are read from all frames together."""
NEAR, UNREAD = 0.03, ""
"""The squared difference from which the nearest picture is no likeness and its word is unread."""


def read_word(scene: Scene, motion: Motion, frames: Tensor, place: Place, at: Sequence[float]) -> list[str]:
    """The word at a place of a scene, as each frame (n, 3, SIZE, SIZE) in 0..1 shows it.

    scene: what the frames should show; its other words are not in question. at: the frames' times, see `render`.
    """
    words = WORDS[place[1]]
    others = [render(scene.with_word(place, word), motion, at=at) for word in words]
    far = distances(frames, others, _region(scene, others, place))
    if place[1] in NEEDS_TIME:
        far = far.mean(1, keepdim=True).expand_as(far)
    return [words[n] if near else UNREAD for n, near in zip(far.argmin(0).tolist(), far.amin(0) < NEAR, strict=True)]


def is_gone(
    scene: Scene, motion: Motion, frames: Tensor, thing: tuple[Thing, Track], at: Sequence[float]
) -> list[bool]:
    """Whether each frame of a scene shows what is behind a thing that the scene leaves out, not the thing.

    The thing is taken to be in front of the others.
    """
    whole = replace(scene, things=(thing[0], *scene.things)), replace(motion, tracks=(thing[1], *motion.tracks))
    shown = render(*whole, at=at)
    there, gone = distances(frames, [shown, render(scene, motion, at=at)], shown.masks[0])
    return ((gone < there) & (gone < NEAR)).tolist()


def distances(frames: Tensor, others: Sequence[Clip], region: Tensor) -> Tensor:
    """Mean squared differences in a region (n, SIZE, SIZE) of softened frames to clips: (clips, n)."""
    soft, area = softened(frames), region.sum((1, 2)).clamp(min=1)
    differences = (((soft - softened(other.frames)) ** 2).mean(1) * region for other in others)
    return torch.stack([difference.sum((1, 2)) / area for difference in differences])


def softened(frames: Tensor) -> Tensor:
    """Frames without the detail that an autoencoder changes."""
    for _ in range(2):
        frames = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return frames


def _region(scene: Scene, others: Sequence[Clip], place: Place) -> Tensor:
    """Where a word can be read: what any of its thing's pictures covers, the ground, or everything."""
    index, kind = place
    if index is not None:
        return torch.stack([other.masks[index] for other in others]).amax(0)
    ground = torch.stack([1 - other.mask for other in others]).amin(0)
    return torch.ones_like(ground) if kind == "style" else ground


def words_read(
    scene: Scene, motion: Motion, frames: Tensor, at: Sequence[float], places: Sequence[Place] | None = None
) -> dict[Place, list[bool]]:
    """Whether each frame shows the scene's word, for each place, or for some."""
    return {
        place: [word == scene.word(place) for word in read_word(scene, motion, frames, place, at)]
        for place in (scene.places if places is None else places)
    }
