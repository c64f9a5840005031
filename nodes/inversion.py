"""Inversion, its store on disk, and a check of its quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..attention.key_frames import KeyFrames
from ..diffusion.invert import InversionSettings
from ..diffusion.parts import Edit
from ..hosts.comfyui.conditions import HostCondition, unsaveable
from ..hosts.comfyui.editing import edit_clip
from ..hosts.comfyui.families import MODELS, check_known, facts_of, takes_of
from ..hosts.comfyui.inversion import NOISE_MASK, HostStore, InvertSettings, invert_clip, source_of
from ..hosts.comfyui.latents import windows_of_video
from ..hosts.comfyui.noise import Timesteps, check_samples
from ..metrics.preservation import psnr
from ..settings import setting_of
from ..store.budget import StoreSettings, format_bytes
from .files import inside
from .settings import ADVANCED, widget, widgets
from .sockets import (
    PROMPT_KEY,
    AttentionStoreSocket,
    schema,
    show_on_node,
)

MODEL_AND_SOURCE = [
    io.Model.Input("model", tooltip=f"{MODELS}, with any LoRA."),
    io.Conditioning.Input("source", tooltip="The source prompt, with any ControlNets."),
]
_BUDGET, _PLACE = (setting_of(StoreSettings, name).meta.text for name in ("budget_gb", "place"))
STEPS = widget(InversionSettings, "steps", max=999)
TIMESTEPS = io.Combo.Input(
    "timesteps",
    options=list(get_args(Timesteps)),
    default="leading",
    optional=True,
    **ADVANCED,
    tooltip="Timesteps of a UNet's schedule. trailing: for LoRAs for few steps, such as Lightning, Hyper and TCD. LCM "
    "(Model Sampling Discrete) has its own.",
)
SOUND = io.Combo.Input(
    "sound",
    options=["keep", "edit"],
    optional=True,
    **ADVANCED,
    tooltip="For a clip with sound (LTX-2, MiniMax H3): keep its sound, or edit it with the video.",
)
CHUNK_FRAMES = widget(InversionSettings, "chunk_frames", optional=True)
SETTINGS = [
    *widgets(InversionSettings, "key_frames", "clip_norm"),
    widget(StoreSettings, "memory", default="auto"),
    widget(StoreSettings, "budget_gb", default=2.0, tooltip=f"{_BUDGET} 0 sets no limit."),
    widget(
        StoreSettings,
        "place",
        advanced=True,
        optional=True,
        tooltip=f"{_PLACE} In ComfyUI, auto leaves the device to the models.",
    ),
    widget(StoreSettings, "precision", advanced=True, optional=True),
    widget(StoreSettings, "keep_steps", advanced=True, optional=True),
    CHUNK_FRAMES,
    widget(InversionSettings, "order", advanced=True, optional=True),
]
"""The widgets of an inversion, except its steps."""
REUSE = widget(InversionSettings, "reuse_midpoint", advanced=True, optional=True)
"""A later widget, because older workflows lack it."""
WINDOWS = [
    widget(InversionSettings, name, advanced=True, optional=True) for name in ("window_frames", "window_overlap")
]
"""The last widgets, because older workflows lack them."""


def invert_settings(
    model: Any,
    source: Any,
    key_frames: str,
    clip_norm: bool,
    memory: Any,
    budget_gb: float,
    place: Any = "auto",
    precision: Any = "model",
    keep_steps: float = 1.0,
    chunk_frames: int = 0,
    order: int = 1,
    sound: str = "keep",
    reuse_midpoint: bool = False,
    window_frames: int = 0,
    window_overlap: int = 0,
) -> InvertSettings:
    """The settings of the widgets in `SETTINGS`, `REUSE` and `WINDOWS`."""
    folder = Path(folder_paths.get_temp_directory())
    store = StoreSettings(memory, place, budget_gb or None, precision, keep_steps, folder=folder)
    prompt = source[0][1].get(PROMPT_KEY)
    InversionSettings(order=order, reuse_midpoint=reuse_midpoint)  # raises for settings that do not go together
    return InvertSettings(
        KeyFrames.parse(key_frames), clip_norm, store, chunk_frames or None,
        windows_of_video(model, window_frames, window_overlap), prompt, order, reuse_midpoint,
        keep_sound=sound == "keep",
    )  # fmt: skip


class FateZeroInvert(io.ComfyNode):
    """Invert a clip to noise, and store what the edit needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroInvert",
            display_name="Invert Video (FateZero)",
            description="DDIM inversion of a clip with its source prompt. Changes of the target prompt, guidance or "
            "fusion do not run it again.",
            search_aliases=["ddim inversion", "unsampler", "invert", "noise"],
            inputs=[
                *MODEL_AND_SOURCE,
                io.Latent.Input(
                    "latent", tooltip="The clip (Encode Video): one latent per frame, or a video VAE's latents."
                ),
                STEPS,
                *SETTINGS,
                widget(InversionSettings, "inversion_steps", advanced=True, optional=True, max=1000),
                TIMESTEPS,
                SOUND,
                REUSE,
                *WINDOWS,
            ],
            outputs=[
                io.Latent.Output("noise", display_name="noise", tooltip="For a KSampler that adds no noise."),
                AttentionStoreSocket.Output("store", display_name="attention store", tooltip="For Edit Video."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, source: Any, latent: dict[str, Tensor], steps: int, inversion_steps: int = 0,
        timesteps: Timesteps = "leading", **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        samples, shown = latent["samples"], [""]
        check_known(model)
        check_samples(model, samples)

        def notify(text: str) -> None:
            shown[0] = text
            show_on_node(cls.hidden.unique_id, text)

        condition = HostCondition.of_socket(source, "source", "source", facts_of(model).attention, takes_of(model))
        InversionSettings(steps, inversion_steps=inversion_steps or None)  # raises for steps that do not fit
        chosen = replace(
            invert_settings(model, source, **settings), inversion_steps=inversion_steps or None, timesteps=timesteps
        )
        noise, store = invert_clip(model, samples, condition, steps, chosen, latent.get(NOISE_MASK), notify)
        return io.NodeOutput({"samples": noise}, store, ui=ui.PreviewText(shown[0]))


class FateZeroReconstructionCheck(io.ComfyNode):
    """Replay an inversion at guidance 1 and compare it with the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroReconstructionCheck",
            display_name="Reconstruction Check (FateZero)",
            description="Replays the inversion without an edit. What this loses, every edit loses too. Below 25 dB, "
            "try more steps or a more accurate source prompt.",
            search_aliases=["psnr", "replay", "reconstruct", "inversion quality"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the inversion."),
                AttentionStoreSocket.Input("store", tooltip="The inversion to check."),
                io.Vae.Input("vae", tooltip="Decodes the replay."),
                io.Image.Input("images", tooltip="The clip's frames."),
                CHUNK_FRAMES,
            ],
            outputs=[
                io.Image.Output("replay", display_name="replay", tooltip="The reconstructed clip."),
                io.String.Output("psnr", display_name="PSNR", tooltip="PSNR in dB by frame, and on average."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, store: HostStore, vae: Any, images: Tensor, chunk_frames: int = 0) -> io.NodeOutput:
        if not facts_of(model).spans_clip and len(images) != store.frames:
            raise ValueError(f"images: {len(images)} frames, but the store has {store.frames}")
        store = replace(store.with_model(model), edit_guides=store.guides)
        positive = replace(source_of(store), role="positive")
        (samples,), _ = edit_clip(model, store, [Edit(positive, guidance_scale=1.0)], chunk_frames or None)
        replay = vae.decode(samples)
        replay = replay.reshape(-1, *replay.shape[-3:])[: len(images)]  # a video VAE's has a batch dimension
        if replay.shape != images[..., :3].shape:
            raise ValueError(
                f"images: {len(images)} of {images.shape[2]}x{images.shape[1]}, but the store has {len(replay)} of "
                f"{replay.shape[2]}x{replay.shape[1]}"
            )
        pairs = zip(replay.movedim(-1, 1).split(1), images[..., :3].movedim(-1, 1).split(1), strict=True)
        values = [psnr(a.cpu(), b.cpu()) for a, b in pairs]
        lines = [f"frame {i}: {value:.1f} dB" for i, value in enumerate(values)]
        text = "\n".join([f"average: {sum(values) / len(values):.1f} dB", *lines])
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(replay, text, ui=ui.PreviewText(text))


class FateZeroSaveStore(io.ComfyNode):
    """Save an inversion in the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSaveStore",
            display_name="Save Attention Store (FateZero)",
            description="Saves an inversion in the output folder as a safetensors file.",
            search_aliases=["save inversion"],
            inputs=[
                AttentionStoreSocket.Input("store", tooltip="The inversion to save."),
                io.String.Input("filename_prefix", default="fatezero/store", tooltip="In the output folder."),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The file, for Load Attention Store.")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, store: HostStore, filename_prefix: str) -> io.NodeOutput:
        if store.guides is not None:
            raise ValueError("store: a file cannot contain the latent's guides and clean frames: edit without saving")
        lost = unsaveable(source_of(store).conditioning)
        if lost and store.kept_steps < store.steps:
            raise ValueError(
                f"store: a file cannot contain {', '.join(lost)} of the source prompt, which recomputed steps need: "
                "edit without saving, or invert with memory queries_keys and keep_steps 1"
            )
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        store.save(Path(folder) / file)
        text = f"{(Path(subfolder) / file).as_posix()} [output]"
        show_on_node(cls.hidden.unique_id, f"{text}: {format_bytes(store.nbytes)}")
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class FateZeroLoadStore(io.ComfyNode):
    """Load an inversion from the input or output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroLoadStore",
            display_name="Load Attention Store (FateZero)",
            description="Loads an inversion from the input or output folder.",
            search_aliases=["load inversion"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_stores(),
                    tooltip="A .safetensors file from Save Attention Store.",
                )
            ],
            outputs=[AttentionStoreSocket.Output("store", display_name="attention store", tooltip="For Edit Video.")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return True if _store(file) is not None else f"file: no store {file!r} in the input or output folder"

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        path = _store(file)
        return path and path.stat().st_mtime

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = _store(file)
        if path is None:
            raise ValueError(f"file: no store {file!r} in the input or output folder")
        store = HostStore.load(path, comfy.model_management.intermediate_device())
        store.source = HostCondition.restored(store.source, store.extra.get("conditioning", {}))
        return io.NodeOutput(store)


def _stores() -> list[str]:
    found = []
    for mark, folder in (("", folder_paths.get_input_directory()), (" [output]", folder_paths.get_output_directory())):
        root = Path(folder)
        found += [f"{path.relative_to(root).as_posix()}{mark}" for path in sorted(root.rglob("*.safetensors"))]
    return found


def _store(file: str) -> Path | None:
    path = inside(file)
    return path if path is not None and path.suffix == ".safetensors" else None
