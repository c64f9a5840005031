"""The interface between the sampling loops and a host's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control
from ..attention.key_frames import ALL, Chunk, ClipCalls, KeyFrames, Windows
from ..attention.packed import PackedChunk, Packing
from ..imports import torch
from ..store.identity import ModelIdentity
from ..store.records import PairedBranch
from .schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

WeightedFrames = Sequence[tuple[Sequence[int], Sequence[float]]]
"""Windows of frames, with the weight of each frame's result."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the negative prompt, the control of its branch, the scale."""

    negative: Condition
    control: Control
    scale: float


class Predictor(Protocol):
    """A model that predicts noise, hooked by a host adapter (`hosts/`)."""

    def hooked(self, clip_norm: bool = False) -> AbstractContextManager[None]:
        """Hook the model for a run, and restore it after the `with` block."""

    def predict_noise(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, guidance: Guidance | None = None
    ) -> Tensor:
        """The guided prediction for latents (frames, c, h, w) of a chunk's frames: epsilon, or the velocity of a flow.

        `control` computes the attention; the latents are those of the frames of its `chunk`.
        """


class Denoiser(Predictor, Protocol):
    """A model with its schedule."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the model's computations."""

    @property
    def device(self) -> torch.device:
        """The device of the model's computations."""

    @property
    def spans_clip(self) -> bool:
        """Whether every frame attends to all frames of a call, as in a video transformer."""

    @property
    def pairs(self) -> bool:
        """Whether `predict_noise` can evaluate a second branch (`paired`)."""

    @property
    def frames_meet(self) -> bool:
        """Whether layers of the model mix all frames of a call, which makes chunks approximate."""

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the model (`Condition.with_guidance`), instead of a negative prompt."""

    @property
    def trained_frames(self) -> int | None:
        """The latent frames of the model's training clips, if longer ones run in windows of this length: not where the
        host decides on windows.
        """

    @property
    def packing(self) -> Packing | None:
        """That of latents with the sound of the video; None for frames, (frames, c, h, w)."""

    @property
    def trained_with(self) -> tuple[tuple[str | int, ...], bool]:
        """The key frames, and the clip norm, of the model's training."""

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        paired: PairedBranch | None = None,
    ) -> Tensor:
        """paired: a second branch to evaluate in the same call, if the host `pairs` branches."""

    def schedule(self, steps: int) -> Schedule:
        """The noise levels of a run with this number of steps."""

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        """The attention layers for latents of this size."""

    def subset_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """The tokens of a frame of latents, if a branch can have some of them only (`Control.rows`)."""

    def identity(self) -> ModelIdentity:
        """The identity of the model's weights."""

    def windows(self, latents: Tensor, timestep: float) -> Sequence[WeightedFrames] | None:
        """The host's context windows at a timestep, if any, and those of a sound packed with the frames."""


@runtime_checkable
class Differentiable(Denoiser, Protocol):
    """A denoiser that computes gradients in its latents."""

    def gradient(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, value: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A scalar `value()` after a UNet call, and its gradient in the latents.

        Activations are recomputed, not stored. Raises ValueError for weights without gradients.
        """


def refuse_clip_norm(clip_norm: bool) -> None:
    """Raise ValueError for clip norm on a video transformer."""
    if clip_norm:
        raise ValueError("clip_norm is for UNets: a video transformer has no GroupNorm")


def keys_on(denoiser: Denoiser, key_frames: KeyFrames | Iterable[str | int] | str | int) -> KeyFrames:
    """The given key frames; on a transformer "all" if its frames attend to all frames, else "self"."""
    keys = KeyFrames.of(key_frames)
    return keys if not denoiser.spans_clip else KeyFrames((ALL if denoiser.frames_meet else "self",))


def frames_meet(denoiser: Denoiser, calls: ClipCalls) -> bool:
    """Whether a frame's result depends on the other frames of its call, beyond fixed key frames: chunks are then
    approximate.
    """
    return calls.clip_norm or denoiser.frames_meet or not calls.key_frames.anchored


def in_parts(denoiser: Denoiser, calls: ClipCalls, latents: Tensor, timestep: float) -> bool:
    """Whether frames that depend on each other run in several chunks, where a frame's attention differs by chunk."""
    return len(chunks_of(denoiser, calls, latents, timestep)) > 1 and frames_meet(denoiser, calls)


def chunks_of(
    denoiser: Denoiser, calls: ClipCalls, latents: Tensor, timestep: float, usual: Windows | None = None
) -> list[Chunk]:
    """The chunks of a clip at a timestep: those of the calls, else the host's windows, else `usual`, None for one."""
    keys, frames, packing = calls.key_frames, clip_frames(denoiser, latents), denoiser.packing
    of_host = None if calls.windows else denoiser.windows(latents, timestep)
    if of_host is None:
        windows = calls.windows or usual
        if packing is not None and windows is not None and windows.frames < frames:
            windows = windows.in_groups(packing.group)
        chunks = keys.chunks(frames, windows, calls.clip_norm or denoiser.frames_meet)
    else:
        chunks = keys.around(of_host[0], frames)
    if packing is None:
        return chunks
    if chunks[0].is_whole:
        return [Chunk.whole(len(latents))]
    sound = keys.around(packing.sound_windows(chunks) if of_host is None else of_host[1], packing.sound)
    both = zip(chunks, sound, strict=True)
    return [PackedChunk(**vars(chunk), packing=packing, of_sound=of_sound) for chunk, of_sound in both]


def clip_frames(denoiser: Denoiser, latents: Tensor) -> int:
    """The number of the clip's frames in latents."""
    return len(latents) if denoiser.packing is None else denoiser.packing.frames


def usual_windows(denoiser: Denoiser) -> Windows | None:
    """The windows of long clips, as long as the clips of the model's training; None for a model without them."""
    return None if denoiser.trained_frames is None else Windows.of_video(denoiser.trained_frames, None, 1)


def frames_of(latents: Tensor, chunk: Chunk) -> Tensor:
    """The latents of a chunk's frames."""
    return latents if chunk.is_whole else chunk.cut(latents)


def joined(chunks: Sequence[Chunk], parts: Sequence[Tensor]) -> Tensor:
    """One result for each frame of the clip, as the weighted sum over chunks."""
    if len(chunks) == 1 and chunks[0].is_whole:
        return parts[0]
    whole = chunks[0].zeros(parts[0])
    for chunk, part in zip(chunks, parts, strict=True):
        chunk.add(part, whole)
    return whole


def check_latents(latents: Tensor) -> None:
    """Raise ValueError for latents that are not those of a clip."""
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be (frames, c, h, w), at least one frame")


def check_finite(latents: Tensor, what: str) -> None:
    """Raise ArithmeticError for infinite or NaN latents, which would end in black frames."""
    if not torch.isfinite(latents).all():
        raise ArithmeticError(f"{what} are not finite: lower guidance or reweight, or use a higher precision")
