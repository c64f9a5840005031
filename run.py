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

from .attention.store import MEMORIES, AttentionStore, StoreError, available_bytes, format_bytes, store_bytes
from .config import EditConfig
from .diffusion.edit import check_store, edit, unet_calls
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
    """`fatezero invert`: keep an inversion in a file."""
    checkpoint = session.open_model(config)
    video = load_frames(config, checkpoint.factor, checkpoint.native_size)
    session.say(plan(checkpoint, config, _latents_shape(video, checkpoint), edits=0))
    if dry_run:
        return
    with session.bars() as bar:
        inversion = invert_video(checkpoint, config, video, bar)
        inversion.store.save(output)
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
        store.latents = store.latents.to(checkpoint.unet.device)
        schedule = checkpoint.denoiser.schedule(store.steps)
        for prompt in prompts:
            check_store(store, checkpoint.denoiser, schedule, prompt)
        shape, fps = tuple(store.latents.shape[1:]), Fraction(*store.extra.get("fps", (8, 1)))
        # A video given beside a store lends its sound; it must have the store's frames.
        sound = read_video(first.video, first.start, first.stride, store.frames).sound if first.video else None
    session.say(plan(checkpoint, first, shape, len(configs)))
    if dry_run:
        return

    with session.bars() as bar:
        inversion = invert_video(checkpoint, first, video, bar) if store is None else Inversion(store)
        for i, (config, prompt) in enumerate(zip(configs, prompts, strict=True)):
            alone = len(configs) == 1
            progress = bar("edit" if alone else f"edit {i + 1} of {len(configs)}")
            frames = edit_video(checkpoint, config, inversion, prompt, progress)
            path = output if alone else output.with_stem(f"{output.stem}_{i}")
            write_video(path, frames, fps, sound)
            session.say(f"{config.target!r} written to {path}")


def plan(checkpoint: Checkpoint, config: EditConfig, latents_shape: tuple[int, ...], edits: int) -> str:
    """What will run and what it takes, in a few lines."""
    frames, _, height, width = latents_shape
    sites = checkpoint.denoiser.sites(height, width)
    sites = [site for site in sites if config.max_tokens is None or site.tokens <= config.max_tokens]
    height, width = height * checkpoint.factor, width * checkpoint.factor
    source = checkpoint.encode_prompt(config.source, width, height)
    size, device = checkpoint.unet.dtype.itemsize, checkpoint.unet.device
    lines = [f"{frames} frames of {width}x{height}, {config.steps} steps, {device}"]
    for memory in MEMORIES:
        needed = store_bytes(memory, sites, latents_shape, config.steps, source, config.keys, 4, size)
        lines.append(f"{'->' if memory == config.memory else '  '} store with memory {memory}: {format_bytes(needed)}")
    models = (checkpoint.unet, checkpoint.vae, *checkpoint.text_encoders)
    weights, free = sum(p.nbytes for model in models for p in model.parameters()), available_bytes(device)
    lines.append(
        f"   model: {format_bytes(weights)}; free on {device}: {'unknown' if free is None else format_bytes(free)}"
    )
    to_invert, to_edit = unet_calls(config.steps, config.guidance_scale, config.memory, config.fusion)
    lines.append(
        f"   UNet calls: {to_invert} to invert" + (f", {to_edit} for each of {edits} edit(s)" if edits else "")
    )
    return "\n".join(lines)


def invert_video(
    checkpoint: Checkpoint, config: EditConfig, video: Video, bar: Callable[[str], Callable[[int, int], None]]
) -> Inversion:
    """Encode and invert a clip with a configuration's settings."""
    width, height = video.size
    blocks = checkpoint.blocks(config.source)
    source = checkpoint.encode_prompt(config.source, width, height, blocks)
    latents = checkpoint.encode_frames(to_unit(video.frames), bar("encode")).float()
    inversion = invert(
        checkpoint.denoiser, latents, source, config.steps, config.keys, config.clip_norm,
        config.memory, config.chunk_frames, max_tokens=config.max_tokens, prompt=config.source,
        progress=bar("invert"),
    )  # fmt: skip
    fps = video.fps
    inversion.store.extra = {"fps": [fps.numerator, fps.denominator], "model": config.model}
    return inversion


def edit_video(
    checkpoint: Checkpoint, config: EditConfig, inversion: Inversion, prompt: Any, progress: Callable[[int, int], None]
) -> Tensor:
    """One edit of an inverted clip, decoded: uint8 (frames, height, width, 3)."""
    height, width = (side * checkpoint.factor for side in inversion.latents.shape[-2:])
    blocks = checkpoint.blocks(config.target, config.negative)
    target = checkpoint.encode_prompt(config.target, width, height, blocks)
    negative = checkpoint.encode_prompt(config.negative, width, height, blocks)
    latents = edit(
        checkpoint.denoiser, inversion, target, negative, config.guidance_scale,
        prompt, config.fusion, config.chunk_frames, progress=progress,
    )  # fmt: skip
    return to_bytes(checkpoint.decode_latents(latents))


def _with_store(config: EditConfig, store: AttentionStore) -> EditConfig:
    """A configuration that says what the store was made with; StoreError where it says otherwise."""
    default = EditConfig()
    said = {
        "steps": (config.steps, store.steps),
        "memory": (config.memory, store.memory),
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
