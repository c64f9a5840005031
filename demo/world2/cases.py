"""Edits of world 2 with their ground truth, in the form of the benchmark's cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import torch
from torch import Tensor

from ..scenes import Clip, Place
from .judge import is_gone, words_read
from .render import render
from .scenes import FRAMES, WORDS, Motion, Scene, random_motion, random_scene

OF_A_THING = ("colour", "material", "shape", "size", "action")
OF_THE_PICTURE = ("background", "clutter", "style")
SWAP, REMOVAL, INSERTION = "swap", "removal", "insertion"
KINDS = (*OF_A_THING, *OF_THE_PICTURE, SWAP, REMOVAL, INSERTION)
"""Kinds of edits: a word of a thing or of the picture; a swap is another thing of the same size, place and action."""
_PRESETS = {"shape": "shape", SWAP: "shape", REMOVAL: "shape", INSERTION: "shape", "style": "style"}
"""The paper's preset of a kind, unless it is the attribute preset."""
_JUDGED = 5
"""Frames of a clip that the judge reads."""


@dataclass(frozen=True)
class Case:
    """A clip, its edit, and how each moves: the motions differ only in a thing that one of them lacks.

    at: the thing that changes, in the scene that has it; None if the picture changes.
    """

    name: str
    kind: str
    source: Scene
    target: Scene
    source_motion: Motion
    motion: Motion
    frames: int = FRAMES
    at: int | None = None

    @property
    def changed(self) -> list[Place]:
        """The words that change; of a thing that comes or goes, the words that name it."""
        if self.kind in (REMOVAL, INSERTION):
            return [(self.at, "shape"), (self.at, "colour")]
        return self.target.changed_from(self.source)

    @property
    def preset(self) -> str:
        return _PRESETS.get(self.kind, "attribute")

    @property
    def blend_words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The words of source and target whose attention localizes the edit; none for an edit of style."""

        def of(scene: Scene) -> tuple[str, ...]:
            if self.at is None:
                return () if self.kind == "style" else (scene.background,)
            return (f"{scene.things[self.at].colour} {scene.things[self.at].shape}",)

        return () if self.kind == INSERTION else of(self.source), () if self.kind == REMOVAL else of(self.target)

    @cached_property
    def clip(self) -> Clip:
        """The source clip."""
        return render(self.source, self.source_motion, self.frames)

    @cached_property
    def truth(self) -> Clip:
        """The ground truth of the edit."""
        return render(self.target, self.motion, self.frames)

    @cached_property
    def ground(self) -> Tensor:
        """The ground truth without its things: (frames, 3, SIZE, SIZE)."""
        return render(replace(self.target, things=()), replace(self.motion, tracks=()), self.frames).frames

    def judged(self, frames: Tensor) -> list[tuple[bool, bool, bool]]:
        """Whether the changed words, the others, and shapes among them, are read in some of a clip's frames.

        Shapes are read by their outlines, so that none is broken where they are read.
        """
        chosen = torch.linspace(0, self.frames - 1, min(_JUDGED, self.frames)).round().long()
        at = (chosen / max(self.frames - 1, 1) - 0.5).tolist()
        shown = frames[chosen]
        if self.kind == REMOVAL:
            assert self.at is not None
            thing = self.source.things[self.at], self.source_motion.tracks[self.at]
            edited = is_gone(self.target, self.motion, shown, thing, at)
        else:
            edited = _all(words_read(self.target, self.motion, shown, at, self.changed), len(at))
        others = [place for place in self.target.places if self.kind == REMOVAL or place not in self.changed]
        read = words_read(self.target, self.motion, shown, at, others)
        shapes = {place: found for place, found in read.items() if place[1] == "shape"}
        return list(zip(edited, _all(read, len(at)), _all(shapes, len(at)), strict=True))


def _all(read: dict[Place, list[bool]], count: int) -> list[bool]:
    """Whether every word is read, for each frame."""
    return [all(column) for column in zip(*read.values(), strict=True)] if read else [True] * count


# --- drawing cases --------------------------------------------------------------------


def sample_cases(seed: int, each: int, frames: int = FRAMES, kinds: Sequence[str] = KINDS) -> list[Case]:
    """`each` cases of every kind, from held-out captions; reproducible by seed.

    Raises ValueError for an unknown kind.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"unknown kind {unknown[0]!r}: use some of {', '.join(map(repr, KINDS))}")
    found = []
    for kind in kinds:
        drawn = _drawn(Random(f"world 2, {seed} {kind}"), kind, frames)
        found += [replace(next(drawn), name=f"{kind}-{n:02d}") for n in range(each)]
    return found


def _drawn(random: Random, kind: str, frames: int) -> Iterator[Case]:
    while True:
        source = random_scene(random, 2 if kind in (REMOVAL, INSERTION) else None)
        motion = random_motion(random, source)
        if not source.held_out:
            continue
        at = random.randrange(len(source.things))
        if kind in (REMOVAL, INSERTION):
            fewer = replace(source, things=tuple(thing for i, thing in enumerate(source.things) if i != at))
            scenes = [(source, motion), (fewer, motion.without(at))]
            (before, moves), (after, move) = scenes if kind == REMOVAL else scenes[::-1]
            yield Case("", kind, before, after, moves, move, frames, at)
        elif kind in OF_THE_PICTURE:
            yield Case("", kind, source, _changed(random, source, (None, kind)), motion, motion, frames)
        else:
            target = source
            for word in ("colour", "material", "shape") if kind == SWAP else (kind,):
                target = _changed(random, target, (at, word))
            if len({thing.shape for thing in target.things}) == len(target.things):
                yield Case("", kind, source, target, motion, motion, frames, at)


def _changed(random: Random, scene: Scene, place: Place) -> Scene:
    """A scene with another word at a place."""
    return scene.with_word(place, random.choice([word for word in WORDS[place[1]] if word != scene.word(place)]))
