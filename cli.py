"""The command line: `fatezero demo`, `edit`, `invert`, `evaluate`, `benchmark` and `train-demo`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .attention.key_frames import KeyFrames
from .config import PRESETS, ConfigError, EditConfig, checked, load_configs, load_pairs, with_preset

app = typer.Typer(
    help="Edit real videos with a prompt and an image diffusion model (FateZero).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

Bar = Callable[[int, int], None]


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Bar]]:
    """A table of bars; each `add(title)` returns a callback (done, total)."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def add(title: str) -> Bar:
            task = progress.add_task(title, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield add


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """End on bad input with one line and status 1, on Ctrl-C with status 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            complain("interrupted; nothing half-written is left")
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, MemoryError) as error:
            if os.environ.get("FATEZERO_DEBUG"):
                raise
            complain(f"error: {error or type(error).__name__}")
            raise typer.Exit(1) from None

    return run


def complain(text: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False).print(text, style="red", markup=False, soft_wrap=True)


# --- options shared by edit and invert --------------------------------------------------

Video = Annotated[Path | None, typer.Argument(help="Video, picture, or folder of pictures.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML of settings, ours or the authors' own.")]
Model = Annotated[
    str | None,
    typer.Option(help="Diffusers folder, .safetensors checkpoint or hub name; default: the bundled demo."),
]
ModelConfig = Annotated[
    str | None,
    typer.Option(help="For a .safetensors checkpoint: a diffusers folder with its tokenizer and configuration."),
]
Lora = Annotated[str | None, typer.Option(help="A LoRA file or folder.")]
Steps = Annotated[int | None, typer.Option(help="DDIM steps [50].")]
KeyFramesOption = Annotated[
    str | None,
    typer.Option("--key-frames", help="self, first, middle, last, previous or offsets, by commas [self,middle]."),
]
ClipNorm = Annotated[bool | None, typer.Option(help="GroupNorm statistics over the whole clip, as the authors' code.")]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", help="recompute, queries_keys, maps, or auto: the fastest that fits [recompute]."),
]
Place = Annotated[str | None, typer.Option(help="Where the store is: device, ram, disk, or auto [auto].")]
Budget = Annotated[float | None, typer.Option(help="The most gigabytes the store may take [what is free].")]
Precision = Annotated[
    str | None, typer.Option(help="Of kept queries and keys: model, float16, bfloat16, float8 [model].")
]
KeepSteps = Annotated[
    float | None, typer.Option(help="Share of steps whose attention is kept; others are computed again [1].")
]
Chunk = Annotated[int | None, typer.Option("--chunk-frames", help="Frames of one UNet call, for long clips [all].")]
MaxTokens = Annotated[int | None, typer.Option(help="Record and fuse layers of up to this many tokens [all].")]
Start = Annotated[int | None, typer.Option(help="First frame [0].")]
Stride = Annotated[int | None, typer.Option(help="Take every n-th frame [1].")]
Count = Annotated[int | None, typer.Option(help="How many frames; 0 for all [at most 8].")]
Crop = Annotated[str | None, typer.Option(help="Pixels to cut: left,top,right,bottom.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT to edit at; default: short side at the model's own size.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: float16 on a GPU, else float32.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, with memory and UNet calls, and stop.")]


@app.command()
@guarded
def edit(
    video: Video = None,
    source: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="What it shall show; several are edited in one pass.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the edit goes: .mp4, .mov, .mkv.")] = Path(
        "edit.mp4"
    ),
    config: Config = None,
    preset: Annotated[str | None, typer.Option(help=f"The paper's settings: {', '.join(PRESETS)}.")] = None,
    store: Annotated[Path | None, typer.Option(help="A store of `fatezero invert`, to reuse.")] = None,
    model: Model = None,
    model_config: ModelConfig = None,
    lora: Lora = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance [7.5].")] = None,
    key_frames: KeyFramesOption = None,
    clip_norm: ClipNorm = None,
    memory: MemoryOption = None,
    place: Place = None,
    budget_gb: Budget = None,
    precision: Precision = None,
    keep_steps: KeepSteps = None,
    chunk_frames: Chunk = None,
    mode: Annotated[str | None, typer.Option(help="refine or replace: how words meet.")] = None,
    blend_source: Annotated[str | None, typer.Option(help="Source words of the mask, by commas.")] = None,
    blend_target: Annotated[str | None, typer.Option(help="Target words of the mask, by commas.")] = None,
    reweight: Annotated[list[str] | None, typer.Option(help="word=factor on a target word; may repeat.")] = None,
    cross_replace_steps: Annotated[float | None, typer.Option(help="Share of steps with cross fusion.")] = None,
    self_replace_steps: Annotated[float | None, typer.Option(help="Share of steps with self fusion.")] = None,
    blend_self_attention: Annotated[
        bool | None, typer.Option(help="Fuse self-attention outside the mask only.")
    ] = None,
    blend_latents: Annotated[bool | None, typer.Option(help="Keep the source's latents outside the mask.")] = None,
    blend_threshold: Annotated[float | None, typer.Option(help="Threshold of the mask.")] = None,
    blend_latents_until: Annotated[
        float | None, typer.Option(help="Share of steps up to which latents are kept [0.8].")
    ] = None,
    mask_from: Annotated[
        str | None, typer.Option(help="attention: the paper's mask; prompts: where their predictions differ.")
    ] = None,
    separate_words: Annotated[
        float | None, typer.Option(help="In the mask of both prompts, how little to look at words of elsewhere [0].")
    ] = None,
    max_tokens: MaxTokens = None,
    mask_tokens: Annotated[int | None, typer.Option(help="Finest grid of the mask [256].")] = None,
    start: Start = None,
    stride: Stride = None,
    count: Count = None,
    crop: Crop = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
) -> None:
    """Edit a video: invert it, then denoise with the target prompt and fused attention."""
    flags = {k: v for k, v in locals().items() if k in EditConfig.__dataclass_fields__}
    configs = _configs(config, preset, flags, store)
    from .run import Session, run_edits  # torch and diffusers take seconds to import: after the cheap checks

    run_edits(Session(console, progress_bar, device, dtype, model_config), configs, output, store, dry_run)


@app.command()
@guarded
def invert(
    video: Video = None,
    source: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the store goes.")] = Path("store.safetensors"),
    config: Config = None,
    model: Model = None,
    model_config: ModelConfig = None,
    lora: Lora = None,
    steps: Steps = None,
    key_frames: KeyFramesOption = None,
    clip_norm: ClipNorm = None,
    memory: MemoryOption = None,
    budget_gb: Budget = None,
    precision: Precision = None,
    keep_steps: KeepSteps = None,
    chunk_frames: Chunk = None,
    max_tokens: MaxTokens = None,
    start: Start = None,
    stride: Stride = None,
    count: Count = None,
    crop: Crop = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
) -> None:
    """Invert a video once and keep the store, for many edits with `fatezero edit --store`."""
    flags = {k: v for k, v in locals().items() if k in EditConfig.__dataclass_fields__}
    configs = _configs(config, None, flags, None, inverting=True)
    from .run import Session, run_invert

    run_invert(Session(console, progress_bar, device, dtype, model_config), configs[0], output, dry_run)


@app.command()
@guarded
def evaluate(
    original: Annotated[Path, typer.Argument(help="The video before the edit.")],
    edited: Annotated[Path, typer.Argument(help="The video after it.")],
    source: Annotated[str, typer.Option(help="What the original shows; for CLIP.")] = "",
    target: Annotated[str, typer.Option(help="What the edit should show; for CLIP.")] = "",
    mask: Annotated[Path | None, typer.Option(help="White where the edit was meant to be: a video or picture.")] = None,
    truth: Annotated[Path | None, typer.Option(help="The edit as it should be, where it is known.")] = None,
    flow: Annotated[
        str, typer.Option(help="auto, dis, raft, none, or a .safetensors file with tensors forward and backward.")
    ] = "auto",
    clip: Annotated[
        str, typer.Option(help="A CLIP of transformers, folder or hub name, e.g. openai/clip-vit-base-patch32.")
    ] = "",
    lpips: Annotated[Path | None, typer.Option(help='Weights of lpips.LPIPS(net="alex") as .safetensors.')] = None,
    judge: Annotated[bool, typer.Option("--judge", help="Read the demo world's words from the frames.")] = False,
    start: Annotated[int, typer.Option(help="The original's first frame, as in `fatezero edit`.")] = 0,
    stride: Annotated[int, typer.Option(help="Take every n-th frame of the original.")] = 1,
    crop: Annotated[str, typer.Option(help="Pixels cut off the original: left,top,right,bottom.")] = "0,0,0,0",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Curves over the frames, a picture.")] = None,
    comparison: Annotated[Path | None, typer.Option(help="Both clips in one video.")] = None,
    how: Annotated[str, typer.Option(help="side by side, wipe, split or difference.")] = "side by side",
    device: Device = "auto",
) -> None:
    """Measure an edit: what it kept, how steadily it moves, what CLIP says, how near the truth it is."""
    left, top, right, bottom = _whole_numbers("crop", crop, ",", 4)
    from .evaluation import Evaluation, run_evaluate
    from .run import Session

    asked = Evaluation(
        original, edited, (source, target), mask, truth, flow, clip, lpips, judge, start, stride,
        (left, top, right, bottom), output, plot, comparison, how,  # type: ignore[arg-type]
    )  # fmt: skip
    run_evaluate(Session(console, progress_bar, device), asked)


@app.command()
@guarded
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("out"),
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    device: Device = "auto",
) -> None:
    """Run an attribute, a shape and a style edit on the bundled clip with the bundled model."""
    from .demo.show import show

    show(output, steps, device, console, progress_bar)


@app.command()
@guarded
def benchmark(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; a run there goes on.")] = Path(
        "benchmark"
    ),
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="4 cases of each kind and the main methods, or 10 and all.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of scenes, motions and words.")] = 2303,
    each: Annotated[int | None, typer.Option(help="Cases of each kind.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="attribute, texture, shape, style, background, swap, two objects or alike objects; may repeat."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of every clip.")] = 4,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    method: Annotated[list[str] | None, typer.Option(help="A method by its name in the table; may repeat.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="YAML list of [source caption, target caption], in the place of drawn cases.")
    ] = None,
    model: Annotated[str, typer.Option(help="Another checkpoint of the demo world.")] = "demo",
    clip: Annotated[str, typer.Option(help="A CLIP of transformers, for Tem-Con and Frame-Acc.")] = "",
    workers: Annotated[int | None, typer.Option(help="Processes [one for each core; one on a GPU].")] = None,
    device: Device = "auto",
) -> None:
    """Compare every method on edits of the demo world, whose right answer is known; goes on where it was stopped."""
    captions = load_pairs(pairs) if pairs else ()
    from .demo.benchmark import BenchmarkSettings, chosen_methods, run_benchmark
    from .demo.cases import KINDS
    from .demo.methods import BEST
    from .demo.table import write_tables
    from .run import pick_device

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
    console.print(f"written to {output}: table.md, table.csv, page.html", soft_wrap=True)


@app.command("train-demo")
@guarded
def train_demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint.")] = Path("checkpoint"),
    state: Annotated[Path, typer.Option(help="Folder for what a resume needs.")] = Path("training"),
    device: Device = "auto",
    unet_steps: Annotated[int | None, typer.Option(help="Steps of the UNet, if fewer.")] = None,
    images: Annotated[int | None, typer.Option(help="Pictures to draw, if fewer.")] = None,
) -> None:
    """Train the bundled checkpoint again, from nothing; hours on a CPU, minutes on a GPU."""
    from .demo.judge import load_judge
    from .demo.train import TrainSettings, train
    from .run import pick_device

    settings = TrainSettings()
    settings = replace(settings, unet_steps=unet_steps or settings.unet_steps, images=images or settings.images)
    where = pick_device(device)
    train(output, state, settings, where, console.print)
    from .demo.evaluate import evaluate
    from .hosts.checkpoint import Checkpoint

    evaluate(Checkpoint.load(str(output), where), load_judge(output).to(where), console.print)


# --- from flags to configurations -------------------------------------------------------


def _configs(
    path: Path | None, preset: str | None, flags: dict[str, Any], store: Path | None, inverting: bool = False
) -> list[EditConfig]:
    """Flags over the preset over the file over the defaults; one for each target."""
    targets = flags.pop("target", None)
    given = checked(_parsed({k: v for k, v in flags.items() if v is not None}))
    configs, notes = load_configs(path) if path else ([EditConfig()], [])
    for note in dict.fromkeys(notes):
        console.print(f"[yellow]note:[/] {note}")
    if "source" in given:
        configs = [replace(c, source=given["source"]) for c in configs]
    if targets:
        configs = [replace(c, target=target) for c in configs for target in targets]
    if preset:
        configs = [with_preset(c, preset) for c in configs]
    configs = [replace(c, **given) for c in configs]
    for c in configs:
        missing = [] if store else [n for n in ("video", "source") if not getattr(c, n)]
        missing += [] if inverting or c.target else ["target"]
        if missing:
            flag = {"video": "VIDEO", "source": "--source", "target": "--target"}
            raise ConfigError(f"missing {', '.join(flag[m] for m in missing)}")
    return configs


def _parsed(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that are written as text, as values."""
    values = dict(flags)
    if "video" in values:
        values["video"] = str(values["video"])
    if "key_frames" in values:
        values["key_frames"] = KeyFrames.parse(values["key_frames"]).entries
    for name in ("blend_source", "blend_target"):
        if name in values:
            values[name] = tuple(word.strip() for word in values[name].split(","))
    if "reweight" in values:
        values["reweight"] = dict(_weight(pair) for pair in values["reweight"])
    if "crop" in values:
        values["crop"] = _whole_numbers("crop", values["crop"], ",", 4)
    if "size" in values:
        values["size"] = _whole_numbers("size", values["size"].lower(), "x", 2)
    return values


def _weight(pair: str) -> tuple[str, float]:
    word, _, factor = pair.rpartition("=")
    try:
        return word, float(factor)
    except ValueError:
        raise ConfigError(f"reweight is {pair!r}; it must be word=factor, e.g. watercolor=10") from None


def _whole_numbers(name: str, text: str, by: str, count: int) -> tuple[int, ...]:
    parts = text.split(by)
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"{name} is {text!r}; it must be {count} whole numbers with {by!r} between")
    return tuple(int(part) for part in parts)


# --- entry ------------------------------------------------------------------------------


def main() -> None:
    """Run the command line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    app()


if __name__ == "__main__":
    main()
