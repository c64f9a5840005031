"""Flux on diffusers: FLUX.1 dev, with guidance as an input of the transformer, and schnell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ...attention.condition import GUIDANCE, Condition
from ...models.flow import FLUX
from .packed import PackedPictures

if TYPE_CHECKING:
    from typing_extensions import Self

TEXT_TOKENS = 512
"""Text columns of a prompt, padding included. Longer prompts have more."""
GUIDANCE_NOTE = (
    "guidance is an input of this model, and lower than elsewhere: for FlowEdit its authors give FLUX.1 dev "
    "--guidance-scale 5.5 --flow-edit.source-guidance 1.5 --strength 0.86 --steps 28"
)


@dataclass(frozen=True)
class Flux(PackedPictures):
    """A Flux text-to-image model. A prompt has T5's embeddings, and CLIP's pooled one in `extras`."""

    family = FLUX
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    kinds = (FluxTransformer2DModel,)

    @classmethod
    def of_pipeline(cls, name: str, pipeline: Any, device: torch.device, notes: tuple[str, ...], **more: Any) -> Self:
        model = super().of_pipeline(name, pipeline, device, notes, **more)
        return replace(model, notes=(*notes, GUIDANCE_NOTE)) if model.embeds_guidance else model

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.transformer.config["guidance_embeds"])

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        tokens = max(TEXT_TOKENS, len(self.tokenizers[1](prompt, truncation=False).input_ids))
        text, pooled, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=tokens)
        return Condition(text, {"pooled": pooled})

    def called(self, packed: Tensor, share: Tensor, condition: Condition, grid: tuple[int, int]) -> Tensor:
        guidance = condition.extras.get(GUIDANCE, packed.new_ones(1)) if self.embeds_guidance else None
        output: Tensor = self.transformer(
            packed, condition.embeddings, condition.extras["pooled"], share,
            self.pipeline._prepare_latent_image_ids(1, *grid, packed.device, packed.dtype),
            packed.new_zeros(condition.text_tokens, 3), guidance, return_dict=False,
        )[0]  # fmt: skip
        return output
