"""`fatezero batch`: what of a file of jobs is still to be done, doing it, and telling how it went."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ...files.whole import lock_folder
from ..config import MADE, ConfigError, EditConfig
from ..files import digest_of
from ..record import record_path
from ..run import Session, pick_device
from .cluster import Cluster, run_on_cluster
from .jobs import Batch, Job
from .processes import Patience, Places, run_here
from .servers import run_on_servers, shown_of
from .summary import Digest, Row, sources_of, write_summary
from .work import Ended, How, config_for, groups_of

LOG = "jobs.jsonl"
"""How each job ended, a line for each try of a run; the last one of a job counts."""
STORES = "stores"
"""The folder of inversions that jobs share, while they need them."""
_SUM_UP_EVERY = 30.0
"""Seconds between summaries while a batch runs."""


class BatchError(OSError):
    """Some jobs failed."""


@dataclass(frozen=True)
class Asked:
    """What a run of `fatezero batch` is asked for, beside its jobs.

    device: one or several by commas, each a process; `workers` of them on each. cluster, servers: Ray's
    and ComfyUI's, in the place of this machine. redo: do again what is done.
    """

    output: Path
    how: How
    device: str = "auto"
    workers: int = 1
    patience: Patience = Patience()
    cluster: Cluster | None = None
    servers: tuple[str, ...] = ()
    redo: bool = False
    dry_run: bool = False


def run_batch(session: Session, batch: Batch, asked: Asked) -> None:
    """Do the jobs that are not done yet, and write the summary; BatchError, in the end, where some failed."""
    of_job = shown_of if asked.servers else config_for
    configs = {job.name: of_job(job) for job in batch.jobs}
    digest = cache(digest_of)  # of clips, each for many jobs
    with lock_folder(asked.output):
        todo = [job for job in batch.jobs if asked.redo or not _is_done(job, configs[job.name], asked, batch, digest)]
        done = len(batch.jobs) - len(todo)
        session.say(f"{len(batch.jobs)} jobs" + (f", {done} of them done" if done else ""))
        ended = _begun(session, batch, [(job, configs[job.name]) for job in todo], asked)
        if asked.dry_run:
            return
        sum_up = partial(_summed_up, batch, asked.output, configs, digest)
        failed = _followed(session, asked.output, len(todo), ended, sum_up)
        shutil.rmtree(asked.output / STORES, ignore_errors=True)
        rows = sum_up()
        done = sum(row.status == "done" for row in rows)
        session.say(f"{done} of {len(rows)} jobs done; summary.csv and index.html are in {asked.output}")
        if failed:
            raise BatchError(f"{failed} of {len(todo)} jobs failed: {asked.output / 'summary.csv'} has their errors")


def _begun(session: Session, batch: Batch, jobs: Sequence[tuple[Job, EditConfig]], asked: Asked) -> Iterator[Ended]:
    """Say where jobs run and what they share; the jobs as they end, which begin when the first is asked for."""
    if asked.servers:
        session.say(f"   on {', '.join(asked.servers)}")
        measure = asked.how.measure(asked.device)
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


def _followed(session: Session, output: Path, count: int, ended: Iterator[Ended], sum_up: Callable[[], Any]) -> int:
    """Keep how each job ended, and sum up at times; how many failed."""
    failed, summed_up = 0, time.monotonic()
    with session.bars() as bar:
        update = bar("jobs")
        for done, one in enumerate(ended, 1):
            _keep(output, one)
            if one.error is not None:
                failed += 1
                session.say(f"failed: {one.name}: {one.error}", style="red")
            if time.monotonic() - summed_up > _SUM_UP_EVERY:
                sum_up()
                summed_up = time.monotonic()
            update(done, count, f"{failed} failed" if failed else "")
    return failed


def _summed_up(batch: Batch, output: Path, configs: Mapping[str, EditConfig], digest: Digest) -> list[Row]:
    rows = rows_of(batch, output)
    write_summary(output, rows, sources_of(output, rows, configs, digest))
    return rows


def _places(asked: Asked) -> Places:
    """A process for each device, or several; ValueError for a device that is not there."""
    devices = [pick_device(name.strip()) for name in asked.device.split(",")]
    if asked.device == "auto" and devices[0].type == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if asked.workers < 1:
        raise ConfigError(f"workers is {asked.workers}; it must be a number of at least 1")
    names = tuple(str(device) for device in devices for _ in range(asked.workers))
    on_cpu = sum(device.type == "cpu" for device in devices) * asked.workers
    threads = max(1, _cores() // on_cpu) if on_cpu else None
    return Places(names, asked.how, threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- what is done -----------------------------------------------------------------------------


def _is_done(job: Job, config: EditConfig, asked: Asked, batch: Batch, digest: Digest) -> bool:
    """Whether the result is there, with the record of its making, of the clip as it is now.

    The settings are those of the name.
    """
    result = asked.output / f"{job.name}{batch.suffix}"
    record = record_path(result)
    if not result.is_file() or not record.is_file():
        return False
    try:
        made_of = json.loads(record.read_text(encoding="utf-8"))[MADE]["files"].get("video")
        return bool(made_of == digest(config.video)) if config.video else True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _keep(output: Path, ended: Ended) -> None:
    told = {
        "name": ended.name, "error": ended.error, "seconds": ended.seconds, "attempts": ended.attempts,
        "where": ended.where, "figures": ended.figures,
    }  # fmt: skip
    with (output / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(told) + "\n")


def rows_of(batch: Batch, output: Path) -> list[Row]:
    """Every job of a file with how it ended last."""
    told = dict[str, dict[str, Any]]()
    log = output / LOG
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            one = json.loads(line)
            told[one["name"]] = one
        except (json.JSONDecodeError, LookupError, TypeError):  # an interruption may cut the last one short
            continue
    return [Row.of(job, output / f"{job.name}{batch.suffix}", told.get(job.name)) for job in batch.jobs]
