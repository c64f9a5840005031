"""`fatezero benchmark`: run every method on edits with a known ground truth.

A run's folder contains `settings.json`, `results.jsonl` (a line per case and method, from which a run resumes),
`strips/` (a row of frames each), and finally `table.csv`, `table.md` and `page.html`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..demo.world2 import cases as world2
from ..files.bundled import WORLD2
from ..files.lines import append_lines
from ..files.whole import whole_file
from ..hosts.diffusers.checkpoint import Checkpoint, quiet
from ..hosts.diffusers.model_files import hub_is_online
from ..metrics.clip import ClipScorer
from ..video.size import to_bytes
from ..video.write import write_picture
from .cases import KINDS, AnyCase, cases_of, sample_cases
from .measure import measure
from .rows import LONG, METHODS, QUICK, TRANSFORMER, TUNED, Method, Trial, edited

Row = dict[str, float | str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of a run. A folder has results of one setting only, except for `each` and `kinds`.

    seed: of scenes, motions and words. each: number of cases of each of the `kinds`. frames, steps: of every clip and
    edit. pairs: given captions (source, target) instead of random ones. clip: for Tem-Con and Frame-Acc. world: 2 for
    the harder one, whose `model` is the folder that its training wrote, or the bundled "demo".
    """

    seed: int = 2303
    each: int = 10
    kinds: tuple[str, ...] = KINDS
    frames: int = 4
    steps: int = 20
    guidance_scale: float = 7.5
    model: str = "demo"
    clip: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    world: int = 1

    @property
    def folder(self) -> Path:
        """The folder of world 2's models."""
        return WORLD2 if self.model == "demo" else Path(self.model)

    @property
    def cases(self) -> Sequence[AnyCase]:
        if self.world == 2:
            return world2.sample_cases(self.seed, self.each, self.frames, self.kinds)
        if self.pairs:
            return cases_of(self.pairs, self.seed, self.frames)
        return sample_cases(self.seed, self.each, self.frames, self.kinds)


def chosen_methods(names: Sequence[str] | None, quick: bool) -> list[Method]:
    """Methods by name, or those of `--quick`, or all; ValueError for an unknown one."""
    if not names:
        return (
            [m for m in METHODS if m.name in QUICK]
            if quick
            else [m for m in METHODS if m not in LONG + TUNED + TRANSFORMER]
        )
    unknown = sorted(set(names) - {m.name for m in METHODS})
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: use some of {', '.join(repr(m.name) for m in METHODS)}")
    return [m for m in METHODS if m.name in names]


def check_world(settings: BenchmarkSettings, methods: Sequence[Method]) -> None:
    """Raises ValueError for settings that world 2 does not have."""
    if settings.world == 1:
        return
    parts = {"unet", *("wan" for method in methods if method.transformer)}
    if lacking := sorted(part for part in parts if not (settings.folder / part).is_dir()):
        raise ValueError(
            f"model {settings.model!r} has no folder {lacking[0]!r}: world 2 needs the folder that "
            "`python -m fatezero.demo.world2.train` wrote"
        )
    if settings.pairs:
        raise ValueError("pairs of captions are of the first world: leave them out, or the world")
    if others := [method.name for method in methods if method.layers == "demo" or method.lora]:
        raise ValueError(f"method {others[0]!r} uses weights of the first world: choose others with --method")


def run_benchmark(
    folder: Path,
    settings: BenchmarkSettings,
    methods: Sequence[Method],
    device: str = "cpu",
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Row]:
    """Run every method on every case that the folder does not have yet; returns all rows.

    workers: processes, with one thread each if there are several. A case's rows are written together when it ends.
    Raises ValueError if the folder has a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, settings)
    rows, cases = load_rows(folder), settings.cases
    done = {(row["case"], row["method"]) for row in rows}
    jobs = [(case, [m.name for m in methods if (case.name, m.name) not in done]) for case in cases]
    jobs = [(case, names) for case, names in jobs if names]
    finished = len(cases) - len(jobs)
    if progress:
        progress(finished, len(cases))
    for found, strips in _run(settings, jobs, device, workers):
        for name, frames in strips.items():
            strip = rearrange(frames, "f y x c -> y (f x) c")
            write_picture(folder / "strips" / name, Image.fromarray(strip.numpy()))
        append_lines(folder / "results.jsonl", found)
        rows += found
        finished += 1
        if progress:
            progress(finished, len(cases))
    known = {(case.name, method.name) for case in cases for method in METHODS}
    return [row for row in rows if (row["case"], row["method"]) in known]


def _claim(folder: Path, settings: BenchmarkSettings) -> None:
    """Mark a folder as a run with these settings; `each` and `kinds` may change."""
    path, own = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    del own["each"], own["kinds"]
    if path.exists():
        found = {"world": 1, **json.loads(path.read_text(encoding="utf-8"))}
        other = [name for name in own if found.get(name) != own[name]]
        if other:
            raise ValueError(
                f"{folder} has a run with {other[0]} {found.get(other[0])!r}, not {own[other[0]]!r}: "
                "choose another folder with --output"
            )
    with whole_file(path) as partial:
        partial.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def load_rows(folder: Path) -> list[Row]:
    """The results in a folder, without a line that an interruption cut short."""
    path, rows = folder / "results.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


# --- the work -----------------------------------------------------------------------------

Job = tuple[AnyCase, list[str]]
Done = tuple[list[Row], dict[str, Tensor]]
"""Rows, and uint8 frames by the name of their strip."""


def _run(settings: BenchmarkSettings, jobs: list[Job], device: str, workers: int) -> Iterator[Done]:
    if workers == 1 or len(jobs) < 2:
        worker = _Worker(settings, device)
        yield from map(worker.run, jobs)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _open, (settings, device)) as pool:
        try:
            yield from pool.map(_in_worker, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


class _Worker:
    """A loaded model that runs cases."""

    def __init__(self, settings: BenchmarkSettings, device: str) -> None:
        with quiet():
            folder = settings.model if settings.world == 1 else str(settings.folder / "unet")
            self.checkpoint = Checkpoint.load(folder, torch.device(device))
        self.settings = settings
        self.clip = ClipScorer.load(settings.clip, device, not hub_is_online()) if settings.clip else None

    def run(self, job: Job) -> Done:
        case, names = job
        video = None if self.settings.world == 1 else self.settings.folder / "wan"
        trial = Trial(self.checkpoint, case, self.settings.steps, self.settings.guidance_scale, video)
        rows: list[Row] = []
        strips = {
            f"{case.name}/source.png": to_bytes(case.clip.frames),
            f"{case.name}/truth.png": to_bytes(case.truth.frames),
        }
        chosen = {m.name: m for m in METHODS if m.name in names}
        for name, latents in edited(trial, list(chosen.values())).items():
            frames = trial.finished(chosen[name], self.checkpoint.decode_latents(latents).cpu())
            labels: Row = {"case": case.name, "kind": case.kind, "method": name}
            labels |= {"source": case.source.caption, "target": case.target.caption}
            rows.append({**labels, **measure(case, frames, self.clip)})
            strips[strip_name(case.name, name)] = to_bytes(frames)
        return rows, strips


_worker: _Worker | None = None


def _open(settings: BenchmarkSettings, device: str) -> None:
    """Load the model once in a worker process."""
    global _worker
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    _worker = _Worker(settings, device)


def _in_worker(job: Job) -> Done:
    assert _worker is not None
    return _worker.run(job)


def strip_name(case: str, method: str) -> str:
    """The file of a case's frames by a method, in `strips/`."""
    return f"{case}/{''.join(c if c.isalnum() else '-' for c in method)}.png"


def strip_frames(folder: Path, case: str, method: str) -> Tensor:
    """Read the frames of a strip: uint8 (frames, height, width, 3); "source" and "truth" are methods too."""
    import numpy as np

    with Image.open(folder / "strips" / strip_name(case, method)) as picture:
        return rearrange(torch.from_numpy(np.asarray(picture).copy()), "y (f x) c -> f y x c", x=picture.height)
