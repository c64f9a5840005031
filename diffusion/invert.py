"""DDIM inversion that records what the edit will need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.key_frames import KeyFrames
from ..attention.records import Recorder
from ..attention.store import AttentionStore, Condition, available_bytes, check_memory, store_bytes
from .ddim import ddim_move
from .denoiser import Denoiser, predict_clip

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
    memory: str = "recompute",
    chunk_frames: int | None = None,
    *,
    max_tokens: int | None = None,
    prompt: str | None = None,
    store_device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Inversion:
    """DDIM inversion of a clip at guidance 1 (FateZero Sec. 3.1).

    latents: (frames, 4, h, w), scaled as the UNet knows them. source_embeddings: (1, tokens,
    dim), or a `Condition`. key_frames: whose keys and values a frame sees, see `KeyFrames`.
    clip_norm: take the ResNet blocks' GroupNorm statistics over the whole clip. memory: see
    `AttentionStore`. chunk_frames: frames of one UNet call, None for all. max_tokens: record
    only layers of up to this many tokens. prompt: kept in the store, to check edits against.
    store_device: where attention is kept as it is recorded; None for the latents' device.

    At step i the UNet is called at the *target* timestep with the latent of the level
    before, as the authors' code does. Raises ValueError for bad shapes or options and
    MemoryError, with the bytes, where the chosen memory does not fit.
    """
    kind, keys = check_memory(memory), KeyFrames.of(key_frames)
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be (frames, 4, h, w), at least one frame")
    source = Condition.of(source_embeddings, "source_embeddings").to(latents)
    schedule = denoiser.schedule(steps)
    frames, _, height, width = latents.shape
    sites = [s for s in denoiser.sites(height, width) if max_tokens is None or s.tokens <= max_tokens]
    needed = store_bytes(
        kind, sites, tuple(latents.shape), steps, source, keys, latents.element_size(), denoiser.dtype.itemsize
    )
    place = torch.device(latents.device if store_device is None else store_device)
    _check_room(kind, needed, place)

    wanted = set() if kind == "recompute" else {site.name for site in sites}
    trajectory, records = [latents], []
    for i, timestep in enumerate(reversed(schedule.timesteps)):
        z = trajectory[-1]
        recorder = Recorder(keys, frames, wanted, maps=kind == "maps")
        noise = predict_clip(denoiser, recorder, z, timestep, source, clip_norm, chunk_frames)
        trajectory.append(ddim_move(z, noise, schedule.alphas[i], schedule.alphas[i + 1]))
        if wanted:
            records.append({name: record.to(place) for name, record in recorder.records.items()})
        if progress:
            progress(i + 1, steps)
    store = AttentionStore(
        memory=kind,
        latents=torch.stack(trajectory),
        source=source,
        timesteps=schedule.timesteps,
        alphas=tuple(schedule.alphas.tolist()),
        key_frames=keys,
        clip_norm=clip_norm,
        model=denoiser.identity(),
        prompt=prompt,
        records=records[::-1],
    )
    return Inversion(store)


def _check_room(memory: str, needed: int, device: torch.device) -> None:
    free = available_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f'memory "{memory}" needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on {device}; '
            'memory "recompute" keeps the latents alone'
        )
