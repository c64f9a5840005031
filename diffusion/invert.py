"""DDIM inversion that records what the edit will need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.budget import Demand, StoreSettings, plan_store
from ..attention.key_frames import KeyFrames
from ..attention.records import Recorder, whole_clip
from ..attention.store import AttentionStore, Condition
from .ddim import ddim_move
from .denoiser import Denoiser, check_finite, frames_of, joined, pieces_of

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""


@dataclass(frozen=True)
class Inversion:
    """A clip carried to noise. `latents`: (steps + 1, frames, 4, h, w), clean to noisy."""

    store: AttentionStore

    @property
    def latents(self) -> Tensor:
        return self.store.latents


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    latents: Tensor,
    source_embeddings: Tensor | Condition,
    steps: int = 50,
    key_frames: KeyFrames | Iterable[str | int] | str | int = ("self", "middle"),
    clip_norm: bool = False,
    memory: str | StoreSettings = "recompute",
    chunk_frames: int | None = None,
    *,
    prompt: str | None = None,
    extra: dict[str, Any] | None = None,
    attachments: dict[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Inversion:
    """DDIM inversion of a clip at guidance 1 (FateZero Sec. 3.1).

    latents: (frames, 4, h, w), scaled as the UNet knows them. source_embeddings: (1, tokens,
    dim), or a `Condition`. key_frames: whose keys and values a frame sees, see `KeyFrames`.
    clip_norm: take the ResNet blocks' GroupNorm statistics over the whole clip. memory: a
    name, or `StoreSettings`. chunk_frames: frames of one UNet call, None for all; see
    `KeyFrames.pieces` for when this approximates. prompt, extra, attachments: kept in the store, to check edits
    against and for the caller's own use; `extra` must fit JSON, `attachments` are tensors.

    At step i the UNet is called at the *target* timestep with the latent of the level
    before, as the authors' code does. Raises ValueError for bad shapes or options, ArithmeticError where the
    model's numbers leave their range, and MemoryError, with the bytes, where the chosen memory does not fit.
    """
    settings, keys = StoreSettings.of(memory), KeyFrames.of(key_frames)
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be (frames, 4, h, w), at least one frame")
    source = Condition.of(source_embeddings, "source_embeddings").to(latents)
    schedule = denoiser.schedule(steps)
    keys.pieces(len(latents), chunk_frames, clip_norm)
    sites = denoiser.sites(*latents.shape[-2:])
    shape, size = tuple(latents.shape), latents.element_size()
    demand = Demand(sites, shape, size, steps, keys, denoiser.dtype, source.columns, source.nbytes)
    plan = plan_store(settings, demand, latents.device)
    store = AttentionStore(
        memory=plan.memory,
        levels=latents.expand(steps + 1, *latents.shape),  # their shape; the values come as they are computed
        source=source,
        timesteps=schedule.timesteps,
        alphas=tuple(schedule.alphas.tolist()),
        key_frames=keys,
        clip_norm=clip_norm,
        model=denoiser.identity(),
        prompt=prompt,
        extra=extra or {},
        attachments=attachments or {},
    )
    wanted, precision = {site.name for site in sites if settings.keeps(site)}, settings.stored(denoiser.dtype)
    z = latents
    with store.filling(plan, settings, demand, latents.device) as put, denoiser.hooked(clip_norm):
        put(0, z, {})
        for i, timestep in enumerate(reversed(schedule.timesteps)):
            step = steps - 1 - i  # of the edit, which goes the other way
            kept = wanted if step < store.kept_steps else set()
            pieces = pieces_of(denoiser, keys, z, timestep, chunk_frames, clip_norm)
            recorders = [Recorder(keys, piece, kept, plan.memory, precision) for piece in pieces]
            noise = [denoiser.predict_noise(frames_of(z, r.piece), timestep, source, r) for r in recorders]
            z = ddim_move(z, joined(pieces, noise), schedule.alphas[i], schedule.alphas[i + 1])
            check_finite(z, f"the inversion's latents at step {i + 1} of {steps}")
            put(i + 1, z, whole_clip(recorders, sites) if kept else {})
            if progress:
                progress(i + 1, steps)
    return Inversion(store)
