"""`fatezero benchmark`: all methods on edits with known true results, or some on FiVE-Bench or V2VBench."""

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
from ..options import Device, given_of, options_of
from ..outputs import check_folder
from ..progress import console, printable, progress_bar
from ..public import PublicRun, check_public, run_public
from ..session import Session, check_clip, pick_device

PUBLIC = "Public benchmarks"
_FIGURES = {
    "five": ("dino", "lpips", "niqe", "tracker", "vlm"),
    "v2v": ("dino", "aesthetic", "pickscore", "viclip", "gmflow"),
}
"""The settings of models for a public benchmark's figures, besides CLIP."""
_DEMO_ONLY = ("quick", "seed", "pairs", "world")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of `fatezero benchmark`."""

    output: str = setting("benchmark", "Folder of the run. An existing run continues.")
    quick: bool = setting(True, "4 cases of each kind and the main methods; else 10 cases and all methods.")
    seed: int = setting(2303, "Random seed for scenes, motions and words.", least=0, most=2**63 - 1)
    each: int | None = setting(
        None, "Cases of each kind.", least=1, most=10_000, shown="4, or 10 with --full; all with --five or --v2v"
    )
    kind: tuple[str, ...] = setting(
        (),
        "attribute, texture, shape, style, background, swap, two objects or alike objects; with --world 2, colour, "
        "material, shape, size, action, background, clutter, style, swap, removal or insertion; with --five, 1 to 6; "
        "with --v2v, a type of its edits. May repeat.",
        shown="all",
    )
    frames: int = setting(
        4, "Frames of every clip; with --five or --v2v, at most so many.", least=1, most=1000,
        shown="4; 41 with --five, all with --v2v",
    )  # fmt: skip
    steps: int = setting_like(
        InversionSettings, "steps", 20, help="DDIM steps.", group="", shown="20; the method's with --five or --v2v"
    )
    guidance_scale: float = setting_like(
        Edit, "guidance_scale", 7.5, help="Classifier-free guidance.", group="",
        shown="7.5; the method's with --five or --v2v",
    )  # fmt: skip
    method: tuple[str, ...] = setting(
        (),
        "A method by its name in the table; with --five or --v2v, a preset or a YAML file of settings. May repeat.",
        shown="the main ones, or all with --full; attribute+ with --five or --v2v",
    )
    pairs: str = setting(
        "", "YAML list of [source caption, target caption], in the place of drawn cases.", shown="none"
    )
    world: int = setting(
        1,
        "1: the demo's scenes of 64 pixels; 2: harder ones of 128, for which --model is a folder that their training "
        "wrote.",
        least=1,
        most=2,
    )
    model: str = setting("demo", "Checkpoint trained on the demo scenes; with --five or --v2v, any model.")
    clip: str = setting(
        "",
        "CLIP model of transformers, for Tem-Con and Frame-Acc; with --five or --v2v, openai/clip-vit-large-patch14.",
        shown="none",
    )
    workers: int | None = setting(
        None,
        "Processes; with --five or --v2v, on each device.",
        least=1,
        most=1024,
        shown="one for each core; one on a GPU, or with --five or --v2v",
    )
    five: str = setting(
        "",
        "FiVE-Bench's data folder (edit_prompt, images, bmasks): edit its clips by --method, measure the results as "
        "its code does, and print the published rows with them.",
        shown="none",
        group=PUBLIC,
    )
    v2v: str = setting("", "V2VBench's folder (config.yaml, frames or videos): the same.", shown="none", group=PUBLIC)
    dino: str = setting(
        "",
        "DINO of transformers: facebook/dino-vitb8 for FiVE-Bench's structure distance, facebook/dinov2-base for "
        "V2VBench's object consistency.",
        shown="none",
        group=PUBLIC,
    )
    lpips: str = setting(
        "", 'FiVE-Bench: weights of lpips.LPIPS(net="squeeze") as .safetensors.', shown="none", group=PUBLIC
    )
    niqe: str = setting(
        "", "FiVE-Bench: .mat file of NIQE's parameters, for the package pyiqa.", shown="none", group=PUBLIC
    )
    tracker: str = setting(
        "", "FiVE-Bench: weights of CoTracker (scaled_offline.pth), for motion fidelity with the package cotracker.",
        shown="none", group=PUBLIC,
    )  # fmt: skip
    vlm: str = setting(
        "", "FiVE-Bench: vision-language model of transformers for FiVE-Acc, Qwen/Qwen2.5-VL-7B-Instruct.",
        shown="none", group=PUBLIC,
    )  # fmt: skip
    aesthetic: str = setting(
        "", "V2VBench: aesthetic predictor for frames quality, "
        "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE.", shown="none", group=PUBLIC,
    )  # fmt: skip
    pickscore: str = setting(
        "", "V2VBench: CLIP model for the frames pick score, yuvalkirstain/PickScore_v1.", shown="none", group=PUBLIC
    )
    viclip: str = setting(
        "", "V2VBench: weights of ViCLIP as .safetensors, for video text alignment. Needs --clip too.",
        shown="none", group=PUBLIC,
    )  # fmt: skip
    gmflow: str = setting(
        "", "V2VBench: weights of GMFlow as .safetensors, for motion alignment with the package ptlflow.",
        shown="none", group=PUBLIC,
    )  # fmt: skip

    @property
    def public(self) -> str:
        """The option of the public benchmark to run, "five" or "v2v"; empty for the demo scenes."""
        return "five" if self.five else "v2v" if self.v2v else ""

    def check_effect(self, given: dict[str, Any]) -> None:
        """Raise ConfigError for given settings that have no effect in this benchmark, or for two benchmarks."""
        if self.five and self.v2v:
            raise ConfigError("give either --five or --v2v, not both")
        used = _FIGURES.get(self.public, ())
        if wrong := [name for name in _DEMO_ONLY if name in given and self.public]:
            raise ConfigError(f"{wrong[0]} has no effect with --{self.public}")
        for option, names in _FIGURES.items():
            if wrong := [name for name in names if name in given and name not in used]:
                raise ConfigError(f"{wrong[0]} has no effect without --{option}")


BenchmarkOptions = options_of(BenchmarkConfig, quick="--full")


def command(
    *,
    options: Annotated[BenchmarkOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
) -> None:
    """Compare methods on demo scenes with known true results, or on FiVE-Bench or V2VBench.

    Continues an interrupted run.
    """
    given = given_of(options)
    config = config_as(BenchmarkConfig, given)
    config.check_effect(given)
    if config.public:
        _public(config, given, device)
        return
    captions = load_pairs(config.pairs) if config.pairs else ()
    check_folder(config.output)
    _check_unused(config.output, "")
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


def _check_unused(output: str, benchmark: str) -> None:
    """Raise ConfigError for a folder with the run of another benchmark, whose tables have the same names."""
    for other, log in {"": "results.jsonl", "five": "five.jsonl", "v2v": "v2v.jsonl"}.items():
        if other != benchmark and (Path(output) / log).exists():
            raise ConfigError(f"{output} has the run of another benchmark ({log}): choose another folder with --output")


def _public(config: BenchmarkConfig, given: dict[str, Any], device: str) -> None:
    """Run a public benchmark. given: the settings on the command line."""
    check_folder(config.output)
    _check_unused(config.output, config.public)
    shared: dict[str, Any] = {name: given[name] for name in ("model", "steps", "guidance_scale") if name in given}
    option = config.public
    models = {name: getattr(config, name) for name in ("clip", *_FIGURES[option])}
    methods = config.method or ("attribute+",)
    run = PublicRun(option, Path(config.output), methods, shared, models, device, config.workers or 1)
    session, skipped = Session(console, progress_bar, device), list[str]()
    cases = check_public(run, getattr(config, option), config.kind, config.each, given.get("frames"), skipped.append)
    for why in skipped:
        session.note(f"left out: {why}")
    console.print(run_public(session, run, cases, skipped), markup=False, soft_wrap=True)
    console.print(printable(f"written to {config.output}: table.md, table.csv"), markup=False, soft_wrap=True)
