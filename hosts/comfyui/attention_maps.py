"""New clips under our attention control in the host, with any sampler; and a record of their attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...attention.control import Control
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.steering import Recording
from .conditions import HostCondition
from .noise import noise_of
from .sameness import WINDOWS
from .sampling import LoopGuider

OWN_FRAME = KeyFrames(("self",))
"""Self-attention is the MODEL's, including key frames of other nodes."""


class ClipGuider(LoopGuider):
    """The host's classifier-free guidance, with a control of the positive prompt's attention in some predictions."""

    loop = None

    def __init__(self, model: Any, positive: HostCondition, negative: HostCondition, guidance_scale: float) -> None:
        """Raises ValueError for a MODEL that is not an attention UNet."""
        super().__init__(model, [positive, negative], kinds=("cross",))
        self.set_cfg(guidance_scale)
        self.positive = positive

    def predicted_by(self, control: Control, x: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        """The host's prediction with a control."""
        plain = Control(OWN_FRAME, control.chunk)
        with self.edited.controlled({0: (control, self.positive.text_tokens), 1: (plain, None)}):
            predicted: Tensor = super().outer_predict_noise(x, timestep, *rest)
        return predicted

    def timestep_at(self, sigma: Tensor) -> float:
        """The timestep of a sigma."""
        (timestep,) = noise_of(self.model_patcher).timesteps(sigma[None].cpu())
        return float(timestep)


class AttentionGuider(ClipGuider):
    """The host's classifier-free guidance, which records the attention in each prediction."""

    def __init__(
        self, model: Any, positive: HostCondition, negative: HostCondition, guidance_scale: float, attention: Recording
    ) -> None:
        super().__init__(model, positive, negative, guidance_scale)
        self.attention = attention

    def sample(self, noise: Tensor, latent_image: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Raises ValueError for context windows, which predict some frames at a time."""
        if self.model_options.get(WINDOWS) is not None:
            raise ValueError("model: attention cannot be recorded in context windows: remove them")
        result: Tensor = super().sample(noise, latent_image, *rest, **more)
        return result

    def outer_predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        sites, tokens = list(self.edited.sites(*x.shape[-2:]).values()), self.positive.text_tokens
        recorder = self.attention.recorder(OWN_FRAME, Chunk.whole(len(x)), sites, tokens)
        predicted = self.predicted_by(recorder, x, timestep, model_options, seed)
        self.attention.record(recorder, self.timestep_at(timestep[0]))
        return predicted
