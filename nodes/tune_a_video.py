"""Tune-A-Video: temporal layers from a file, or tuned on a clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..attention.key_frames import KeyFrames
from ..diffusion.invert import InversionSettings
from ..files.temporal_layers import (
    about_temporal_layers,
    load_temporal_layers,
    training_metadata,
    write_temporal_layers,
)
from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.temporal import temporal_layers, weights_of, with_temporal_layers
from ..hosts.comfyui.tuning import HostTunable, tune_model
from ..methods.tune_a_video import ClassPictures, LayerSettings, TuneSettings, Validation, ValidationSettings, tune
from ..metrics.losses import plot_losses
from ..settings import settings_of
from .settings import made, widget, widgets
from .sockets import PROMPT_KEY, schema, show_on_node

FOLDER = "temporal_layers"
"""The host's folder of temporal layers."""
DEMO = "demo"
"""The name of the bundled layers."""
MORE = ("train_convolutions", "prior_preservation", "class_batch")
TUNING = tuple(one.name for one in settings_of(TuneSettings) if one.name not in MORE)
"""The settings of a tuning; those of `MORE` come last on the node, where older workflows have no values."""


def _folder() -> Path:
    """The folder of temporal layers, registered with the host."""
    home = Path(folder_paths.models_dir) / FOLDER
    folder_paths.folder_names_and_paths.setdefault(FOLDER, ([str(home)], {".safetensors"}))
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _free_path(name: str) -> Path:
    """An unused path for a name, numbered if need be; ValueError for a name with a folder."""
    if Path(name).name != name or "\\" in name or name.startswith("."):
        raise ValueError(f"name: {name!r} must be a file name without a folder")
    stem = name.removesuffix(".safetensors")
    paths = (_folder() / f"{stem}{f'_{number}' if number else ''}.safetensors" for number in range(10_000))
    return next(path for path in paths if not path.exists())


class FateZeroLoadTemporalLayers(io.ComfyNode):
    """Load temporal layers into a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        _folder()
        return schema(
            node_id="FateZeroLoadTemporalLayers",
            display_name="Load Temporal Layers (FateZero)",
            description="Turns an image model into a video model: adds temporal layers of Tune-A-Video or FateZero "
            "from a .safetensors file in models/temporal_layers.",
            search_aliases=["tune-a-video", "text to video", "temporal attention", "motion module"],
            inputs=[
                io.Model.Input("model", tooltip="A model of the layers' architecture. LoRA before or after."),
                io.Combo.Input(
                    "name",
                    options=[DEMO, *folder_paths.get_filename_list(FOLDER)],
                    tooltip="demo makes the demo model generate moving scenes.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched",
                    display_name="model",
                    tooltip="For Invert Video, Edit Video and any sampler, whose batch is then a clip.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, name: str) -> str:
        path = Path(_path_of(name))
        return f"{name} {path.stat().st_mtime_ns if path.is_file() else 'absent'}"

    @classmethod
    def execute(cls, model: Any, name: str) -> io.NodeOutput:
        path = _path_of(name)
        about = about_temporal_layers(path)
        if about:
            show_on_node(cls.hidden.unique_id, "\n".join(f"{key}: {value}" for key, value in about.items()))
        return io.NodeOutput(with_temporal_layers(model, load_temporal_layers(path)))


def _path_of(name: str) -> str:
    return DEMO if name == DEMO else folder_paths.get_full_path_or_raise(FOLDER, name)


class FateZeroTuneOnVideo(io.ComfyNode):
    """Tune a MODEL's temporal layers on one clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroTuneOnVideo",
            display_name="Tune on Video (FateZero)",
            description="One-shot tuning (Tune-A-Video, arXiv 2212.11565): the model learns the motion of one clip in "
            "a few hundred steps, so that edits can change shapes more. Trains a copy; takes minutes on a GPU.",
            search_aliases=["tune-a-video", "one-shot tuning", "train", "temporal layers"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x or SDXL model, with or without temporal layers."),
                io.Latent.Input("latent", tooltip="The clip (Encode Video)."),
                io.Conditioning.Input("prompt", tooltip="A description of the clip."),
                *widgets(TuneSettings, *TUNING, advanced=("weight_decay", "clip_gradients", "optimizer")),
                widget(InversionSettings, "key_frames", default="first, previous"),
                widget(InversionSettings, "clip_norm", default=True),
                *widgets(LayerSettings, advanced=("layers", "rank")),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="File name in models/temporal_layers, for Load Temporal Layers; numbered if it exists. "
                    "Empty: do not save.",
                ),
                *(widget(TuneSettings, name, optional=True, advanced=True) for name in MORE),
                *(widget(ValidationSettings, one.name, optional=True) for one in settings_of(ValidationSettings)),
                io.Latent.Input(
                    "class_pictures",
                    optional=True,
                    tooltip="Pictures of the clip's class, against overfitting: each step on the clip comes after one "
                    "on some of them, without temporal layers.",
                ),
                io.Conditioning.Input("class_prompt", optional=True, tooltip="The prompt of class_pictures."),
                io.Conditioning.Input("validation", optional=True, tooltip="The prompt of validation clips."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="An empty prompt: validation's negative, and its inversion's."
                ),
            ],
            outputs=[
                io.Model.Output("tuned", display_name="model", tooltip="The model with its temporal layers."),
                io.Image.Output("losses", display_name="losses", tooltip="The loss of every step."),
                io.Latent.Output(
                    "clips", display_name="validation", tooltip="The validation clips, one after another."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, latent: dict[str, Any], prompt: Any, key_frames: str, clip_norm: bool, layers: Any, rank: int,
        name: str, **values: Any,
    ) -> io.NodeOutput:  # fmt: skip
        of_tuning = {key: value for key, value in values.items() if key in (*TUNING, *MORE)}
        settings, fresh = made(TuneSettings, of_tuning), made(LayerSettings, {"layers": layers, "rank": rank})
        if temporal_layers(model) is not None and fresh != LayerSettings():
            raise ValueError("layers: has no effect: the model already has temporal layers")
        path, keys = _free_path(name) if name else None, KeyFrames.parse(key_frames)
        extras = _Extras.of(values, comfy.utils.ProgressBar(settings.steps), cls.hidden.unique_id)
        condition = HostCondition.of_socket(prompt, "positive", "prompt")

        def train(denoiser: HostTunable, latents: Any) -> list[float]:
            return tune(
                denoiser, latents, condition, settings, None, keys, clip_norm, progress=extras.progress,
                class_pictures=extras.class_pictures(denoiser), validation=extras.validation(denoiser),
            )  # fmt: skip

        prompts = [condition, *extras.prompts.values()]
        tuned, losses = tune_model(
            model, latent["samples"], prompts, train, keys, fresh.layers, fresh.rank, settings.seed
        )
        if path is not None:
            text = prompt[0][1].get(PROMPT_KEY)
            about = {"prompt": text} if isinstance(text, str) else {}
            about |= training_metadata(keys.entries, clip_norm) | {"steps": str(len(losses))}
            write_temporal_layers(path, weights_of(tuned), about)
            show_on_node(cls.hidden.unique_id, f"{len(losses)} steps, loss {losses[-1]:.4f}; saved as {path.name}")
        return io.NodeOutput(tuned, plot_losses(losses)[None].float() / 255, extras.clips())


@dataclass
class _Extras:
    """The class pictures and validation clips of a tuning, and its progress on the node.

    prompts: by socket. samples: the class pictures' LATENT samples. shown: the validation clips' samples so far.
    """

    prompts: dict[str, HostCondition]
    samples: Tensor | None
    settings: ValidationSettings
    bar: Any
    node: str | None
    shown: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, values: dict[str, Any], bar: Any, node: str | None) -> _Extras:
        """Raises ValueError, naming the socket, for inputs that need another."""
        every = {one.name for one in settings_of(ValidationSettings)}
        settings = made(ValidationSettings, {key: value for key, value in values.items() if key in every})
        prompts = {
            socket: HostCondition.of_socket(values[socket], socket, socket)
            for socket in ("class_prompt", "validation", "negative")
            if values.get(socket) is not None
        }
        needed = {"class_prompt"} if values.get("class_pictures") is not None else set()
        needed |= {"validation", "negative"} if settings.validate_every else set()
        for socket in sorted(needed - prompts.keys()):
            raise ValueError(f"{socket}: is missing: connect a prompt")
        for socket in sorted(prompts.keys() - needed):
            other = "class_pictures" if socket == "class_prompt" else "validate_every"
            raise ValueError(f"{socket}: has no effect without {other}")
        pictures = values.get("class_pictures")
        return cls(prompts, None if pictures is None else pictures["samples"], settings, bar, node)

    def class_pictures(self, denoiser: HostTunable) -> ClassPictures | None:
        if self.samples is None:
            return None
        return ClassPictures(denoiser.from_host(self.samples), self.prompts["class_prompt"])

    def validation(self, denoiser: HostTunable) -> Validation | None:
        if not self.settings.validate_every:
            return None

        def show(step: int, clips: list[Tensor]) -> None:
            self.shown += [denoiser.to_host(clip) for clip in clips]
            self.bar.update_absolute(step, preview=denoiser.preview(clips[0]))

        negative = self.prompts["negative"]
        return Validation([self.prompts["validation"]], negative, negative, show, self.settings)

    def progress(self, done: int, of: int, loss: float, norm: float) -> None:
        self.bar.update(1)
        if done % 10 == 0 or done == of:
            show_on_node(self.node, f"step {done} of {of}, loss {loss:.4f}")

    def clips(self) -> Any:
        """The LATENT of the validation clips."""
        if self.shown:
            return {"samples": torch.cat(self.shown)}
        return ExecutionBlocker("Tune on Video has no validation clips: set validate_every")
