"""Interfaces of layout guidance, in generated clips and in edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames
from .denoiser import Denoiser

if TYPE_CHECKING:
    from torch import Tensor


class Steering(Protocol):
    """Guides some steps of a run."""

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step is guided."""

    def moved(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        timestep: float,
        alpha: Tensor,
        condition: Condition,
        calls: ClipCalls,
    ) -> Tensor:
        """The guided latents from which the step starts. alpha: the cumulative alpha there."""


class ClipSteering(Steering, Protocol):
    """Guides a generated clip."""

    @property
    def moves_latents(self) -> bool:
        """Whether it moves latents before a step, and not attention within it."""

    def control(self, key_frames: KeyFrames, chunk: Chunk) -> Control:
        """The control of the conditional branch."""

    def check_fits(self, frames: int, text_tokens: int) -> None:
        """Raise ValueError for a wrong number of frames or text tokens."""


class Recording(Protocol):
    """Records attention in each step of a generated clip."""

    def recorder(self, keys: KeyFrames, chunk: Chunk, sites: Sequence[AttentionSite], tokens: int) -> Any:
        """The control of the conditional branch in a step. sites: the model's layers; tokens: of the text."""

    def record(self, recorder: Any, timestep: float) -> None:
        """Add a step."""


@runtime_checkable
class FollowingSteering(ClipSteering, Protocol):
    """Guides a clip relative to the same clip without guidance."""

    def recorder(self) -> Any:
        """A `Recording` of the clip without guidance."""

    def following(self, recorded: Any) -> ClipSteering:
        """The guidance against a record."""


class EditSteering(Steering, Protocol):
    """Guides one edit of a source."""

    @property
    def area(self) -> Tensor | None:
        """The area that may change, (frames, h, w) in 0..1; an injection preserves the rest. None for everything."""

    def initial(self, z: Tensor, noisy: float) -> Tensor:
        """The latents (frames, c, h, w) from which the edit starts. noisy: the deviation of their noise."""

    def after_step(self, z: Tensor, level: int, step: int) -> Tensor:
        """The latents after a step, given those at a level of the store."""
