"""V2VBench (Sun et al., 2024, arXiv 2407.07111): its folder of cases, its figures and published rows.

The folder is the authors' data set:

    config.yaml                   data: a list of clips with their prompt and edits
    frames/hike/00.png ...        a clip's frames (or videos/hike.mp4)

An entry of `data` has `video_id`, `prompt` and `edit`, a list with the `prompt` of each edit and its `type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..metrics.clip import ClipScorer
from ..metrics.frame_models import Aesthetic, DinoV2
from ..metrics.viclip import load_viclip
from ..settings import shown
from ..video.flow import dis_flow
from .public import (
    Benchmark,
    Case,
    Clips,
    Column,
    FigureModel,
    FolderError,
    Measure,
    Skip,
    clip_of,
    opened,
    readable,
    text_of,
)
from .v2v_metrics import V2VMetrics, load_gmflow

_PLACES = ("frames/{}", "videos/{}.mp4", "videos/{}.gif", "{}", "{}.mp4", "{}.gif")
_UNNAMED = "edit"
"""The type of an edit without one."""


def load_v2v(
    folder: str | Path,
    kinds: Sequence[str] = (),
    each: int | None = None,
    frames: int | None = None,
    skip: Skip | None = None,
) -> list[Case]:
    """The cases of a folder. kinds: of which types; all if empty. each: at most so many of a type. frames: at most so
    many of a clip. skip: called with the reason for each clip that is missing or cannot be read; None refuses it.

    Raises FolderError, naming the clip and the edit, for anything else that is wrong, and if no case is left.
    """
    folder = Path(folder)
    found: dict[str, list[Case]] = {}
    for entry in _entries(folder / "config.yaml"):
        clip = text_of(entry, "video_id", "config.yaml")
        where = f"config.yaml, {clip}"
        source = text_of(entry, "prompt", where)
        if (read := readable(partial(_clip, folder, entry, where, frames), skip)) is None:
            continue
        video, length = read
        for n, edit in enumerate(_list(entry.get("edit"), f"{where}: edit")):
            kind, target = str(edit.get("type") or _UNNAMED), text_of(edit, "prompt", f"{where}, edit {n}")
            found.setdefault(kind, []).append(Case(f"{clip}-{n}", kind, video, source, target, length))
    if not found:
        raise FolderError(f"{folder} has no clip that can be read")
    if unknown := next((kind for kind in kinds if kind not in found), None):
        raise FolderError(f"kind is {shown(unknown)}; it must be one of {', '.join(found)}")
    return [case for kind, of_kind in found.items() if not kinds or kind in kinds for case in of_kind[:each]]


def _clip(folder: Path, entry: Mapping[str, Any], where: str, most: int | None) -> tuple[Path, int]:
    """A clip's frames or video, and how many frames it has."""
    video = clip_of(folder, entry, "video_id", where, _PLACES)
    return video, len(opened(video, where, most))


def _entries(file: Path) -> list[Mapping[str, Any]]:
    if not file.is_file():
        raise FolderError(f"{file.parent} is not a folder of V2VBench: it has no config.yaml")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FolderError(f"{file} cannot be read as YAML: {error}") from error
    return _list(data.get("data") if isinstance(data, dict) else None, f"{file}: data")


def _list(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise FolderError(f"{where} is {shown(value)}; it must be a list of sections")
    return value


# --- figures ------------------------------------------------------------------------------

COLUMNS = (
    Column("quality", "frames quality", 1, 3),
    Column("semantic", "semantic consistency", 1, 3),
    Column("object", "object consistency", 1, 3),
    Column("video_quality", "video quality", 1, 3),
    Column("text", "frames text alignment", 1, 3),
    Column("pick", "frames pick score", 1, 3),
    Column("video_text", "video text alignment", 1, 3),
    Column("motion", "motion alignment", 1, 3),
    Column("motion_flow", "motion alignment by DIS", 1, 3),
)
"""V2VBench's figures, then ours, which it does not have."""

PUBLISHED = {
    "Tune-A-Video": (5.001, 0.934, 0.917, 0.527, 27.513, 20.701, 0.254, -5.599),
    "SimDA": (4.988, 0.940, 0.929, 0.569, 26.773, 20.512, 0.248, -4.756),
    "VidToMe": (4.988, 0.949, 0.945, 0.656, 26.813, 20.546, 0.240, -3.203),
    "VideoComposer": (4.429, 0.914, 0.905, 0.370, 28.001, 20.272, 0.262, -8.095),
    "MotionDirector": (4.984, 0.940, 0.951, 0.617, 27.845, 20.923, 0.262, -3.088),
    "Video-P2P": (4.907, 0.943, 0.926, 0.471, 23.550, 19.751, 0.193, -5.974),
    "Vid2Vid-Zero": (5.103, 0.919, 0.912, 0.638, 28.789, 20.950, 0.270, -4.175),
    "Fate-Zero": (5.036, 0.951, 0.952, 0.704, 25.065, 20.707, 0.225, -1.439),
    "TokenFlow": (5.068, 0.947, 0.943, 0.715, 27.522, 20.757, 0.254, -1.572),
    "FLATTEN": (4.965, 0.943, 0.949, 0.645, 27.156, 20.745, 0.251, -1.446),
    "FRESCO": (5.127, 0.908, 0.896, 0.689, 25.639, 20.239, 0.223, -5.241),
    "Text2Video-Zero": (5.097, 0.899, 0.894, 0.613, 29.124, 20.568, 0.265, -17.226),
    "Pix2Video": (5.075, 0.946, 0.944, 0.638, 28.731, 21.054, 0.271, -2.889),
    "ControlVideo": (5.404, 0.959, 0.948, 0.674, 28.551, 20.961, 0.261, -9.396),
    "Rerender": (5.002, 0.872, 0.863, 0.724, 27.379, 20.460, 0.261, -4.959),
    "RAVE": (5.077, 0.926, 0.936, 0.664, 28.190, 20.865, 0.255, -2.398),
}
"""The authors' leaderboard (github.com/wenhao728/awesome-diffusion-v2v), in the order and units of the columns."""
_NOTES = (
    "Published rows: V2VBench's leaderboard, its 150 edits of 50 clips.",
    "video quality (DOVER) is not computed; its published values are in table.csv",
    "motion alignment by DIS: with OpenCV's DIS flow instead of GMFlow's; no published row has it",
)


def _measure(models: Mapping[str, Any]) -> Measure:
    metrics = V2VMetrics(**models, dis=dis_flow())

    def measure(case: Case, clips: Clips) -> dict[str, float | None]:
        return metrics.measure(clips.source, clips.edited, case.target)

    return measure


V2V = Benchmark(
    name="V2VBench",
    load=load_v2v,
    cases=150,
    columns=COLUMNS,
    published=PUBLISHED,
    notes=_NOTES,
    models={
        "aesthetic": FigureModel("frames quality", Aesthetic.load),
        "clip": FigureModel("semantic consistency and frames text alignment", ClipScorer.load),
        "dino": FigureModel("object consistency", DinoV2.load),
        "pickscore": FigureModel("frames pick score", ClipScorer.load),
        "viclip": FigureModel("video text alignment", load_viclip, file=True, needs="clip"),
        "gmflow": FigureModel("motion alignment", load_gmflow, file=True, library="ptlflow"),
    },
    measure=_measure,
)
