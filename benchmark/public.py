"""Public benchmarks of video editing: their cases, their published rows, and the tables of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, UnidentifiedImageError

from ..files.whole import whole_file
from ..metrics.bootstrap import Interval, mean_of
from ..metrics.vlm import Questions
from ..settings import shown
from ..video.pictures import VideoError, picture_files
from ..video.read import VideoSource, open_video

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")


class FolderError(ValueError):
    """A folder that is not in a benchmark's layout."""


class ClipError(FolderError):
    """A clip, or its masks, that is missing or cannot be read."""


Skip = Callable[[str], None]
"""Called with why a case is left out."""


@dataclass(frozen=True)
class Case:
    """A clip and a pair of prompts. name: unique in its folder. mask: a folder of pictures; None if there are none."""

    name: str
    kind: str
    video: Path
    source: str
    target: str
    frames: int
    mask: Path | None = None
    questions: Questions | None = None


@dataclass(frozen=True)
class Column:
    """A figure: its key in a row, its heading, the factor of the table, and whether higher is better."""

    key: str
    heading: str
    times: float = 1
    digits: int = 2
    higher: bool = True


@dataclass(frozen=True)
class FigureModel:
    """A model that figures need.

    figures: their names. load: from a file's path and a device, or from a folder or hub name of transformers.
    library: the optional package that it needs. needs: the setting of a model that it needs too.
    """

    figures: str
    load: Callable[..., Any]
    file: bool = False
    library: str = ""
    needs: str = ""


Figures = dict[str, "float | None"]
"""Figures of an edit; None where one is undefined."""


@dataclass(frozen=True)
class Clips:
    """Source and edit of a case at the source's size, (f, 3, h, w) in 0..1, and its mask (f, h, w), if it has one.

    saved: the edit's uint8 frames at its own size, (f, h, w, 3).
    """

    source: Tensor
    edited: Tensor
    mask: Tensor | None
    saved: Tensor


Measure = Callable[[Case, Clips], Figures]
"""The figures of a case."""


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    load: the cases of a folder, given kinds, at most how many of a kind, at most how many frames, and what is called
    for each case that is left out (None refuses it). cases: how many its published rows have. columns: its figures, in
    the order of its published rows, then ours. models: by setting. measure: makes the function that measures, from the
    loaded models.
    """

    name: str
    load: Callable[[Path, Sequence[str], int | None, int | None, Skip | None], list[Case]]
    cases: int
    columns: tuple[Column, ...]
    published: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...]
    models: Mapping[str, FigureModel]
    measure: Callable[[Mapping[str, Any]], Measure]


# --- reading a folder ---------------------------------------------------------------------


def text_of(entry: Mapping[str, Any], key: str, where: str) -> str:
    """A text of an entry. Raises FolderError if it is missing or empty."""
    value = entry.get(key)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if not isinstance(value, (str, int, float)) or not text.strip():
        raise FolderError(f"{where}: {key} is {shown(value)}; it must be a text")
    return text.strip()


def clip_of(folder: Path, entry: Mapping[str, Any], key: str, where: str, places: Sequence[str]) -> Path:
    """The frames or the video of a clip that an entry names, in the first of the places that has it.

    Raises FolderError for a path instead of a name, ClipError if no place has it.
    """
    name = text_of(entry, key, where)
    if Path(name).name != name:
        raise FolderError(f"{where}: {key} is {shown(name)}; it must be a name without folders")
    names = [place.format(name) for place in places]
    if (found := next((folder / place for place in names if _has_frames(folder / place)), None)) is None:
        raise ClipError(f"{where}: no clip {' or '.join(names)} in {folder}")
    return found


def _has_frames(path: Path) -> bool:
    """Whether a path is a file, or a folder with pictures."""
    with suppress(VideoError):
        return path.is_file() or (path.is_dir() and bool(picture_files(path)))
    return False


def readable(read: Callable[[], T], skip: Skip | None) -> T | None:
    """What is read of a case; None if its clip or its masks cannot be, which is reported or raised."""
    try:
        return read()
    except ClipError as error:
        if skip is None:
            raise
        skip(str(error))
        return None


def opened(video: Path, where: str, most: int | None) -> VideoSource:
    """A clip of at most so many frames. Raises ClipError if it cannot be read."""
    try:
        return open_video(video, at_most=most)
    except (OSError, ValueError) as error:
        raise ClipError(f"{where}: {error}") from error


def masks_of(folder: Path, video: Path, frames: int) -> list[Path]:
    """The masks of a clip's first frames: those named like its pictures, or a video's in order.

    Raises OSError or ValueError if one is missing.
    """
    masks, pictures = picture_files(folder), picture_files(video)[:frames]
    named = {mask.stem: mask for mask in masks}
    if lacking := next((picture for picture in pictures if picture.stem not in named), None):
        raise VideoError(f"no mask of {lacking.name} at {folder}")
    if len(masks) < frames:
        raise VideoError(f"{folder} has {len(masks)} masks for {frames} frames")
    return [named[picture.stem] for picture in pictures] if pictures else list(masks[:frames])


def check_masks(folder: Path, video: Path, clip: VideoSource, where: str) -> None:
    """Raise ClipError unless each frame has a mask of its size and, if it is a picture, of its name."""
    if not folder.is_dir():
        raise ClipError(f"{where}: no masks at {folder}")
    try:
        sizes = [_size(mask) for mask in masks_of(folder, video, len(clip))]
    except (OSError, ValueError) as error:
        raise ClipError(f"{where}: {error}") from error
    if other := next((size for size in sizes if size != clip.size), None):
        (w, h), (width, height) = other, clip.size
        raise ClipError(f"{where}: masks of {w}x{h} at {folder}, but frames of {width}x{height}")


def _size(picture: Path) -> tuple[int, int]:
    try:
        with Image.open(picture) as opened_picture:
            return opened_picture.size
    except UnidentifiedImageError as error:
        raise VideoError(f"{picture} is not a readable picture") from error


# --- tables -------------------------------------------------------------------------------

Row = dict[str, Any]
"""A case's `case`, `kind`, `method`, `result` and figures; a figure that is undefined there is None."""


def write_public_tables(folder: Path, benchmark: Benchmark, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Write `table.md` and `table.csv` to a run's folder; returns the Markdown."""
    present = [column for column in benchmark.columns if any(column.key in row for row in rows)]
    text = _markdown(benchmark, rows, present, (*benchmark.notes, *notes))
    with whole_file(folder / "table.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with whole_file(folder / "table.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "kind", "cases", "figure", "mean", "low", "high", "measured"])
        for method, kind, chosen in _parts(rows):
            for column in present:
                cells = [f"{v:.6g}" for v in _mean(chosen, column)]
                writer.writerow([method, kind, len(chosen), column.heading, *cells, _measured(chosen, column)])
        for method, values in benchmark.published.items():
            for column, value in zip(benchmark.columns, values, strict=False):
                writer.writerow([f"{method} (published)", "all", benchmark.cases, column.heading, value, "", "", ""])
    return text


def _parts(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """The rows of each method, of all kinds and of each kind."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        found.append((method, "all", own))
        for kind in dict.fromkeys(row["kind"] for row in rows):
            if of_kind := [row for row in own if row["kind"] == kind]:
                found.append((method, kind, of_kind))
    return found


def _measured(rows: Sequence[Row], column: Column) -> int:
    """How many rows have a figure."""
    return sum(row.get(column.key) is not None for row in rows)


def _mean(rows: Sequence[Row], column: Column) -> Interval:
    values = [row.get(column.key) for row in rows]
    interval = mean_of([math.nan if value is None else float(value) for value in values])
    return Interval(*(column.times * value for value in interval))


def _markdown(benchmark: Benchmark, rows: Sequence[Row], present: Sequence[Column], notes: Sequence[str]) -> str:
    heads = ["method", "type of edit", "cases", *(f"{c.heading} {'↑' if c.higher else '↓'}" for c in present)]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for method, kind, chosen in _parts(rows):
        lines.append([method, kind, str(len(chosen)), *(_cell(chosen, c) for c in present)])
    for method, values in benchmark.published.items():
        given = {c.key: f"{v:.{c.digits}f}" for c, v in zip(benchmark.columns, values, strict=False)}
        if any(cells := [given.get(c.key, "") for c in present]):
            lines.append([f"*{method}, published*", "all", str(benchmark.cases), *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _cell(rows: Sequence[Row], column: Column) -> str:
    """The mean, with the number of cases if not all have the figure."""
    value, measured = _mean(rows, column).value, _measured(rows, column)
    some = f" ({measured})" if 0 < measured < len(rows) else ""
    return "" if math.isnan(value) else f"{value:.{column.digits}f}{some}"
