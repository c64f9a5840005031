"""Write the rows of `gpu.py` to benchmarks/RESULTS.md: `make gpu-report FOLDER=out/gpu`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from checkout import use_checkout

use_checkout()

from fatezero.benchmarks.page import RESULTS, table, write_section  # noqa: E402

SECTION = "On a GPU"
GROUPS = {
    "a": "SD 1.5's shape",
    "b": "Wan 2.1 1.3B's shape",
    "c": "Larger models, attention kernels, torch.compile",
    "d": "Correctness",
    "e": "Paths that a CPU does not take",
}
PUBLISHED = {
    "DFVEdit's table: FateZero on a transformer": {"with its inversion, 50 steps": 3.40, "memory of plain": 2.32},
    "DFVEdit's table: DFVEdit": {"with its inversion, 50 steps": 1.20, "memory of plain": 0.95},
}
"""Figures of arXiv 2506.20967, relative to its base model (CogVideoX-5B)."""
ABOUT = """\
Random weights of the models' shapes; `make gpu` measures these rows and `make gpu-report` writes them here. Times are
medians of rounds in which a row and plain sampling take turns. "x" is a ratio to what is named; plain is guided
sampling of the same clip by the model as diffusers has it. Memory is the peak beyond the weights, with the store where
it is on the device; "memory of plain" counts the weights on both sides. A difference is the largest one as a share of
the largest value: to float64 on the CPU in columns named by a precision."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of rows.jsonl")
    parser.add_argument("--page", type=Path, default=RESULTS)
    given = parser.parse_args()
    lines = (given.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    write_section(SECTION, section([json.loads(line) for line in lines]), given.page)


def section(lines: list[dict[str, Any]]) -> str:
    """The text of the section. Of rows measured twice, the last one counts."""
    rows = {(row["group"], row["name"]): row for row in sorted(lines, key=lambda row: bool(row["numbers"]))}
    order = list(dict.fromkeys((row["group"], row["name"]) for row in lines))
    measured = [row for row in rows.values() if row["numbers"]]
    on = sorted({f"{row['device']}; {row['versions']}" for row in measured})
    parts = [f"Measured on: {' / '.join(on)}." if on else "All rows are open: no GPU was at hand.", ABOUT]
    for group, title in GROUPS.items():
        own = [rows[key] for key in order if key[0] == group]
        for number, units in enumerate(unlike([row["units"] for row in own])):
            parts.append(f"### {title}{' (continued)' if number else ''}")
            parts.append(group_table(units, [row for row in own if row["units"] == units]))
            if group == "b" and "memory of plain" in units:
                parts[-1] += "\n" + published(units)
    return "\n\n".join(parts)


def unlike(units: list[dict[str, str]]) -> list[dict[str, str]]:
    """Distinct units, in order of first appearance."""
    return [one for number, one in enumerate(units) if one not in units[:number]]


def group_table(units: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """A table of rows with the same units."""
    head = ["", *(f"{name} ({unit})" if unit not in ("", "x") else name for name, unit in units.items()), "of"]
    return table(head, [[row["name"], *cells(row)] for row in rows])


def cells(row: dict[str, Any]) -> list[str]:
    if not row["numbers"]:
        return ["open", *[""] * (len(row["units"]) - 1), row["why"]]
    shown = [f"{row['numbers'][name]:.3g}" for name in row["units"]]
    return [*shown, "; ".join(part for part in (row["shape"], row["dtype"], row["scaled"]) if part)]


def published(units: dict[str, str]) -> str:
    """Rows with another paper's figures."""
    lines = [
        [name, *(f"{numbers[unit]:.2f}" if unit in numbers else "" for unit in units), "arXiv 2506.20967, CogVideoX-5B"]
        for name, numbers in PUBLISHED.items()
    ]
    return table([], lines).split("\n", 2)[2]


if __name__ == "__main__":
    main()
