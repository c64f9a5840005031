"""The training loss of a clip, and the interface of a model for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, KeyFrames
from ..imports import F, torch
from .denoiser import Predictor
from .schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn


class Tunable(Predictor, Protocol):
    """A predictor whose weights can be trained."""

    def trained(self, convolutions: bool = False) -> dict[str, nn.Parameter]:
        """The weights to train, by name. convolutions: those of convolutions over frames too."""

    def training(self, convolutions: bool = False) -> AbstractContextManager[None]:
        """Enable gradients for the trained weights only, in at least single precision, with activations recomputed.

        Undone after the `with` block.
        """

    def bypassed(self) -> AbstractContextManager[None]:
        """Predict without temporal layers in the `with` block."""

    def schedule(self, steps: int) -> Schedule:
        """The noise levels of a run with this number of steps."""

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Latents at a timestep, and the cumulative alpha there."""

    @property
    def predicts_v(self) -> bool:
        """Whether the model predicts v, and is trained on it, instead of the noise."""


@dataclass(frozen=True)
class Prior:
    """The model before its training: predictions of single pictures are held near those of that model.

    weight: of the squared distance in the loss. before: the model's own weights before the training.
    """

    weight: float
    before: Mapping[nn.Parameter, Tensor]

    def predicted(self, denoiser: Tunable, z: Tensor, timestep: int, condition: Condition) -> Tensor:
        """The prediction for one picture (1, c, h, w), without temporal layers."""
        with torch.no_grad(), self._restored(), denoiser.bypassed():
            return denoiser.predict_noise(z, timestep, condition, Control(KeyFrames(("self",)), Chunk.whole(1)))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        now = {weight: weight.data for weight in self.before}
        try:
            for weight, before in self.before.items():
                weight.data = before
            yield
        finally:
            for weight, data in now.items():
                weight.data = data


def clip_loss(
    denoiser: Tunable,
    latents: Tensor,
    noise: Tensor,
    timestep: int,
    condition: Condition,
    keys: KeyFrames,
    prior: Prior | None = None,
) -> Tensor:
    """Mean squared error of a clip's predicted noise at one timestep, or of v for a model that predicts v.

    prior: adds its weight times the mean squared distance of the first frame's prediction from the prior's. An error of
    v equals that of the noise divided by the cumulative alpha.
    """
    z, alpha = denoiser.noised(latents, noise, timestep)
    # Before the clip's call: its activations are recomputed with the state that the last call leaves.
    known = None if prior is None else prior.predicted(denoiser, z[:1], timestep, condition)
    predicted = denoiser.predict_noise(z, timestep, condition, Control(keys, Chunk.whole(len(latents))))
    loss = F.mse_loss(predicted, noise)
    if prior is not None and known is not None:
        loss = loss + prior.weight * F.mse_loss(predicted[:1], known)
    return loss / (alpha if denoiser.predicts_v else 1.0)


def noised(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """sqrt(abar) z + sqrt(1 - abar) eps."""
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
