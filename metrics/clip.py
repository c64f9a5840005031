"""CLIP similarity of frames and prompts, with any CLIP model of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .frame_models import FrameModel


@dataclass(frozen=True)
class ClipScorer(FrameModel):
    """A CLIP model and its processor; the paper uses "openai/clip-vit-base-patch32"."""

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu", local_files_only: bool = False) -> ClipScorer:
        """Load from a folder, or from the hub by name, which may use the network.

        Raises OSError if it is missing, ValueError for a model of another kind.
        """
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        where = {"local_files_only": local_files_only}
        kind = AutoConfig.from_pretrained(name, **where).model_type
        if kind != "clip":
            raise ValueError(f"{name} is a {kind!r} model: give a CLIP model")
        model = CLIPModel.from_pretrained(name, **where)
        return cls(model.to(device).eval(), CLIPProcessor.from_pretrained(name, **where))

    def images(self, frames: Tensor, batch: int = 8) -> Tensor:
        """Normalized embeddings (f, d) of frames (f, 3, h, w) in 0..1, in batches."""
        embed = self.model.get_image_features
        return F.normalize(self.of_frames(frames, lambda pixels: _tensor(embed(pixel_values=pixels)), batch), dim=-1)

    def pooled(self, frames: Tensor) -> Tensor:
        """The vision model's pooled output (f, d), before the projection to the text's space."""
        return self.of_frames(frames, lambda pixels: self.model.vision_model(pixel_values=pixels).pooler_output)

    @property
    def scale(self) -> float:
        """The factor of the similarities in the model's training."""
        return math.exp(self.model.logit_scale.item())

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """The normalized embedding (d,) of a prompt, truncated to CLIP's 77 tokens."""
        tokens = self.processor(text=[prompt], return_tensors="pt", padding=True, truncation=True)
        ids = {k: tokens[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
        return F.normalize(_tensor(self.model.get_text_features(**ids)).float().cpu(), dim=-1)[0]


def _tensor(output: Any) -> Tensor:
    """The embeddings; newer versions of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output
