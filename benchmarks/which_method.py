"""Write the first section of QUALITY.md: the preset for each kind of edit, with its figures from `results/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common import table, write_section

from fatezero.benchmark.rows import BEST, PAPER
from fatezero.benchmark.table import Results
from fatezero.metrics.bootstrap import Interval, bootstrap, difference_of

HERE = Path(__file__).parent
TITLE = "Which method for what"
KINDS = {
    "attribute": ("a colour", "`attribute+`"),
    "texture": ("a texture", "`attribute+`"),
    "background": ("the ground", "`attribute+`"),
    "style": ("the style of the whole picture", "`style+`"),
    "shape": ("a shape", "`shape+`"),
    "swap": ("an object: its colour and shape", "`shape+`"),
    "two objects": ("one of two objects", "that of the changed word"),
    "alike objects": ("one of two objects of the same colour and texture", "that of the changed word"),
    "removal": ("an object away", "`remove`"),
}
"""What changes, and the preset, by kind of case."""


LONG, STEADY = ("long unseen", "long fresh"), f"{BEST}, flow smoothing 0.9, steady 0.9"
"""The runs on clips of 16 frames, and their row with the least flicker."""


def main() -> None:
    lines = []
    for kind, (what, preset) in KINDS.items():
        results = load("removal" if kind == "removal" else "outlines")
        figures = [
            of(results.mean(method, figure, kind))
            for method in (BEST, PAPER)
            for figure, of in (("success", share), ("preserved_db", decibels))
        ]
        lines.append([what, preset, *figures])
    heads = ["to change", "preset", "right", "preserved", "the paper's: right", "preserved"]
    write_section(TITLE, f"{INTRODUCTION}\n\n{table(heads, lines)}\n\n{others()}", HERE / "QUALITY.md")


INTRODUCTION = (
    "For each kind of edit, the preset with a plus (row FateZero+) was compared with the paper's: it is right at\n"
    "least as often, and preserves more. Four cases of each kind, 4 frames, 20 steps, judged with whole outlines\n"
    "(tables *outlines* and *removal*; `python benchmarks/which_method.py`). 100 % without\n"
    "brackets: right in every case."
)


def others() -> str:
    """Methods for other needs than a kind of edit."""
    few, moved, new = load("few_steps"), rows("layout_moved"), rows("layout_new")
    long = Results([row | {"case": f"{name} {row['case']}"} for name in LONG for row in rows(name)])
    warp = ratio_of_means(long.column(STEADY, "warp_error"), long.column(BEST, "warp_error"))
    fewer = difference_of(long.column(STEADY, "success"), long.column(BEST, "success"))
    steady = "{:.2f} times the warp error ({:.2f} to {:.2f})".format(*warp)
    points = "{:+.1f} points of right frames ({:.1f} to {:.1f})".format(*(100 * x for x in fewer))
    turbo, many = (few.mean(method, "success") for method in ("Wan: few_steps", "Wan: FlowEdit, 30 steps, guidance 5"))
    calls = f"right in 10 calls: {share(turbo)}; FlowEdit in 84 guided calls: {share(many)}"
    overlap = [mean(moved, method, "overlap") for method in ("all (ours)", "inversion + prompt")]
    there = [mean(new, method, "there") for method in ("backward, inside", "no guidance")]
    lines = [
        [
            "fewer calls",
            "`--guidance-until 0.6`",
            f"the paper's presets: {guided(PAPER)}; plus presets: {guided(BEST)}",
        ],
        [
            "less flicker",
            "*Flow Smoothing* and *Steady Video*, both at 0.9, not for changes of texture or shape",
            f"{steady}, {points}",
        ],
        ["a model in 4 to 8 steps", "`few_steps`", calls],
        [
            "an object elsewhere",
            "`--shift`, *Layout*",
            "overlap with the true place {}, by the prompt {}".format(*overlap),
        ],
        [
            "a new clip, objects on paths",
            "`generate`, *Layout Guider*",
            "in place in {} of the frames, without it in {}".format(*there),
        ],
    ]
    return table(["need", "use", "result"], lines)


def guided(method: str) -> str:
    """What guidance in the first 0.6 of the steps changes."""
    results, until = load("guided"), f"{method}, guided in 0.6 of the steps"
    more = difference_of(results.column(until, "preserved_db"), results.column(method, "preserved_db"))
    right = [f"{100 * results.mean(name, 'success').value:.0f} %" for name in (until, method)]
    return "{} right instead of {}, ".format(*right) + f"{more.value:+.1f} dB preserved"


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (HERE / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def load(name: str) -> Results:
    return Results(rows(name))  # type: ignore[arg-type]


def ratio_of_means(errors: Sequence[float], others: Sequence[float]) -> Interval:
    return bootstrap([errors, others], lambda x, y: x.mean(-1) / y.mean(-1))


def mean(found: list[dict[str, object]], method: str, figure: str) -> str:
    values = [float(row[figure]) for row in found if row["method"] == method]  # type: ignore[arg-type]
    return f"{100 * sum(values) / len(values):.0f} %"


def share(found: Interval) -> str:
    value, low, high = (f"{100 * x:.0f}" for x in found)
    return f"{value} %" if low == high else f"{value} % ({low} to {high})"


def decibels(found: Interval) -> str:
    if found.value != found.value:
        return ""
    return f"{found.value:.1f} dB ({found.low:.1f} to {found.high:.1f})"


if __name__ == "__main__":
    main()
