"""The session of a command: its device, models, messages and output files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..imports import torch
from ..models import DEMOS
from ..settings import shown
from ..video.read import VideoSource, open_video
from ..video.which import colour_of
from .config.paths import check_names, files_of, is_clip
from .config.settings import EditConfig, GenerateConfig, ModelSettings, TuneConfig, of_setting
from .masks import fitted_like
from .outputs import Outputs
from .progress import Bar, in_a_line, printable

if TYPE_CHECKING:
    from ..hosts.diffusers.checkpoint import Checkpoint
    from ..hosts.diffusers.model import Model
    from ..metrics.clip import ClipScorer

Bars = Callable[[], AbstractContextManager[Callable[[str], Bar]]]


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" takes CUDA, then MPS, then the CPU. Raises ValueError for a missing device."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # also fails for devices without memory
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {shown(name)} cannot be used ({reason}): give another with --device") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is float16 on a GPU and float32 elsewhere."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in known:
        raise ValueError(f"dtype is {name!r}; it must be auto or one of {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Session:
    """The session of a command.

    model_config: for single-file checkpoints, a folder with tokenizer and configuration.
    overwrite: replace existing outputs. inputs: files of the run that are never replaced. resume: whether to continue
    an interrupted run; None: if its settings and files are the same.
    """

    console: Console
    bars: Bars
    device: str = "auto"
    dtype: str = "auto"
    model_config: str | None = None
    overwrite: bool = False
    inputs: tuple[Path, ...] = ()
    resume: bool | None = False

    def open_model(self, settings: ModelSettings, videos: bool = False) -> Model:
        """A model of any family. videos: also accept text-to-video UNets."""
        from ..hosts.diffusers.checkpoint import quiet
        from ..hosts.diffusers.load import open_model

        check_temporal(settings)
        where = pick_device(self.device)
        dtype = None if self.dtype == "auto" else pick_dtype(self.dtype, where)
        with quiet():
            model = open_model(settings.model, where, dtype, **self._options(settings), videos=videos)
        self._note_of(model)
        return model

    def open_unet(self, settings: ModelSettings) -> Checkpoint:
        """A model with a UNet of images."""
        from ..hosts.diffusers.checkpoint import Checkpoint, quiet
        from ..hosts.diffusers.load import CheckpointError, loader_of

        check_temporal(settings)
        where, model = pick_device(self.device), settings.model
        with quiet():
            family = loader_of(model).family
        if family.title != Checkpoint.family.title:
            raise CheckpointError(f"{model} is a {family.title} model; give one with a UNet: SD 1.x, SD 2.x or SDXL")
        if self.model_config is not None and not Path(model).is_file():
            raise ValueError(f"model_config has no effect: {model!r} is not a single file")
        with quiet():
            checkpoint = Checkpoint.load(model, where, pick_dtype(self.dtype, where), **self._options(settings))
        self._note_of(checkpoint)
        return checkpoint

    def _options(self, settings: ModelSettings) -> dict[str, Any]:
        """Of `LoadOptions`."""
        return {
            "config": self.model_config, "lora": settings.lora, "temporal": settings.temporal,
            "variant": settings.variant, "attention": settings.attention, "timesteps": settings.timesteps,
        }  # fmt: skip

    def _note_of(self, checkpoint: Model) -> None:
        """Print notes on a model, and one for the demo models."""
        for note in checkpoint.notes:
            self.say(note)
        if checkpoint.name in DEMOS:
            self.note("the bundled demo model only knows its own simple scenes; for real videos give --model")

    def outputs(self, config: EditConfig | GenerateConfig | TuneConfig, *inputs: Path | None) -> Outputs:
        """The outputs of a run. inputs: the files it reads besides those in its configuration."""
        files = files_of(config)
        check_names({**files, "model_config": self.model_config})
        clips = [file for what, file in files.items() if is_clip(what)]
        others = [file for what, file in files.items() if not is_clip(what)]
        more = (self.model_config, *self.inputs, *inputs)
        return Outputs(self.overwrite, clips, [*others, *(name for name in more if name)])

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(printable(text), style=style, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.say(f"note: {in_a_line(text)}", style="yellow")


def check_temporal(settings: ModelSettings) -> None:
    """Raise ConfigError, before the model is loaded, for temporal layers that cannot be read."""
    from ..files.temporal_layers import about_temporal_layers

    with of_setting("temporal"):
        _ = settings.temporal and about_temporal_layers(settings.temporal)


def check_control(config: EditConfig) -> None:
    """Raise ConfigError, before the model is loaded, for a ControlNet or a control video that cannot be read."""
    if not config.controlnet and not config.control:
        return
    from ..hosts.diffusers.model_files import check_hub_name

    path = Path(config.controlnet)
    with of_setting("controlnet"):
        if config.controlnet and path.is_dir() and not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a ControlNet of diffusers: it has no config.json")
        if config.controlnet and not path.exists():
            check_hub_name(config.controlnet)
    with of_setting("control"):
        open_video(config.control, at_most=1)


def open_clip(name: str, device: torch.device) -> ClipScorer:
    """A CLIP model of transformers, by folder or hub name. Raises CheckpointError for anything else."""
    from ..hosts.diffusers.checkpoint import quiet
    from ..hosts.diffusers.model_files import as_checkpoint_error, from_hub
    from ..metrics.clip import ClipScorer

    load = partial(ClipScorer.load, device=device)
    with quiet(), of_setting("clip"), as_checkpoint_error(name):
        return load(name, local_files_only=True) if Path(name).is_dir() else from_hub(name, load)


def check_clip(name: str) -> None:
    """Raise CheckpointError for a CLIP model that `open_clip` would not find."""
    from transformers import AutoConfig

    from ..hosts.diffusers.checkpoint import quiet
    from ..hosts.diffusers.model_files import as_checkpoint_error, from_hub

    with quiet(), of_setting("clip"), as_checkpoint_error(name):
        if Path(name).is_dir():
            AutoConfig.from_pretrained(name, local_files_only=True)
        else:
            from_hub(name, AutoConfig.from_pretrained)


def controlled(
    session: Session,
    checkpoint: Model,
    config: EditConfig,
    cut: EditConfig,
    frames: int,
    size: tuple[int, int],
    clip: VideoSource | None,
) -> Model:
    """A model with the configuration's ControlNet, if any, on pictures cropped like the clip.

    cut: the settings of the clip. clip: its frames, if it is there. Raises ValueError for a model without ControlNet
    support, for too few pictures, and for a range without a step.
    """
    from ..hosts.diffusers.checkpoint import quiet

    chosen = config.chosen_control
    if not chosen.controlnet and not chosen.control:
        return checkpoint
    with of_setting("control"):
        source = open_video(
            chosen.control, cut.start, cut.stride, frames, fps=cut.frame_rate, background=colour_of(cut.background)
        )
        pictures = torch.stack(list(fitted_like(cut.crop, size, clip)(source).frames()))
    with quiet(), of_setting("controlnet"):
        made = checkpoint.with_control(
            chosen.controlnet, pictures, chosen.controlnet_strength, chosen.control_start, chosen.control_end,
            config.variant,
        )  # fmt: skip
    acting = made.control_steps(config.steps)
    if chosen.controlnet_strength and not acting:
        raise ValueError(
            f"no step of {config.steps} is between control_start {chosen.control_start:g} and control_end "
            f"{chosen.control_end:g}: give a wider range, or more steps"
        )
    how = "" if chosen.controlnet_strength == 1 else f" at strength {chosen.controlnet_strength:g}"
    what = f"ControlNet {Path(chosen.controlnet).name}" if chosen.controlnet else f"control {Path(chosen.control).name}"
    session.say(f"{what}: in {acting} of {config.steps} steps{how}")
    return made
