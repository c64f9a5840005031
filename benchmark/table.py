"""The benchmark's results as tables, a page of pictures, and contact sheets of cases."""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..files.whole import whole_file
from ..metrics.bootstrap import Interval, bootstrap, difference_of, error_ratio, mean_of
from ..video.sheet import contact_sheet
from .cases import ALL_KINDS, world2
from .rows import METHODS, PAPER
from .run import Row, strip_frames, strip_name

SHARES = ("success", "changed", "kept", "outline", "object_iou", "frame_acc")
"""Figures in per cent."""
HEADINGS = {
    "success": "edit right %",
    "changed": "changed words %",
    "kept": "other words %",
    "outline": "whole outlines %",
    "preserved_db": "preserved dB",
    "preserved_ssim": "preserved SSIM",
    "truth_db": "to truth dB",
    "object_iou": "outline IoU %",
    "warp_error": "warp x1000",
    "warp_error_dis": "warp (DIS) x1000",
    "tem_con": "Tem-Con",
    "frame_acc": "Frame-Acc %",
}
MAIN = tuple(name for name in HEADINGS if name not in ("preserved_ssim", "tem_con", "frame_acc"))
"""Figures of the Markdown table; the CSV has all."""


class Results:
    """Rows by method and case."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(str(row["method"]), str(row["case"])): row for row in rows}
        self.cases = list(dict.fromkeys(str(row["case"]) for row in rows))
        order = [m.name for m in METHODS]
        self.methods = sorted({method for method, _ in self.rows}, key=order.index)
        self.figures = [name for name in HEADINGS if any(name in row for row in rows)]

    def column(self, method: str, figure: str, kind: str | None = None) -> list[float]:
        """A figure of a method for each case, of all kinds or of one; NaN for cases that were not run."""
        chosen = [case for case in self.cases if kind is None or self._kind(case) == kind]
        found = (self.rows.get((method, case)) for case in chosen)
        return [math.nan if row is None else float(row.get(figure, math.nan)) for row in found]

    def _kind(self, case: str) -> str:
        return next(str(self.rows[m, case]["kind"]) for m in self.methods if (m, case) in self.rows)

    @property
    def kinds(self) -> list[str]:
        present = {self._kind(case) for case in self.cases}
        return [kind for kind in dict.fromkeys((*ALL_KINDS, *world2.KINDS)) if kind in present]

    def count(self, method: str) -> int:
        """Number of cases that a method was run on."""
        return sum((method, case) in self.rows for case in self.cases)

    def mean(self, method: str, figure: str, kind: str | None = None) -> Interval:
        return mean_of(self.column(method, figure, kind))

    def compared(self, method: str, other: str) -> Compared:
        """A method compared with another, over the cases of both."""

        def columns(figure: str) -> tuple[list[float], list[float]]:
            return self.column(method, figure), self.column(other, figure)

        return Compared(
            error_ratio(*columns("success")),
            bootstrap(columns("truth_db"), lambda x, y: 10 ** ((y - x).mean(-1) / 10)),
            difference_of(*columns("preserved_db")),
        )


class Compared(NamedTuple):
    """A method's figures relative to another's.

    wrong: ratio of the shares of wrong frames. squared: ratio of the squared errors to the ground truth, as a geometric
    mean over cases. kept: difference of `preserved_db`.
    """

    wrong: Interval
    squared: Interval
    kept: Interval


def write_tables(folder: Path, rows: Sequence[Row], best: str) -> str:
    """Write `table.csv`, `table.md` and `page.html` to a run's folder; returns the Markdown."""
    results = Results(rows)
    text = markdown(results)
    for name, content in (("table.md", text), ("page.html", page(folder, results, best))):
        with whole_file(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    with whole_file(folder / "table.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "kind", "figure", "mean", "low", "high"])
        for method in results.methods:
            for kind in (None, *results.kinds):
                for figure in results.figures:
                    interval = results.mean(method, figure, kind)
                    writer.writerow([method, kind or "all", figure, *(f"{v:.6g}" for v in interval)])
    return text


def markdown(results: Results) -> str:
    """Two tables: all figures over all cases, and the share of correct edits by kind.

    The first one's last columns are relative to the paper's settings (`Compared`).
    """
    figures = [f for f in results.figures if f in MAIN or f in ("tem_con", "frame_acc")]
    heads = ["method", "cases", *(HEADINGS[f] for f in figures)]
    if PAPER in results.methods:
        heads += ["wrong frames", "squared error", "kept dB"]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for method in results.methods:
        cells = [_cell(results.mean(method, figure), figure) for figure in figures]
        if PAPER in results.methods:
            relative = results.compared(method, PAPER)
            own = [_cell(relative.wrong, "ratio"), _cell(relative.squared, "ratio"), _cell(relative.kept, "gain")]
            cells += own if method != PAPER else ["1", "1", "0"]
        lines.append(_line([method, str(results.count(method)), *cells]))
    kinds = results.kinds
    lines += ["", _line(["edit right % / preserved dB", *kinds]), _line(["---", *["---:"] * len(kinds)])]
    for method in results.methods:
        cells = []
        for kind in kinds:
            right, kept = results.mean(method, "success", kind).value, results.mean(method, "preserved_db", kind).value
            share = "" if math.isnan(right) else f"{100 * right:.0f}"
            cells.append(share + ("" if math.isnan(kept) else f" / {kept:.1f}"))
        lines.append(_line([method, *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(interval: Interval, figure: str) -> str:
    """Text of an interval, value (low to high), in the figure's unit."""
    if math.isnan(interval.value):
        return ""
    times, digits = (100, 0) if figure in SHARES else (1, 2 if figure in ("ratio", "preserved_ssim", "tem_con") else 1)
    value, low, high = (f"{times * v:.{digits}f}" for v in interval)
    return value if low == high else f"{value} ({low} to {high})"


# --- pictures -----------------------------------------------------------------------------


def ranked(results: Results, method: str) -> list[str]:
    """Cases from a method's best to worst edit: by success, then by similarity to the ground truth."""
    found = {case: results.rows[method, case] for case in results.cases if (method, case) in results.rows}
    return sorted(found, key=lambda case: (-float(found[case]["success"]), -float(found[case]["truth_db"])))


def case_sheet(
    folder: Path, results: Results, case: str, methods: Sequence[str], title: str, tile: int = 150
) -> Image.Image:
    """A contact sheet of a case: source, ground truth and the results of some methods."""
    any_row = next(row for (_, name), row in results.rows.items() if name == case)
    rows = [(f"source: {any_row['source']}", strip_frames(folder, case, "source"))]
    rows.append((f"truth: {any_row['target']}", strip_frames(folder, case, "truth")))
    for method in methods:
        row = results.rows[method, case]
        label = f"{method}: right {100 * float(row['success']):.0f} %, to truth {float(row['truth_db']):.1f} dB"
        rows.append((label, strip_frames(folder, case, method)))
    return contact_sheet(rows, title, tile)


def page(folder: Path, results: Results, best: str) -> str:
    """A page of all cases with every method's frames, from the best edit by one method to the worst."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>fatezero benchmark</title>",
        "<style>body{font:14px sans-serif;margin:2em;max-width:1200px}img{image-rendering:pixelated;height:72px;"
        "display:block}figure{display:inline-block;margin:4px}figcaption{font-size:11px;max-width:300px}"
        "td,th{padding:2px 8px;text-align:right;font-size:12px}td:first-child{text-align:left}</style>",
        f"<h1>fatezero benchmark</h1><p>{len(results.cases)} cases, from the best edit by {html.escape(best)} to the "
        "worst. Under each row of frames: the share of frames that are right, and PSNR to the true edit.</p>",
        _html_tables(markdown(results)),
    ]
    for case in ranked(results, best if best in results.methods else results.methods[-1]):
        found = {m: results.rows[m, case] for m in results.methods if (m, case) in results.rows}
        first = next(iter(found.values()))
        parts.append(
            f"<h3>{case}</h3><p>{html.escape(str(first['source']))} &rarr; {html.escape(str(first['target']))}</p>"
        )
        for name in ("source", "truth", *found):
            label = name
            if name in found:
                label += f": {100 * float(found[name]['success']):.0f} %, {float(found[name]['truth_db']):.1f} dB"
            parts.append(
                f"<figure><img loading='lazy' src='strips/{strip_name(case, name)}'>"
                f"<figcaption>{html.escape(label)}</figcaption></figure>"
            )
    return "\n".join(parts) + "\n"


def _html_tables(text: str) -> str:
    """Markdown tables as HTML."""
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines()]
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows if row[0] != "---"]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
