"""FiVE-Bench with the command's edits: a batch of its cases, then its figures."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..files.lines import append_lines
from ..files.whole import lock_folder
from ..methods import METHODS
from ..settings import shown
from ..video.flow import flow_estimator
from ..video.pictures import picture_files
from ..video.read import open_video
from ..video.size import crop, resize_to_fill, to_unit
from .batch.jobs import Batch, Job, batch_of
from .batch.work import WorkerOptions, config_for
from .config.files import config_of, data_of
from .config.paths import check_names, digest_of
from .config.settings import PRESETS, ConfigError, of_setting
from .frames import find_frames
from .session import Session, check_clip, open_clip, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from ..benchmark.five import FiveCase, FiveRow
    from ..benchmark.five_metrics import FiveMetrics
    from ..metrics.lpips import Lpips

T = TypeVar("T")
FIVE_ONLY = ("dino", "lpips", "niqe", "tracker", "vlm")
"""The settings of models for FiVE-Bench's figures, besides CLIP."""
ROWS = "five.jsonl"
"""The measured edits, one line for each; the last one of an edit counts."""
_MASKED = {method.name for method in METHODS if method.needs_mask}
_LIBRARIES = {"niqe": "pyiqa", "tracker": "cotracker"}
_FIGURES = {
    "clip": "CLIP and CLIP edit", "dino": "structure", "lpips": "LPIPS", "niqe": "NIQE", "tracker": "motion",
    "vlm": "FiVE-Acc",
}  # fmt: skip


@dataclass(frozen=True)
class FiveRun:
    """A run on FiVE-Bench.

    methods: presets or YAML files. shared: settings of every edit, which override the methods'. models: of figures, by
    setting. workers: processes on each device.
    """

    output: Path
    methods: tuple[str, ...]
    shared: dict[str, Any]
    models: dict[str, str]
    device: str
    workers: int

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


def check_five(run: FiveRun, folder: str, kinds: Sequence[str], each: int | None, frames: int | None) -> list[FiveCase]:
    """The cases of a folder. Raises ConfigError or OSError for anything that would fail later: the folder, the methods,
    the models of the figures."""
    from ..benchmark.five import FRAMES, load_five

    check_names({"five": folder, **{name: Path(path) for name, path in run.models.items() if path}})
    with of_setting("five"):
        cases = load_five(folder, kinds, each, frames or FRAMES)
    names = [Path(method).stem for method in run.methods]
    if len(set(names)) < len(names):
        raise ConfigError(f"method: {', '.join(names)}: give each once, and files with different names")
    for method, name in zip(run.methods, names, strict=True):
        settings = {**run.settings_of(method), **_of_case(cases[0])}
        try:
            config_of(settings)
        except ConfigError as error:
            raise ConfigError(f"method {name}: {error}") from error
    _check_models(run.models)
    return cases


def _check_models(models: dict[str, str]) -> None:
    """Raise, before any model is loaded, for models of figures that are not there."""
    for name in ("lpips", *_LIBRARIES):
        if models[name] and not Path(models[name]).is_file():
            raise FileNotFoundError(f"{name}: no file at {models[name]}")
    if models["clip"]:
        check_clip(models["clip"])
    if models["lpips"]:
        _lpips(models["lpips"])
    for name in ("dino", "vlm"):
        if models[name]:
            from transformers import AutoConfig

            _of_transformers(name, models[name], AutoConfig.from_pretrained)


def run_five(session: Session, run: FiveRun, cases: Sequence[FiveCase]) -> str:
    """Edit what is not edited yet, measure what is not measured yet, and write the tables; returns the Markdown.

    Finally raises BatchError if edits failed.
    """
    from ..benchmark.five import write_five_tables
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
        rows = _measured(session, run, jobs)
        text = write_five_tables(run.output, rows, _notes(run.models)) if rows else ""
    if failed is not None:
        session.say(text)
        raise failed
    return text


def _job(run: FiveRun, case: FiveCase, method: str) -> Job:
    """An edit of a case, without loss; with the case's masks if the method needs one."""
    values = {**run.settings_of(method), **_of_case(case), "name": f"{case.name}_{Path(method).stem}"}
    (job,) = batch_of({"jobs": [values]}).jobs
    config = config_for(job)
    if config.injection in _MASKED and not config.edit_mask:
        values["edit_mask"] = str(_masks(run.output / "masks" / case.video.stem, case))
        (job,) = batch_of({"jobs": [values]}).jobs
    return job


def _of_case(case: FiveCase) -> dict[str, Any]:
    """The settings of an edit that its case determines."""
    of_clip = {"video": str(case.video), "count": case.frames, "lossless": True}
    return {"source": case.source, "target": case.target, **of_clip}


def _masks(folder: Path, case: FiveCase) -> Path:
    """A copy of the masks of the case's frames, without those of later ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in picture_files(case.mask)[: case.frames]:
        shutil.copyfile(file, folder / file.name)
    return folder


def _measured(session: Session, run: FiveRun, jobs: Sequence[tuple[FiveCase, str, Job]]) -> list[FiveRow]:
    """The rows of all results, in the jobs' order."""
    results = [(run.output / f"{job.name}.mkv", case, method, job) for case, method, job in jobs]
    results = [one for one in results if one[0].is_file()]
    models = {name: model for name, model in run.models.items() if model}
    there = {(row["result"], row["digest"]): row for row in _rows(run.output / ROWS) if row["models"] == models}
    digests = {result.name: digest_of(result) for result, *_ in results}
    todo = [one for one in results if (one[0].name, digests[one[0].name]) not in there]
    metrics = _metrics(run) if todo else None
    with session.bars() as bar:
        update = bar("figures")
        for done, (result, case, method, job) in enumerate(todo, 1):
            row: FiveRow = {"case": case.name, "kind": case.kind, "method": method, "result": result.name}
            row |= {"digest": digests[result.name], "models": models}
            assert metrics is not None
            row |= metrics.measure(*_clips(case, job, result), case.target, case.questions)
            append_lines(run.output / ROWS, [row])
            there[result.name, digests[result.name]] = row
            update(done, len(todo))
    return [there[result.name, digests[result.name]] for result, *_ in results]


def _rows(path: Path) -> list[FiveRow]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):  # an interruption may truncate a line
            found.append(json.loads(line))
    return found


def _clips(case: FiveCase, job: Job, result: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Source, edit and mask at the source's size; of the source, the part that the edit shows."""
    config, edited = config_for(job), open_video(result).read().frames
    source = find_frames(replace(config, count=len(edited))).read().frames
    mask = open_video(case.mask, config.start, config.stride, len(edited)).read().frames
    source, mask = (_shown(crop(frames, *config.crop), *edited.shape[1:3]) for frames in (source, mask))
    scaled = resize_to_fill(edited, source.shape[2], source.shape[1])
    return to_unit(source), to_unit(scaled), (mask > 0).any(-1).float()


def _shown(frames: Tensor, height: int, width: int) -> Tensor:
    """The centre of frames (f, h, w, 3) with the aspect ratio of a size, as an edit of that size fits them."""
    h, w = frames.shape[1:3]
    scale = min(h / height, w / width)
    top, left = (h - round(height * scale)) // 2, (w - round(width * scale)) // 2
    return frames[:, top : h - top, left : w - left]


# --- the models of figures ----------------------------------------------------------------


def _notes(models: dict[str, str]) -> list[str]:
    """Which figures are left out, and why, and the models of the others."""
    notes = []
    for name, figure in _FIGURES.items():
        missing = name in _LIBRARIES and not _installed(_LIBRARIES[name])
        left_out = f"give --{name}" if not models[name] else f"{_LIBRARIES[name]} is not installed" if missing else ""
        notes.append(f"{figure} left out: {left_out}" if left_out else f"{figure}: {models[name]}")
    return [*notes, "motion by flow: tracks along DIS flow instead of CoTracker's; no published row has it"]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _metrics(run: FiveRun) -> FiveMetrics:
    """Load the models of the figures, without those whose library is not installed."""
    from ..benchmark.five_metrics import FiveMetrics, load_niqe
    from ..metrics.motion import flow_tracker, load_cotracker
    from ..metrics.structure import Dino
    from ..metrics.vlm import load_vlm

    device = pick_device(run.device.split(",")[0].strip())

    def loaded(name: str, load: Callable[[str], T]) -> T | None:
        usable = run.models[name] and (name not in _LIBRARIES or _installed(_LIBRARIES[name]))
        return load(run.models[name]) if usable else None

    def of_transformers(name: str, load: Callable[..., T]) -> T | None:
        return loaded(name, lambda model: _of_transformers(name, model, partial(load, device=device)))

    return FiveMetrics(
        loaded("clip", lambda model: open_clip(model, device)),
        of_transformers("dino", Dino.load),
        loaded("lpips", _lpips),
        loaded("niqe", load_niqe),
        loaded("tracker", lambda model: load_cotracker(model, device)),
        flow_tracker(flow_estimator("dis")[1]) if _installed("cv2") else None,
        of_transformers("vlm", load_vlm),
    )


def _lpips(path: str) -> Lpips:
    """LPIPS with SqueezeNet, which FiVE-Bench uses. Raises ConfigError for another net."""
    from ..metrics.lpips import Lpips

    with of_setting("lpips"):
        found = Lpips.load(path)
        if found.name != "squeeze":
            raise ValueError(f'{path} has the net "{found.name}"; FiVE-Bench uses "squeeze"')
    return found


def _of_transformers(what: str, name: str, load: Callable[..., T]) -> T:
    """Load from a folder, or by hub name. Raises CheckpointError, naming the setting, for anything else."""
    from ..hosts.diffusers.checkpoint import quiet
    from ..hosts.diffusers.model_files import as_checkpoint_error, from_hub

    with quiet(), of_setting(what), as_checkpoint_error(name):
        return load(name, local_files_only=True) if Path(name).is_dir() else from_hub(name, load)
