"""The training loss of a clip, and the interface of a model for training."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, KeyFrames
from ..imports import F
from .denoiser import Predictor

if TYPE_CHECKING:
    from torch import Tensor, nn


class Tunable(Predictor, Protocol):
    """A predictor whose weights can be trained."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights to train, by name."""

    def training(self) -> AbstractContextManager[None]:
        """Enable gradients for the trained weights only, in at least single precision, with activations recomputed.

        Undone after the `with` block.
        """

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Latents at a timestep, and the cumulative alpha there."""

    @property
    def predicts_v(self) -> bool:
        """Whether the model predicts v, and is trained on it, instead of the noise."""


def clip_loss(
    denoiser: Tunable, latents: Tensor, noise: Tensor, timestep: int, condition: Condition, keys: KeyFrames
) -> Tensor:
    """Mean squared error of a clip's predicted noise at one timestep, or of v for a model that predicts v.

    The error of v equals that of the noise divided by the cumulative alpha.
    """
    z, alpha = denoiser.noised(latents, noise, timestep)
    predicted = denoiser.predict_noise(z, timestep, condition, Control(keys, Chunk.whole(len(latents))))
    return F.mse_loss(predicted, noise) / (alpha if denoiser.predicts_v else 1.0)


def noised(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """sqrt(abar) z + sqrt(1 - abar) eps."""
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
