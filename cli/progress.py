"""The messages of a command: progress bars on a terminal, else lines; errors in one line."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..settings import shortened

console = Console(highlight=False)


class Bar(Protocol):
    """A progress callback: called with (done, total) and an optional note."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


_LINE_EVERY = 10.0
"""Seconds between lines of progress without a terminal."""


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Bar]]:
    """Progress of several things; each `add(title)` returns a callback (done, total).

    On a terminal a table of bars, elsewhere lines: the first, then one every ten seconds, and the last.
    """
    if not console.is_terminal:
        yield _progress_lines
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:

        def add(title: str) -> Bar:
            title = printable(title)
            task = progress.add_task(title, total=None)

            def update(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, description=f"{title} {note}")

            return update

        yield add


@contextmanager
def no_bars() -> Iterator[Callable[[str], Bar]]:
    """Replaces `progress_bar` for no output."""
    yield lambda title: lambda done, total, note="": None


def _progress_lines(title: str) -> Bar:
    begun, last, title = time.monotonic(), float("-inf"), printable(title)

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY or done == total:
            last, left = now, (now - begun) / max(1, done) * (total - done)
            rest = f", {_minutes(left)} left" if done < total else f" in {_minutes(now - begun)}"
            console.print(f"{title} {done}/{total}{note and ', '}{note}{rest}", markup=False, soft_wrap=True)
            console.file.flush()

    return update


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def in_words(seconds: float) -> str:
    """A time to wait: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_MOST = 320
"""Maximal characters of an error: two lines of a wide terminal."""
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with its unprintable characters escaped."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def in_a_line(text: str) -> str:
    """A text in one line, without the numbers of system errors; long texts are shortened in the middle."""
    return shortened(" ".join(_ERRNO.sub("", printable(text)).split()), _MOST)


def one_line(error: Exception) -> str:
    """An error in one line; with its place in the code for an internal error."""
    text = in_a_line(str(error)) or type(error).__name__
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return f"error: out of memory: {text}; use fewer or smaller frames, --window-frames, or another --device"
    if isinstance(error, (ValueError, TypeError, OSError, ArithmeticError, ImportError, MemoryError)):
        return f"error: {text}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"error: {type(error).__name__}: {text} ({where}; FATEZERO_DEBUG=1 shows the traceback)"


def print_error(text: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False).print(printable(text), style="red", markup=False, soft_wrap=True)
