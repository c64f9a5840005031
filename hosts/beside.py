"""A branch that runs beside another one, block by block, in networks that take one branch a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

Phase = Literal["off", "enter", "run", "leave"]
Run = Callable[[Tensor, Any, bool], Tensor]
"""A block, from its rows and other inputs. The flag: whether they are those of the branch beside."""
Alone = Callable[[int, Tensor, Any], Tensor]
"""A block of the network by its index, from the rows and other inputs of the branch beside."""


class Beside:
    """The branch beside that of a call, so that what it records in a block is needed for this block only.

    Three calls: in one on the branch's inputs, the blocks return their rows, which gives the inputs of the first block
    ("enter"); in the main call, each block runs on the branch's rows first ("run"); in a last one on the branch's
    inputs, the last block returns its rows, which become its prediction ("leave"). The first and the last cost the
    network's embedding and output layers only.
    """

    def __init__(self, blocks: int, alone: Alone | None = None) -> None:
        """alone: runs the blocks that the main call leaves out (skip-layer guidance)."""
        self._last, self._alone = blocks - 1, alone
        self._phase: Phase = "off"
        self._rows: Tensor | None = None
        self._others: Any = None
        self._next = 0
        """The block that the branch's rows are at."""
        self._reached = False
        """Whether the calls of the phase reached the block that it needs."""

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The phase of the calls inside. Raises ValueError where they did not reach the blocks."""
        before, self._phase, self._reached = self._phase, phase, False
        try:
            yield
            if not self._reached:
                raise ValueError(
                    "model: a call ran no block: another node on the model skips calls (EasyCache, LazyCache) or "
                    "replaces blocks: remove it"
                )
        finally:
            self._phase = before

    @property
    def runs(self) -> bool:
        """Whether blocks compute, instead of passing on their rows."""
        return self._phase in ("off", "run")

    def forget(self) -> None:
        self._phase, self._rows, self._others = "off", None, None

    def block(self, index: int, rows: Tensor, others: Any, run: Run) -> Tensor:
        """The output of a block of the current call. others: its inputs besides the rows.

        Raises ValueError for a call that runs a block again.
        """
        self._reached |= self._phase != "leave" or index == self._last
        if self._phase == "enter":
            if index == 0:
                self._rows, self._others, self._next = rows, others, 0
            return rows
        if self._phase == "leave":
            return self._rows_at(self._last + 1) if index == self._last else rows
        if self._phase == "run":
            self._rows, self._next = run(self._rows_at(index), self._others, True), index + 1
        return run(rows, others, False)

    def _rows_at(self, index: int) -> Tensor:
        """The branch's rows before a block, after those that the call left out."""
        if self._rows is None or index < self._next or (index > self._next and self._alone is None):
            raise ValueError(f"model: block {index} ran where {self._next} was expected: another node calls it again")
        for left_out in range(self._next, index):
            assert self._alone is not None
            self._rows = self._alone(left_out, self._rows, self._others)
        self._next = index
        return self._rows
