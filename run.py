"""From a video file to a video file: what `fatezero edit` and `fatezero invert` do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .attention.store import AttentionStore, StoreError, available_bytes, store_bytes
from .config import EditConfig
from .diffusion.edit import check_store, edit, unet_calls
from .diffusion.invert import Inversion, invert
from .hosts.checkpoint import Checkpoint, quiet
from .video.read import Sound, Video, read_video
from .video.size import check_size, crop, fit_size, resize_to_fill, to_bytes, to_unit
from .video.write import check_output, write_video

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
    video = read_video(config.video, config.start, config.stride, config.count)
    left, top, right, bottom = config.crop
    frames = crop(video.frames, left, top, right, bottom)
    if config.size is None:
        width, height = fit_size(frames.shape[2], frames.shape[1], native, factor)
    else:
        width, height = config.size
        check_size(width, height, factor)
    return Video(resize_to_fill(frames, width, height), video.fps, video.sound)


@dataclass
class _Run:
    """What both commands share."""

    console: Console
    bars: Bars

    def open_model(self, config: EditConfig, model_config: str | None, device: str, dtype: str) -> Checkpoint:
        where = pick_device(device)
        with quiet():
            checkpoint = Checkpoint.load(
                config.model, where, pick_dtype(dtype, where), model_config, config.lora or None
            )
        if config.model == "demo":
            self.console.print(
                "[yellow]note:[/] the bundled demo model knows only its own small world; for real videos give --model"
            )
        return checkpoint

    def plan(self, checkpoint: Checkpoint, config: EditConfig, latents_shape: tuple[int, ...], edits: int) -> None:
        """Say what will run and what it takes."""
        denoiser = checkpoint.denoiser
        frames, _, height, width = latents_shape
        sites = [s for s in denoiser.sites(height, width) if config.max_tokens is None or s.tokens <= config.max_tokens]
        source = checkpoint.encode_prompt(config.source, width * checkpoint.factor, height * checkpoint.factor)
        calls = unet_calls(config.steps, config.guidance_scale, config.memory, config.fusion)
        size, device = checkpoint.unet.dtype.itemsize, checkpoint.unet.device
        lines = [
            f"{frames} frames of {width * checkpoint.factor}x{height * checkpoint.factor}, "
            f"{config.steps} steps, {device}"
        ]
        for memory in ("recompute", "queries_keys", "maps"):
            needed = store_bytes(memory, sites, latents_shape, config.steps, source, config.keys, 4, size)
            mark = "->" if memory == config.memory else "  "
            lines.append(f"{mark} store with memory {memory}: {_bytes(needed)}")
        free = available_bytes(device)
        weights = sum(
            p.nbytes for m in (checkpoint.unet, checkpoint.vae, *checkpoint.text_encoders) for p in m.parameters()
        )
        lines.append(
            f"   model: {_bytes(weights)}; free on {device}: {_bytes(free) if free is not None else 'unknown'}"
        )
        lines.append(
            f"   UNet calls: {calls[0]} to invert" + (f", {calls[1]} for each of {edits} edit(s)" if edits else "")
        )
        self.console.print("\n".join(lines), markup=False)


@dataclass
class InvertRun(_Run):
    """`fatezero invert`."""

    def __init__(
        self,
        config: EditConfig,
        output: Path,
        model_config: str | None,
        device: str,
        dtype: str,
        console: Console,
        bars: Bars,
    ) -> None:
        super().__init__(console, bars)
        self.config, self.output = config, output
        self.model_config, self.device, self.dtype = model_config, device, dtype

    def run(self, dry_run: bool) -> None:
        config = self.config
        config.keys.windows(1, None)
        checkpoint = self.open_model(config, self.model_config, self.device, self.dtype)
        video = load_frames(config, checkpoint.factor, checkpoint.native_size)
        self.plan(checkpoint, config, _latents_shape(video, checkpoint), edits=0)
        if dry_run:
            return
        with self.bars() as bar:
            inversion = invert_video(checkpoint, config, video, bar)
        inversion.store.save(self.output)
        self.console.print(f"store of {_bytes(inversion.store.nbytes)} written to {self.output}", soft_wrap=True)


@dataclass
class EditRun(_Run):
    """`fatezero edit`: one inversion, one edit for each configuration."""

    def __init__(
        self,
        configs: list[EditConfig],
        output: Path,
        store: Path | None,
        model_config: str | None,
        device: str,
        dtype: str,
        console: Console,
        bars: Bars,
    ) -> None:
        super().__init__(console, bars)
        self.configs, self.output, self.store = configs, output, store
        self.model_config, self.device, self.dtype = model_config, device, dtype

    def run(self, dry_run: bool) -> None:
        first = self.configs[0]
        stored = AttentionStore.load(self.store) if self.store else None
        if stored is not None:
            self.configs = [_with_store(c, stored) for c in self.configs]
            first = self.configs[0]
        for config in self.configs:
            config.fusion  # noqa: B018  every setting is checked before the model is loaded
            check_output(self.output, config.count or 2 if stored is None else stored.frames)
        if stored is None:
            read_video(first.video, first.start, first.stride, 1)
        checkpoint = self.open_model(first, self.model_config, self.device, self.dtype)
        edits = [config.prompt_edit(checkpoint.tokenizer) for config in self.configs]
        fps, sound, video = _fps_and_sound(stored)
        if stored is None:
            video = load_frames(first, checkpoint.factor, checkpoint.native_size)
            fps, sound = video.fps, video.sound
            self.plan(checkpoint, first, _latents_shape(video, checkpoint), len(edits))
        else:
            stored.latents = stored.latents.to(checkpoint.unet.device)
            check_store(stored, checkpoint.denoiser, checkpoint.denoiser.schedule(stored.steps), edits[0])
            if first.video:
                sound = _check_video(first, stored)
            self.plan(checkpoint, first, tuple(stored.latents.shape[1:]), len(edits))
        if dry_run:
            return
        with self.bars() as bar:
            if stored is None:
                assert video is not None
                inversion = invert_video(checkpoint, first, video, bar)
            else:
                inversion = Inversion(stored)
            for i, (config, prompt) in enumerate(zip(self.configs, edits, strict=True)):
                title = f"edit {i + 1} of {len(edits)}" if len(edits) > 1 else "edit"
                frames = edit_video(checkpoint, config, inversion, prompt, bar(title))
                path = self.output if len(edits) == 1 else self.output.with_stem(f"{self.output.stem}_{i}")
                write_video(path, frames, fps, sound)
                self.console.print(f"{config.target!r} written to {path}", soft_wrap=True, markup=False)


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
    from dataclasses import replace

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


def _fps_and_sound(store: AttentionStore | None) -> tuple[Fraction, Sound | None, Video | None]:
    fps = Fraction(*store.extra["fps"]) if store is not None and "fps" in store.extra else Fraction(8)
    return fps, None, None


def _check_video(config: EditConfig, store: AttentionStore) -> Sound | None:
    """A video given beside a store lends its sound; its frames must be as many."""
    video = read_video(config.video, config.start, config.stride, store.frames)
    return video.sound


def _latents_shape(video: Video, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    width, height = video.size
    return len(video.frames), 4, height // checkpoint.factor, width // checkpoint.factor


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
