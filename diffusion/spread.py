"""One clip on several processes: each predicts some of its chunks, and all know the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ..attention.key_frames import Chunk

T = TypeVar("T")


class Spread(Protocol):
    """Which process predicts which chunk of a clip.

    Every process runs the same loop on the same latents; a chunk is the same process's at every step, for what a
    step's masks remember of the last lies with it.
    """

    def each(self, chunks: Sequence[Chunk], call: Callable[[Chunk], T]) -> list[T]:
        """What a call gives for each chunk, in order, on every process; tensors, or tuples of them and None."""


class OneProcess:
    """All chunks, one after another, by this process."""

    def each(self, chunks: Sequence[Chunk], call: Callable[[Chunk], T]) -> list[T]:
        return [call(chunk) for chunk in chunks]


ONE_PROCESS = OneProcess()
