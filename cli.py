"""The command line: `fatezero demo`, `edit`, `invert`, `evaluate`, `benchmark` and `train-demo`."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperCommand

from .attention.key_frames import KeyFrames
from .config import PRESETS, ConfigError, EditConfig, check_effect, checked, load_configs, load_pairs, with_preset

app = typer.Typer(
    help="Edit real videos with a prompt and an image diffusion model (FateZero).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut long names, and whose markup eats square brackets
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False)

Bar = Callable[[int, int], None]
_LINE_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""


class Grouped(TyperCommand):
    """A command whose help shows its options in groups, each with its default."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Bar]]:
    """Progress of several things; each `add(title)` returns a callback (done, total).

    On a terminal a table of bars, elsewhere lines: the first, then one every ten seconds, and the last.
    """
    if not console.is_terminal:
        yield _progress_lines
        return
    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:

        def add(title: str) -> Bar:
            task = progress.add_task(title, total=None)

            return lambda done, total: progress.update(task, completed=done, total=total)

        yield add


def _progress_lines(title: str) -> Bar:
    begun, told = time.monotonic(), float("-inf")

    def update(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _LINE_EVERY or done == total:
            told, left = now, (now - begun) / max(1, done) * (total - done)
            rest = f", {_minutes(left)} left" if done < total else f" in {_minutes(now - begun)}"
            console.print(f"{title} {done}/{total}{rest}", markup=False, soft_wrap=True)
            console.file.flush()

    return update


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """End on bad input, and on whatever goes wrong, with one line and status 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("FATEZERO_DEBUG"):
                raise
            complain(_told(error))
            raise typer.Exit(1) from None

    return run


def _told(error: Exception) -> str:
    """An error in one line; of one that is no user's doing, where it came from."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return f"error: out of memory: {text}; take fewer or smaller frames, --chunk-frames, or another --device"
    if isinstance(error, (ValueError, TypeError, OSError, ArithmeticError, ImportError, MemoryError)):
        return f"error: {text}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"error: {type(error).__name__}: {text} ({where}; FATEZERO_DEBUG=1 shows all of it)"


def complain(text: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False).print(text, style="red", markup=False, soft_wrap=True)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"fatezero {__version__}")
        raise typer.Exit


def _quiet(asked: bool) -> None:
    console.quiet = asked


@app.callback()
def fatezero(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Edit real videos with a prompt and an image diffusion model (FateZero)."""


# --- options shared by edit and invert --------------------------------------------------


def _option(help: str, *names: str, default: str | None = None, panel: str | None = None) -> Any:
    """An option with the default that its help shows; a value of None leaves that to what is beneath it."""
    shown = f"{help}  [default: {default}]" if default else help
    return typer.Option(*names, help=shown, show_default=False, rich_help_panel=panel)


_MODEL, _FRAMES, _STORE, _EDIT, _RUN = "Model", "Which frames", "The store", "The edit", "This run"
_INVERSION = "The inversion"

Video = Annotated[Path | None, typer.Argument(help='Video, picture, or pictures: a folder, "f_%04d.png" or "*.png".')]
Config = Annotated[Path | None, _option("YAML of settings, ours or the authors' own.", "--config", panel=_RUN)]
Model = Annotated[
    str | None,
    _option("Diffusers folder, .safetensors checkpoint or hub name.", default="the bundled demo", panel=_MODEL),
]
ModelConfig = Annotated[
    str | None,
    _option("For a .safetensors checkpoint: a diffusers folder with its tokenizer and configuration.", panel=_MODEL),
]
Lora = Annotated[str | None, _option("A LoRA file or folder.", panel=_MODEL)]
Steps = Annotated[int | None, _option("DDIM steps.", default="50", panel=_INVERSION)]
KeyFramesOption = Annotated[
    str | None,
    _option(
        "self, first, middle, last, previous or offsets, by commas.", "--key-frames", default="self,middle",
        panel=_INVERSION,
    ),
]  # fmt: skip
ClipNorm = Annotated[
    bool | None,
    _option("GroupNorm statistics over the whole clip, as the authors' code.", default="no", panel=_INVERSION),
]
MemoryOption = Annotated[
    str | None,
    _option(
        "recompute, queries_keys, maps, or auto: the fastest that fits.", "--memory", default="recompute", panel=_STORE
    ),
]
Place = Annotated[str | None, _option("Where it is: device, ram, disk, or auto.", default="auto", panel=_STORE)]
Budget = Annotated[
    float | None, _option("The most gigabytes it may take, latents included.", default="what is free", panel=_STORE)
]
Precision = Annotated[
    str | None,
    _option("Of kept queries and keys: model, float16, bfloat16, float8.", default="model", panel=_STORE),
]
KeepSteps = Annotated[
    float | None,
    _option("Share of steps whose attention is kept; others are computed again.", default="1", panel=_STORE),
]
MaxTokens = Annotated[
    int | None, _option("Record and fuse layers of up to this many tokens.", default="all", panel=_STORE)
]
Chunk = Annotated[
    int | None, _option("Frames of one UNet call, for long clips.", "--chunk-frames", default="all", panel=_RUN)
]
Start = Annotated[str | None, _option("First frame, or its time: 48, 2.5s, 1:02.", default="0", panel=_FRAMES)]
End = Annotated[str | None, _option("The frame, or time, to stop before.", default="the end", panel=_FRAMES)]
Stride = Annotated[int | None, _option("Take every n-th frame.", default="1", panel=_FRAMES)]
Count = Annotated[
    int | None, _option("How many frames; 0 for all.", default="at most 8; with --end all", panel=_FRAMES)
]
Fps = Annotated[
    float | None,
    _option("See the video at this rate; of pictures, their rate.", default="its own; pictures: 8", panel=_FRAMES),
]
Crop = Annotated[str | None, _option("Pixels to cut: left,top,right,bottom.", default="0,0,0,0", panel=_FRAMES)]
Size = Annotated[
    str | None,
    _option("WIDTHxHEIGHT to edit at.", default="the short side at the model's own size", panel=_FRAMES),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.", rich_help_panel=_RUN)]
Dtype = Annotated[
    str,
    typer.Option(help="float32, float16, bfloat16, or auto: float16 on a GPU, else float32.", rich_help_panel=_RUN),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan, with memory and UNet calls, and stop.", rich_help_panel=_RUN),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.", rich_help_panel=_RUN)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_quiet, help="Say nothing but errors.", rich_help_panel=_RUN),
]


@app.command(cls=Grouped)
@guarded
def edit(
    video: Video = None,
    source: Annotated[str | None, _option("What the video shows.")] = None,
    target: Annotated[list[str] | None, _option("What it shall show; several are edited in one pass.")] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help='Where the edit goes: .mp4, .mov, .mkv, .webm, .gif; pictures: "folder/" or "f_%04d.png".',
        ),
    ] = "edit.mp4",
    config: Config = None,
    preset: Annotated[str | None, _option(f"Settings that go together: {', '.join(PRESETS)}.", panel=_EDIT)] = None,
    store: Annotated[
        Path | None, _option("A store of `fatezero invert`, in the place of an inversion.", panel=_STORE)
    ] = None,
    model: Model = None,
    model_config: ModelConfig = None,
    lora: Lora = None,
    negative: Annotated[str | None, _option("Negative prompt.", default="none", panel=_EDIT)] = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, _option("Classifier-free guidance.", default="7.5", panel=_EDIT)] = None,
    key_frames: KeyFramesOption = None,
    clip_norm: ClipNorm = None,
    memory: MemoryOption = None,
    place: Place = None,
    budget_gb: Budget = None,
    precision: Precision = None,
    keep_steps: KeepSteps = None,
    chunk_frames: Chunk = None,
    mode: Annotated[str | None, _option("refine or replace: how words meet.", default="refine", panel=_EDIT)] = None,
    blend_source: Annotated[
        str | None, _option("Source words of the mask, by commas.", default="those that change", panel=_EDIT)
    ] = None,
    blend_target: Annotated[
        str | None, _option("Target words of the mask, by commas.", default="those that change", panel=_EDIT)
    ] = None,
    reweight: Annotated[list[str] | None, _option("word=factor on a target word; may repeat.", panel=_EDIT)] = None,
    cross_replace_steps: Annotated[
        float | None, _option("Share of steps with cross fusion.", default="0.7", panel=_EDIT)
    ] = None,
    self_replace_steps: Annotated[
        float | None, _option("Share of steps with self fusion.", default="0.8", panel=_EDIT)
    ] = None,
    blend_self_attention: Annotated[
        bool | None, _option("Fuse self-attention outside the mask only.", default="no", panel=_EDIT)
    ] = None,
    blend_latents: Annotated[
        bool | None, _option("Keep the source's latents outside the mask.", default="no", panel=_EDIT)
    ] = None,
    blend_threshold: Annotated[float | None, _option("Threshold of the mask.", default="0.3", panel=_EDIT)] = None,
    blend_latents_until: Annotated[
        float | None, _option("Share of steps up to which latents are kept.", default="0.8", panel=_EDIT)
    ] = None,
    mask_from: Annotated[
        str | None,
        _option(
            "attention: the paper's mask; prompts: where their predictions differ.", default="attention", panel=_EDIT
        ),
    ] = None,
    separate_words: Annotated[
        float | None,
        _option("In the mask of both prompts, how little to look at words of elsewhere.", default="0", panel=_EDIT),
    ] = None,
    max_tokens: MaxTokens = None,
    mask_tokens: Annotated[int | None, _option("Finest grid of the mask.", default="256", panel=_EDIT)] = None,
    start: Start = None,
    end: End = None,
    stride: Stride = None,
    count: Count = None,
    fps: Fps = None,
    crop: Crop = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Edit a video: invert it, then denoise with the target prompt and fused attention."""
    flags = {k: v for k, v in locals().items() if k in EditConfig.__dataclass_fields__}
    configs = _configs(config, preset, flags, store)
    from .run import Session, run_edits  # torch and diffusers take seconds to import: after the cheap checks

    inputs = tuple(path for path in (config, store) if path)
    session = Session(console, progress_bar, device, dtype, model_config, overwrite, inputs)
    run_edits(session, configs, output, store, dry_run)


@app.command(cls=Grouped)
@guarded
def invert(
    video: Video = None,
    source: Annotated[str | None, _option("What the video shows.")] = None,
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
    end: End = None,
    stride: Stride = None,
    count: Count = None,
    fps: Fps = None,
    crop: Crop = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Invert a video once and keep the store, for many edits with `fatezero edit --store`."""
    flags = {k: v for k, v in locals().items() if k in EditConfig.__dataclass_fields__}
    configs = _configs(config, None, flags, None, inverting=True)
    from .run import Session, run_invert

    inputs = (config,) if config else ()
    session = Session(console, progress_bar, device, dtype, model_config, overwrite, inputs)
    run_invert(session, configs[0], output, dry_run)


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
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure an edit: what it kept, how steadily it moves, what CLIP says, how near the truth it is."""
    left, top, right, bottom = _whole_numbers("crop", crop, ",", 4)
    from .evaluation import Evaluation, run_evaluate
    from .run import Session

    asked = Evaluation(
        original, edited, (source, target), mask, truth, flow, clip, lpips, judge, start, stride,
        (left, top, right, bottom), output, plot, comparison, how,  # type: ignore[arg-type]
    )  # fmt: skip
    run_evaluate(Session(console, progress_bar, device, overwrite=overwrite), asked)


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
    workers: Annotated[
        int | None, typer.Option(help="Processes.", show_default="one for each core; one on a GPU")
    ] = None,
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
    texts = {"source": given["source"]} if "source" in given else {}
    notes: list[str] = []
    configs: list[EditConfig] = []
    for target in targets or [None]:
        own = texts | (checked({"target": target}) if target is not None else {})
        if path:
            found, told = load_configs(path, own, preset)
            notes += told
        else:
            found = [EditConfig(**own)]
            found = [with_preset(c, preset) for c in found] if preset else found
        configs += [c for c in (replace(c, **given) for c in found) if c not in configs]
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    for c in configs:
        missing = [] if store else [n for n in ("video", "source") if not getattr(c, n)]
        missing += [] if inverting or c.target else ["target"]
        if missing:
            flag = {"video": "VIDEO", "source": "--source", "target": "--target"}
            raise ConfigError(f"missing {', '.join(flag[m] for m in missing)}")
        check_effect(c, () if store else list(given))
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
            values[name] = tuple(word.strip() for word in values[name].split(",") if word.strip())
    if "reweight" in values:
        values["reweight"] = dict(_weight(pair) for pair in values["reweight"])
    if "crop" in values:
        values["crop"] = _whole_numbers("crop", values["crop"], ",", 4)
    if "size" in values:
        values["size"] = _whole_numbers("size", values["size"].lower(), "x", 2)
    for name in ("start", "end"):
        if name in values and values[name].strip().lstrip("+-").isdigit():
            values[name] = int(values[name])
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
