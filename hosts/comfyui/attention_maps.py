"""Attention to words in the host, recorded by a GUIDER while any sampler runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...attention.control import Control
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.word_attention import WordAttention
from .conditions import HostCondition
from .sampling import LoopGuider

_OWN_FRAME = KeyFrames(("self",))
"""Self-attention is the MODEL's, including key frames of other nodes."""


class AttentionGuider(LoopGuider):
    """The host's classifier-free guidance, which records the attention to words in each prediction."""

    loop = None

    def __init__(
        self,
        model: Any,
        positive: HostCondition,
        negative: HostCondition,
        guidance_scale: float,
        attention: WordAttention,
    ) -> None:
        """Raises ValueError for a MODEL that is not an attention UNet."""
        super().__init__(model, [positive, negative], kinds=("cross",))
        self.set_cfg(guidance_scale)
        self.positive, self.attention = positive, attention

    def sample(self, noise: Tensor, latent_image: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Raises ValueError for context windows, which predict some frames at a time."""
        if self.model_options.get("context_handler") is not None:
            raise ValueError("model: attention maps do not support context windows: remove them")
        result: Tensor = super().sample(noise, latent_image, *rest, **more)
        return result

    def outer_predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        sites, tokens = list(self.edited.sites(*x.shape[-2:]).values()), self.positive.text_tokens
        chunk = Chunk.whole(len(x))
        recorder = Control(_OWN_FRAME, chunk)
        self.attention.watch(recorder, sites, tokens)
        with self.edited.controlled({0: (recorder, tokens), 1: (Control(_OWN_FRAME, chunk), None)}):
            predicted: Tensor = super().outer_predict_noise(x, timestep, model_options, seed)
        self.attention.record(recorder)
        return predicted
