"""Public benchmarks with the command's edits: a batch of their cases, then the figures."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from ..files.lines import append_lines
from ..files.whole import lock_folder
from ..methods import METHODS
from ..settings import shown
from ..video.read import open_video
from ..video.size import crop, resize_to_fill, to_unit
from .batch.jobs import Batch, Job, batch_of
from .batch.work import WorkerOptions, config_for
from .config.files import config_of, data_of
from .config.paths import check_names, digest_of
from .config.settings import PRESETS, ConfigError, of_setting
from .frames import find_frames
from .session import Session, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from ..benchmark.public import Benchmark, Case, Clips, FigureModel, Row

T = TypeVar("T")
_CUTS = ("start", "end", "stride", "count")
"""Settings of the frames that an edit takes, which a benchmark chooses."""
_MASKED = {method.name for method in METHODS if method.needs_mask}


def benchmark_of(option: str) -> Benchmark:
    """The benchmark of an option, "five" or "v2v"."""
    from ..benchmark.five import FIVE
    from ..benchmark.v2v import V2V

    return {"five": FIVE, "v2v": V2V}[option]


@dataclass(frozen=True)
class PublicRun:
    """A run on a public benchmark.

    option: its option, "five" or "v2v". methods: presets or YAML files. shared: settings of every edit, which override
    the methods'. models: of figures, by setting. workers: processes on each device.
    """

    option: str
    output: Path
    methods: tuple[str, ...]
    shared: dict[str, Any]
    models: dict[str, str]
    device: str
    workers: int

    @property
    def benchmark(self) -> Benchmark:
        return benchmark_of(self.option)

    @property
    def log(self) -> Path:
        """The measured edits, one line for each; the last one of an edit counts."""
        return self.output / f"{self.option}.jsonl"

    @cached_property
    def identities(self) -> dict[str, str]:
        """What tells the usable models of figures apart: the digest of files, and a hub's name."""
        return {name: digest_of(one) if Path(one).exists() else one for name, one in self.usable.items()}

    @property
    def usable(self) -> dict[str, str]:
        """The models of figures that are given, and whose library is installed."""
        known = self.benchmark.models
        return {name: given for name, given in self.models.items() if given and _installed(known[name].library)}

    def settings_of(self, method: str) -> dict[str, Any]:
        """The settings of an edit by a method. Raises ConfigError for neither a preset nor a file of settings."""
        if method in PRESETS:
            return {"preset": method, **self.shared}
        if not method.endswith((".yaml", ".yml", ".json")):
            raise ConfigError(f"method is {shown(method)}; it must be a .yaml file or one of {', '.join(PRESETS)}")
        data = data_of(Path(method))
        if not isinstance(data, dict):
            raise ConfigError(f"{method}: contains no settings")
        return {**data, **self.shared}


def check_public(
    run: PublicRun,
    folder: str,
    kinds: Sequence[str],
    each: int | None,
    frames: int | None,
    skip: Callable[[str], None] | None = None,
) -> list[Case]:
    """The cases of a folder. skip: called with the reason for each case that is left out; None refuses it.

    Raises ConfigError or OSError for anything that would fail later: the folder, the methods, the models of the
    figures.
    """
    check_names({run.option: folder, **{name: Path(path) for name, path in run.models.items() if path}})
    with of_setting(run.option):
        cases = run.benchmark.load(Path(folder), kinds, each, frames, skip)
    names = [Path(method).stem for method in run.methods]
    if len(set(names)) < len(names):
        raise ConfigError(f"method: {', '.join(names)}: give each once, and files with different names")
    for method, name in zip(run.methods, names, strict=True):
        own = run.settings_of(method)
        if cut := next((key for key in _CUTS if key in own), None):
            raise ConfigError(f"method {name}: {cut} is given, but the benchmark chooses the frames: leave it out")
        settings = {**own, **_of_case(cases[0])}
        try:
            config = config_of(settings)
        except ConfigError as error:
            raise ConfigError(f"method {name}: {error}") from error
        if config.injection in _MASKED and not config.edit_mask and cases[0].mask is None:
            raise ConfigError(f"method {name} needs masks, which {run.benchmark.name} does not have")
    for name, model in run.benchmark.models.items():
        if run.models[name]:
            _check_model(run, name, model)
    return cases


def _check_model(run: PublicRun, name: str, model: FigureModel) -> None:
    """Raise, before any model is loaded, for a model of figures that is not there."""
    if model.needs and not run.models[model.needs]:
        raise ConfigError(f"{name} needs --{model.needs} too")
    if not model.file:
        from transformers import AutoConfig

        _of_transformers(name, run.models[name], AutoConfig.from_pretrained)
    elif not Path(run.models[name]).is_file():
        raise FileNotFoundError(f"{name}: no file at {run.models[name]}")
    elif _installed(model.library):
        with of_setting(name):
            model.load(run.models[name])


def run_public(session: Session, run: PublicRun, cases: Sequence[Case], skipped: Sequence[str] = ()) -> str:
    """Edit what is not edited yet, measure what is not measured yet, and write the tables; returns the Markdown.
    skipped: why cases are left out, for the notes.

    Finally raises BatchError if edits or measurements failed.
    """
    from ..benchmark.public import write_public_tables
    from .commands.batch import BatchConfig, BatchError, Run, run_batch

    jobs = [(case, Path(method).stem, _job(run, case, method)) for case in cases for method in run.methods]
    batch = Batch(tuple(job for _, _, job in jobs), ".mkv", None, {})
    config = BatchConfig(measure=False, device=run.device, workers=run.workers)
    failed: BatchError | None = None
    try:
        run_batch(session, batch, Run(run.output, WorkerOptions(measures=False), config))
    except BatchError as error:
        failed = error
    with lock_folder(run.output):
        rows, broken = _measured(session, run, jobs)
        text = (
            write_public_tables(run.output, run.benchmark, rows, [*_notes(run, cases), *_left_out(skipped)])
            if rows
            else ""
        )
    if broken:
        failed = BatchError("; ".join([*([str(failed)] if failed else []), *broken]))
    if failed is not None:
        session.say(text)
        raise failed
    return text


def _job(run: PublicRun, case: Case, method: str) -> Job:
    """An edit of a case, without loss; with the case's masks if the method needs one."""
    values = {**run.settings_of(method), **_of_case(case), "name": f"{case.name}_{Path(method).stem}"}
    (job,) = batch_of({"jobs": [values]}).jobs
    config = config_for(job)
    if config.injection in _MASKED and not config.edit_mask and case.mask is not None:
        values["edit_mask"] = str(_masks(run.output / "masks", case))
        (job,) = batch_of({"jobs": [values]}).jobs
    return job


def _of_case(case: Case) -> dict[str, Any]:
    """The settings of an edit that its case determines."""
    of_clip = {"video": str(case.video), "count": case.frames, "lossless": True}
    return {"source": case.source, "target": case.target, **of_clip}


def _masks(folder: Path, case: Case) -> Path:
    """A folder with copies of the masks of a case's frames and no others."""
    from ..benchmark.public import masks_of

    assert case.mask is not None
    folder = folder / case.mask.name
    folder.mkdir(parents=True, exist_ok=True)
    chosen = masks_of(case.mask, case.video, case.frames)
    for old in {file.name for file in folder.iterdir()} - {file.name for file in chosen}:
        (folder / old).unlink()
    for file in chosen:
        shutil.copyfile(file, folder / file.name)
    return folder


def _measured(session: Session, run: PublicRun, jobs: Sequence[tuple[Case, str, Job]]) -> tuple[list[Row], list[str]]:
    """The rows of all results, in the jobs' order, and an error for each result that cannot be measured."""
    results = [(run.output / f"{job.name}.mkv", case, method, job) for case, method, job in jobs]
    results = [one for one in results if one[0].is_file()]
    same = {result: _measured_from(run, result, case) for result, case, *_ in results}
    there = {row["result"]: row for row in _rows(run.log) if row in map(row.__or__, same.values())}
    todo = [one for one in results if one[0].name not in there]
    measure = run.benchmark.measure(_models(run)) if todo else None
    broken = []
    with session.bars() as bar:
        update = bar("figures")
        for done, (result, case, method, job) in enumerate(todo, 1):
            row: Row = {"case": case.name, "kind": case.kind, "method": method, **same[result]}
            assert measure is not None
            try:
                row |= measure(case, _clips(case, job, result))
            except (OSError, ValueError) as error:
                broken.append(f"{result.name} cannot be measured: {error}")
            else:
                append_lines(run.log, [row])
                there[result.name] = row
            update(done, len(todo))
    return [there[result.name] for result, *_ in results if result.name in there], broken


def _measured_from(run: PublicRun, result: Path, case: Case) -> dict[str, Any]:
    """What a row's figures depend on."""
    given = json.dumps([case.source, case.target, str(case.questions), case.mask and digest_of(case.mask)])
    digests = {"digest": digest_of(result), "given": hashlib.sha256(given.encode()).hexdigest()}
    return {"result": result.name, **digests, "models": run.identities}


def _rows(path: Path) -> list[Row]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):  # an interruption may truncate a line
            found.append(json.loads(line))
    return found


def _clips(case: Case, job: Job, result: Path) -> Clips:
    """Source, edit and mask; of the source, the part that the edit shows."""
    from ..benchmark.public import Clips

    config, edited = config_for(job), open_video(result).read().frames
    size = edited.shape[1:3]
    source = _shown(crop(find_frames(replace(config, count=len(edited))).read().frames, *config.crop), *size)
    scaled = to_unit(resize_to_fill(edited, source.shape[2], source.shape[1]))
    if case.mask is None:
        return Clips(to_unit(source), scaled, None, edited)
    with TemporaryDirectory() as folder:
        mask = open_video(_masks(Path(folder), case)).read().frames
    inside = (_shown(crop(mask, *config.crop), *size) > 0).any(-1).float()
    return Clips(to_unit(source), scaled, inside, edited)


def _shown(frames: Tensor, height: int, width: int) -> Tensor:
    """The centre of frames (f, h, w, 3) with the aspect ratio of a size, as an edit of that size fits them."""
    h, w = frames.shape[1:3]
    scale = min(h / height, w / width)
    top, left = (h - round(height * scale)) // 2, (w - round(width * scale)) // 2
    return frames[:, top : h - top, left : w - left]


# --- the models of figures ----------------------------------------------------------------


def _left_out(skipped: Sequence[str]) -> list[str]:
    return [f"{len(skipped)} cases left out: {'; '.join(skipped)}"] if skipped else []


def _notes(run: PublicRun, cases: Sequence[Case]) -> list[str]:
    """How the methods were run, which figures are left out, and why, and the models of the others."""
    notes, longest = [], max(case.frames for case in cases)
    for method in run.methods:
        config = config_of({**run.settings_of(method), **_of_case(cases[0])})
        notes.append(f"{Path(method).stem}: model {config.model}, {config.steps} steps, at most {longest} frames")
    for name, model in run.benchmark.models.items():
        why = f"{model.library} is not installed" if run.models[name] else f"give --{name}"
        notes.append(
            f"{model.figures}: {run.models[name]}" if name in run.usable else f"{model.figures} left out: {why}"
        )
    return notes


def _installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def _models(run: PublicRun) -> Mapping[str, Any]:
    """Load the models of the figures, without those whose library is not installed."""
    device, known = pick_device(run.device.split(",")[0].strip()), run.benchmark.models
    found = {}
    for name, given in run.usable.items():
        if not known[name].file:
            found[name] = _of_transformers(name, given, partial(known[name].load, device=device))
        else:
            with of_setting(name):
                found[name] = known[name].load(given, device)
    return found


def _of_transformers(what: str, name: str, load: Callable[..., T]) -> T:
    """Load from a folder, or by hub name. Raises CheckpointError, naming the setting, for anything else."""
    from ..hosts.diffusers.checkpoint import quiet
    from ..hosts.diffusers.model_files import as_checkpoint_error, from_hub

    with quiet(), of_setting(what), as_checkpoint_error(name):
        return load(name, local_files_only=True) if Path(name).is_dir() else from_hub(name, load)
