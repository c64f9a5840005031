"""CLIP's opinion of frames and prompts, by any CLIP of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..video.size import to_bytes


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP and its processor; the paper's is "openai/clip-vit-base-patch32"."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> ClipScorer:
        """A folder, or a hub name, the only case that uses the network.

        Raises OSError where there is none, ValueError for a model of another kind.
        """
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise ValueError(f"{name} is a model of kind {kind!r}; a CLIP is needed")
        return cls(CLIPModel.from_pretrained(name).to(device).eval(), CLIPProcessor.from_pretrained(name))

    @torch.no_grad()
    def images(self, frames: Tensor, batch: int = 8) -> Tensor:
        """Embeddings (f, d), of length one, of frames (f, 3, h, w) in 0..1, a few at a time."""
        parts = []
        for some in frames.split(batch):
            pictures = [Image.fromarray(frame) for frame in to_bytes(some).cpu().numpy()]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            parts.append(_tensor(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return F.normalize(torch.cat(parts).float().cpu(), dim=-1)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """The embedding (d,), of length one, of a prompt; CLIP reads its first 77 tokens."""
        tokens = self.processor(text=[prompt], return_tensors="pt", padding=True, truncation=True)
        ids = {k: tokens[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
        return F.normalize(_tensor(self.model.get_text_features(**ids)).float().cpu(), dim=-1)[0]


def _tensor(output: Any) -> Tensor:
    """The embeddings; newer transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output
