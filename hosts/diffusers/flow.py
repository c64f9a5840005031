"""Transformers that are sampled as a flow and called as their pipelines call them, without control of attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...attention.condition import Condition
from ...attention.control import AttentionSite
from ...diffusion.denoiser import refuse_clip_norm
from ...diffusion.schedule import FlowSchedule
from .model import ClipFacts
from .model_files import CheckpointError
from .network import Branch, NetworkDenoiser, numbered_weights
from .schedulers import flow_schedule, is_flow
from .transformer import TransformerModel

if TYPE_CHECKING:
    from typing_extensions import Self


class FlowDenoiser(NetworkDenoiser):
    """A model's transformers and schedule, as the loops of `fatezero.diffusion` call them."""

    trained_with = (("self",), False)

    def __init__(self, model: FlowModel) -> None:
        super().__init__(model.networks, model.scheduler)
        self.model = model
        self.family, self.text_dim = model.family, model.text_dim  # type: ignore[misc]
        self.frames_meet, self.embeds_guidance = model.frames_meet, model.embeds_guidance

    @property
    def channels(self) -> int:
        return self.model.channels

    @property
    def layout(self) -> str:
        config = self.networks[0].config
        shown = ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
        return " ".join([type(self.networks[0]).__name__, *(f"{name}={config[name]}" for name in shown)])

    def weights(self) -> dict[str, Tensor]:
        return numbered_weights(self.networks)

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        return []

    def schedule(self, steps: int) -> FlowSchedule:
        """Raises ValueError for a number of steps that the scheduler does not support."""
        return flow_schedule(self.scheduler, steps, self.model.tokens)

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        refuse_clip_norm(clip_norm)
        yield

    def predicted(self, branches: Sequence[Branch], timestep: float) -> list[Tensor]:
        found = []
        for latents, condition, control in branches:
            self.check(latents, condition)
            z = latents.to(self.dtype)
            velocity = self.model.velocity(z, timestep, condition.to(z), control.chunk.frame_indices)
            found.append(velocity.to(latents.dtype))
        return found


@dataclass(frozen=True)
class FlowModel(TransformerModel):
    """A model for edits that need its predictions only: FlowEdit, masks from predictions, plain sampling.

    clip: what its calls need of the clip, see `for_clip`.
    """

    text_dim: ClassVar[str]
    frames_meet: ClassVar[bool]
    """Whether frames see each other; else each is a picture of its own."""

    clip: ClipFacts | None = field(default=None, kw_only=True)

    @classmethod
    def of_pipeline(cls, name: str, pipeline: Any, device: torch.device, notes: tuple[str, ...], **more: Any) -> Self:
        if not is_flow(pipeline.scheduler, shifted=True):
            kind = type(pipeline.scheduler).__name__
            raise CheckpointError(f"{name}: scheduler is a {kind} without a flow's sigmas: use the model's own")
        return super().of_pipeline(name, pipeline, device, notes, **more)

    @abstractmethod
    def velocity(self, z: Tensor, timestep: float, condition: Condition, frames: Sequence[int]) -> Tensor:
        """The predicted velocity of latents (frames, c, h, w). frames: their indices in the clip."""

    def check_length(self, tokens: int, most: int) -> None:
        """Raise ValueError for a prompt of more tokens than the model reads."""
        if tokens > most:
            raise ValueError(f"the prompt has {tokens} tokens; {self.family.title} reads {most}: shorten it")

    @property
    def tokens(self) -> int | None:
        """The tokens of a call, by which the schedule is shifted; None for a schedule that is not."""
        return None

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the transformer."""
        return False

    @cached_property
    def denoiser(self) -> FlowDenoiser:
        return FlowDenoiser(self)

    def for_clip(self, clip: ClipFacts) -> Self:
        return replace(self, clip=clip)

    @property
    def facts(self) -> ClipFacts:
        """The facts of the clip. Raises ValueError where `for_clip` was not called."""
        if self.clip is None:
            raise ValueError(f"a {self.family.title} model needs the clip first: call for_clip")
        return self.clip
