"""`fatezero benchmark`: all methods on edits with known true results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ...diffusion.edit import Edit
from ...diffusion.invert import InversionSettings
from ...settings import setting, setting_like, shown
from ..config.files import load_pairs
from ..config.settings import ConfigError
from ..config.values import config_as
from ..options import Device, given_of, options_of
from ..outputs import check_folder
from ..progress import console, printable, progress_bar
from ..session import check_clip, pick_device


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of `fatezero benchmark`."""

    output: str = setting("benchmark", "Folder of the run. An existing run continues.")
    quick: bool = setting(True, "4 cases of each kind and the main methods; else 10 cases and all methods.")
    seed: int = setting(2303, "Random seed for scenes, motions and words.", least=0, most=2**63 - 1)
    each: int | None = setting(None, "Cases of each kind.", least=1, most=10_000, shown="4, or 10 with --full")
    kind: tuple[str, ...] = setting(
        (),
        "attribute, texture, shape, style, background, swap, two objects or alike objects; may repeat.",
        shown="all",
    )
    frames: int = setting(4, "Frames of every clip.", least=1, most=1000)
    steps: int = setting_like(InversionSettings, "steps", 20, help="DDIM steps.", group="")
    guidance_scale: float = setting_like(Edit, "guidance_scale", 7.5, help="Classifier-free guidance.", group="")
    method: tuple[str, ...] = setting(
        (), "A method by its name in the table; may repeat.", shown="the main ones, or all with --full"
    )
    pairs: str = setting(
        "", "YAML list of [source caption, target caption], in the place of drawn cases.", shown="none"
    )
    model: str = setting("demo", "Checkpoint trained on the demo scenes.")
    clip: str = setting("", "CLIP model of transformers, for Tem-Con and Frame-Acc.", shown="none")
    workers: int | None = setting(None, "Processes.", least=1, most=1024, shown="one for each core; one on a GPU")


BenchmarkOptions = options_of(BenchmarkConfig, quick="--full")


def command(
    *,
    options: Annotated[BenchmarkOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
) -> None:
    """Compare all methods on edits of demo scenes with known true results; continues an interrupted run."""
    config = config_as(BenchmarkConfig, given_of(options))
    captions = load_pairs(config.pairs) if config.pairs else ()
    check_folder(config.output)
    from ...benchmark.cases import ALL_KINDS, KINDS
    from ...benchmark.rows import BEST
    from ...benchmark.run import BenchmarkSettings, chosen_methods, run_benchmark
    from ...benchmark.table import write_tables

    if unknown := sorted(set(config.kind) - set(ALL_KINDS)):
        raise ConfigError(f"kind is {shown(unknown[0])}; it must be one of {', '.join(ALL_KINDS)}")
    settings = BenchmarkSettings(
        config.seed, config.each or (4 if config.quick else 10), config.kind or KINDS, config.frames, config.steps,
        config.guidance_scale, config.model, config.clip, captions,
    )  # fmt: skip
    if config.clip:
        check_clip(config.clip)
    methods = chosen_methods(config.method, config.quick)
    where, folder = pick_device(device), Path(config.output)
    processes = config.workers or (len(os.sched_getaffinity(0)) if where.type == "cpu" else 1)
    with progress_bar() as bar:
        rows = run_benchmark(folder, settings, methods, str(where), processes, bar("cases"))
    console.print(write_tables(folder, rows, BEST), markup=False, soft_wrap=True)
    console.print(printable(f"written to {folder}: table.md, table.csv, page.html"), markup=False, soft_wrap=True)
