"""`fatezero batch`: run the unfinished jobs of a file, and write a summary."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ...files.lines import append_lines
from ...files.whole import lock_folder
from ...imports import torch
from ...settings import setting, shown
from ..batch.cluster import Cluster, run_on_cluster
from ..batch.jobs import Batch, Job, load_batch
from ..batch.processes import Devices, RetryPolicy, run_here
from ..batch.servers import for_server, run_on_servers
from ..batch.summary import Digest, Row, sources_of, write_summary
from ..batch.work import Ended, WorkerOptions, config_for, groups_of
from ..config.files import MADE
from ..config.paths import digest_of
from ..config.record import files_read, record_path
from ..config.settings import ConfigError, EditConfig
from ..config.values import config_as
from ..options import DryRun, Dtype, ModelConfig, Quiet, given_of, options_of
from ..outputs import check_folder
from ..progress import console, one_line, progress_bar
from ..session import Session, check_clip, pick_device, pick_dtype

_RAY = "On a Ray cluster"
LOG = "jobs.jsonl"
"""The results of jobs, one line for each; the last one of a job counts."""
STORES = "stores"
"""The folder of shared inversions, while jobs need them."""
_SUM_UP_EVERY = 30.0
"""Seconds between summaries while a batch runs."""


@dataclass(frozen=True)
class BatchConfig:
    """Settings of `fatezero batch`."""

    output: str = setting(
        "", "Folder for results and summary. An existing batch continues.", shown="the jobs' path without .yaml"
    )
    workers: int = setting(1, "Processes on each device.", least=1, most=1024)
    timeout: float | None = setting(None, "Maximal seconds of a job.", least=0.1, most=1e9, shown="no limit")
    retries: int = setting(1, "Retries of a job whose process died.", least=0, most=1000)
    measure: bool = setting(True, "Measure each result against its source.")
    clip: str = setting("", "CLIP model of transformers to measure with.", shown="none")
    maps: bool = setting(
        False, "Write the heat maps, masks and slices of each edit that runs into NAME_maps, as `fatezero edit --maps`."
    )
    redo: bool = setting(False, "Repeat finished jobs.")
    ray: str = setting("", "Address of a Ray cluster to run the jobs on, auto, or local.", shown="none", group=_RAY)
    ray_gpus: float | None = setting(
        None, "GPUs of each job.", least=0, most=1024, shown="1 if there are any", group=_RAY
    )
    ray_cpus: float = setting(1.0, "CPU cores of each job.", least=0, most=1024, group=_RAY)
    ray_inputs: Literal["shared", "sent"] = setting(
        "shared",
        "Whether clips, masks and LoRAs are on a path that all machines share, or are sent through Ray.",
        group=_RAY,
    )
    comfyui: tuple[str, ...] = setting(
        (), "Address of a ComfyUI server to run the jobs' workflow on; repeatable.", shown="none"
    )
    device: str = setting("auto", "cpu, cuda, mps, several (cuda:0,cuda:1), or auto: all GPUs.")

    def check_places(self, dtype: str, model_config: str | None) -> None:
        """Raise ConfigError for settings that do not apply where the jobs run."""
        if self.ray and self.comfyui:
            raise ConfigError("give only one of --ray and --comfyui")
        if self.maps and (self.ray or self.comfyui):
            raise ConfigError("maps are written on this machine only: leave out --ray and --comfyui, or --maps")
        if model_config is not None and self.comfyui:
            raise ConfigError("model_config has no effect with --comfyui: the workflow names the model")
        if self.ray and self.timeout is not None:
            raise ConfigError("timeout has no effect with --ray: Ray sets the time limit of jobs")
        for url in self.comfyui:
            if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
                raise ConfigError(f"comfyui is {shown(url)}; it must be an address such as http://127.0.0.1:8188")
        if not self.comfyui:
            pick_dtype(dtype, torch.device("cpu"))


BatchOptions = options_of(BatchConfig, redo="", maps="")


def command(
    jobs: Annotated[Path, Parameter(help="YAML file of jobs, or of clips, targets, settings and methods to combine.")],
    /,
    *,
    options: Annotated[BatchOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    dtype: Dtype = "auto",
    model_config: ModelConfig = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Run many edits with shared inversions, or continue a batch. A failed edit does not stop the others."""
    console.quiet = quiet
    config = config_as(BatchConfig, given_of(options))
    batch = load_batch(jobs)
    folder = Path(config.output) if config.output else jobs.with_suffix("")
    check_folder(folder)
    config.check_places(dtype, model_config)
    if config.clip and config.measure:
        check_clip(config.clip)
    options = WorkerOptions(dtype, model_config, config.measure, config.clip, config.maps)
    run_batch(Session(console, progress_bar), batch, Run(folder, options, config, dry_run))


class BatchError(OSError):
    """Some jobs failed."""


@dataclass(frozen=True)
class Run:
    """The options of a run."""

    output: Path
    options: WorkerOptions
    config: BatchConfig
    dry_run: bool = False

    @property
    def servers(self) -> tuple[str, ...]:
        """ComfyUI servers to run on instead of this machine, without duplicates."""
        return tuple(dict.fromkeys(url.rstrip("/") for url in self.config.comfyui))

    @property
    def cluster(self) -> Cluster | None:
        """The Ray cluster to run on instead of this machine."""
        one = self.config
        if not one.ray:
            return None
        return Cluster(one.ray, one.ray_gpus, one.ray_cpus, one.retries, one.ray_inputs == "sent")

    @property
    def policy(self) -> RetryPolicy:
        return RetryPolicy(self.config.timeout, self.config.retries)

    @property
    def devices(self) -> list[str]:
        return [name.strip() for name in self.config.device.split(",")]


def run_batch(session: Session, batch: Batch, run: Run) -> None:
    """Run the unfinished jobs and write the summary; finally raises BatchError if jobs failed."""
    configs, refused = _understood(batch, for_server(batch) if run.servers else config_for)
    digest = cache(digest_of)  # a clip has many jobs
    with lock_folder(run.output):
        there, todo = list[Job](), list[Job]()
        for job in batch.jobs:
            if (config := configs.get(job.name)) is not None:
                done = not run.config.redo and _is_done(job, config, run, batch, digest)
                (there if done else todo).append(job)
        session.say(f"{len(batch.jobs)} jobs" + (f", {len(there)} of them done" if there else ""))
        blank = _blank(there, configs, run)
        if blank:
            session.say(f"   {len(blank)} finished jobs have no metrics yet")
        begun = _begun(session, batch, [(job, configs[job.name]) for job in todo], run) if todo else ()
        if run.dry_run:
            for one in refused:
                _print_failed(session, one)
            if refused:
                raise BatchError(f"{len(refused)} of {len(batch.jobs)} jobs cannot run")
            return
        sum_up = partial(_summed_up, batch, run.output, configs, digest)
        ended = chain(refused, _filled(blank, configs, batch, run), begun)
        count = len(refused) + len(blank) + len(todo)
        failed = _followed(session, run.output, count, ended, sum_up)
        shutil.rmtree(run.output / STORES, ignore_errors=True)
        rows = sum_up()
        whole = sum(row.status == "done" for row in rows)
        session.say(f"{whole} of {len(rows)} jobs done; summary.csv and index.html are in {run.output}")
        if failed:
            raise BatchError(f"{failed} of {count} jobs failed: {run.output / 'summary.csv'} has their errors")


def _understood(batch: Batch, read: Callable[[Job], EditConfig]) -> tuple[dict[str, EditConfig], list[Ended]]:
    """The edits by job name, and the invalid jobs. Raises ConfigError if all are invalid."""
    configs, refused = dict[str, EditConfig](), list[Ended]()
    for job in batch.jobs:
        try:
            configs[job.name] = read(job)
        except (ValueError, TypeError) as error:
            refused.append(Ended(job.name, _of_error(error), attempts=0))
    if refused and not configs:
        raise ConfigError(f"{refused[0].name}: {refused[0].error}")
    return configs, refused


def _of_error(error: Exception) -> str:
    return one_line(error).removeprefix("error: ")


# --- missing metrics --------------------------------------------------------------------------


def _blank(there: Sequence[Job], configs: Mapping[str, EditConfig], run: Run) -> dict[str, Ended]:
    """The results of finished jobs without metrics, by name, because a run was killed or failed to measure."""
    log, clip = _logged(run.output), bool(run.options.clip)
    last = {job.name: log.get(job.name, Ended(job.name)) for job in there}
    if not run.options.measures:
        return {name: one for name, one in last.items() if one.error is not None}
    measured = {name for name in last if not run.servers or Path(configs[name].video).is_file()}
    return {name: one for name, one in last.items() if name in measured and one.lacks(clip)}


def _filled(blank: Mapping[str, Ended], configs: Mapping[str, EditConfig], batch: Batch, run: Run) -> Iterator[Ended]:
    """Measure existing results."""
    device = "auto" if run.cluster is not None else run.devices[0]
    measure = run.options.measure(device) if blank else None
    for name, last in blank.items():
        try:
            figures = {} if measure is None else measure(configs[name], _result(run.output, name, batch))
            yield replace(last, error=None, figures=figures)
        except Exception as error:
            yield replace(last, error=f"its metrics: {_of_error(error)}")


def _result(output: Path, name: str, batch: Batch) -> Path:
    return output / f"{name}{batch.suffix}"


def _begun(session: Session, batch: Batch, jobs: Sequence[tuple[Job, EditConfig]], run: Run) -> Iterator[Ended]:
    """Print where jobs run and what they share; returns an iterator that runs the jobs."""
    if run.servers:
        session.say(f"   on {', '.join(run.servers)}")
        measure = run.options.measure(run.devices[0])
        return run_on_servers([job for job, _ in jobs], batch, run.output, run.servers, run.policy, measure)
    groups = groups_of(jobs)
    shared = [group for group in groups if group.inversion]
    saved = sum(len(group.edits) - 1 for group in shared)
    devices = _places(run)
    session.say(f"   on {', '.join(devices.names) if run.cluster is None else f'Ray at {run.cluster.address}'}")
    if saved:
        session.say(f"   {len(shared)} shared inversions save {saved}")
    if run.cluster is not None:
        return run_on_cluster(groups, run.output, batch.suffix, run.cluster, run.options)
    return run_here(groups, run.output, run.output / STORES, batch.suffix, devices, run.policy)


def _followed(session: Session, output: Path, count: int, ended: Iterable[Ended], sum_up: Callable[[], Any]) -> int:
    """Log each result and update the summary from time to time; returns the number of failures."""
    failed, summed_up = 0, time.monotonic()
    with session.bars() as bar:
        update = bar("jobs")
        for done, one in enumerate(ended, 1):
            append_lines(output / LOG, [asdict(one)])
            if one.error is not None:
                failed += 1
                _print_failed(session, one)
            if time.monotonic() - summed_up > _SUM_UP_EVERY:
                sum_up()
                summed_up = time.monotonic()
            update(done, count, f"{failed} failed" if failed else "")
    return failed


def _print_failed(session: Session, one: Ended) -> None:
    session.say(f"failed: {one.name}: {one.error}", style="red")


def _summed_up(batch: Batch, output: Path, configs: Mapping[str, EditConfig], digest: Digest) -> list[Row]:
    rows = rows_of(batch, output)
    write_summary(output, rows, sources_of(output, rows, configs, digest))
    return rows


def _places(run: Run) -> Devices:
    """One or more processes for each device. Raises ValueError for a missing device."""
    devices, workers = [pick_device(name) for name in run.devices], run.config.workers
    if run.config.device == "auto" and devices[0].type == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    names = tuple(str(device) for device in devices for _ in range(workers))
    on_cpu = sum(device.type == "cpu" for device in devices) * workers
    threads = max(1, _cores() // on_cpu) if on_cpu else None
    return Devices(names, run.options, threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- finished jobs ----------------------------------------------------------------------------


def _is_done(job: Job, config: EditConfig, run: Run, batch: Batch, digest: Digest) -> bool:
    """Whether the result exists with its record, and was made from the current content of its clip and other files.

    Its name identifies the settings.
    """
    result = _result(run.output, job.name, batch)
    record = record_path(result)
    if not result.is_file() or not record.is_file():
        return False
    try:
        made_of = json.loads(record.read_text(encoding="utf-8"))[MADE]["files"]
        return all(made_of.get(what) == own for what, own in files_read([config], None, digest)[0].items())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _logged(output: Path) -> dict[str, Ended]:
    """The last result of each job, by name."""
    found, log = dict[str, Ended](), output / LOG
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with suppress(ValueError, TypeError):  # an interruption may truncate a line
            one = Ended.read(line)
            found[one.name] = one
    return found


def rows_of(batch: Batch, output: Path) -> list[Row]:
    """Every job of a file with its last result."""
    log = _logged(output)
    return [Row.of(job, _result(output, job.name, batch), log.get(job.name)) for job in batch.jobs]
