"""FiVE-Bench (Li et al., ICCV 2025, arXiv 2503.13684): its folder of cases, published rows, and the tables of a run.

The folder is the authors' `data`, with its archives unpacked:

    edit_prompt/edit1_FiVE.json ... edit6_FiVE.json   a list of prompt pairs for each type of edit
    images/0001_bus/00001.jpg ...                     a clip's frames (or videos/0001_bus.mp4)
    bmasks/0001_bus/00001.jpg ...                     the masks of its object, with the same names
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..files.whole import whole_file
from ..metrics.bootstrap import Interval, mean_of
from ..metrics.vlm import Questions
from ..settings import shown
from ..video.pictures import picture_files
from ..video.read import open_video

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
_QUESTIONS = ("source_yes_no_question", "target_yes_no_question", "multiple_choice_question")


class FiveError(ValueError):
    """A folder that is not in FiVE-Bench's layout."""


@dataclass(frozen=True)
class FiveCase:
    """A clip, its mask and a pair of prompts. name: of its file, and its position there."""

    name: str
    kind: str
    video: Path
    mask: Path
    source: str
    target: str
    frames: int
    questions: Questions | None = None


def load_five(
    folder: str | Path, kinds: Sequence[str] = (), each: int | None = None, frames: int = FRAMES
) -> list[FiveCase]:
    """The cases of a folder. kinds: of which types, by number or name; all if empty. each: at most so many of a type.
    frames: at most so many of a clip.

    Raises FiveError, naming the file and the case, for anything that is missing or cannot be read.
    """
    folder = Path(folder)
    files = sorted((folder / "edit_prompt").glob("*.json"))
    if not files:
        raise FiveError(f"{folder} is not a folder of FiVE-Bench: it has no edit_prompt/*.json")
    chosen = {_kind_of("kind", kind) for kind in kinds} or set(KINDS.values())
    found: dict[str, list[FiveCase]] = {kind: [] for kind in KINDS.values()}
    for file in files:
        for n, entry in enumerate(_entries(file)):
            where = f"{file.relative_to(folder)}, case {n}"
            kind = _kind_of(f"{where}: editing_type_id", _text(entry, "editing_type_id", where))
            if kind in chosen and (each is None or len(found[kind]) < each):
                found[kind].append(_case(folder, f"{file.stem.split('_')[0]}-{n:03d}", kind, entry, where, frames))
    cases = [case for of_kind in found.values() for case in of_kind]
    if not cases:
        raise FiveError(f"{folder} has no case of {', '.join(sorted(chosen))}")
    return cases


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FiveError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FiveError(f"{file} must be a list of cases")
    return entries


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise FiveError(f"{where}: {key} is {shown(value)}; it must be a text")
    return str(value)


def _kind_of(what: str, given: str) -> str:
    kind = KINDS.get(given, given)
    if kind not in KINDS.values():
        known = ", ".join(f"{number} ({name})" for number, name in KINDS.items())
        raise FiveError(f"{what} is {shown(given)}; it must be one of {known}")
    return kind


def _case(folder: Path, name: str, kind: str, entry: dict[str, Any], where: str, most: int) -> FiveCase:
    clip = _text(entry, "video_name", where)
    if Path(clip).name != clip:
        raise FiveError(f"{where}: video_name is {shown(clip)}; it must be a name without folders")
    video, mask = _found(folder, clip, where), folder / "bmasks" / clip
    source, target = (
        _text(entry, key, where).replace("[", "").replace("]", "") for key in ("source_prompt", "target_prompt")
    )
    asked = [str(entry.get(key) or "") for key in _QUESTIONS]
    questions = Questions(*asked) if asked[1] and asked[2] else None
    return FiveCase(name, kind, video, mask, source, target, _checked(video, mask, where, most), questions)


def _found(folder: Path, clip: str, where: str) -> Path:
    """The frames of a clip, or else its video."""
    for path in (folder / "images" / clip, folder / "videos" / f"{clip}.mp4"):
        if path.exists():
            return path
    raise FiveError(f"{where}: no clip images/{clip} or videos/{clip}.mp4 in {folder}")


def _checked(video: Path, mask: Path, where: str, most: int) -> int:
    """The number of frames to edit. Raises FiveError unless each has a mask of its size; of its name, if a picture."""
    if not mask.is_dir():
        raise FiveError(f"{where}: no masks at {mask}")
    try:
        clip = open_video(video, at_most=most)
        masks = picture_files(mask)[: len(clip)]
    except (OSError, ValueError) as error:
        raise FiveError(f"{where}: {error}") from error
    if len(masks) < len(clip):
        raise FiveError(f"{where}: {mask} has {len(masks)} masks for {len(clip)} frames")
    pairs = zip(picture_files(video), masks, strict=False)
    if wrong := next((frame for frame, own in pairs if frame.stem != own.stem), None):
        raise FiveError(f"{where}: no mask of {wrong.name} at {mask}")
    with Image.open(masks[0]) as picture:
        if picture.size != clip.size:
            raise FiveError(f"{where}: masks of {picture.size[0]}x{picture.size[1]} at {mask}, but frames of "
                            f"{clip.size[0]}x{clip.size[1]}")  # fmt: skip
    return len(clip)


# --- tables -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A figure: its key in a row, its heading, the factor of the table, and whether higher is better."""

    key: str
    heading: str
    times: float = 1
    digits: int = 2
    higher: bool = True


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
    "Wan-Edit": (12.53, 25.57, 94.6, 41.8, 82.55, 26.39, 21.23, 6.54, 89.43, 46.97),
}
"""Tables 2 and 3 of arXiv 2503.13684, in the order and units of the first columns."""
SOURCE = "Published rows: FiVE-Bench, arXiv 2503.13684, Tables 2 and 3: its 420 cases, each method on its own model."

FiveRow = dict[str, Any]
"""A case's `case`, `kind`, `method`, `result` and figures; a figure that is undefined there is None."""


def write_five_tables(folder: Path, rows: Sequence[FiveRow], notes: Sequence[str]) -> str:
    """Write `table.md` and `table.csv` to a run's folder; returns the Markdown."""
    present = [c for c in COLUMNS if any(c.key in row for row in rows)]
    text = _markdown(rows, present, notes)
    with whole_file(folder / "table.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with whole_file(folder / "table.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "kind", "cases", "figure", "mean", "low", "high"])
        for method, kind, chosen in _parts(rows):
            for column in present:
                interval = _mean(chosen, column)
                writer.writerow([method, kind, len(chosen), column.heading, *(f"{v:.6g}" for v in interval)])
        for method, values in PUBLISHED.items():
            for column, value in zip(COLUMNS, values, strict=False):
                writer.writerow([f"{method} (published)", "all", 420, column.heading, value, "", ""])
    return text


def _parts(rows: Sequence[FiveRow]) -> list[tuple[str, str, list[FiveRow]]]:
    """The rows of each method, of all types and of each type."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        found.append((method, "all", own))
        kinds = [kind for kind in KINDS.values() if any(row["kind"] == kind for row in own)]
        found += [(method, kind, [row for row in own if row["kind"] == kind]) for kind in kinds]
    return found


def _mean(rows: Sequence[FiveRow], column: Column) -> Interval:
    values = [row.get(column.key) for row in rows]
    interval = mean_of([math.nan if value is None else float(value) for value in values])
    return Interval(*(column.times * value for value in interval))


def _markdown(rows: Sequence[FiveRow], present: Sequence[Column], notes: Sequence[str]) -> str:
    heads = ["method", "type of edit", "cases", *(f"{c.heading} {'↑' if c.higher else '↓'}" for c in present)]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for method, kind, chosen in _parts(rows):
        lines.append([method, kind, str(len(chosen)), *(_cell(_mean(chosen, c).value, c) for c in present)])
    for method, values in PUBLISHED.items():
        given = dict(zip((c.key for c in COLUMNS), values, strict=False))
        cells = [_cell(given[c.key], c) if c.key in given else "" for c in present]
        lines.append([f"*{method}, published*", "all", "420", *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in (SOURCE, *notes)) + "\n"


def _cell(value: float, column: Column) -> str:
    return "" if math.isnan(value) else f"{value:.{column.digits}f}"
