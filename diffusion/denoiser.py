"""What the loops ask of a host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control
from ..attention.key_frames import ALL, Chunk, KeyFrames
from ..imports import torch
from ..store.identity import ModelIdentity
from ..store.records import Beside
from .schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

Windows = Sequence[tuple[Sequence[int], Sequence[float]]]
"""Frames to look at together, and how much each frame's result counts."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the negative prompt, the control of its branch, the scale."""

    negative: Condition
    control: Control
    scale: float


class Predictor(Protocol):
    """A model that tells the noise of latents, hooked by a host adapter (`hosts/`)."""

    def hooked(self, clip_norm: bool = False) -> AbstractContextManager[None]:
        """Hook the model for a run; leave no trace after the `with` block."""

    def predict_noise(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, guidance: Guidance | None = None
    ) -> Tensor:
        """What a step goes along (`schedule`) of the latents of a chunk's frames, (frames, c, h, w), guided away from a
        negative prompt: epsilon, or the velocity of a flow.

        `control` computes attention, and its `chunk` tells which of the clip's frames these are.
        """


class Denoiser(Predictor, Protocol):
    """A model with its schedule."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def spans_clip(self) -> bool:
        """Whether self-attention sees all frames of a call by itself, as a video transformer's does."""

    @property
    def pairs(self) -> bool:
        """Whether `predict_noise` takes a branch beside."""

    @property
    def frames_meet(self) -> bool:
        """Whether layers of the model mix all frames of a call, so that chunks only come near the whole clip."""

    @property
    def trained_with(self) -> tuple[tuple[str | int, ...], bool]:
        """The key frames, and whether clip norm, that the model was trained with."""

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        """beside: a branch to be evaluated within the call, by hosts that pair branches."""

    def schedule(self, steps: int) -> Schedule:
        """The noise levels of a run of `steps`."""

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        """The attention layers on latents of this size."""

    def identity(self) -> ModelIdentity:
        """What tells this model from another."""

    def windows(self, latents: Tensor, timestep: float) -> Windows | None:
        """The windows a host was told to see a clip through at a timestep; None for none."""


@runtime_checkable
class Differentiable(Denoiser, Protocol):
    """A denoiser whose latents can have gradients."""

    def gradient(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, value: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A number that a control has after a UNet call, and its gradient in the latents, of their shape.

        Activations are computed twice, and not kept. Raises ValueError for weights that no gradient passes through.
        """


def refuse_clip_norm(clip_norm: bool) -> None:
    """Raise ValueError where clip norm is asked of a video transformer."""
    if clip_norm:
        raise ValueError("clip_norm is for UNets: a video transformer has no GroupNorm")


def keys_on(denoiser: Denoiser, key_frames: KeyFrames | Iterable[str | int] | str | int) -> KeyFrames:
    """The key frames that are asked for, on a model that has none of its own: a video transformer's frames see all."""
    asked = KeyFrames.of(key_frames)
    return KeyFrames((ALL,)) if denoiser.spans_clip else asked


def frames_meet(denoiser: Denoiser, key_frames: KeyFrames, clip_norm: bool) -> bool:
    """Whether a frame's attention depends on which frames are in its call, beyond fixed key frames: several chunks then
    only come near the whole clip.
    """
    return clip_norm or denoiser.frames_meet or not key_frames.anchored


def in_parts(
    denoiser: Denoiser,
    key_frames: KeyFrames,
    latents: Tensor,
    timestep: float,
    chunk_frames: int | None,
    clip_norm: bool,
) -> bool:
    """Whether frames that meet run in several chunks, so that each has an attention in every chunk it is in."""
    chunks = chunks_of(denoiser, key_frames, latents, timestep, chunk_frames, clip_norm)
    return len(chunks) > 1 and frames_meet(denoiser, key_frames, clip_norm)


def chunks_of(
    denoiser: Denoiser,
    key_frames: KeyFrames,
    latents: Tensor,
    timestep: float,
    chunk_frames: int | None,
    clip_norm: bool,
) -> list[Chunk]:
    """The chunks a clip runs in at a timestep: chunks if asked for, else the host's windows, else one."""
    if chunk_frames is None:
        windows = denoiser.windows(latents, timestep)
        if windows is not None:
            return key_frames.around(windows, len(latents))
    return key_frames.chunks(len(latents), chunk_frames, clip_norm or denoiser.frames_meet)


def frames_of(latents: Tensor, chunk: Chunk) -> Tensor:
    """The latents of a chunk's frames."""
    return latents if chunk.is_whole else latents[list(chunk.frame_indices)]


def joined(chunks: Sequence[Chunk], parts: Sequence[Tensor]) -> Tensor:
    """One result for each frame of the clip, from the chunks' weighted ones."""
    if len(chunks) == 1 and chunks[0].is_whole:
        return parts[0]
    whole = torch.zeros(chunks[0].clip, *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device)
    for chunk, part in zip(chunks, parts, strict=True):
        weights = torch.tensor(chunk.weights, dtype=part.dtype).to(part.device)
        whole[list(chunk.frame_indices)] += weights.view(-1, *[1] * (part.ndim - 1)) * part
    return whole


def check_latents(latents: Tensor) -> None:
    """Raise ValueError for latents that are not those of a clip."""
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be (frames, c, h, w), at least one frame")


def check_finite(latents: Tensor, what: str) -> None:
    """Raise ArithmeticError for latents that hold an infinity or no number: all that follows would be black."""
    if not torch.isfinite(latents).all():
        raise ArithmeticError(
            f"{what} are not finite: a setting is too large (guidance, reweight), or the model's precision too small"
        )
