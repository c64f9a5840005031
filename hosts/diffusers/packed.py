"""Picture transformers on packed latents, two by two places a token: a clip is edited frame by frame."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ...attention.condition import Condition
from .flow import FlowModel
from .pictures import FrameByFrame

PACKED = 2
"""Places of the latents along each side of a token."""


class PackedPictures(FlowModel, FrameByFrame):
    """A picture transformer of a pipeline with `_pack_latents` and `_unpack_latents`."""

    text_dim = "joint_attention_dim"
    frames_meet = False

    @property
    def channels(self) -> int:
        return int(self.transformer.config["in_channels"]) // PACKED**2

    @property
    def multiple(self) -> int:
        return PACKED * self.factor

    @property
    def native_size(self) -> int:
        return 1024

    @property
    def tokens(self) -> int:
        *_, height, width = self.facts.shape
        return height // PACKED * (width // PACKED)

    def velocity(self, z: Tensor, timestep: float, condition: Condition, frames: Sequence[int]) -> Tensor:
        _, channels, height, width = z.shape
        share = torch.tensor([timestep / self.scheduler.config["num_train_timesteps"]], device=z.device)
        done = []
        for frame in z.split(1):
            packed = self.pipeline._pack_latents(frame, 1, channels, height, width)
            output = self.called(packed, share, condition, (height // PACKED, width // PACKED))
            sides = height * self.factor, width * self.factor
            done.append(self.pipeline._unpack_latents(output, *sides, self.factor).view_as(frame))
        return torch.cat(done)

    @abstractmethod
    def called(self, packed: Tensor, share: Tensor, condition: Condition, grid: tuple[int, int]) -> Tensor:
        """The transformer's output for one frame's tokens, (1, tokens, dim). share: the timestep in 0..1. grid: the
        rows and columns of tokens.
        """
