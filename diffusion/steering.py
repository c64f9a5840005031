"""What has a say in where things are, in new clips and in edits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, KeyFrames
from .denoiser import Denoiser

if TYPE_CHECKING:
    from torch import Tensor


class Steering(Protocol):
    """What has a say in the steps of a run."""

    def guides(self, step: int, steps: int) -> bool:
        """Whether it has one in a step."""

    def moved(
        self, denoiser: Denoiser, latents: Tensor, timestep: float, alpha: Tensor, condition: Condition,
        key_frames: KeyFrames, clip_norm: bool, chunk_frames: int | None,
    ) -> Tensor:  # fmt: skip
        """The latents that the step begins from. alpha: the cumulative one there."""


class ClipSteering(Steering, Protocol):
    """The same of new clips."""

    @property
    def moves_latents(self) -> bool:
        """Whether it moves latents before a step, and not attention within it."""

    def control(self, key_frames: KeyFrames, chunk: Chunk) -> Control:
        """Of the conditional branch."""

    def check_fits(self, frames: int, text_tokens: int) -> None:
        """Raise ValueError where it is for another clip or text."""


class EditSteering(Steering, Protocol):
    """The same in one edit, whose source it knows."""

    @property
    def area(self) -> Tensor | None:
        """Where alone the clip changes, (frames, h, w) in 0..1, for an injection to keep the rest; None for no such."""

    def started(self, z: Tensor, noisy: float) -> Tensor:
        """The latents (frames, 4, h, w) that the edit begins from. noisy: the deviation of the noise in them."""

    def carried(self, z: Tensor, level: int, step: int) -> Tensor:
        """The latents after a step, at a level of the store."""
