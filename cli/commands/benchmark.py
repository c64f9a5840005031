"""`fatezero benchmark`: every method on edits whose right answer is known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..config.files import load_pairs
from ..options import Device, whole
from ..progress import console, printable, progress_bar
from ..session import pick_device


def command(
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Folder of the run; a run there goes on.")] = Path(
        "benchmark"
    ),
    quick: Annotated[
        bool, Parameter(negative="--full", help="4 cases of each kind and the main methods, or 10 and all.")
    ] = True,
    seed: Annotated[int, Parameter(converter=whole, help="Of scenes, motions and words.")] = 2303,
    each: Annotated[int | None, Parameter(converter=whole, help="Cases of each kind.")] = None,
    kind: Annotated[
        list[str] | None,
        Parameter(help="attribute, texture, shape, style, background, swap, two objects or alike objects; may repeat."),
    ] = None,
    frames: Annotated[int, Parameter(converter=whole, help="Frames of every clip.")] = 4,
    steps: Annotated[int, Parameter(converter=whole, help="DDIM steps.")] = 20,
    guidance_scale: Annotated[float, Parameter(help="Classifier-free guidance.")] = 7.5,
    method: Annotated[list[str] | None, Parameter(help="A method by its name in the table; may repeat.")] = None,
    pairs: Annotated[
        Path | None, Parameter(help="YAML list of [source caption, target caption], in the place of drawn cases.")
    ] = None,
    model: Annotated[str, Parameter(help="Another checkpoint of the demo world.")] = "demo",
    clip: Annotated[str, Parameter(help="A CLIP of transformers, for Tem-Con and Frame-Acc.")] = "",
    workers: Annotated[
        int | None,
        Parameter(converter=whole, help="Processes.", show_default=lambda _: "one for each core; one on a GPU"),
    ] = None,
    device: Device = "auto",
) -> None:
    """Compare every method on edits of the demo world, whose right answer is known; goes on where it was stopped."""
    captions = load_pairs(pairs) if pairs else ()
    from ...benchmark.cases import KINDS
    from ...benchmark.rows import BEST
    from ...benchmark.run import BenchmarkSettings, chosen_methods, run_benchmark
    from ...benchmark.table import write_tables

    settings = BenchmarkSettings(
        seed, each or (4 if quick else 10), tuple(kind or KINDS), frames, steps, guidance_scale, model, clip, captions
    )  # fmt: skip
    where = pick_device(device)
    processes = workers or (len(os.sched_getaffinity(0)) if where.type == "cpu" else 1)
    with progress_bar() as bar:
        rows = run_benchmark(
            output, settings, chosen_methods(method, quick), str(where), processes, bar("cases")
        )  # fmt: skip
    console.print(write_tables(output, rows, BEST), markup=False, soft_wrap=True)
    console.print(printable(f"written to {output}: table.md, table.csv, page.html"), markup=False, soft_wrap=True)
