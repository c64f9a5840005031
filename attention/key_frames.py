"""Spatio-temporal self-attention: whose keys and values a frame sees (FateZero Eq. 8)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

NAMES = ("self", "first", "middle", "last", "previous")


@dataclass(frozen=True)
class KeyFrames:
    """The key frames of every frame of a clip.

    entries: each one of "self", "first", "middle", "last", "previous", or an int offset
    from the frame, clipped to the clip. The middle is frame (frames - 1) // 2. Paper Eq. 8
    is ("self", "middle"); the authors' style configurations are ("middle",), their
    Tune-A-Video ones ("previous", "first").
    least_channels: layers with fewer channels keep to their own frame (the authors'
    `least_sc_channel`).

    Raises ValueError for no entry or an unknown one.
    """

    entries: tuple[str | int, ...]
    least_channels: int = 0

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError('key_frames is empty: name at least one, e.g. ("self", "middle")')
        for entry in self.entries:
            known = (isinstance(entry, int) and not isinstance(entry, bool)) or entry in NAMES
            if not known:
                raise ValueError(f"key_frames: {entry!r} is neither one of {', '.join(NAMES)} nor a whole offset")

    @classmethod
    def of(cls, entries: KeyFrames | Iterable[str | int] | str | int) -> KeyFrames:
        """From what a user writes: a tuple, a list, or one entry alone."""
        if isinstance(entries, KeyFrames):
            return entries
        return cls((entries,) if isinstance(entries, (str, int)) else tuple(entries))

    @classmethod
    def parse(cls, text: str) -> KeyFrames:
        """From words with commas between: "self, middle, -1"."""
        words = [word.strip() for word in text.split(",") if word.strip()]
        return cls(tuple(int(word) if word.lstrip("+-").isdigit() else word for word in words))

    def at(self, channels: int) -> KeyFrames:
        """The key frames of a layer of so many channels."""
        return self if channels >= self.least_channels else KeyFrames(("self",))

    def of_frame(self, frame: int, frames: int) -> tuple[int, ...]:
        """The clip's frames that `frame` sees, one for each entry."""

        def resolve(entry: str | int) -> int:
            named = {"self": frame, "first": 0, "middle": (frames - 1) // 2, "last": frames - 1, "previous": frame - 1}
            at = named[entry] if isinstance(entry, str) else frame + entry
            return min(max(at, 0), frames - 1)

        return tuple(resolve(entry) for entry in self.entries)

    @property
    def only_self(self) -> bool:
        return all(entry in ("self", 0) for entry in self.entries)

    @property
    def anchored(self) -> bool:
        """Whether frames meet only through fixed frames, so that a clip can run in chunks."""
        return all(entry in ("self", 0, "first", "middle", "last") for entry in self.entries)

    def used(self, frames: int) -> tuple[int, ...]:
        """The clip's frames whose keys any frame sees, in order."""
        return tuple(sorted({seen for f in range(frames) for seen in self.of_frame(f, frames)}))

    def windows(self, frames: int, chunk: int | None) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Pieces of a clip to run one after another: (frames in the call, frames kept).

        A piece holds up to `chunk` frames and the key frames they see. Raises ValueError
        where frames meet through neighbours, for then no piece is enough by itself.
        """
        everything = tuple(range(frames))
        if chunk is None or chunk >= frames:
            return [(everything, everything)]
        if chunk < 1:
            raise ValueError(f"chunk_frames is {chunk}; it must be at least 1")
        if not self.anchored:
            raise ValueError(
                f"chunk_frames={chunk} needs key_frames among self, first, middle and last, got {self.entries}: "
                "with neighbours every frame depends on the whole clip"
            )
        pieces = []
        for start in range(0, frames, chunk):
            kept = everything[start : start + chunk]
            seen = {s for f in kept for s in self.of_frame(f, frames)}
            seen |= {s for f in seen for s in self.of_frame(f, frames)}
            pieces.append((tuple(sorted(seen | set(kept))), kept))
        return pieces

    def gather(self, k: Tensor, held: Sequence[int], frames: Sequence[int], clip: int) -> Tensor:
        """Keys or values of the key frames of each of `frames`.

        k: (f h t d) of the clip's frames `held`. Returns (frames, h, (n t), d), or a single
        frame's to broadcast when all see the same ones.
        """
        if self.only_self and len(self.entries) == 1 and list(held) == list(frames):
            return k
        row = {frame: i for i, frame in enumerate(held)}
        table = [[row[seen] for seen in self.of_frame(frame, clip)] for frame in frames]
        if all(seen == table[0] for seen in table):
            table = table[:1]
        return rearrange(k[torch.tensor(table, device=k.device)], "f n h t d -> f h (n t) d")
