"""`fatezero batch`: what of a file of jobs is still to be done, doing it, and telling how it went."""

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
from ..batch.processes import Patience, Places, run_here
from ..batch.servers import for_server, run_on_servers
from ..batch.summary import Digest, Row, sources_of, write_summary
from ..batch.work import Ended, How, config_for, groups_of
from ..config.files import MADE
from ..config.paths import digest_of
from ..config.record import record_path
from ..config.settings import ConfigError, EditConfig
from ..config.values import config_as
from ..options import DryRun, Dtype, ModelConfig, Quiet, given_of, options_of
from ..outputs import check_folder
from ..progress import console, progress_bar, told
from ..session import Session, check_clip, pick_device, pick_dtype

_RAY = "On a Ray cluster"
LOG = "jobs.jsonl"
"""How each job ended, a line for each try of a run; the last one of a job counts."""
STORES = "stores"
"""The folder of inversions that jobs share, while they need them."""
_SUM_UP_EVERY = 30.0
"""Seconds between summaries while a batch runs."""


@dataclass(frozen=True)
class BatchConfig:
    """Settings of `fatezero batch`."""

    output: str = setting(
        "", "Folder for results and summary. A run there continues.", shown="that of the jobs, without .yaml"
    )
    workers: int = setting(1, "Processes on each device.", least=1, most=1024)
    timeout: float | None = setting(None, "Seconds that a job may take.", least=0.1, most=1e9, shown="any")
    retries: int = setting(1, "Retries of a job whose process died.", least=0, most=1000)
    measure: bool = setting(True, "Measure each result beside its source.")
    clip: str = setting("", "CLIP model of transformers to measure with.", shown="none")
    redo: bool = setting(False, "Repeat finished jobs.")
    ray: str = setting("", "Address of a Ray cluster to run the jobs on, auto, or local.", shown="none", group=_RAY)
    ray_gpus: float | None = setting(
        None, "GPUs of each job.", least=0, most=1024, shown="1 where there are any", group=_RAY
    )
    ray_cpus: float = setting(1.0, "CPU cores of each job.", least=0, most=1024, group=_RAY)
    ray_inputs: Literal["shared", "sent"] = setting(
        "shared", "Clips, masks and LoRAs lie on a path that all machines share, or are sent through Ray.", group=_RAY
    )
    comfyui: tuple[str, ...] = setting(
        (), "Address of a ComfyUI server to run the jobs' workflow on; may repeat.", shown="none"
    )
    device: str = setting("auto", "cpu, cuda, mps, several (cuda:0,cuda:1), or auto: all GPUs.")

    def check_places(self, dtype: str, model_config: str | None) -> None:
        """Raise ConfigError for settings of another place than the one that jobs run in."""
        if self.ray and self.comfyui:
            raise ConfigError("give --ray or --comfyui: a job is done in one place")
        if model_config is not None and self.comfyui:
            raise ConfigError("model_config has no effect with --comfyui: the workflow names the model")
        if self.ray and self.timeout is not None:
            raise ConfigError("timeout has no effect with --ray: Ray decides how long a job may take")
        for url in self.comfyui:
            if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
                raise ConfigError(f"comfyui is {shown(url)}; it must be an address such as http://127.0.0.1:8188")
        if not self.comfyui:
            pick_dtype(dtype, torch.device("cpu"))


BatchOptions = options_of(BatchConfig, redo="")


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
    """Do many edits: those not done yet, an inversion that several share once; a failed one leaves the others alone."""
    console.quiet = quiet
    config = config_as(BatchConfig, given_of(options))
    held = load_batch(jobs)
    folder = Path(config.output) if config.output else jobs.with_suffix("")
    check_folder(folder)
    config.check_places(dtype, model_config)
    if config.clip and config.measure:
        check_clip(config.clip)
    how = How(dtype, model_config, config.measure, config.clip)
    run_batch(Session(console, progress_bar), held, Asked(folder, how, config, dry_run))


class BatchError(OSError):
    """Some jobs failed."""


@dataclass(frozen=True)
class Asked:
    """What a run is asked for, beside its jobs."""

    output: Path
    how: How
    config: BatchConfig
    dry_run: bool = False

    @property
    def servers(self) -> tuple[str, ...]:
        """ComfyUI's, each once, in the place of this machine."""
        return tuple(dict.fromkeys(url.rstrip("/") for url in self.config.comfyui))

    @property
    def cluster(self) -> Cluster | None:
        """Ray's, in the place of this machine."""
        one = self.config
        if not one.ray:
            return None
        return Cluster(one.ray, one.ray_gpus, one.ray_cpus, one.retries, one.ray_inputs == "sent")

    @property
    def patience(self) -> Patience:
        return Patience(self.config.timeout, self.config.retries)

    @property
    def devices(self) -> list[str]:
        return [name.strip() for name in self.config.device.split(",")]


def run_batch(session: Session, batch: Batch, asked: Asked) -> None:
    """Do the jobs that are not done yet, and write the summary; BatchError, in the end, where some failed."""
    configs, refused = _understood(batch, for_server(batch) if asked.servers else config_for)
    digest = cache(digest_of)  # of clips, each for many jobs
    with lock_folder(asked.output):
        there, todo = list[Job](), list[Job]()
        for job in batch.jobs:
            if (config := configs.get(job.name)) is not None:
                done = not asked.config.redo and _is_done(job, config, asked, batch, digest)
                (there if done else todo).append(job)
        session.say(f"{len(batch.jobs)} jobs" + (f", {len(there)} of them done" if there else ""))
        blank = _blank(there, configs, asked)
        if blank:
            session.say(f"   {len(blank)} of those done have no figures yet")
        begun = _begun(session, batch, [(job, configs[job.name]) for job in todo], asked) if todo else ()
        if asked.dry_run:
            for one in refused:
                _say_failed(session, one)
            if refused:
                raise BatchError(f"{len(refused)} of {len(batch.jobs)} jobs cannot run")
            return
        sum_up = partial(_summed_up, batch, asked.output, configs, digest)
        ended = chain(refused, _filled(blank, configs, batch, asked), begun)
        count = len(refused) + len(blank) + len(todo)
        failed = _followed(session, asked.output, count, ended, sum_up)
        shutil.rmtree(asked.output / STORES, ignore_errors=True)
        rows = sum_up()
        whole = sum(row.status == "done" for row in rows)
        session.say(f"{whole} of {len(rows)} jobs done; summary.csv and index.html are in {asked.output}")
        if failed:
            raise BatchError(f"{failed} of {count} jobs failed: {asked.output / 'summary.csv'} has their errors")


def _understood(batch: Batch, read: Callable[[Job], EditConfig]) -> tuple[dict[str, EditConfig], list[Ended]]:
    """The edits of jobs by name, and the jobs that are none; ConfigError where none of them is one."""
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
    return told(error).removeprefix("error: ")


# --- figures that are missing -----------------------------------------------------------------


def _blank(there: Sequence[Job], configs: Mapping[str, EditConfig], asked: Asked) -> dict[str, Ended]:
    """How jobs ended by name, of those done whose figures are missing: a run may have been killed before it kept them,
    or have failed to measure.
    """
    log, clip = _logged(asked.output), bool(asked.how.clip)
    last = {job.name: log.get(job.name, Ended(job.name)) for job in there}
    if not asked.how.measures:
        return {name: one for name, one in last.items() if one.error is not None}
    measured = {name for name in last if not asked.servers or Path(configs[name].video).is_file()}
    return {name: one for name, one in last.items() if name in measured and one.lacks(clip)}


def _filled(
    blank: Mapping[str, Ended], configs: Mapping[str, EditConfig], batch: Batch, asked: Asked
) -> Iterator[Ended]:
    """Measure results that are there."""
    device = "auto" if asked.cluster is not None else asked.devices[0]
    measure = asked.how.measure(device) if blank else None
    for name, last in blank.items():
        try:
            figures = {} if measure is None else measure(configs[name], _result(asked.output, name, batch))
            yield replace(last, error=None, figures=figures)
        except Exception as error:
            yield replace(last, error=f"its figures: {_of_error(error)}")


def _result(output: Path, name: str, batch: Batch) -> Path:
    return output / f"{name}{batch.suffix}"


def _begun(session: Session, batch: Batch, jobs: Sequence[tuple[Job, EditConfig]], asked: Asked) -> Iterator[Ended]:
    """Say where jobs run and what they share; the jobs as they end, which begin when the first is asked for."""
    if asked.servers:
        session.say(f"   on {', '.join(asked.servers)}")
        measure = asked.how.measure(asked.devices[0])
        return run_on_servers([job for job, _ in jobs], batch, asked.output, asked.servers, asked.patience, measure)
    groups = groups_of(jobs)
    shared = [group for group in groups if group.inversion]
    saved = sum(len(group.edits) - 1 for group in shared)
    places = _places(asked)
    session.say(f"   on {', '.join(places.devices) if asked.cluster is None else f'Ray at {asked.cluster.address}'}")
    if saved:
        session.say(f"   {len(shared)} inversions are shared, which saves {saved}")
    if asked.cluster is not None:
        return run_on_cluster(groups, asked.output, batch.suffix, asked.cluster, asked.how)
    return run_here(groups, asked.output, asked.output / STORES, batch.suffix, places, asked.patience)


def _followed(session: Session, output: Path, count: int, ended: Iterable[Ended], sum_up: Callable[[], Any]) -> int:
    """Keep how each job ended, and sum up at times; how many failed."""
    failed, summed_up = 0, time.monotonic()
    with session.bars() as bar:
        update = bar("jobs")
        for done, one in enumerate(ended, 1):
            append_lines(output / LOG, [asdict(one)])
            if one.error is not None:
                failed += 1
                _say_failed(session, one)
            if time.monotonic() - summed_up > _SUM_UP_EVERY:
                sum_up()
                summed_up = time.monotonic()
            update(done, count, f"{failed} failed" if failed else "")
    return failed


def _say_failed(session: Session, one: Ended) -> None:
    session.say(f"failed: {one.name}: {one.error}", style="red")


def _summed_up(batch: Batch, output: Path, configs: Mapping[str, EditConfig], digest: Digest) -> list[Row]:
    rows = rows_of(batch, output)
    write_summary(output, rows, sources_of(output, rows, configs, digest))
    return rows


def _places(asked: Asked) -> Places:
    """A process for each device, or several; ValueError for a device that is not there."""
    devices, workers = [pick_device(name) for name in asked.devices], asked.config.workers
    if asked.config.device == "auto" and devices[0].type == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    names = tuple(str(device) for device in devices for _ in range(workers))
    on_cpu = sum(device.type == "cpu" for device in devices) * workers
    threads = max(1, _cores() // on_cpu) if on_cpu else None
    return Places(names, asked.how, threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- what is done -----------------------------------------------------------------------------


def _is_done(job: Job, config: EditConfig, asked: Asked, batch: Batch, digest: Digest) -> bool:
    """Whether the result is there, with the record of its making, of the clip as it is now.

    The settings are those of the name.
    """
    result = _result(asked.output, job.name, batch)
    record = record_path(result)
    if not result.is_file() or not record.is_file():
        return False
    try:
        made_of = json.loads(record.read_text(encoding="utf-8"))[MADE]["files"].get("video")
        return bool(made_of == digest(config.video)) if config.video else True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _logged(output: Path) -> dict[str, Ended]:
    """How each job ended last, by name."""
    found, log = dict[str, Ended](), output / LOG
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with suppress(ValueError, TypeError):  # an interruption may cut a line short
            one = Ended.read(line)
            found[one.name] = one
    return found


def rows_of(batch: Batch, output: Path) -> list[Row]:
    """Every job of a file with how it ended last."""
    log = _logged(output)
    return [Row.of(job, _result(output, job.name, batch), log.get(job.name)) for job in batch.jobs]
