"""`fatezero tune`: tune temporal layers on a clip."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...files.safetensors import format_bytes
from ...files.temporal_layers import FILE, training_metadata
from ...files.whole import whole_file
from ...imports import Image, torch
from ...methods.tune_a_video import ClassPictures, Validation, optimizer_class, tune
from ...settings import setting
from ...store.budget import available_bytes
from ...video.fitted import FittedVideo
from ...video.write import write_picture, write_video
from ..config.files import load_tuning
from ..config.settings import TuneConfig
from ..config.values import config_as, tune_config
from ..frames import class_sources, decode, find_frames, fit_frames, posterior, shape_of
from ..options import AS_USUAL, RUN, RunOptions, Video, flags_of, given_of, options_of, tune_options
from ..outputs import check_folder
from ..plan import check_size_fits
from ..session import Session, pick_device, pick_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ...hosts.diffusers.checkpoint import Checkpoint

DEFAULT_FRAMES = 24
"""The default maximal number of frames to tune on, as in the authors' code."""
STATE, VALIDATION = "state.safetensors", "validation"
"""The file of the state for --resume, and the folder of validation clips."""


@dataclass(frozen=True)
class TuneOutput:
    """Options of a run of `fatezero tune` besides its settings."""

    output: str = setting("tuned", "Folder for the layers, the losses and their plot.", group="This run")
    resume: bool = setting(False, "Continue the tuning in the folder.", group="This run")
    keep_every: int = setting(50, "Steps between saved states for --resume.", least=1, most=1_000_000, group="This run")
    folder: bool = setting(False, "Write the whole model too, for the authors' code and --model.", group="This run")

    @property
    def path(self) -> Path:
        return Path(self.output)


TuneOptions, TuneOutputOptions = tune_options(), options_of(TuneOutput, resume="", folder="")


def command(
    video: Video = None,
    /,
    *,
    config: Annotated[Path | None, Parameter(help="YAML file of settings, ours or the authors'.", group=RUN)] = None,
    options: Annotated[TuneOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    more: Annotated[TuneOutputOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    run: RunOptions = AS_USUAL,
) -> None:
    """Tune a model on a video (Tune-A-Video): temporal layers for `fatezero edit --temporal`."""
    values, of_output, notes = load_tuning(config, TuneOutput) if config else ({}, {}, [])
    settings = tune_config({**values, **flags_of(video, options)})
    output = config_as(TuneOutput, {**of_output, **given_of(more)})
    check_folder(output.path)
    session = run.session(config)
    for note in notes:
        session.note(note)
    run_tune(session, settings, output, run.dry_run)


def run_tune(session: Session, config: TuneConfig, more: TuneOutput, dry_run: bool) -> None:
    """Tune a model on a clip; writes layers, losses, their plot, validation clips, and states for --resume.

    Raises errors of the input before the model is loaded, and ValueError for a state of other settings.
    """
    optimizer_class(config.optimizer)  # raises if its library is missing
    state = _state_of(more.path / STATE, config) if more.resume else None
    accelerator = _accelerator(session)
    session.console.quiet = session.console.quiet or not accelerator.is_main_process
    with replace(session, overwrite=session.overwrite or more.resume).outputs(config) as outputs:
        names = (FILE, STATE, "loss.csv", "loss.png", *(("model_index.json",) if more.folder else ()))
        clips = (file for step in _validated(config) for file in _clips(config, more, step))
        for path in (*(more.path / name for name in names), *clips) if accelerator.is_main_process else ():
            outputs.file(path)
        _tune(session, config, more, state, accelerator, dry_run)


def _tune(
    session: Session,
    config: TuneConfig,
    more: TuneOutput,
    state: dict[str, Tensor] | None,
    accelerator: Any,
    dry_run: bool,
) -> None:
    source, of_class = find_frames(config, DEFAULT_FRAMES), class_sources(config)
    checkpoint = _model(session, config, accelerator)
    video = fit_frames(config, source, checkpoint.factor, checkpoint.native_size)
    check_size_fits(checkpoint, shape_of(video, checkpoint))
    pictures = [FittedVideo.of(one, (0, 0, 0, 0), video.size) for one in of_class]
    texts = _texts(checkpoint, config, video.size)
    session.say(_plan(checkpoint, config, video, texts[config.prompt], accelerator.num_processes))
    _say_more(session, config, sum(map(len, pictures)))
    if dry_run:
        return
    with session.bars() as bar:
        latents, deviation = posterior(checkpoint, video, bar("encode"))
        classes = _class_pictures(checkpoint, config, pictures, texts, bar)
        for part in (checkpoint.vae, *checkpoint.text_encoders):  # to free memory for training
            part.to("cpu")
        losses: list[float] = [] if state is None else state["losses"].tolist()
        update = bar("tune")

        def progress(done: int, of: int, loss: float, norm: float) -> None:
            losses.append(loss)
            update(done, of, f"loss {fmean(losses[-25:]):.4f}")

        validation = _validation(checkpoint, config, more, texts, video, bar) if accelerator.is_main_process else None
        done = tune(
            checkpoint.denoiser, latents, texts[config.prompt], config.tuning, None, config.keys,
            config.clip_norm, deviation=deviation, class_pictures=classes, validation=validation, resume=state,
            keep=lambda state: _keep(more.path / STATE, state, config, accelerator), keep_every=more.keep_every,
            accelerator=accelerator, progress=progress,
        )  # fmt: skip
    if accelerator.is_main_process:
        _write(checkpoint, config, more, done)
        session.say(_done(config, more, done))


def _done(config: TuneConfig, more: TuneOutput, losses: list[float]) -> str:
    channels = config.key_frames_least_channels
    least = f" --key-frames-least-channels {channels}" if channels else ""
    clips = f"validation clips written to {more.path / VALIDATION}\n" if config.validate else ""
    return (
        f"loss {fmean(losses[:25]):.4f} at first, {fmean(losses[-25:]):.4f} at the end (means of 25 steps)\n{clips}"
        f"temporal layers written to {more.path / FILE}; to edit with them:\n"
        f"   fatezero edit {quote(config.video)} --temporal {quote(str(more.output))} "
        f"--key-frames {','.join(map(str, config.key_frames))}"
        f"{least}{' --clip-norm' if config.clip_norm else ''} --source {quote(config.prompt)} --target ..."
    )


# --- class pictures and validation --------------------------------------------------------


Texts = dict[str | None, Any]
"""The conditioning of each prompt of a run; None for the negative of validation clips."""


def _texts(checkpoint: Checkpoint, config: TuneConfig, size: tuple[int, int]) -> Texts:
    prompts = {config.prompt, config.class_prompt or config.prompt}
    prompts |= {*config.validate, config.validate_source} if config.validate else set()
    blocks = checkpoint.blocks(*prompts)
    texts: Texts = {prompt: checkpoint.encode_prompt(prompt, *size, blocks) for prompt in prompts}
    return texts | {None: checkpoint.encode_negative("", *size, blocks)}


def _class_pictures(
    checkpoint: Checkpoint, config: TuneConfig, pictures: list[FittedVideo], texts: Texts, bar: Any
) -> ClassPictures | None:
    if not pictures:
        return None
    update, parts = bar("encode class pictures"), []
    for done, picture in enumerate(pictures, 1):
        parts.append(posterior(checkpoint, picture, lambda *_: None))
        update(done, len(pictures))
    latents, deviation = (torch.cat(list(some)) for some in zip(*parts, strict=True))
    return ClassPictures(latents, texts[config.class_prompt or config.prompt], deviation)


def _validation(
    checkpoint: Checkpoint, config: TuneConfig, more: TuneOutput, texts: Texts, video: FittedVideo, bar: Any
) -> Validation | None:
    if not config.validate:
        return None

    def show(step: int, clips: list[Tensor]) -> None:
        checkpoint.vae.to(checkpoint.device)
        for path, clip in zip(_clips(config, more, step), clips, strict=True):
            write_video(path, decode(checkpoint, clip, len(video), lambda *_: None), video.fps, times=video.times)
        checkpoint.vae.to("cpu")

    prompts, source = [texts[prompt] for prompt in config.validate], texts[config.validate_source]
    return Validation(prompts, source, texts[None], show, config.validation)


def _validated(config: TuneConfig) -> list[int]:
    """The steps after which clips are sampled."""
    if config.validate_every is None:
        return []
    return sorted({*range(config.validate_every, config.steps + 1, config.validate_every), config.steps})


def _clips(config: TuneConfig, more: TuneOutput, step: int) -> list[Path]:
    """The files of the validation clips of a step, one for each prompt."""
    width = len(str(config.steps))
    return [
        more.path / VALIDATION / f"step_{step:0{width}d}_{number}.mp4" for number, _ in enumerate(config.validate, 1)
    ]


def _say_more(session: Session, config: TuneConfig, pictures: int) -> None:
    """The plan of class pictures and validation, and a note on convolutions that stay as they are."""
    if pictures:
        session.say(f"   class pictures: {pictures}, in a step before each step on the clip")
    if config.validate:
        session.say(f"   validation: {len(config.validate)} clips after {len(_validated(config))} steps")
    if config.layers == "fatezero" and not config.train_convolutions:
        session.note("new convolutions over frames have no effect untrained: give --train-convolutions")


def _accelerator(session: Session) -> Any:
    from accelerate import Accelerator  # seconds to import

    device = pick_device(session.device)
    dtype = pick_dtype(session.dtype, device)
    mixed = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no") if device.type == "cuda" else "no"
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")


def _model(session: Session, config: TuneConfig, accelerator: Any) -> Checkpoint:
    if accelerator.num_processes > 1:
        session = replace(session, device=str(accelerator.device))
    from ...hosts.diffusers import with_temporal_layers
    from ...hosts.diffusers.temporal import temporal_layers

    checkpoint = session.open_unet(config.chosen_model)
    if temporal_layers(checkpoint.unet) is None:
        with_temporal_layers(checkpoint.unet, None, config.layers, config.rank, config.seed)
    return checkpoint


def _plan(checkpoint: Checkpoint, config: TuneConfig, video: FittedVideo, text: Any, processes: int) -> str:
    """The plan of a run and its memory, in a few lines."""
    from ...hosts.diffusers.memory import activation_bytes

    denoiser, settings = checkpoint.denoiser, config.tuning
    (width, height), factor = video.size, checkpoint.factor
    shape = (len(video), 4, height // factor, width // factor)
    numbers = sum(weight.numel() for weight in denoiser.trained(settings.train_convolutions).values())
    moments = 8 if settings.optimizer == "adamw" else 2
    parts = {
        "model": sum(p.nbytes for p in checkpoint.unet.parameters()),
        "trained weights, gradients and moments": numbers * (8 + moments),
        "activations of a step": activation_bytes(
            denoiser,
            shape,
            text,
            config.keys,
            config.clip_norm,
            convolutions=settings.train_convolutions,
        ),
    }
    device = checkpoint.unet.device
    free = available_bytes(device)
    whole = f"{len(video)} frames of {width}x{height}, {settings.steps} steps, {device}"
    lines = [whole + (f", {processes} processes with different samples" if processes > 1 else "")]
    lines.append(f"   {numbers:,} trained numbers")
    lines += [f"   {name}: {format_bytes(nbytes)}" for name, nbytes in parts.items()]
    lines.append(
        f"   together {format_bytes(sum(parts.values()))}; free on {device}: "
        f"{'unknown' if free is None else format_bytes(free)}"
    )
    return "\n".join(lines)


# --- files --------------------------------------------------------------------------------


def _keep(path: Path, state: Mapping[str, Tensor], config: TuneConfig, accelerator: Any) -> None:
    from safetensors.torch import save_file

    if accelerator.is_main_process:
        with whole_file(path) as partial:
            save_file(dict(state), partial, {"settings": json.dumps(_of_the_run(config))})


def _of_the_run(config: TuneConfig) -> dict[str, Any]:
    """The settings that a resumed tuning must keep: all but the number of steps and those of validation clips."""
    values = json.loads(json.dumps(asdict(config)))
    return {name: value for name, value in values.items() if name != "steps" and not name.startswith("validate")}


def _state_of(path: Path, config: TuneConfig) -> dict[str, Tensor]:
    """The state of a stopped tuning. Raises ValueError for a state of other settings."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads((file.metadata() or {}).get("settings", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the state of a tuning: {error}") from error
    usual = _of_the_run(TuneConfig())
    for name, value in _of_the_run(config).items():
        if made.get(name, usual[name]) != value:
            raise ValueError(f"the tuning in {path.parent} was started with {name} {made.get(name)!r}, not {value!r}")
    if len(state["losses"]) >= config.steps:
        raise ValueError(f"the tuning in {path.parent} has done {len(state['losses'])} steps: give more with --steps")
    return state


def _write(checkpoint: Checkpoint, config: TuneConfig, more: TuneOutput, losses: list[float]) -> None:
    from ...hosts.diffusers.checkpoint import save_tuned
    from ...hosts.diffusers.temporal import save_temporal_layers
    from ...metrics.losses import plot_losses

    about = {
        "prompt": config.prompt,
        **training_metadata(config.key_frames, config.clip_norm),
        "steps": str(len(losses)),
        "model": config.model,
    }
    save_temporal_layers(checkpoint.unet, more.path / FILE, about)
    if more.folder:
        save_tuned(checkpoint, more.path)
    with whole_file(more.path / "loss.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, 1)])
    write_picture(more.path / "loss.png", Image.fromarray(plot_losses(losses).numpy()))
