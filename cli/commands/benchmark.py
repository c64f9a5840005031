"""`fatezero benchmark`: all methods on edits with known true results, or some on FiVE-Bench."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ...diffusion.edit import Edit
from ...diffusion.invert import InversionSettings
from ...settings import setting, setting_like, shown
from ..config.files import load_pairs
from ..config.settings import ConfigError
from ..config.values import config_as
from ..five import FIVE_ONLY, FiveRun, check_five, run_five
from ..options import Device, given_of, options_of
from ..outputs import check_folder
from ..progress import console, printable, progress_bar
from ..session import Session, check_clip, pick_device

FIVE = "FiVE-Bench"


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of `fatezero benchmark`."""

    output: str = setting("benchmark", "Folder of the run. An existing run continues.")
    quick: bool = setting(True, "4 cases of each kind and the main methods; else 10 cases and all methods.")
    seed: int = setting(2303, "Random seed for scenes, motions and words.", least=0, most=2**63 - 1)
    each: int | None = setting(
        None, "Cases of each kind.", least=1, most=10_000, shown="4, or 10 with --full; all with --five"
    )
    kind: tuple[str, ...] = setting(
        (),
        "attribute, texture, shape, style, background, swap, two objects or alike objects; with --world 2, colour, "
        "material, shape, size, action, background, clutter, style, swap, removal or insertion; with --five, 1 to 6. "
        "May repeat.",
        shown="all",
    )
    frames: int = setting(
        4, "Frames of every clip; with --five, at most so many.", least=1, most=1000, shown="4; 41 with --five"
    )
    steps: int = setting_like(
        InversionSettings, "steps", 20, help="DDIM steps.", group="", shown="20; the method's with --five"
    )
    guidance_scale: float = setting_like(
        Edit, "guidance_scale", 7.5, help="Classifier-free guidance.", group="", shown="7.5; the method's with --five"
    )
    method: tuple[str, ...] = setting(
        (),
        "A method by its name in the table; with --five, a preset or a YAML file of settings. May repeat.",
        shown="the main ones, or all with --full; attribute+ with --five",
    )
    pairs: str = setting(
        "", "YAML list of [source caption, target caption], in the place of drawn cases.", shown="none"
    )
    world: int = setting(
        1,
        "1: the demo's scenes of 64 pixels; 2: harder ones of 128, with --model: the folder that their training wrote.",
        least=1,
        most=2,
    )
    model: str = setting("demo", "Checkpoint trained on the demo scenes; with --five, any model.")
    clip: str = setting(
        "",
        "CLIP model of transformers, for Tem-Con and Frame-Acc; with --five, openai/clip-vit-large-patch14.",
        shown="none",
    )
    workers: int | None = setting(
        None,
        "Processes; with --five, on each device.",
        least=1,
        most=1024,
        shown="one for each core; one on a GPU or with --five",
    )
    five: str = setting(
        "",
        "FiVE-Bench's data folder (edit_prompt, images, bmasks): edit its clips by --method, measure the results as "
        "its code does, and print the published rows with them.",
        shown="none",
        group=FIVE,
    )
    dino: str = setting(
        "", "DINO of transformers for the structure distance: facebook/dino-vitb8.", shown="none", group=FIVE
    )
    lpips: str = setting("", 'Weights of lpips.LPIPS(net="squeeze") as .safetensors.', shown="none", group=FIVE)
    niqe: str = setting("", "File of NIQE's parameters, for the package pyiqa.", shown="none", group=FIVE)
    tracker: str = setting(
        "", "Weights of CoTracker (scaled_offline.pth), for motion fidelity with the package cotracker.",
        shown="none", group=FIVE,
    )  # fmt: skip
    vlm: str = setting(
        "", "Vision-language model of transformers for FiVE-Acc: Qwen/Qwen2.5-VL-7B-Instruct.", shown="none", group=FIVE
    )

    def check_effect(self, given: dict[str, Any]) -> None:
        """Raise ConfigError for given settings that have no effect with --five, or without it."""
        without = ("quick", "seed", "pairs", "world") if self.five else FIVE_ONLY
        if wrong := [name for name in without if name in given]:
            raise ConfigError(f"{wrong[0]} has no effect {'with' if self.five else 'without'} --five")


BenchmarkOptions = options_of(BenchmarkConfig, quick="--full")


def command(
    *,
    options: Annotated[BenchmarkOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
) -> None:
    """Compare methods on demo scenes with known true results, or on FiVE-Bench; continues an interrupted run."""
    given = given_of(options)
    config = config_as(BenchmarkConfig, given)
    config.check_effect(given)
    if config.five:
        _five(config, given, device)
        return
    captions = load_pairs(config.pairs) if config.pairs else ()
    check_folder(config.output)
    from ...benchmark.cases import ALL_KINDS, KINDS, world2
    from ...benchmark.rows import BEST
    from ...benchmark.run import BenchmarkSettings, check_world, chosen_methods, run_benchmark
    from ...benchmark.table import write_tables

    every, usual = (ALL_KINDS, KINDS) if config.world == 1 else (world2.KINDS, world2.KINDS)
    if unknown := sorted(set(config.kind) - set(every)):
        raise ConfigError(f"kind is {shown(unknown[0])}; it must be one of {', '.join(every)}")
    settings = BenchmarkSettings(
        config.seed, config.each or (4 if config.quick else 10), config.kind or usual, config.frames, config.steps,
        config.guidance_scale, config.model, config.clip, captions, config.world,
    )  # fmt: skip
    if config.clip:
        check_clip(config.clip)
    methods = chosen_methods(config.method, config.quick)
    check_world(settings, methods)
    where, folder = pick_device(device), Path(config.output)
    processes = config.workers or (len(os.sched_getaffinity(0)) if where.type == "cpu" else 1)
    with progress_bar() as bar:
        rows = run_benchmark(folder, settings, methods, str(where), processes, bar("cases"))
    console.print(write_tables(folder, rows, BEST), markup=False, soft_wrap=True)
    console.print(printable(f"written to {folder}: table.md, table.csv, page.html"), markup=False, soft_wrap=True)


def _five(config: BenchmarkConfig, given: dict[str, Any], device: str) -> None:
    """Run FiVE-Bench. given: the settings on the command line."""
    check_folder(config.output)
    shared: dict[str, Any] = {name: given[name] for name in ("model", "steps", "guidance_scale") if name in given}
    models = {name: getattr(config, name) for name in ("clip", *FIVE_ONLY)}
    run = FiveRun(Path(config.output), config.method or ("attribute+",), shared, models, device, config.workers or 1)
    cases = check_five(run, config.five, config.kind, config.each, given.get("frames"))
    console.print(run_five(Session(console, progress_bar, device), run, cases), markup=False, soft_wrap=True)
    console.print(printable(f"written to {config.output}: table.md, table.csv"), markup=False, soft_wrap=True)
