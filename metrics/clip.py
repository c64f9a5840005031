"""CLIP similarity of frames and prompts, with any CLIP model of transformers."""

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
    """A CLIP model and its processor; the paper uses "openai/clip-vit-base-patch32"."""

    model: Any
    processor: Any

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

    @torch.no_grad()
    def images(self, frames: Tensor, batch: int = 8) -> Tensor:
        """Normalized embeddings (f, d) of frames (f, 3, h, w) in 0..1, in batches."""
        parts = []
        for some in frames.split(batch):
            pictures = [Image.fromarray(frame) for frame in to_bytes(some).cpu().numpy()]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            parts.append(_tensor(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return F.normalize(torch.cat(parts).float().cpu(), dim=-1)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """The normalized embedding (d,) of a prompt, truncated to CLIP's 77 tokens."""
        tokens = self.processor(text=[prompt], return_tensors="pt", padding=True, truncation=True)
        ids = {k: tokens[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
        return F.normalize(_tensor(self.model.get_text_features(**ids)).float().cpu(), dim=-1)[0]


def _tensor(output: Any) -> Tensor:
    """The embeddings; newer versions of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output
