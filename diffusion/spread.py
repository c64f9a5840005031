"""One clip on several processes: each predicts some of its chunks, and all get the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ..attention.key_frames import Chunk

T = TypeVar("T")


class Spread(Protocol):
    """Distributes the chunks of a clip over processes.

    Every process runs the same loop on the same latents. A chunk belongs to the same process at every step, because
    masks depend on the chunk's previous steps.
    """

    def each(self, chunks: Sequence[Chunk], call: Callable[[Chunk], T]) -> list[T]:
        """The results of a call for each chunk, in order, on every process: tensors, or tuples of tensors and None."""


class OneProcess:
    """Runs all chunks in this process."""

    def each(self, chunks: Sequence[Chunk], call: Callable[[Chunk], T]) -> list[T]:
        return [call(chunk) for chunk in chunks]


ONE_PROCESS = OneProcess()
