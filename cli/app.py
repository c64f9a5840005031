"""The command line: `fatezero demo`, `edit`, `invert`, `tune`, `generate`, `evaluate`, `benchmark` and `train-demo`."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from .. import __version__
from .config.settings import (
    PRESETS,
    ConfigError,
    EditConfig,
    check_effect,
    checked,
    completed,
    generate_config,
    load_configs,
    load_pairs,
    of_methods,
    tune_config,
    with_preset,
    with_values,
)
from .help import show_help
from .options import (
    GROUPS,
    edit_options,
    generate_options,
    given_of,
    invert_options,
    tune_options,
    whole,
    whole_numbers,
)
from .progress import complain, console, in_a_line, printable, progress_bar, told
from .config.record import apart_from, check_is_here, made_by

app = App(
    name="fatezero",
    help="Edit real videos with a prompt and an image diffusion model: FateZero, Plug-and-Play, TokenFlow, "
    "Tune-A-Video.",
    help_format="plaintext",
    version=f"fatezero {__version__}",
    console=console,
    group_parameters=Group("Options", sort_key=-1),
)

EditOptions, InvertOptions = edit_options(), invert_options(of_methods())
TuneOptions, GenerateOptions = tune_options(), generate_options()

_RUN = GROUPS["This run"]
_RAY = Group("On a Ray cluster", sort_key=100)
Video = Annotated[
    str | None, Parameter(help='Video, picture, or pictures: a folder, "f_%04d.png" or "*.png".', negative="")
]
Config = Annotated[
    Path | None,
    Parameter(
        help="YAML file of settings, ours or the authors'. Or a result or its .json, to make it again.", group=_RUN
    ),
]
ModelConfig = Annotated[
    str | None,
    Parameter(
        help="For a .safetensors checkpoint: a diffusers folder with its tokenizer and configuration.",
        group=GROUPS["Model"],
    ),
]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1, mps, or auto.", group=_RUN)]
Dtype = Annotated[
    str,
    Parameter(help="float32, float16, bfloat16 or auto. auto: float16 on a GPU, else float32.", group=_RUN),
]
DryRun = Annotated[bool, Parameter(negative="", help="Print the plan with its memory and time, and stop.", group=_RUN)]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace an existing output.", group=_RUN)]
Quiet = Annotated[bool, Parameter(name=("--quiet", "-q"), negative="", help="Print errors only.", group=_RUN)]


@app.command
def edit(
    video: Video = None,
    /,
    *,
    target: Annotated[
        list[str] | None,
        Parameter(
            help="Prompt that describes the edit. Repeat it for several edits in one pass.",
            negative="",
            group=GROUPS["What to edit"],
        ),
    ] = None,
    output: Annotated[
        str,
        Parameter(
            name=("--output", "-o"),
            group=GROUPS["What to edit"],
            help='Output: .mp4, .mov, .mkv, .webm, .gif, or pictures, "folder/" or "f_%04d.png".',
        ),
    ] = "edit.mp4",
    config: Config = None,
    preset: Annotated[
        str | None, Parameter(help=f"Settings that go together: {', '.join(PRESETS)}.", group=GROUPS["The edit"])
    ] = None,
    store: Annotated[
        Path | None,
        Parameter(help="A store of `fatezero invert`, in the place of an inversion.", group=GROUPS["The store"]),
    ] = None,
    model_config: ModelConfig = None,
    options: Annotated[EditOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Edit a video: invert it, then denoise with the target prompt and what is taken of the source."""
    console.quiet = quiet
    flags = _flags(video, options)
    made = made_by(config) if config else None
    if made is not None:  # a result's record: made again with what it was made with
        others = {"store": store, "model_config": model_config, "target": target, "preset": preset}
        given = {*flags, *(name for name, value in others.items() if value)}
        made = apart_from(made, given)
        store = store or (Path(made.store) if made.store else None)
        model_config = model_config or made.model_config
        device, dtype = (b if a == "auto" else a for a, b in ((device, made.device), (dtype, made.dtype)))
    configs = _configs(config, preset, flags, target or [], store)
    if config is not None and made is not None:
        check_is_here(config, configs[0], model_config, given)
    from .commands.edit import Session, run_edits  # diffusers takes seconds to import: after the cheap checks

    inputs = tuple(path for path in (config, store) if path)
    session = Session(console, progress_bar, device, dtype, model_config, overwrite, inputs)
    run_edits(session, configs, output, store, dry_run, made)


@app.command
def invert(
    video: Video = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Output file of the store.")] = Path(
        "store.safetensors"
    ),
    config: Config = None,
    model_config: ModelConfig = None,
    options: Annotated[InvertOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Invert a video once and keep the store, for many edits with `fatezero edit --store`."""
    console.quiet = quiet
    configs = _configs(config, None, _flags(video, options), [], None, inverting=True)
    from .commands.edit import Session, run_invert

    inputs = (config,) if config else ()
    session = Session(console, progress_bar, device, dtype, model_config, overwrite, inputs)
    run_invert(session, configs[0], output, dry_run)


@app.command
def tune(
    video: Video = None,
    /,
    *,
    output: Annotated[
        Path,
        Parameter(name=("--output", "-o"), help="Folder for the layers, the losses and their plot.", group=_RUN),
    ] = Path("tuned"),
    model_config: ModelConfig = None,
    options: Annotated[TuneOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    resume: Annotated[bool, Parameter(negative="", help="Continue the tuning in the folder.", group=_RUN)] = False,
    keep_every: Annotated[
        int, Parameter(converter=whole, help="Steps between two states to go on from.", group=_RUN)
    ] = 50,
    folder: Annotated[
        bool,
        Parameter(
            negative="",
            help="Write the whole model too. The authors' code and --model read it.",
            group=_RUN,
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Tune a model on a video (Tune-A-Video): temporal layers for `fatezero edit --temporal`."""
    console.quiet = quiet
    config = tune_config(_flags(video, options))
    if keep_every < 1:
        raise ConfigError(f"keep_every is {keep_every}; it must be a number of at least 1")
    from .commands.edit import Session
    from .commands.tune import TuneRun, run_tune

    session = Session(console, progress_bar, device, dtype, model_config, overwrite)
    run_tune(session, config, TuneRun(output, resume, folder, keep_every, dry_run))


@app.command(name="generate")
def generate_clip(
    *,
    output: Annotated[
        str, Parameter(name=("--output", "-o"), group=GROUPS["The clip"], help="Output, as in `fatezero edit`.")
    ] = "clip.mp4",
    model_config: ModelConfig = None,
    options: Annotated[GenerateOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Draw a new clip of a prompt, with objects where they are asked for (cross-attention guidance)."""
    console.quiet = quiet
    config = generate_config(given_of(options))
    from .commands.generate import run_generate
    from .commands.edit import Session

    session = Session(console, progress_bar, device, dtype, model_config, overwrite)
    run_generate(session, config, output, dry_run)


@app.command
def evaluate(
    original: Annotated[Path, Parameter(help="The video before the edit.")],
    edited: Annotated[Path, Parameter(help="The video after it.")],
    /,
    *,
    source: Annotated[str, Parameter(help="What the original shows; for CLIP.")] = "",
    target: Annotated[str, Parameter(help="What the edit should show; for CLIP.")] = "",
    mask: Annotated[Path | None, Parameter(help="White where the edit was meant to be: a video or picture.")] = None,
    truth: Annotated[Path | None, Parameter(help="The edit as it should be, where it is known.")] = None,
    flow: Annotated[
        str, Parameter(help="auto, dis, raft, none, or a .safetensors file with tensors forward and backward.")
    ] = "auto",
    clip: Annotated[
        str, Parameter(help="A CLIP of transformers, folder or hub name, e.g. openai/clip-vit-base-patch32.")
    ] = "",
    lpips: Annotated[Path | None, Parameter(help='Weights of lpips.LPIPS(net="alex") as .safetensors.')] = None,
    judge: Annotated[bool, Parameter(negative="", help="Read the demo world's words from the frames.")] = False,
    start: Annotated[int, Parameter(converter=whole, help="The original's first frame, as in `fatezero edit`.")] = 0,
    stride: Annotated[int, Parameter(converter=whole, help="Take every n-th frame of the original.")] = 1,
    crop: Annotated[str, Parameter(help="Pixels cut off the original: left,top,right,bottom.")] = "0,0,0,0",
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), help="The figures as JSON.")] = None,
    plot: Annotated[Path | None, Parameter(help="Curves over the frames, a picture.")] = None,
    comparison: Annotated[Path | None, Parameter(help="Both clips in one video.")] = None,
    how: Annotated[str, Parameter(help="side by side, wipe, split or difference.")] = "side by side",
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure an edit: what it kept, how steadily it moves, what CLIP says, how near the truth it is."""
    console.quiet = quiet
    left, top, right, bottom = whole_numbers("crop", crop, ",", 4)
    from .commands.evaluate import Evaluation, run_evaluate
    from .commands.edit import Session

    asked = Evaluation(
        original, edited, (source, target), mask, truth, flow, clip, lpips, judge, start, stride,
        (left, top, right, bottom), output, plot, comparison, how,  # type: ignore[arg-type]
    )  # fmt: skip
    run_evaluate(Session(console, progress_bar, device, overwrite=overwrite), asked)


@app.command
def demo(
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Folder for the results.")] = Path("out"),
    steps: Annotated[int, Parameter(converter=whole, help="DDIM steps.")] = 50,
    device: Device = "auto",
) -> None:
    """Run an attribute, a shape and a style edit on the bundled clip with the bundled model."""
    from ..demo.show import show

    show(output, steps, device, console, progress_bar)


@app.command(name="batch")
def batch_of_jobs(
    jobs: Annotated[Path, Parameter(help="YAML file of jobs, or of clips, targets, settings and methods to combine.")],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(
            name=("--output", "-o"),
            help="Folder for results and summary. A run there continues.",
            show_default=lambda _: "that of the jobs, without .yaml",
        ),
    ] = None,
    workers: Annotated[int, Parameter(converter=whole, help="Processes on each device.")] = 1,
    timeout: Annotated[float | None, Parameter(help="Seconds that a job may take.")] = None,
    retries: Annotated[int, Parameter(converter=whole, help="Retries of a job whose process died.")] = 1,
    measure: Annotated[bool, Parameter(help="Measure each result beside its source.")] = True,
    clip: Annotated[str, Parameter(help="CLIP model of transformers to measure with.")] = "",
    redo: Annotated[bool, Parameter(negative="", help="Repeat finished jobs.")] = False,
    ray: Annotated[
        str | None,
        Parameter(help="Address of a Ray cluster to run the jobs on, auto, or local.", group=_RAY),
    ] = None,
    ray_gpus: Annotated[
        float | None, Parameter(help="GPUs of each job.", show_default=lambda _: "1 where there are any", group=_RAY)
    ] = None,
    ray_cpus: Annotated[float, Parameter(help="CPU cores of each job.", group=_RAY)] = 1,
    ray_inputs: Annotated[
        Literal["shared", "sent"],
        Parameter(
            help="Clips, masks and LoRAs lie on a path that all machines share, or are sent through Ray.", group=_RAY
        ),
    ] = "shared",
    comfyui: Annotated[
        list[str] | None,
        Parameter(help="Address of a ComfyUI server to run the jobs' workflow on; may repeat.", negative=""),
    ] = None,
    device: Annotated[str, Parameter(help="cpu, cuda, mps, several (cuda:0,cuda:1), or auto: all GPUs.")] = "auto",
    dtype: Dtype = "auto",
    model_config: ModelConfig = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Do many edits: those not done yet, an inversion that several share once; a failed one leaves the others alone."""
    console.quiet = quiet
    from .batch.jobs import load_batch

    held = load_batch(jobs)
    if ray is not None and comfyui:
        raise ConfigError("give --ray or --comfyui: a job is done in one place")
    if model_config is not None and comfyui:
        raise ConfigError("model_config has no effect with --comfyui: the workflow names the model")
    if ray is not None and timeout is not None:
        raise ConfigError("timeout has no effect with --ray: Ray decides how long a job may take")
    from .batch.cluster import Cluster
    from .batch.processes import Patience
    from .commands.batch import Asked, run_batch
    from .batch.work import How
    from .commands.edit import Session

    cluster = None if ray is None else Cluster(ray, ray_gpus, ray_cpus, retries, ray_inputs == "sent")
    folder, patience = output or jobs.with_suffix(""), Patience(timeout, retries)
    how = How(dtype, model_config, measure, clip)
    asked = Asked(folder, how, device, workers, patience, cluster, tuple(comfyui or ()), redo, dry_run)
    run_batch(Session(console, progress_bar), held, asked)


@app.command
def benchmark(
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
    from ..benchmark.cases import KINDS
    from ..benchmark.rows import BEST
    from ..benchmark.run import BenchmarkSettings, chosen_methods, run_benchmark
    from ..benchmark.table import write_tables
    from .commands.edit import pick_device

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


@app.command(name="train-demo")
def train_demo(
    *,
    part: Annotated[
        Literal["image", "video", "transformer"],
        Parameter(
            help="The image model, the temporal layers that make the bundled one a model of videos, or the video "
            "transformer."
        ),
    ] = "image",
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Folder for what is trained.")] = Path(
        "checkpoint"
    ),
    state: Annotated[Path, Parameter(help="Folder for what a resume needs.")] = Path("training"),
    device: Device = "auto",
    steps: Annotated[int | None, Parameter(converter=whole, help="Steps of the UNet or the layers, if fewer.")] = None,
    images: Annotated[int | None, Parameter(converter=whole, help="Pictures or clips to draw, if fewer.")] = None,
) -> None:
    """Train the bundled models again; hours on a CPU, minutes on a GPU."""
    from ..demo.evaluate import evaluate, moving_figures
    from ..demo.judge import load_judge
    from ..demo.temporal import TemporalSettings, train_temporal
    from ..demo.train import TrainSettings, train
    from ..demo.train_wan import WanSettings, train_wan
    from ..files.temporal_layers import FILE
    from ..hosts.diffusers.checkpoint import Checkpoint
    from ..hosts.diffusers.checkpoint_wan import WanCheckpoint
    from .commands.edit import pick_device

    where = pick_device(device)
    if part == "image":
        settings = TrainSettings()
        settings = replace(settings, unet_steps=steps or settings.unet_steps, images=images or settings.images)
        train(output, state, settings, where, console.print)
        evaluate(Checkpoint.load(str(output), where), load_judge(output).to(where), console.print)
        return
    if part == "transformer":
        of_wan = WanSettings()
        of_wan = replace(of_wan, steps=steps or of_wan.steps, clips=images or of_wan.clips)
        train_wan(output, state, of_wan, where, console.print)
        _tell(moving_figures(WanCheckpoint.of_demo(where, folder=output), load_judge()))
        return
    of_layers = TemporalSettings()
    of_layers = replace(of_layers, steps=steps or of_layers.steps, clips=images or of_layers.clips)
    train_temporal(output / FILE, state, of_layers, where, console.print)
    _tell(moving_figures(Checkpoint.load("demo", where, temporal=str(output)), load_judge()))


def _tell(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        console.print(f"{name}: {value:.3f}")


# --- from flags to configurations -------------------------------------------------------


def _configs(
    path: Path | None,
    preset: str | None,
    flags: dict[str, Any],
    targets: list[str],
    store: Path | None,
    inverting: bool = False,
) -> list[EditConfig]:
    """Flags over the preset over the file over the defaults; one for each target."""
    given = checked(flags)
    texts = {"source": given["source"]} if "source" in given else {}
    notes: list[str] = []
    configs: list[EditConfig] = []
    for target in (*targets,) or (None,):
        own = texts | (checked({"target": target}) if target is not None else {})
        if path:
            found, left_out = load_configs(path, own, preset)
            notes += left_out
        else:
            found = [with_values(EditConfig(), own)]
            found = [with_preset(c, preset) for c in found] if preset else found
        configs += [c for c in (with_values(c, given) for c in found) if c not in configs]
    for note in dict.fromkeys(notes):
        console.print(f"note: {in_a_line(note)}", style="yellow", markup=False, soft_wrap=True)
    configs = [completed(c, inverting, store is not None) for c in configs]
    for c in configs:
        check_effect(c, () if store else list(given))
    return configs


def _flags(video: str | None, options: Any) -> dict[str, Any]:
    """The settings that were given as options."""
    return ({} if video is None else {"video": video}) | given_of(options)


# --- entry ------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; ends with one line and status 1 on bad input, and on whatever goes wrong."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        if show_help(app, sys.argv[1:], console):
            sys.exit(0)
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except CycloptsError as error:
        complain(f"error: {in_a_line(str(error))}")
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FATEZERO_DEBUG"):
            raise
        complain(told(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
