"""Exclusive use of models: another run is rejected, and calls from other threads bypass the hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()
_USED: set[int] = set()

OtherThread = Callable[[], bool]
"""Whether the current call comes from another thread than the run's."""


@contextmanager
def exclusively(models: Sequence[nn.Module], what: str) -> Iterator[OtherThread]:
    """Use models exclusively inside the `with` block. what: their name in the error.

    Raises ValueError if another run uses one of them.
    """
    ids = {id(model) for model in models}
    with _LOCK:
        if ids & _USED:
            raise ValueError(IN_USE.format(what=what))
        _USED.update(ids)
    owner = threading.get_ident()

    def other_thread() -> bool:
        # autograd's threads, which Python did not start, recompute blocks for the run
        own = threading.get_ident() == owner or isinstance(threading.current_thread(), threading._DummyThread)
        return not own

    try:
        yield other_thread
    finally:
        with _LOCK:
            _USED.difference_update(ids)


IN_USE = "another edit is using this {what}: wait for it, or use a separate {what} for each"
