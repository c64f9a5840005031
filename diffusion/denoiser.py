"""What the loops ask of a host."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..attention.control import AttentionSite, Control
from ..attention.store import Condition, ModelIdentity
from .ddim import Schedule


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the negative prompt, the control of its branch, the scale."""

    negative: Condition
    control: Control
    scale: float


class Denoiser(Protocol):
    """A UNet with its schedule, hooked by a host adapter (`hosts/`)."""

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""

    def schedule(self, steps: int) -> Schedule:
        """The noise levels of a run of `steps`."""

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        """The attention layers on latents of this size."""

    def identity(self) -> ModelIdentity:
        """What tells this model from another."""

    def controlled(self, control: Control, clip_norm: bool = False) -> AbstractContextManager[None]:
        """Let `control` compute attention inside the `with` block; leave no trace after it."""

    def predict_noise(
        self, latents: Tensor, timestep: int, condition: Condition, guidance: Guidance | None = None
    ) -> Tensor:
        """Epsilon of (frames, 4, h, w) latents at a timestep, guided away from a negative prompt."""


def predict_clip(
    denoiser: Denoiser,
    control: Control,
    latents: Tensor,
    timestep: int,
    condition: Condition,
    clip_norm: bool,
    chunk_frames: int | None,
    guidance: Guidance | None = None,
) -> Tensor:
    """Epsilon of a whole clip under a control, in one UNet call or in chunks of frames."""
    frames = len(latents)
    pieces = control.key_frames.windows(frames, chunk_frames)
    if clip_norm and len(pieces) > 1:
        raise ValueError(
            f"chunk_frames={chunk_frames} needs clip_norm=False: clip norm takes statistics over all {frames} frames"
        )
    parts = []
    with denoiser.controlled(control, clip_norm):
        for held, kept in pieces:
            for branch in (control, guidance.control) if guidance else (control,):
                branch.frames, branch.kept = held, kept
            noise = denoiser.predict_noise(latents[list(held)], timestep, condition, guidance)
            parts.append(noise if held == kept else noise[[held.index(f) for f in kept]])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
