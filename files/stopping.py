"""Signals that end a run, from the program's first line on, without half-written files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SHOW_CURSOR = b"\x1b[?25h\n"


_last: list[Callable[[], None]] = []


def at_end(last: Callable[[], None]) -> None:
    """Register a short function to call when a signal ends the process."""
    _last.append(last)


def end_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP remove unfinished files and exit with 128 plus their number.

    At once: an exception would pass through libraries that convert it, swallow it, or exit in their own way. A signal
    that is already ignored, as under nohup, stays ignored.
    """
    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def leave(status: int) -> None:
    """Exit with a status, ignoring further signals."""
    _ignore_signals()
    sys.exit(status)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def _ignore_signals() -> None:
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    _ignore_signals()
    whole = sys.modules.get(f"{__package__}.whole")
    if whole is not None:
        whole.remove_leftovers()
    for last in _last:
        with suppress(Exception):
            last()
    for worker in getattr(sys.modules.get("multiprocessing.process"), "active_children", list)():
        worker.terminate()
    with suppress(Exception):  # the signal may have interrupted a print
        sys.stdout.flush()
        if sys.stdout.isatty():
            os.write(1, _SHOW_CURSOR)
    word = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    with suppress(OSError):
        os.write(2, f"{word}; nothing half-written is left\n".encode())
    os._exit(128 + number)
