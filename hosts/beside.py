"""A branch that runs beside another one, block by block, in networks that take one branch a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

Phase = Literal["off", "enter", "run", "leave"]
Run = Callable[[Tensor, Any, bool], Tensor]
"""A block, from its rows and other inputs. The flag: whether they are those of the branch beside."""


CALLS = "another node on the model calls blocks twice or leaves some out: remove it"
"""Why a block does not run in its turn."""


class Beside:
    """The branch beside that of a call, so that what it records in a block is needed for this block only.

    Three calls: in one on the branch's inputs, the blocks return their rows, which gives the inputs of the first block
    ("enter"); in the main call, each block runs on the branch's rows first ("run"); in a last one on the branch's
    inputs, the last block returns its rows, which become its prediction ("leave"). The first and the last cost the
    network's embedding and output layers only.
    """

    def __init__(self, blocks: int) -> None:
        self._last = blocks - 1
        self._phase: Phase = "off"
        self._rows: Tensor | None = None
        self._others: Any = None
        self._next = 0

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The phase of the calls inside."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    @property
    def runs(self) -> bool:
        """Whether blocks compute, instead of passing on their rows."""
        return self._phase in ("off", "run")

    def forget(self) -> None:
        self._phase, self._rows, self._others = "off", None, None

    def block(self, index: int, rows: Tensor, others: Any, run: Run) -> Tensor:
        """The output of a block of the current call. others: its inputs besides the rows."""
        if self._phase == "enter":
            if index == 0:
                self._rows, self._others, self._next = rows, others, 0
            return rows
        if self._phase == "leave":
            assert self._rows is not None
            return self._rows if index == self._last else rows
        if self._phase == "run":
            if self._rows is None or index != self._next:
                raise ValueError(f"model: block {index} ran where {self._next} was expected: {CALLS}")
            self._rows, self._next = run(self._rows, self._others, True), index + 1
        return run(rows, others, False)
