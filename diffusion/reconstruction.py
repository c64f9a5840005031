"""Guided sampling of the source from its inverted noise, whose attention Prompt-to-Prompt uses (FateZero, Fig. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk
from ..imports import torch
from ..store.store import AttentionStore
from .denoiser import Denoiser, Guidance, frames_of, joined
from .schedule import Solver

if TYPE_CHECKING:
    from torch import Tensor


def reconstructed(
    denoiser: Denoiser,
    store: AttentionStore,
    negative: Tensor | Condition | None,
    guidance_scale: float,
    chunks: Sequence[Sequence[Chunk]],
) -> AttentionStore:
    """A view of a store with the latents of guided sampling, which drift from the clip, and no attention of its own.

    negative: its embeddings (1, tokens, dim); unused at guidance 1. chunks: of every step. Called while the denoiser is
    hooked.
    """
    steps, solver = store.steps, Solver(denoiser.schedule(store.steps), store.order)
    z = store.level(steps).to(denoiser.device)
    away = None if negative is None or guidance_scale == 1 else Condition.of(negative, "negative_embeddings").to(z[:1])
    away = away and away.with_pictures_of(store.source)
    levels = [z]

    def predicted(step: int, chunk: Chunk) -> Tensor:
        plain, other = (Control(store.key_frames, chunk) for _ in range(2))
        guidance = None if away is None else Guidance(away, other, guidance_scale)
        return denoiser.predict_noise(frames_of(z, chunk), store.timesteps[step], store.source, plain, guidance)

    for step, parts in enumerate(chunks):
        z = solver.move(z, joined(parts, [predicted(step, chunk) for chunk in parts]), steps - step, steps - step - 1)
        levels.append(z)
    return replace(store, levels=torch.stack(levels[::-1]), memory="recompute", backend=None, kept_steps=0)
