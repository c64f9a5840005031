"""Where a store's records stand, and how they come and go beside the UNet's work."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from .files import CODES, copied
from .key_frames import KeyFrames, Piece
from .records import Record, pick, record_from

T = TypeVar("T")
Records = dict[str, Record]
"""A step's records by the name of their layer."""


class Shelf(Protocol):
    """Keeps the records of a store's steps."""

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """A step's tensors, by layer and part; on disk they are mapped, not read."""


class MemoryShelf:
    """Records in memory: on the device that made them, or in RAM, pinned beside a CUDA device."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self.device = device
        self.pinned = pinned
        self._steps: dict[int, Records] = {}

    def put(self, step: int, records: Records) -> None:
        """Keep a step's records."""
        self._steps[step] = {
            name: record_from({part: self._kept(t) for part, t in record.tensors.items()})
            for name, record in records.items()
        }

    def _kept(self, x: Tensor) -> Tensor:
        if not self.pinned:
            # A copy of its own where it is a view, or it would hold a larger tensor alive.
            whole = x.untyped_storage().nbytes() == x.nbytes
            return x.to(self.device) if whole or x.device != self.device else x.clone()
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        return {name: record.tensors for name, record in self._steps[step].items()}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for step in self._steps.values() for r in step.values() for t in r.tensors.values())


class FileShelf:
    """Records in a safetensors file, mapped into memory and read where they are asked for.

    The file is opened anew for each step, so that no more than a step's pages stay mapped.
    temporary: remove the file and its folder with this object, or when the process ends.
    """

    def __init__(self, path: Path, temporary: bool = False) -> None:
        self.path = path
        self.nbytes = 0
        self._names: dict[int, list[tuple[str, str, str]]] = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dict
                if key.startswith("step."):
                    layer, _, part = key[10:].rpartition(".")
                    self._names.setdefault(int(key[5:9]), []).append((key, layer, part))
                    self.nbytes += _slice_bytes(file, key)
        if temporary:
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.path, framework="pt") as file:
            for key, layer, part in self._names[step]:
                found.setdefault(layer, {})[part] = file.get_tensor(key)
        return found


def tensor_name(step: int, name: str) -> str:
    """How a step's tensor is called in a file."""
    return f"step.{step:04d}.{name}"


def _slice_bytes(file: Any, key: str) -> int:
    part = file.get_slice(key)
    size = next(dtype.itemsize for dtype, code in CODES.items() if code == part.get_dtype())
    return prod(part.get_shape()) * size


def fetch(
    shelf: Shelf, step: int, wanted: set[str], key_frames: KeyFrames, piece: Piece, device: torch.device
) -> Records:
    """A step's records of some layers and the frames of a piece, on a device.

    Layers that were not kept are left out.
    """
    mapped = isinstance(shelf, FileShelf)
    records = {}
    for name, parts in shelf.tensors(step).items():
        if name in wanted:
            rows = {} if piece.is_whole else _rows_of_piece(parts, name.endswith("cross"), key_frames, piece)
            brought = {part: _brought(t, rows.get(part), device, mapped) for part, t in parts.items()}
            records[name] = record_from(brought)
    return records


def _rows_of_piece(
    parts: dict[str, Tensor], cross: bool, key_frames: KeyFrames, piece: Piece
) -> dict[str, Sequence[int]]:
    """Where a piece's frames are among a record's rows, and the keys these see."""
    rows: dict[str, Sequence[int]] = {"map": piece.held, "q": piece.held}
    if not cross and "k" in parts:
        keys = key_frames.at(parts["k"].shape[1] * parts["k"].shape[3])
        kept = keys.used(range(piece.clip), piece.clip)
        rows["k"] = [kept.index(f) for f in keys.used(piece.held, piece.clip)]
    return rows


def _brought(x: Tensor, rows: Sequence[int] | None, device: torch.device, mapped: bool) -> Tensor:
    """Rows on a device; of a mapped file a copy, so that it is read here and not at its first use."""
    if mapped:
        x = copied(x, rows)
    elif rows is not None:
        x = pick(x, rows)
    if device.type == "cuda" and not x.is_pinned() and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# --- beside the UNet ----------------------------------------------------------------------


class Background:
    """One piece of work at a time in a thread, on a CUDA device in a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Do this after what is queued on the caller's stream; done when it has left the device's queue."""
        inference = torch.is_inference_mode_enabled()
        if self._stream is None:
            return self._pool.submit(self._in_mode, work, inference)
        stream = self._stream
        ready = torch.cuda.current_stream(stream.device).record_event()

        def on_stream() -> T:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                done = work()
            stream.synchronize()
            return done

        return self._pool.submit(self._in_mode, on_stream, inference)

    @staticmethod
    def _in_mode(work: Callable[[], T], inference: bool) -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return work()

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)


Put = Callable[[int, Records], None]
"""Keeps the records of a step."""


@contextmanager
def written_behind(device: torch.device, on_disk: bool, write: Put) -> Iterator[Put]:
    """`write`, done while the caller goes on: one step at a time, its errors told at the next.

    From a CPU's work to its own memory there is nothing to wait for, and `write` is done at once.
    """
    if device.type == "cpu" and not on_disk:
        yield write
        return
    background = Background(device)
    pending: list[Future[None]] = []

    def put(step: int, records: Records) -> None:
        if pending:
            pending.pop().result()
        pending.append(background.start(lambda: write(step, records)))

    try:
        yield put
        if pending:
            pending.pop().result()
    finally:
        background.close()


@contextmanager
def read_ahead(
    device: torch.device, on_disk: bool, jobs: Iterable[Callable[[], Records]]
) -> Iterator[Callable[[], Records]]:
    """The results of some jobs in order, each fetched while the one before it is in use.

    Where a CPU reads its own memory there is nothing to wait for, and each is done as it is asked for.
    """
    waiting = iter(jobs)
    if device.type == "cpu" and not on_disk:
        yield lambda: next(waiting)()
        return
    background = Background(device)
    pending: list[Future[Records]] = []

    def begin() -> None:
        job = next(waiting, None)
        if job is not None:
            pending.append(background.start(job))

    def take() -> Records:
        records = pending.pop().result()
        if device.type == "cuda":
            for record in records.values():
                for tensor in record.tensors.values():
                    tensor.record_stream(torch.cuda.current_stream(device))
        begin()
        return records

    begin()
    try:
        yield take
    finally:
        background.close()
