"""Benchmark cases: edits with a known ground truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from torch import Tensor

from ..demo.judge import read_words, words_by_frame
from ..demo.model import SceneClassifier
from ..demo.outline import removed, whole_outlines
from ..demo.scenes import (
    Clip,
    Motion,
    Place,
    Scene,
    Track,
    random_motion,
    random_scene,
    render,
)
from ..demo.world2 import cases as world2

KINDS = ("attribute", "texture", "shape", "style", "background", "swap", "two objects", "alike objects")
"""Kinds of edits: one word of a thing or of the picture; a swap changes all words of a thing. With two objects, one
of them changes in one word; alike ones have the same colour and texture."""
REMOVAL = "removal"
"""One of two objects is removed. A kind by name only, because it has no changed words."""
ALL_KINDS = (*KINDS, REMOVAL)

_OF_A_THING = ("colour", "texture", "shape")
_CHANGED = {"attribute": "colour"} | {kind: kind for kind in ("texture", "shape", "style", "background")}
_PRESETS = {"shape": "shape", "style": "style"}
"""The paper's preset for a word, unless it is the attribute preset."""


@dataclass(frozen=True)
class Case:
    """A clip of a demo scene, and its edit. removed: the index of the source's thing that the target leaves out."""

    name: str
    kind: str
    source: Scene
    target: Scene
    motion: Motion
    frames: int
    removed: int | None = None

    @property
    def changed(self) -> list[Place]:
        if self.removed is not None:
            return [(self.removed, word) for word in ("colour", "shape")]
        return self.target.changed_from(self.source)

    @property
    def tracks(self) -> tuple[Track, ...]:
        """Those of the target's things."""
        return tuple(track for i, track in enumerate(self.motion.tracks) if i != self.removed)

    @property
    def preset(self) -> str:
        """The paper's preset: shape if an outline changes, else that of the first changed word."""
        words = [word for _, word in self.changed]
        return "shape" if "shape" in words else _PRESETS.get(words[0], "attribute")

    @property
    def blend_words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The words of source and target whose attention localizes the edit; none for an edit of style."""

        def of(scene: Scene) -> tuple[str, ...]:
            things = [f"{thing.colour} {thing.shape}" for i, thing in enumerate(scene.things) if i in places]
            return (*things, *([scene.background] if (None, "background") in self.changed else []))

        places = {place for place, _ in self.changed}
        return of(self.source), () if self.removed is not None else of(self.target)

    def judged(self, frames: Tensor) -> list[tuple[bool, bool, bool]]:
        """Whether the changed words, the others, and whole outlines are read in each frame."""
        before = self.target if self.removed is not None else self.source
        words = words_by_frame(before, self.target, frames, self.tracks)
        if self.removed is not None:
            gone = removed(self.clip.masks[self.removed], self.truth, frames)
            words = [(ok, rest) for ok, (_, rest) in zip(gone, words, strict=True)]
        whole = whole_outlines(self.target, self.truth, frames, self.tracks)
        return [(*read, ok) for read, ok in zip(words, whole, strict=True)]

    @cached_property
    def clip(self) -> Clip:
        """The source clip."""
        return render(self.source, self.motion, self.frames)

    @cached_property
    def truth(self) -> Clip:
        """The ground truth of the edit."""
        return render(self.target, replace(self.motion, tracks=self.tracks), self.frames)

    @cached_property
    def ground(self) -> Tensor:
        """The ground truth without its things: (frames, 3, SIZE, SIZE)."""
        empty = replace(self.target, things=())
        return render(empty, replace(self.motion, tracks=()), self.frames).frames


AnyCase = Case | world2.Case


def sample_cases(seed: int, each: int, frames: int, kinds: Sequence[str] = KINDS) -> list[Case]:
    """`each` cases of every kind, from held-out captions; reproducible by seed.

    Raises ValueError for an unknown kind.
    """
    unknown = sorted(set(kinds) - set(ALL_KINDS))
    if unknown:
        raise ValueError(f"unknown kind {unknown[0]!r}: use some of {', '.join(map(repr, ALL_KINDS))}")
    found = []
    for kind in kinds:
        usable = filter(is_read, _sampled(Random(f"{seed} {kind}"), kind, frames))
        found += [replace(next(usable), name=f"{kind.replace(' ', '-')}-{n:02d}") for n in range(each)]
    return found


def is_read(case: Case) -> bool:
    """Whether the judge reads every word of the rendered source and truth; other cases cannot be judged.

    With one thing it makes no errors; with two it misreads an outline or texture in about 2 % of the frames.
    """
    shown = ((case.source, case.clip, case.motion.tracks), (case.target, case.truth, case.tracks))
    return all(read_words(scene, scene, clip.frames, tracks)[0] == 1 for scene, clip, tracks in shown)


def _sampled(random: Random, kind: str, frames: int) -> Iterator[Case]:
    things = 2 if kind.endswith("objects") or kind == REMOVAL else 1
    while True:
        source = random_scene(random, things)
        if kind == "alike objects":
            first, second = source.things
            source = source.with_thing(1, colour=first.colour, texture=first.texture)
        if not source.held_out or len({thing.shape for thing in source.things}) < things:
            continue  # "a star and a star" would not identify the one that changes
        at = random.randrange(things)
        if kind == REMOVAL:
            rest = tuple(thing for i, thing in enumerate(source.things) if i != at)
            yield Case("", kind, source, replace(source, things=rest), random_motion(random, things), frames, at)
            continue
        words = _OF_A_THING if kind == "swap" else (_CHANGED.get(kind) or random.choice(_OF_A_THING),)
        target = source
        for word in words:
            ground = word not in _OF_A_THING
            before = getattr(source if ground else source.things[at], word)
            after = random.choice([w for w in SceneClassifier.HEADS[word] if w != before])
            target = replace(target, **{word: after}) if ground else target.with_thing(at, **{word: after})  # type: ignore[arg-type]
        yield Case("", kind, source, target, random_motion(random, things), frames)


def cases_of(pairs: Sequence[tuple[str, str]], seed: int, frames: int) -> list[Case]:
    """Cases from given captions, each with a random motion of the seed.

    Raises ValueError for captions that no demo scene has, with unequal numbers of things, or equal.
    """
    found = []
    for n, (before, after) in enumerate(pairs):
        source, target = Scene.parse(before), Scene.parse(after)
        if len(source.things) != len(target.things):
            raise ValueError(f"both captions must have the same number of things: {before!r} / {after!r}")
        motion = random_motion(Random(f"{seed} {n}"), len(source.things))
        case = Case(f"given-{n:02d}", "", source, target, motion, frames)
        if not case.changed:
            raise ValueError(f"nothing changes: {before!r} / {after!r}")
        found.append(replace(case, kind=_kind_of(case)))
    return found


def _kind_of(case: Case) -> str:
    """The kind of a case, from its number of things and the words that change."""
    words = [word for _, word in case.changed]
    if len(case.source.things) == 2:
        first, second = case.source.things
        alike = (first.colour, first.texture) == (second.colour, second.texture)
        return "alike objects" if alike else "two objects"
    if "shape" in words and len(words) > 1:
        return "swap"
    return next(kind for kind, word in _CHANGED.items() if word == words[0])
