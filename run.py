"""From a video file to a video file: what `fatezero edit` and `fatezero invert` do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .attention.budget import Demand, StoreSettings, available_bytes, format_bytes, plan_store
from .attention.records import MEMORIES
from .attention.store import AttentionStore, StoreError
from .config import EditConfig
from .diffusion.edit import Edit, check_store, edit_many, unet_calls
from .diffusion.invert import Inversion, invert
from .hosts.checkpoint import Checkpoint, quiet
from .video.read import Video, read_video
from .video.size import check_size, crop, fit_size, resize_to_fill, to_bytes, to_unit
from .video.write import check_output, write_video

DEFAULT_FRAMES = 8
"""Frames edited, at most, where nothing says how many."""

Bars = Callable[[], AbstractContextManager[Callable[[str], Callable[[int, int], None]]]]


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" takes CUDA, then MPS, then the CPU. ValueError for one that is absent."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is float16 on a GPU and float32 elsewhere."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in known:
        raise ValueError(f"dtype is {name!r}; it must be auto or one of {', '.join(known)}")
    return known[name]


def load_frames(config: EditConfig, factor: int, native: int) -> Video:
    """The frames to edit, cut and scaled; ValueError for a size the model cannot take."""
    at_most = DEFAULT_FRAMES if config.count is None else None
    video = read_video(config.video, config.start, config.stride, config.count or None, at_most)
    left, top, right, bottom = config.crop
    frames = crop(video.frames, left, top, right, bottom)
    if config.size is None:
        width, height = fit_size(frames.shape[2], frames.shape[1], native, factor)
    else:
        width, height = config.size
        check_size(width, height, factor)
    return Video(resize_to_fill(frames, width, height), video.fps, video.sound)


@dataclass(frozen=True)
class Session:
    """Where a command runs and how it speaks.

    model_config: for single-file checkpoints, a folder with tokenizer and configuration.
    """

    console: Console
    bars: Bars
    device: str = "auto"
    dtype: str = "auto"
    model_config: str | None = None

    def open_model(self, config: EditConfig) -> Checkpoint:
        where = pick_device(self.device)
        with quiet():
            checkpoint = Checkpoint.load(
                config.model, where, pick_dtype(self.dtype, where), self.model_config, config.lora or None
            )
        if config.model == "demo":
            self.say(
                "note: the bundled demo model knows only its own small world; for real videos give --model",
                style="yellow",
            )
        return checkpoint

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)


def run_invert(session: Session, config: EditConfig, output: Path, dry_run: bool) -> None:
    """`fatezero invert`: keep an inversion in a file, written while it runs."""
    settings = replace(config.store, path=output)
    checkpoint = session.open_model(config)
    video = load_frames(config, checkpoint.factor, checkpoint.native_size)
    session.say(plan(checkpoint, [config], _latents_shape(video, checkpoint), settings, edits=False))
    if dry_run:
        return
    with session.bars() as bar:
        inversion = invert_video(checkpoint, config, video, bar, settings)
    session.say(f"store of {format_bytes(inversion.store.nbytes)} written to {output}")


def run_edits(
    session: Session, configs: list[EditConfig], output: Path, store_path: Path | None, dry_run: bool
) -> None:
    """`fatezero edit`: one inversion, or one from a file, and an edit for each configuration.

    Everything that can be refused is refused before the inversion starts.
    """
    store = AttentionStore.load(store_path) if store_path else None
    if store is not None:
        configs = [_with_store(config, store) for config in configs]
    first = configs[0]
    for config in configs:
        config.fusion, config.keys  # noqa: B018  raise for settings out of range
    check_output(output, 1 if store is None else store.frames)
    if store is None:
        read_video(first.video, first.start, first.stride, 1)
    checkpoint = session.open_model(first)
    prompts = [config.prompt_edit(checkpoint.tokenizer) for config in configs]

    shape: tuple[int, ...]
    if store is None:
        video = load_frames(first, checkpoint.factor, checkpoint.native_size)
        check_output(output, len(video.frames))
        shape, fps, sound = _latents_shape(video, checkpoint), video.fps, video.sound
    else:
        schedule = checkpoint.denoiser.schedule(store.steps)
        for prompt in prompts:
            check_store(store, checkpoint.denoiser, schedule, prompt)
        shape, fps = tuple(store.levels.shape[1:]), Fraction(*store.extra.get("fps", (8, 1)))
        # A video given beside a store lends its sound; it must have the store's frames.
        sound = read_video(first.video, first.start, first.stride, store.frames).sound if first.video else None
    session.say(plan(checkpoint, configs, shape, first.store, edits=True, store=store))
    if dry_run:
        return

    with session.bars() as bar:
        inversion = invert_video(checkpoint, first, video, bar) if store is None else Inversion(store)
        edits = [one_edit(checkpoint, config, prompt, shape) for config, prompt in zip(configs, prompts, strict=True)]
        title = "edit" if len(edits) == 1 else f"{len(edits)} edits in one pass"
        results = edit_many(checkpoint.denoiser, inversion, edits, first.chunk_frames, progress=bar(title))
        for i, (config, latents) in enumerate(zip(configs, results, strict=True)):
            path = output if len(configs) == 1 else output.with_stem(f"{output.stem}_{i}")
            write_video(path, decode(checkpoint, latents), fps, sound)
            session.say(f"{config.target!r} written to {path}")


def plan(
    checkpoint: Checkpoint,
    configs: list[EditConfig],
    latents_shape: tuple[int, ...],
    settings: StoreSettings,
    edits: bool,
    store: AttentionStore | None = None,
) -> str:
    """What will run and what it takes, in a few lines. store: one from a file, in the place of an inversion."""
    config, device = configs[0], checkpoint.unet.device
    frames, _, height, width = latents_shape
    source = checkpoint.encode_prompt(config.source, width * checkpoint.factor, height * checkpoint.factor)
    demand = Demand(
        checkpoint.denoiser.sites(height, width), latents_shape, 4, config.steps, config.keys, checkpoint.unet.dtype,
        source.columns, source.nbytes,
    )  # fmt: skip
    chosen = None if store else plan_store(settings, demand, device)
    size = f"{width * checkpoint.factor}x{height * checkpoint.factor}"
    lines = [f"{frames} frames of {size}, {config.steps} steps, {device}"]
    for memory in MEMORIES:
        mark = "->" if memory == (store or chosen or config).memory else "  "
        lines.append(f"{mark} store with memory {memory}: {format_bytes(demand.nbytes(memory, settings))}")
    if chosen:
        lines.append(f"   store: {chosen}")
    models = (checkpoint.unet, checkpoint.vae, *checkpoint.text_encoders)
    weights, free = sum(p.nbytes for model in models for p in model.parameters()), available_bytes(device)
    lines.append(
        f"   model: {format_bytes(weights)}; free on {device}: {'unknown' if free is None else format_bytes(free)}"
    )
    if store:
        kept = store.kept_steps
    else:
        kept = settings.kept_steps(config.steps) if chosen and chosen.memory != "recompute" else 0
    lines.append(f"   UNet calls: {_calls(configs, kept, not store, edits)}")
    chunk = config.chunk_frames
    if chunk is not None and chunk < frames and (config.clip_norm or not config.keys.anchored):
        lines.append("   chunks approximate the whole clip: its frames meet through neighbours or clip norm")
    return "\n".join(lines)


def _calls(configs: list[EditConfig], kept_steps: int, inverts: bool, edits: bool) -> str:
    """How often the UNet sees the clip."""
    counted = [unet_calls(c.steps, c.guidance_scale, kept_steps, c.fusion) for c in configs]
    source = max(calls.source for calls in counted)
    parts = [f"{counted[0].invert} to invert"] if inverts else []
    if edits:
        parts.append(f"{sum(calls.edit for calls in counted)} for {len(configs)} edit(s)")
        parts += [f"{source} for the source beside"] if source else []
    return ", ".join(parts)


def invert_video(
    checkpoint: Checkpoint,
    config: EditConfig,
    video: Video,
    bar: Callable[[str], Callable[[int, int], None]],
    settings: StoreSettings | None = None,
) -> Inversion:
    """Encode and invert a clip with a configuration's settings; its store's unless others are given."""
    source = checkpoint.encode_prompt(config.source, *video.size, checkpoint.blocks(config.source))
    fps = video.fps
    return invert(
        checkpoint.denoiser, encode(checkpoint, video.frames, bar("encode")), source, config.steps, config.keys,
        config.clip_norm, settings or config.store, config.chunk_frames, prompt=config.source,
        extra={"fps": [fps.numerator, fps.denominator], "model": config.model}, progress=bar("invert"),
    )  # fmt: skip


def one_edit(checkpoint: Checkpoint, config: EditConfig, prompt: Any, latents_shape: tuple[int, ...]) -> Edit:
    """A configuration's edit, its prompts encoded."""
    height, width = (side * checkpoint.factor for side in latents_shape[-2:])
    blocks = checkpoint.blocks(config.target, config.negative)
    target, negative = (
        checkpoint.encode_prompt(text, width, height, blocks) for text in (config.target, config.negative)
    )
    return Edit(target, negative, config.guidance_scale, prompt, config.fusion)


def encode(checkpoint: Checkpoint, frames: Tensor, progress: Callable[[int, int], None]) -> Tensor:
    """Latents of uint8 frames (frames, height, width, 3); pictures are unpacked one at a time."""
    parts = []
    for i, frame in enumerate(frames.split(1)):
        parts.append(checkpoint.encode_frames(to_unit(frame)).float())
        progress(i + 1, len(frames))
    return torch.cat(parts)


def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """uint8 frames (frames, height, width, 3) of latents, one at a time."""
    return torch.cat([to_bytes(checkpoint.decode_latents(latent)) for latent in latents.split(1)])


def _with_store(config: EditConfig, store: AttentionStore) -> EditConfig:
    """A configuration that says what the store was made with; StoreError where it says otherwise."""
    default = EditConfig()
    said = {
        "steps": (config.steps, store.steps),
        "memory": (default.memory if config.memory == "auto" else config.memory, store.memory),
        "clip_norm": (config.clip_norm, store.clip_norm),
        "key_frames": (config.key_frames, store.key_frames.entries),
        "source": (config.source, store.prompt),
    }
    for name, (asked, held) in said.items():
        if asked not in (held, getattr(default, name)):
            raise StoreError(f"the store was made with {name} {held!r}, not {asked!r}")
    model = config.model if config.model != default.model else store.extra.get("model", config.model)
    return replace(
        config, steps=store.steps, memory=store.memory, clip_norm=store.clip_norm, model=model, count=store.frames,
        key_frames=store.key_frames.entries, key_frames_least_channels=store.key_frames.least_channels,
        source=store.prompt or config.source,
    )  # fmt: skip


def _latents_shape(video: Video, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    width, height = video.size
    return len(video.frames), 4, height // checkpoint.factor, width // checkpoint.factor
