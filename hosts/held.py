"""A model that one run has: others are refused, and calls by other threads go as if nothing were hooked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()
_HELD: set[int] = set()

Stranger = Callable[[], bool]
"""Whether the call under way is of another thread than the run's."""


@contextmanager
def held(models: Sequence[nn.Module], what: str) -> Iterator[Stranger]:
    """Have models, called so, from before they are checked until they are as they were.

    Raises ValueError where another run has one of them.
    """
    ids = {id(model) for model in models}
    with _LOCK:
        if ids & _HELD:
            raise ValueError(IN_USE.format(what=what))
        _HELD.update(ids)
    owner = threading.get_ident()

    def stranger() -> bool:
        # autograd's own threads, which Python did not start, compute a block again for the run
        own = threading.get_ident() == owner or isinstance(threading.current_thread(), threading._DummyThread)
        return not own

    try:
        yield stranger
    finally:
        with _LOCK:
            _HELD.difference_update(ids)


IN_USE = "another edit is using this {what}: wait for it, or give each a {what} of its own"
