"""The plan of a run: memory, calls of the model, and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames, Windows
from ..attention.masks import GivenMask
from ..diffusion.denoiser import Denoiser, frames_meet, keys_on
from ..diffusion.invert import levels_among, recomputed, training_windows
from ..diffusion.schedule import Schedule, reused_steps
from ..files.memory import check_room, free_bytes
from ..files.safetensors import format_bytes
from ..imports import no_grad, torch
from ..recipes.cost import Calls, beside_plain, fastest_memory
from ..recipes.recipe import Recipe
from ..store.budget import Demand, StorePlan, StoreSettings, available_bytes, plan_store
from ..store.records import MEMORIES
from ..store.store import AttentionStore
from .config.settings import EditConfig
from .progress import in_words

if TYPE_CHECKING:
    from ..hosts.diffusers.model import Model


CHUNK_FRAMES = 16
"""Default frames of a call, if chunks give the whole clip's result."""


def in_chunks(
    config: EditConfig, checkpoint: Model, frames: int, store: AttentionStore | None = None, processes: int = 1
) -> EditConfig:
    """A configuration with the frames of each call of the model, if it gives none, for a clip of so many latents:
    chunks that give the whole clip's result, else the windows of the store or of the model's training.

    ValueError where several processes have only one window, and for an overlap without windows.
    """
    denoiser, ratio = checkpoint.denoiser, checkpoint.frames_per_latent
    given = config.chunk_frames is not None or config.window_frames is not None
    if config.window_overlap and config.window_frames is None and (store or denoiser.trained_frames is None):
        raise ValueError(f"window_overlap is {config.window_overlap}, but no windows are set: give window_frames too")
    if not frames_meet(denoiser, ClipCalls(config.keys, config.clip_norm)):
        most = CHUNK_FRAMES if processes == 1 else -(-frames // processes)
        return config if given or frames <= most else replace(config, chunk_frames=most)
    usual = None if given or store else training_windows(denoiser, frames, config.memory)
    if usual is not None:
        config = replace(config, window_frames=(usual.frames - 1) * ratio + 1)
    windows = windows_of(config, checkpoint) or (store and store.windows)
    if processes > 1 and (windows is None or windows.frames >= frames):
        raise ValueError(
            f"several processes need windows shorter than the clip's {frames} latents, which only approximate the "
            "whole clip: give --window-frames"
        )
    return config


def windows_of(config: EditConfig, checkpoint: Model) -> Windows | None:
    """The windows or chunks of the model's calls, None for the whole clip."""
    return Windows.of(config.chunk_frames) or config.windows(checkpoint.frames_per_latent)


def in_windows(store: AttentionStore, config: EditConfig, checkpoint: Model) -> AttentionStore:
    """A store whose edits run in the configuration's windows, if it gives some."""
    return replace(store, windows=config.windows(checkpoint.frames_per_latent) or store.windows)


def check_size_fits(model: Model, latents_shape: Sequence[int]) -> None:
    """Raise ValueError for frames that do not fit into memory, from the autoencoder's memory for one frame."""
    frames, _, *grid = latents_shape
    height, width = (side * model.factor for side in grid)
    at_once = model.frames_at_once(height, width) or frames
    what = f"{width}x{height}: {'a frame' if at_once == 1 else f'{at_once} frames'}"
    check_room(what, 15 * at_once * height * width, free_bytes(), _SMALLER)
    needed = model.coding_bytes(height, width)
    check_room(f"{width}x{height}: the autoencoder", needed, available_bytes(model.device), _SMALLER)


_SMALLER = "choose a smaller --size, or crop the video"


def store_for(checkpoint: Model, configs: Sequence[EditConfig], latents_shape: Sequence[int]) -> StoreSettings:
    """The settings of an inversion's store, for the edits that read it."""
    grid = checkpoint.denoiser.subset_grid(*latents_shape[-2:])
    injections = [config.planned_recipe().injection for config in configs]
    return replace(configs[0].store, fastest=fastest_memory(injections, grid))


def plan(
    checkpoint: Model,
    configs: list[EditConfig],
    latents_shape: tuple[int, ...],
    settings: StoreSettings | None,
    edits: bool,
    store: AttentionStore | None = None,
    masks: Sequence[GivenMask | None] = (),
) -> str:
    """The plan of a run, in a few lines.

    settings: of the store; None for `store_for`. store: from a file, instead of an inversion. masks: of the edits.
    """
    settings = settings or store_for(checkpoint, configs, latents_shape)
    config, device, denoiser = configs[0], checkpoint.device, checkpoint.denoiser
    check_size_fits(checkpoint, latents_shape)
    schedule = config.recipe().start.schedule(denoiser.schedule(config.steps))  # raises for those it cannot take
    if config.inversion_steps and not store:
        levels_among(schedule, denoiser.schedule(config.inversion_steps))
    frames, _, height, width = latents_shape
    source = checkpoint.encode_prompt(config.source, width * checkpoint.factor, height * checkpoint.factor)
    keys, windows = keys_on(denoiser, config.keys), windows_of(config, checkpoint) or (store and store.windows)
    at_once = min(windows.frames, frames) if windows else frames
    parts = at_once < frames and frames_meet(denoiser, ClipCalls(keys, config.clip_norm))
    demand = Demand(
        denoiser.sites(height, width), latents_shape, 4, config.steps, keys, checkpoint.dtype, source.text_tokens,
        source.nbytes, parts,
    )  # fmt: skip
    inverts = not store and config.noise == "inverted"
    settings = recomputed(settings) if config.inversion_steps or config.reuse_midpoint else settings
    chosen = plan_store(settings, demand, device) if inverts else None
    size = f"{width * checkpoint.factor}x{height * checkpoint.factor}"
    what = "latents" if denoiser.spans_clip else "frames"
    lines = [f"{frames} {what} of {size}, {config.steps} steps, {device}"]
    if coding := checkpoint.coding(height * checkpoint.factor, width * checkpoint.factor):
        lines.append(f"   autoencoder: {coding}")
    if store or inverts:
        lines += _about_store(demand, settings, (store or chosen or config).memory, chosen)
    else:
        lines.append(f"   latents of the clip: {format_bytes(demand.latents_bytes // (config.steps + 1))}")
    weights, free = sum(p.nbytes for part in checkpoint.parts for p in part.parameters()), available_bytes(device)
    lines.append(
        f"   model: {format_bytes(weights)}; free on {device}: {'unknown' if free is None else format_bytes(free)}"
    )
    if store:
        kept = store.kept_steps
    else:
        kept = settings.kept_steps(config.steps) if chosen and chosen.memory != "recompute" else 0
    memory = store.memory if store else chosen.memory if chosen else "recompute"
    more = {"kept_steps": kept, "memory": memory, "grid": denoiser.subset_grid(height, width)}
    recipes = [config.planned_recipe() for config in configs]
    if masks:
        recipes = [replace(recipe, mask=mask) for recipe, mask in zip(recipes, masks, strict=True)]
    parts_of_run = _calls(configs, recipes, inverts, edits, denoiser, schedule, frames=frames, **more)
    counted = ", ".join(f"{calls:g} for the {part}" for part, calls in parts_of_run.items())
    lines.append(f"   {'model' if denoiser.spans_clip else 'UNet'} calls: {counted}")
    if edits:
        branches = [1 if config.guidance_scale == 1 or denoiser.embeds_guidance else 2 for config in configs]
        lines.append(f"   {beside_plain(parts_of_run, config.steps * sum(branches))}")
    times = len(windows.starts(frames)) if windows and parts else frames / at_once
    seconds, nbytes = _cost_of_call(checkpoint, (at_once, *latents_shape[1:]), source, keys, config.clip_norm)
    lines.append(f"   a guided call of {at_once}: about {format_bytes(2 * nbytes)} of activations")
    lines.append(f"   time: about {in_words(sum(parts_of_run.values()) * seconds * times)}, and encoding and decoding")
    if parts:
        lines.append(
            f"   {times} windows of {at_once} {what} approximate the whole clip, whose frames depend on each other"
        )
    return "\n".join(lines)


def _about_store(demand: Demand, settings: StoreSettings, memory: str, chosen: StorePlan | None) -> list[str]:
    """The sizes of a store in each memory, the chosen one marked."""
    memories = MEMORIES if demand.sites else MEMORIES[:1]
    sizes = [(one, format_bytes(demand.nbytes(one, settings))) for one in memories]
    lines = [f"{'->' if one == memory else '  '} store with memory {one}: {size}" for one, size in sizes]
    lines += [f"   store: {chosen}"] if chosen else []
    on_disk = ", and on disk until the output is written" if chosen and chosen.memory == "recompute" else ""
    return [*lines, f"   latents of all levels, in every store{on_disk}: {format_bytes(demand.latents_bytes)}"]


def _calls(
    configs: list[EditConfig], recipes: list[Recipe], inverts: bool, edits: bool, denoiser: Denoiser,
    schedule: Schedule, **more: Any,
) -> dict[str, float]:  # fmt: skip
    """The calls of the model on the clip, by what they are for; a call with gradients counts as four. more: see
    `Recipe.calls`.
    """
    config = configs[0]
    if denoiser.embeds_guidance:  # one call instead of two
        recipes = [replace(recipe, guidance_scale=1.0, guidance_until=1.0) for recipe in recipes]
    reused = reused_steps(schedule, config.order) if config.reuse_midpoint else set()
    counted = [
        recipe.calls(config.steps, spans_clip=denoiser.spans_clip, reused=reused, **more)
        for recipe, config in zip(recipes, configs, strict=True)
    ]
    invert = counted[0].invert
    if config.inversion_steps:
        fine = denoiser.schedule(config.inversion_steps)
        invert = fine.steps - (len(reused_steps(fine, config.order)) if reused else 0)
    edit, prepare = sum(calls.edit for calls in counted), sum(calls.prepare for calls in counted)
    source = max(calls.source for calls in counted)
    whole = Calls(invert if inverts else 0, *((edit, source, prepare) if edits else (0, 0, 0)))
    gradients = sum(c.layout.guided_calls(c.steps) for c in configs if c.places_objects) if edits else 0
    parts = {
        f"{len(configs)} edits" if part == "edit" and len(configs) > 1 else part: n for part, n in whole.parts.items()
    }
    return parts | ({"gradients of the layout": 4.0 * gradients} if gradients else {})


@no_grad
def _cost_of_call(
    checkpoint: Model, shape: tuple[int, ...], source: Condition, keys: KeyFrames, clip_norm: bool
) -> tuple[float, int]:
    """The seconds and peak bytes of a model call, measured with one call.

    A quick one is timed by a second, for the first makes things ready.
    """
    from ..hosts.diffusers.memory import LiveBytes

    denoiser, control = checkpoint.denoiser, Control(keys, Chunk.whole(shape[0]))
    latents = torch.zeros(shape, device=denoiser.device)

    def called() -> float:
        begun = time.perf_counter()
        denoiser.predict_noise(latents, 500, source, control).sum().item()  # waits for the device
        return time.perf_counter() - begun

    with denoiser.hooked(clip_norm):
        with LiveBytes(*checkpoint.parts) as live:
            seconds = called()
        return (seconds if seconds > 1 else called()), live.most
