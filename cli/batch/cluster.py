"""A batch on a Ray cluster: Ray schedules the tasks, allocates GPUs, and retries the tasks of lost machines."""

from __future__ import annotations

import json
import logging
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...files.whole import remove_folder, temporary_folder, whole_file
from ...video.pictures import picture_files
from ..config.paths import files_of, full_name, renamed
from ..config.record import record_path, settings_of, write_record
from ..progress import one_line
from .work import Ended, Group, Task, Worker, WorkerOptions


@dataclass(frozen=True)
class Cluster:
    """Settings of Ray.

    address: of a running cluster, "auto", or "local" for a cluster of this machine. gpus, cpus: for each task; None for
    one GPU if the cluster has any. retries: of a task whose process or machine died. ships: whether to send the files
    of a job through Ray's object store; else they must be on a path that all machines share.
    """

    address: str
    gpus: float | None = None
    cpus: float = 1
    retries: int = 3
    ships: bool = False


def run_on_cluster(
    groups: Sequence[Group], folder: Path, suffix: str, cluster: Cluster, options: WorkerOptions
) -> Iterator[Ended]:
    """Run all tasks and yield each edit's result when it ends. Results come through Ray; only this process writes them.

    Raises ImportError if Ray is not installed, and ConnectionError if there is no cluster.
    """
    ray = _ray(cluster.address)
    try:
        gpus = cluster.gpus if cluster.gpus is not None else float("GPU" in ray.cluster_resources())
        placed = ray.remote(num_gpus=gpus, num_cpus=cluster.cpus, max_retries=cluster.retries)
        inverts, edits = placed(_invert), placed(_edit)
        threads = max(1, int(cluster.cpus))
        ship = cache(lambda name: SentInput.of(ray, name))
        coming: dict[Any, Task] = {}
        for group in groups:
            store = None
            for one in (replace(task, config=renamed(task.config, full_name)) for task in group):
                named = files_of(one.config).items() if cluster.ships else ()
                files = {name: ship(name) for what, name in named if _is_shipped(what, name)}
                if one.job is None:
                    store = inverts.remote(one, files, options, threads)
                else:
                    coming[edits.remote(one, suffix, files, options, threads, store)] = one
        while coming:
            for ref in ray.wait(list(coming))[0]:
                yield _received(ray, ref, coming.pop(ref), folder, suffix)
    finally:
        ray.shutdown()


def _ray(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'fatezero[ray]'") from error
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster responds at {address}: {error.strerror or error}") from error
    ray.init(
        address=None if address == "local" else address, log_to_driver=False, logging_level=logging.ERROR,
        include_dashboard=False if address == "local" else None,
    )  # fmt: skip
    return ray


@dataclass(frozen=True)
class SentInput:
    """A file, or the pictures of a folder or pattern, in Ray's object store: their names and references."""

    name: str
    contents: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, ray: Any, name: str) -> SentInput:
        path = Path(name)
        if path.is_file():
            return cls(path.name, ((path.name, ray.put(path.read_bytes())),))
        inside = f"{path.name}/" if path.is_dir() else ""
        found = ((f"{inside}{picture.name}", ray.put(picture.read_bytes())) for picture in picture_files(path))
        return cls(path.name, tuple(found))

    def unpack(self, ray: Any, folder: Path) -> str:
        """Write it into a folder; returns its path."""
        for name, ref in self.contents:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(ray.get(ref))
        return str(folder / self.name)


def _is_shipped(what: str, name: str) -> bool:
    """Whether to send a file to the machine that needs it; models are too large, and must be on every machine."""
    try:
        return what not in ("model", "temporal", "controlnet") and (
            Path(name).is_file() or bool(picture_files(Path(name)))
        )
    except (OSError, ValueError):
        return False


def _received(ray: Any, ref: Any, task: Task, folder: Path, suffix: str) -> Ended:
    """Write the result of an edit, or return its error."""
    try:
        (content, record), figures, seconds, where = ray.get(ref)
    except Exception as error:
        return Ended(task.name, _cause(ray, error))
    result = folder / f"{task.name}{suffix}"
    with whole_file(result) as partial:
        partial.write_bytes(content)
    write_record(result, record | {name: value for name, value in settings_of(task.config).items() if name in record})
    return Ended(task.name, None, seconds, where=where, figures=figures)


def _cause(ray: Any, error: Exception) -> str:
    """The error of a task, its inversion or its machine, in one line."""
    inner: Any = error
    while isinstance(getattr(inner, "cause", None), Exception):
        inner = inner.cause
    if isinstance(inner, ray.exceptions.RayError):
        return f"on the cluster: {' '.join(str(inner).split())}"
    return one_line(inner).removeprefix("error: ")


# --- on the machines of the cluster -----------------------------------------------------------


def _invert(task: Task, files: Mapping[str, SentInput], options: WorkerOptions, threads: int) -> bytes:
    """The store of an inversion, as the content of its file."""
    with _folder() as folder:
        here, store = _unpacked(task, files, folder), folder / "store.safetensors"
        _worker(options, threads).invert(here, store)
        return store.read_bytes()


def _edit(
    task: Task, suffix: str, files: Mapping[str, SentInput], options: WorkerOptions, threads: int, store: bytes | None
) -> tuple[tuple[bytes, dict[str, Any]], dict[str, float], float, str]:
    """Result and record, metrics, seconds, and the machine's name."""
    begun = time.monotonic()
    with _folder() as folder:
        here, kept = _unpacked(task, files, folder), None
        if store is not None:
            kept = folder / "store.safetensors"
            kept.write_bytes(store)
        result = folder / f"{task.name}{suffix}"
        figures = _worker(options, threads).edit(here, result, kept)
        made = result.read_bytes(), json.loads(record_path(result).read_text(encoding="utf-8"))
    return made, figures, round(time.monotonic() - begun, 2), platform.node()


@contextmanager
def _folder() -> Iterator[Path]:
    folder = temporary_folder()
    try:
        yield folder
    finally:
        remove_folder(folder)


def _unpacked(task: Task, files: Mapping[str, SentInput], folder: Path) -> Task:
    """The task with the paths of its files on this machine."""
    import ray

    places = {name: file.unpack(ray, folder / str(i)) for i, (name, file) in enumerate(files.items())}
    return replace(task, config=renamed(task.config, lambda name: places.get(name, name)))


@cache
def _worker(options: WorkerOptions, threads: int) -> Worker:
    """The worker of this process, which Ray reuses."""
    return Worker(options, "auto", threads)
