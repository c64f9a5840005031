"""Write the first section of QUALITY.md: the preset for each kind of edit, with its figures from `results/`."""

from __future__ import annotations

import json
from pathlib import Path

from common import table, write_section

from fatezero.benchmark.rows import BEST, PAPER
from fatezero.benchmark.table import Results
from fatezero.metrics.bootstrap import Interval

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
    "alike objects": ("one of two objects of the same shape", "that of the changed word"),
    "removal": ("an object away", "`remove`"),
}
"""What changes, and the preset, by kind of case."""


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
    "Four cases of each kind (tables *outlines* and *removal*), 4 frames, 20 steps. A frame is right if a judge reads\n"
    "every word of the target in it and every outline is whole. In brackets: 95 % of resamples of the cases;\n"
    "kinds that were right in all of their few cases have none (`python benchmarks/which_method.py`)."
)


def others() -> str:
    """Methods for other needs than a kind of edit."""
    long, few, moved, new = load("long again"), load("few_steps"), rows("layout_moved"), rows("layout_new")
    smooth, steady = (long.mean(f"{BEST}, flow smoothing{more}", "warp_error") for more in ("", ", steady"))
    plain = long.mean(BEST, "warp_error")
    turbo, many = (few.mean(method, "success") for method in ("Wan: few_steps", "Wan: FlowEdit, 30 steps, guidance 5"))
    heads = ["need", "use", "here"]
    warp = f"warp error {plain.value:.1f}, smoothed {smooth.value:.1f}, with both {steady.value:.1f} (x 1000)"
    calls = f"{share(turbo)} right in 10 calls; FlowEdit in 84 guided calls {share(many)}"
    overlap = [mean(moved, method, "overlap") for method in ("all (ours)", "inversion + prompt")]
    there = [mean(new, method, "there") for method in ("backward, inside", "no guidance")]
    guided = load("guided")
    until = [
        "{:.0f} %, {:.1f} dB".format(100 * guided.mean(name, "success").value, guided.mean(name, "preserved_db").value)
        for name in (PAPER, f"{PAPER}, guided in 0.6 of the steps", BEST, f"{BEST}, guided in 0.6 of the steps")
    ]
    kept = "right and preserved: the paper's presets {}, with it {}; plus presets {}, with it {}".format(*until)
    lines = [
        ["fewer calls", "`--guidance-until 0.6`", kept],
        ["less flicker", "`--smoothing 0.8` and *Steady Video*, not for changes of shape", warp],
        ["a model in 4 to 8 steps", "`few_steps`", calls],
        [
            "an object elsewhere",
            "`--shift`, *Layout*",
            "overlap with the true place {}, by the prompt {}".format(*overlap),
        ],
        [
            "a new clip, objects on paths",
            "`generate`, *Layout Guider*",
            "in place in {} of the frames, else {}".format(*there),
        ],
    ]
    return table(heads, lines)


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (HERE / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def load(name: str) -> Results:
    return Results(rows(name))  # type: ignore[arg-type]


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
