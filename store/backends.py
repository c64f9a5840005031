"""Where a store's records are kept, and background reading and writing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from ..attention.key_frames import Chunk, KeyFrames
from ..files.safetensors import FileTensor, SafetensorsReader
from ..imports import torch
from .records import Record, pick, record_from

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Records = dict[str, Record]
"""A step's records by the name of their layer."""


Stored: TypeAlias = "Tensor | FileTensor"
"""A tensor in memory, or one in a file, read on demand."""


class Backend(Protocol):
    """Keeps the records of a store's steps."""

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""

    def tensors(self, step: int) -> Mapping[str, Mapping[str, Stored]]:
        """A step's tensors, by layer and part."""


class MemoryBackend:
    """Records in memory: on the device that made them, or in RAM, pinned for a CUDA device."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self.device = device
        self.pinned = pinned
        self._steps: dict[int, Records] = {}

    def put(self, step: int, records: Records) -> None:
        """Store a step's records."""
        self._steps[step] = {
            name: record_from({part: self._moved(t) for part, t in record.tensors.items()})
            for name, record in records.items()
        }

    def _moved(self, x: Tensor) -> Tensor:
        if not self.pinned:
            # Copy views, which would keep a larger tensor in memory.
            whole = x.untyped_storage().nbytes() == x.nbytes
            return x.to(self.device) if whole or x.device != self.device else x.clone()
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        return {name: record.tensors for name, record in self._steps[step].items()}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for step in self._steps.values() for r in step.values() for t in r.tensors.values())


class FileBackend:
    """Records in a file, read and checked on demand."""

    def __init__(self, file: SafetensorsReader) -> None:
        self.nbytes = 0
        self._steps: dict[int, dict[str, dict[str, FileTensor]]] = {}
        for name, tensor in file.tensors.items():
            if name.startswith("step."):
                layer, _, part = name[10:].rpartition(".")
                self._steps.setdefault(int(name[5:9]), {}).setdefault(layer, {})[part] = tensor
                self.nbytes += tensor.nbytes

    @property
    def steps(self) -> list[int]:
        return sorted(self._steps)

    def tensors(self, step: int) -> Mapping[str, Mapping[str, FileTensor]]:
        return self._steps[step]


class FileLevels:
    """The latents of every level, clean to noisy, in a file; indexed like a tensor (levels, frames, c, h, w)."""

    def __init__(self, levels: Sequence[FileTensor]) -> None:
        self._levels = levels
        self.shape = torch.Size((len(levels), *levels[0].shape))
        self.dtype = levels[0].dtype
        self.nbytes = sum(level.nbytes for level in levels)

    def __len__(self) -> int:
        return len(self._levels)

    def __getitem__(self, level: int) -> Tensor:
        return self._levels[level].read()


class NoiseSource(Protocol):
    """Noise for each level and draw."""

    def at(self, level: int, draw: int, like: Tensor) -> Tensor:
        """Standard normal noise of a tensor's shape, type and device."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise of a random seed, for so many levels."""

    seed: int
    levels: int

    def at(self, level: int, draw: int, like: Tensor) -> Tensor:
        """See `NoiseSource.at`."""
        random = torch.Generator().manual_seed(self.seed + 1_000_003 * (draw * self.levels + level))
        return torch.randn(like.shape, generator=random).to(like)  # on the CPU: the same on every device


@dataclass(frozen=True)
class GivenNoise:
    """Given noise, (samples, frames, c, h, w): `draws` samples for each level, noisy to clean, and one for `last`.

    last: the cleanest level that has noise; 0 if every level has `draws` samples. Noisier levels may be left out.
    """

    noises: Tensor
    draws: int = 1
    last: int = 0

    def at(self, level: int, draw: int, like: Tensor) -> Tensor:
        """See `NoiseSource.at`. Raises ValueError for a level without noise."""
        of_level = (level - self.last) * self.draws + (self.last > 0)
        if of_level > len(self.noises):
            raise ValueError(f"noises has {len(self.noises)} samples, but {level} steps use {of_level}")
        return self.noises[draw - of_level].to(like)


class DrawnLevels:
    """The latents of every level with sampled noise, clean to noisy: signal * clip + deviation * eps, with other noise
    for each level and draw. One index gives one level.

    clip: (frames, c, h, w). shared: the levels up to this one share its noise. draw: which noise of each level.
    """

    def __init__(
        self,
        clip: Tensor,
        signals: Sequence[float],
        deviations: Sequence[float],
        noise: NoiseSource,
        shared: int = 0,
        draw: int = 0,
    ) -> None:
        self.clip, self.signals, self.deviations = clip, signals, deviations
        self.noise, self.shared, self.draw = noise, shared, draw
        self.shape = torch.Size((len(signals), *clip.shape))
        self.dtype = clip.dtype
        self.nbytes = clip.nbytes

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, level: int) -> Tensor:
        if level == 0:
            return self.clip
        eps = self.noise.at(max(level, self.shared), self.draw, self.clip)
        return self.signals[level] * self.clip + self.deviations[level] * eps

    def to(self, device: torch.device | str) -> DrawnLevels:
        """With its clip on a device."""
        return self._with(self.clip.to(device), self.draw)

    def of_draw(self, draw: int) -> DrawnLevels:
        """The same clip with another noise in each level."""
        return self._with(self.clip, draw)

    def _with(self, clip: Tensor, draw: int) -> DrawnLevels:
        return DrawnLevels(clip, self.signals, self.deviations, self.noise, self.shared, draw)


Levels: TypeAlias = "Tensor | FileLevels | DrawnLevels"


def tensor_name(step: int, name: str) -> str:
    """The name of a step's tensor in a file."""
    return f"step.{step:04d}.{name}"


def level_name(level: int) -> str:
    """The name of a level's latents in a file."""
    return f"latents.{level:04d}"


def read(x: Stored) -> Tensor:
    """A tensor, read from its file if need be."""
    return x.read() if isinstance(x, FileTensor) else x


def fetch(
    backend: Backend, step: int, layers: set[str], key_frames: KeyFrames, chunk: Chunk, device: torch.device
) -> Records:
    """A step's records of some layers and a chunk's frames, on a device, without layers that were not stored."""
    records = {}
    for name, parts in backend.tensors(step).items():
        if name in layers:
            rows = {} if chunk.is_whole else _rows_of_chunk(parts, name.endswith("cross"), key_frames, chunk)
            records[name] = record_from({part: _to_device(t, rows.get(part), device) for part, t in parts.items()})
    return records


class RecordsOnDemand(dict[str, Record]):
    """A step's records, fetched when they are read; only the last one stays in memory."""

    def __init__(self, fetch: Callable[[str], Record]) -> None:
        super().__init__()
        self._fetch = fetch

    def __missing__(self, layer: str) -> Record:
        self.clear()
        self[layer] = self._fetch(layer)
        return self[layer]


def _rows_of_chunk(
    parts: Mapping[str, Stored], cross: bool, key_frames: KeyFrames, chunk: Chunk
) -> dict[str, Sequence[int]]:
    """The rows of a record that belong to a chunk's frames and to the keys they attend to, by part."""
    rows: dict[str, Sequence[int]] = {"map": chunk.frame_indices, "q": chunk.frame_indices}
    if not cross and "k" in parts:
        keys = key_frames.at(parts["k"].shape[1] * parts["k"].shape[3])
        kept = keys.used(range(chunk.clip), chunk.clip)
        rows["k"] = rows["v"] = [kept.index(f) for f in keys.used(chunk.frame_indices, chunk.clip)]
    return rows


def _to_device(x: Stored, rows: Sequence[int] | None, device: torch.device) -> Tensor:
    """A tensor's rows (None: all) on a device."""
    if isinstance(x, FileTensor):
        x = x.read(rows)
    elif rows is not None:
        x = pick(x, rows)
    if device.type == "cuda" and not x.is_pinned() and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# --- in the background --------------------------------------------------------------------


class Background:
    """Runs one job at a time in a thread, on CUDA in a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Run work after what the caller's stream has queued; the future completes when the device has finished."""
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
        """Wait for the running job and drop the queued ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def written_behind(device: torch.device, on_disk: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that runs jobs in the background, one at a time; a job's error is raised by the next call.

    On a CPU that writes to RAM nothing is gained by queued, so each job runs at once.
    """
    if device.type == "cpu" and not on_disk:
        yield lambda work: work()
        return
    background = Background(device)
    pending: list[Future[None]] = []

    def start(work: Callable[[], None]) -> None:
        if pending:
            pending.pop().result()
        pending.append(background.start(work))

    try:
        yield start
        if pending:
            pending.pop().result()
    finally:
        background.close()


@contextmanager
def read_ahead(
    device: torch.device, on_disk: bool, jobs: Iterable[Callable[[], Records]]
) -> Iterator[Callable[[], Records]]:
    """A function that returns the jobs' results in order, each fetched while the previous one is in use.

    On a CPU that reads RAM each job runs on demand.
    """
    queued = iter(jobs)
    if device.type == "cpu" and not on_disk:
        yield lambda: next(queued)()
        return
    background = Background(device)
    pending: list[Future[Records]] = []

    def begin() -> None:
        job = next(queued, None)
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
