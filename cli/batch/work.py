"""The tasks of a batch's process: an inversion that edits share, or one edit with its metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ...diffusion.invert import InversionSettings
from ...imports import torch
from ...settings import settings_of, shown
from ...store.budget import StoreSettings
from ...video.fitted import FittedVideo
from ...video.flow import Estimator, flow_estimator
from ...video.read import open_video
from ...video.size import to_unit
from ...video.which import ClipSettings
from ..captions import recorded_source
from ..commands.edit import run_edits
from ..commands.invert import run_invert
from ..config.files import config_of
from ..config.settings import ControlSettings, EditConfig, ModelSettings
from ..config.values import completed
from ..frames import find_frames
from ..progress import no_bars
from ..session import Session, open_clip, pick_device
from .jobs import Job

if TYPE_CHECKING:
    from ...hosts.diffusers.model import Model
    from ...metrics.clip import ClipScorer

_OF_INVERSIONS = (
    "video", "source", "caption_model",
    *(
        one.name
        for part in (ModelSettings, ControlSettings, ClipSettings, InversionSettings, StoreSettings)
        for one in settings_of(part)
    ),
)  # fmt: skip
"""The settings of an inversion."""
_OF_PLACES = ("place", "budget_gb")
"""Settings for where an inversion is stored."""


@dataclass(frozen=True)
class Task:
    """A job, or an inversion that several share (`job` is None).

    config: what to do. store: the name of the inversion that is made, or edited. Names are of files in the batch's
    folder.
    """

    config: EditConfig
    name: str
    store: str | None = None
    job: Job | None = None


@dataclass(frozen=True)
class Ended:
    """The result of a job. error: None for success. attempts: their number. figures: metrics by name."""

    name: str
    error: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    where: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, line: str) -> Ended:
        """From a line of the log. Raises ValueError or TypeError for any other line."""
        one = cls(**json.loads(line))
        texts = isinstance(one.name, str) and isinstance(one.where, str) and isinstance(one.error, (str, NoneType))
        numbers = (one.seconds, one.attempts, *one.figures.values()) if isinstance(one.figures, dict) else (None,)
        if not texts or not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(f"{shown(line)} is not a line of the log")
        return one

    def lacks(self, clip: bool) -> bool:
        """Whether a finished edit lacks metrics. clip: whether CLIP metrics are required."""
        from ...metrics.evaluate import OF_CLIP

        return self.error is not None or not self.figures or (clip and OF_CLIP not in self.figures)


@dataclass(frozen=True)
class Group:
    """Edits of one clip, and their shared inversion, if any."""

    inversion: Task | None
    edits: tuple[Task, ...]

    def __iter__(self) -> Iterator[Task]:
        yield from (self.inversion,) if self.inversion else ()
        yield from self.edits


def config_for(job: Job) -> EditConfig:
    """A job's edit. Raises ConfigError for invalid settings."""
    return completed(config_of(job.values))


def groups_of(jobs: Sequence[tuple[Job, EditConfig]]) -> list[Group]:
    """Jobs grouped by their inversion; a job that shares none inverts by itself."""
    sharing = dict[str, list[tuple[Job, EditConfig]]]()
    for job, config in jobs:
        own = config.first_frame or config.guide_frame  # frames of the clip are inputs of its inversion
        alone = config.noise == "drawn" or config.region == "auto" or bool(own)
        key = job.name if alone else sha256(repr(asdict(inversion_of(config))).encode()).hexdigest()
        sharing.setdefault(key, []).append((job, config))
    groups = []
    for key, members in sharing.items():
        store = f"{key[:16]}.safetensors" if len(members) > 1 else None
        inversion = store and Task(inversion_of(members[0][1]), store, store)
        groups.append(Group(inversion or None, tuple(Task(config, job.name, store, job) for job, config in members)))
    return groups


def inversion_of(config: EditConfig) -> EditConfig:
    """An edit's settings for its inversion, with the others at their defaults."""
    return replace(EditConfig(), **{name: getattr(config, name) for name in _OF_INVERSIONS})


@dataclass(frozen=True)
class WorkerOptions:
    """Options of all jobs of a run, wherever they run.

    model_config: see `Session`. measures: whether results are measured; clip: by which CLIP of transformers too. maps:
    whether each edit's heat maps, masks and slices are written next to it.
    """

    dtype: str = "auto"
    model_config: str | None = None
    measures: bool = True
    clip: str = ""
    maps: bool = False

    def measure(self, device: str) -> Measure | None:
        return Measure(device, self.clip) if self.measures else None


class Measure:
    """Measures results against their sources. clip: a CLIP model of transformers for more metrics."""

    def __init__(self, device: str = "auto", clip: str = "") -> None:
        self._device, self._clip = pick_device(device), clip

    def __call__(self, config: EditConfig, output: Path) -> dict[str, float]:
        """The metrics of an edit by name. config: selects the edited frames of its clip."""
        from ...metrics.evaluate import evaluate

        edited = open_video(output).read()
        found = find_frames(replace(config, count=len(edited.frames)))
        source = torch.stack(list(FittedVideo.of(found, config.crop, edited.size).frames()))
        report = evaluate(
            to_unit(source), to_unit(edited.frames), prompts=(config.source, config.target), flow=self._flow,
            clip=self._scorer,
        )  # fmt: skip
        return {name: figure.value for name, figure in report.figures.items()}

    @cached_property
    def _flow(self) -> Estimator | None:
        try:
            return flow_estimator("auto", self._device)[1]
        except ImportError:  # without OpenCV there is no warp error
            return None

    @cached_property
    def _scorer(self) -> ClipScorer | None:
        return open_clip(self._clip, self._device) if self._clip else None


class Worker:
    """Runs tasks one by one, and keeps the last model.

    threads: of a CPU; None leaves them as they are.
    """

    def __init__(self, options: WorkerOptions, device: str, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._measure, self._maps = options.measure(device), options.maps
        self._session = _Keeping(
            Console(quiet=True), no_bars, device, options.dtype, options.model_config, overwrite=True, resume=None
        )

    def invert(self, task: Task, store: Path) -> None:
        run_invert(self._session, task.config, store, dry_run=False)

    def edit(self, task: Task, output: Path, store: Path | None = None) -> dict[str, float]:
        """Edit and measure; returns the metrics by name."""
        config, usual = task.config, EditConfig()
        if store is not None:
            config = replace(config, **{name: getattr(usual, name) for name in _OF_PLACES})
        maps = output.with_name(f"{output.stem}_maps") if self._maps else None
        run_edits(self._session, [config], str(output), store, dry_run=False, from_batch=store is not None, maps=maps)
        return {} if self._measure is None else self._measure(recorded_source(config, output), output)


@dataclass(frozen=True)
class _Keeping(Session):
    """A session that keeps the last model it opened."""

    kept: dict[tuple[Any, ...], Model] = field(default_factory=dict)

    def open_model(self, settings: ModelSettings, videos: bool = False) -> Model:
        key = (settings, videos)
        if key not in self.kept:
            self.kept.clear()  # free memory before the next model is loaded
            self.kept[key] = super().open_model(settings, videos)
        return self.kept[key]
