"""Signals that end a run: heard before anything slow is imported, and cleaned up after."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

heard: list[int] = []
"""The signals that came, in order."""
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


def run_to_the_end(load: Callable[[], Callable[[], Any]]) -> int:
    """Load a program and run it; its exit status, or 128 and the signal that ended it (Ctrl-C: 130).

    Whatever way the interruption ends up, through libraries that turn it into errors of their own or swallow it,
    the files that were not finished are removed.
    """
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _hear)
    sys.unraisablehook = _unraisable
    try:
        load()()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        if not heard:
            raise
        status = 1
    if not heard:
        return status
    for number in set(heard):
        signal.signal(number, signal.SIG_IGN)
    remove_leftovers: Callable[[], None] | None = getattr(sys.modules.get(_WHOLE), "remove_leftovers", None)
    if remove_leftovers:
        remove_leftovers()
    word = "interrupted" if heard[0] == signal.SIGINT else f"ended by {signal.Signals(heard[0]).name}"
    print(f"{word}; nothing half-written is left", file=sys.stderr, flush=True)
    return 128 + heard[0]


_WHOLE = __name__.rpartition(".")[0] + ".whole"


def stop_if_heard() -> None:
    """Raise KeyboardInterrupt where a signal came and whatever ran then swallowed it."""
    if heard:
        raise KeyboardInterrupt


def leave(status: int) -> None:
    """End the process: at once after a signal, for threads and libraries may be in any state."""
    if heard:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _hear(number: int, frame: FrameType | None) -> None:
    heard.append(number)
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    if not heard:
        sys.__unraisablehook__(unraisable)
