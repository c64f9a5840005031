"""A batch on processes of one machine that each keep a model on their device."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...files.whole import remove_leftovers
from ..progress import one_line as in_a_line
from .work import Ended, Group, Task, Worker, WorkerOptions

_CONTEXT = get_context("spawn")
_READY = "ready"
"""The message of a process that has started, because the start does not count as a task's time."""


@dataclass(frozen=True)
class Devices:
    """The devices of a batch: one process per name in `names`. threads: of each process on a CPU."""

    names: tuple[str, ...]
    options: WorkerOptions = WorkerOptions()
    threads: int | None = None


@dataclass(frozen=True)
class RetryPolicy:
    """timeout: the maximal seconds of a task; None for no limit. retries: of a task whose process died."""

    timeout: float | None = None
    retries: int = 1


def run_here(
    groups: Sequence[Group], folder: Path, stores: Path, suffix: str, devices: Devices, policy: RetryPolicy
) -> Iterator[Ended]:
    """Run all tasks and yield each job's result when it ends; an inversion runs before the edits that share it.

    folder: of the results. stores: the folder of inversions, which are removed after their last edit.
    """
    ready = deque(task for group in groups for task in ((group.inversion,) if group.inversion else group.edits))
    waiting = {group.inversion.name: list(group.edits) for group in groups if group.inversion}
    left = {name: len(edits) for name, edits in waiting.items()}
    tries = dict[str, int]()
    slots = [_Slot(f"{device} #{i}" if len(devices.names) > 1 else device, device, devices) for i, device in
             enumerate(devices.names)]  # fmt: skip
    try:
        while ready or any(slot.task for slot in slots):
            for slot in slots:
                if ready and slot.task is None:
                    task = ready.popleft()
                    tries[task.name] = tries.get(task.name, 0) + 1
                    slot.begin(task, folder, stores, suffix)
            for slot, error, figures, again in _next(slots, policy):
                task = slot.finish()
                if again and tries[task.name] <= policy.retries:
                    ready.append(task)
                    continue
                if task.job is not None:
                    yield Ended(task.name, error or None, slot.seconds, tries[task.name], slot.name, figures)
                elif error:
                    edits = waiting.pop(task.name)
                    yield from (Ended(edit.name, f"its inversion: {error}", where=slot.name) for edit in edits)
                else:
                    ready.extendleft(reversed(waiting.pop(task.name)))  # to remove its store early
                if task.job is not None and task.store is not None:
                    left[task.store] -= 1
                    if not left[task.store]:
                        (stores / task.store).unlink(missing_ok=True)
                        shutil.rmtree(stores / f"{task.store}.state", ignore_errors=True)
    finally:
        for slot in slots:
            slot.stop()


def _next(slots: Sequence[_Slot], policy: RetryPolicy) -> Iterator[tuple[_Slot, str, dict[str, float], bool]]:
    """Wait for tasks to end: yields the slot, the error, the metrics, and whether to retry."""
    busy, limit = [slot for slot in slots if slot.task is not None], None
    if policy.timeout is not None:
        limit = max(0.0, min(slot.begun for slot in busy) + policy.timeout - time.monotonic())
    ends = {id(end): slot for slot in busy for end in (slot.line, slot.process.sentinel)}
    found = wait([end for slot in busy for end in (slot.line, slot.process.sentinel)], limit)
    for slot in dict.fromkeys(ends[id(end)] for end in found if id(end) in ends):
        if slot.line.poll():
            with suppress(EOFError, OSError):
                message = slot.line.recv()
                if message == _READY:
                    slot.begun = time.monotonic()
                else:
                    yield slot, *message, False
                continue
        slot.process.join(5)
        yield slot, _death(slot.process.exitcode), {}, True
    for slot in busy:
        if policy.timeout is not None and slot.task is not None and time.monotonic() > slot.begun + policy.timeout:
            slot.stop()
            yield slot, f"it took more than {policy.timeout:g} seconds", {}, False


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        more = ": the machine may have run out of memory" if -code == getattr(signal, "SIGKILL", 9) else ""
        return f"its process was ended by {signal.Signals(-code).name}{more}"
    return f"its process ended with status {code}"


class _Slot:
    """A process that runs one task at a time; started on demand, and again after it died."""

    def __init__(self, name: str, device: str, devices: Devices) -> None:
        self.name, self.device, self.devices = name, device, devices
        self.task: Task | None = None
        self.begun = self.seconds = 0.0
        self.process: Any = None
        self.line: Connection

    def begin(self, task: Task, folder: Path, stores: Path, suffix: str) -> None:
        if self.process is None or not self.process.is_alive():
            self.line, theirs = _CONTEXT.Pipe()
            self.process = _CONTEXT.Process(target=_work, args=(theirs, self.device, self.devices), daemon=True)
            self.process.start()
            theirs.close()
        self.task, self.begun = task, time.monotonic()
        with suppress(OSError):  # it died, which `_next` finds
            self.line.send((task, folder, stores, suffix))

    def finish(self) -> Task:
        """The task that ended."""
        task, self.task = self.task, None
        self.seconds = round(time.monotonic() - self.begun, 2)
        assert task is not None
        return task

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.join(5)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.line.close()
            self.process = None


def _work(line: Connection, device: str, devices: Devices) -> None:
    """A process that runs the tasks from its line until the parent exits."""
    _end_with_parent()
    warnings.filterwarnings("ignore", category=FutureWarning)
    worker: Worker | None = None

    def done(task: Task, folder: Path, stores: Path, suffix: str) -> tuple[str, dict[str, float]]:
        nonlocal worker
        try:
            worker = worker or Worker(devices.options, device, devices.threads)
            if task.job is None:
                worker.invert(task, stores / task.name)
                return "", {}
            store = None if task.store is None else stores / task.store
            return "", worker.edit(task, folder / f"{task.name}{suffix}", store)
        except Exception as problem:
            return in_a_line(problem).removeprefix("error: "), {}

    with suppress(EOFError, OSError):
        line.send(_READY)
        while True:
            line.send(done(*line.recv()))


def _end_with_parent() -> None:
    """Remove partial files when the parent ends this process, or when the parent is gone."""

    def end(*_: object) -> None:
        remove_leftovers()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        end()

    threading.Thread(target=watch, daemon=True).start()
