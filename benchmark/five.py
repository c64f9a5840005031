"""FiVE-Bench (Li et al., ICCV 2025, arXiv 2503.13684): its folder of cases, its figures and published rows.

The folder is the authors' `data`, with its archives unpacked:

    edit_prompt/edit1_FiVE.json ... edit6_FiVE.json   a list of prompt pairs for each type of edit
    images/0001_bus/00001.jpg ...                     a clip's frames (or videos/0001_bus.mp4)
    bmasks/0001_bus/00001.jpg ...                     the masks of its object, with the same names
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..metrics.clip import ClipScorer
from ..metrics.motion import flow_tracker, load_cotracker
from ..metrics.structure import Dino
from ..metrics.vlm import Questions, load_vlm
from ..settings import shown
from ..video.flow import dis_flow
from .five_metrics import FiveMetrics, load_niqe, load_squeeze
from .public import (
    Benchmark,
    Case,
    Clips,
    Column,
    FigureModel,
    FolderError,
    Measure,
    Skip,
    check_masks,
    clip_of,
    opened,
    readable,
    text_of,
)

KINDS = {
    "1": "rigid replacement",
    "2": "non-rigid replacement",
    "3": "colour",
    "4": "material",
    "5": "addition",
    "6": "removal",
}
"""The types of edits, by `editing_type_id`."""
FRAMES = 41
"""Frames that the authors' own methods edit."""
_PLACES = ("images/{}", "videos/{}.mp4")
_QUESTIONS = ("source_yes_no_question", "target_yes_no_question", "multiple_choice_question")


def load_five(
    folder: str | Path,
    kinds: Sequence[str] = (),
    each: int | None = None,
    frames: int | None = None,
    skip: Skip | None = None,
) -> list[Case]:
    """The cases of a folder. kinds: of which types, by number or name; all if empty. each: at most so many of a type.
    frames: at most so many of a clip; 41 if None. skip: called with the reason for each case whose clip or masks are
    missing or cannot be read, which the authors' code leaves out too; None refuses it.

    Raises FolderError, naming the file and the case, for anything else that is wrong, and if no case is left.
    """
    folder = Path(folder)
    files = sorted(file for file in (folder / "edit_prompt").glob("*.json") if not file.name.startswith("."))
    if not files:
        raise FolderError(f"{folder} is not a folder of FiVE-Bench: it has no edit_prompt/*.json")
    chosen = {_kind_of("kind", kind) for kind in kinds} or set(KINDS.values())
    found: dict[str, list[Case]] = {kind: [] for kind in KINDS.values()}
    for file in files:
        for n, entry in enumerate(_entries(file)):
            where = f"{file.relative_to(folder)}, case {n}"
            kind = _kind_of(f"{where}: editing_type_id", text_of(entry, "editing_type_id", where))
            if kind in chosen and (each is None or len(found[kind]) < each):
                name = f"{file.stem.removesuffix('_FiVE')}-{n:03d}"
                case = readable(partial(_case, folder, name, kind, entry, where, frames or FRAMES), skip)
                if case is not None:
                    found[kind].append(case)
    cases = [case for of_kind in found.values() for case in of_kind]
    if not cases:
        raise FolderError(f"{folder} has no case of {', '.join(sorted(chosen))} whose clip and masks can be read")
    return cases


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FolderError(f"{file} must be a list of cases")
    return entries


def _kind_of(what: str, given: str) -> str:
    kind = KINDS.get(given, given)
    if kind not in KINDS.values():
        known = ", ".join(f"{number} ({name})" for number, name in KINDS.items())
        raise FolderError(f"{what} is {shown(given)}; it must be one of {known}")
    return kind


def _case(folder: Path, name: str, kind: str, entry: dict[str, Any], where: str, most: int) -> Case:
    video = clip_of(folder, entry, "video_name", where, _PLACES)
    mask = folder / "bmasks" / text_of(entry, "video_name", where)
    frames = opened(video, where, most)
    check_masks(mask, video, frames, where)
    source, target = (
        text_of(entry, key, where).replace("[", "").replace("]", "") for key in ("source_prompt", "target_prompt")
    )
    asked = [str(entry.get(key) or "") for key in _QUESTIONS]
    questions = Questions(*asked) if asked[1] and asked[2] else None
    return Case(name, kind, video, source, target, len(frames), mask, questions)


# --- figures ------------------------------------------------------------------------------

COLUMNS = (
    Column("structure", "structure x1000", 1000, 2, False),
    Column("psnr", "PSNR dB"),
    Column("lpips", "LPIPS x1000", 1000, 1, False),
    Column("mse", "MSE x10000", 10000, 1, False),
    Column("ssim", "SSIM x100", 100),
    Column("clip", "CLIP"),
    Column("clip_edit", "CLIP edit"),
    Column("niqe", "NIQE", 1, 2, False),
    Column("motion", "motion x100", 100),
    Column("FiVE-Acc", "FiVE-Acc %", 100),
    Column("YN", "YN %", 100),
    Column("MC", "MC %", 100),
    Column("motion_flow", "motion by flow x100", 100),
    Column("inside", "change inside %", 100),
    Column("largest", "largest outside /255", 255, 1, False),
)
"""FiVE-Bench's figures, then ours, which it does not have."""

PUBLISHED = {
    "TokenFlow": (35.62, 19.06, 263.6, 138.7, 72.51, 26.46, 21.15, 4.01, 89.00, 27.43),
    "DMT": (85.95, 14.71, 404.6, 372.8, 51.64, 26.66, 21.44, 5.24, 82.30, 48.42),
    "VidToMe": (22.37, 21.15, 263.9, 88.8, 70.69, 26.84, 21.05, 4.68, 90.06, 26.77),
    "AnyV2V": (71.36, 15.90, 348.6, 343.0, 50.77, 24.89, 19.72, 5.04, 60.36, 38.02),
    "VideoGrain": (12.40, 27.05, 185.2, 25.1, 79.13, 25.69, 20.31, 4.08, 88.57, 37.23),
    "Pyramid-Edit": (28.65, 20.84, 276.6, 95.6, 71.72, 26.82, 20.20, 5.48, 80.59, 43.84),
    "Wan-Edit": (12.53, 25.57, 94.6, 41.8, 82.55, 26.39, 21.23, 6.54, 89.43, 46.97, 41.41, 52.53),
}
"""Tables 2 and 3 of arXiv 2503.13684, in the order and units of the first columns."""
_NOTES = (
    "Published rows: FiVE-Bench, arXiv 2503.13684, Tables 2 and 3: its 420 cases, each method on its own model.",
    "motion by flow: tracks along DIS flow instead of CoTracker's; no published row has it",
)


def _measure(models: Mapping[str, Any]) -> Measure:
    named = {"answer" if name == "vlm" else name: model for name, model in models.items()}
    estimate = dis_flow()
    metrics = FiveMetrics(**named, flow_tracker=estimate and flow_tracker(estimate))

    def measure(case: Case, clips: Clips) -> dict[str, float | None]:
        assert clips.mask is not None
        return metrics.measure(clips.source, clips.edited, clips.mask, case.target, case.questions, clips.saved)

    return measure


FIVE = Benchmark(
    name="FiVE-Bench",
    load=load_five,
    cases=420,
    columns=COLUMNS,
    published=PUBLISHED,
    notes=_NOTES,
    models={
        "clip": FigureModel("CLIP and CLIP edit", ClipScorer.load),
        "dino": FigureModel("structure", Dino.load),
        "lpips": FigureModel("LPIPS", load_squeeze, file=True),
        "niqe": FigureModel("NIQE", load_niqe, file=True, library="pyiqa"),
        "tracker": FigureModel("motion", load_cotracker, file=True, library="cotracker"),
        "vlm": FigureModel("FiVE-Acc", load_vlm),
    },
    measure=_measure,
)
