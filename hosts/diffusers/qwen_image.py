"""Qwen-Image on diffusers: Qwen2.5-VL's text, and a causal video autoencoder, for which each picture is a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from ...attention.condition import Condition
from ...models.flow import QWEN_IMAGE
from .packed import PackedPictures

TEXT_TOKENS = 1024
"""The most text columns of a prompt."""


@dataclass(frozen=True)
class QwenImage(PackedPictures):
    """A Qwen-Image text-to-image model."""

    family = QWEN_IMAGE
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    kinds = (QwenImageTransformer2DModel,)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Raises ValueError for a prompt that the pipeline would cut."""
        around = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        self.check_length(len(self.tokenizer(around[0].format(prompt)).input_ids) - around[1], TEXT_TOKENS)
        text, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=TEXT_TOKENS)
        return Condition(text)

    def called(self, packed: Tensor, share: Tensor, condition: Condition, grid: tuple[int, int]) -> Tensor:
        output: Tensor = self.transformer(packed, condition.embeddings, None, share, [[(1, *grid)]], return_dict=False)[
            0
        ]
        return output

    # --- pictures -----------------------------------------------------------------------

    @property
    def factor(self) -> int:
        return int(2 ** len(self.vae.config["temperal_downsample"]))

    def coding_bytes(self, height: int, width: int) -> int:
        return int(6 * self.vae.config["base_dim"] * self.vae.dtype.itemsize * height * width)

    def _posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super()._posterior(pictures[:, :, None])
        return mean[:, :, 0], deviation[:, :, 0]

    def _pictures(self, latents: Tensor) -> Tensor:
        return super()._pictures(latents[:, :, None])[:, :, 0]
