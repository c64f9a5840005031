"""Models of transformers that are applied to each frame; V2VBench's (arXiv 2407.07111) besides CLIP."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..video.size import to_bytes


@dataclass(frozen=True)
class FrameModel:
    """A model and the processor of its pictures."""

    model: Any
    processor: Any

    @torch.no_grad()
    def of_frames(self, frames: Tensor, call: Callable[[Tensor], Tensor], batch: int = 8) -> Tensor:
        """What a call returns of the processed frames (f, 3, h, w) in 0..1, in batches, on the CPU."""
        parts = (call(self.pixels(some).to(self.model.device)) for some in frames.split(batch))
        return torch.cat([part.float().cpu() for part in parts])

    def pixels(self, frames: Tensor) -> Tensor:
        """Frames (f, 3, h, w) in 0..1 as the processor scales, crops and normalizes them."""
        pictures = [Image.fromarray(frame) for frame in to_bytes(frames).cpu().numpy()]
        pixels: Tensor = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return pixels


@dataclass(frozen=True)
class DinoV2(FrameModel):
    """DINOv2 (Oquab et al., 2023, arXiv 2304.07193); V2VBench uses "facebook/dinov2-base"."""

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu", local_files_only: bool = False) -> DinoV2:
        """Load from a folder, or from the hub by name, which may use the network.

        Raises OSError if it is missing, ValueError for a model of another kind.
        """
        from transformers import AutoConfig, AutoImageProcessor, Dinov2Model

        where: dict[str, Any] = {"local_files_only": local_files_only}
        kind = AutoConfig.from_pretrained(name, **where).model_type
        if kind != "dinov2":
            raise ValueError(f"{name} is a {kind!r} model: give a DINOv2 such as facebook/dinov2-base")
        model = Dinov2Model.from_pretrained(name, **where)
        return cls(model.to(device).eval(), AutoImageProcessor.from_pretrained(name, **where))

    def pooled(self, frames: Tensor) -> Tensor:
        """The pooled output (f, d) of frames (f, 3, h, w) in 0..1."""
        return self.of_frames(frames, lambda pixels: self.model(pixel_values=pixels).pooler_output)


@dataclass(frozen=True)
class Aesthetic(FrameModel):
    """LAION's aesthetic predictor, version 2: layers on CLIP's embedding of a frame.

    V2VBench uses "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE".
    """

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu", local_files_only: bool = False) -> Aesthetic:
        """Load from a folder, or from the hub by name, which may use the network.

        Raises OSError if it is missing, ValueError for a model without the predictor's layers.
        """
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        class Predictor(CLIPVisionModelWithProjection):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                sides = (config.projection_dim, 1024, 128, 64, 16, 1)
                layers = map(nn.Linear, sides, sides[1:])
                self.layers = nn.Sequential(OrderedDict(zip(("0", "2", "4", "6", "7"), layers, strict=True)))
                self.post_init()

        where: dict[str, Any] = {"local_files_only": local_files_only}
        model, loaded = Predictor.from_pretrained(name, output_loading_info=True, **where)
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"{name} is not an aesthetic predictor of version 2 with linear layers: no {missing[0]}")
        return cls(model.to(device).eval(), CLIPImageProcessor.from_pretrained(name, **where))

    def scores(self, frames: Tensor) -> Tensor:
        """The score (f,) of frames (f, 3, h, w) in 0..1, of 1 to 10."""

        def call(pixels: Tensor) -> Tensor:
            embedding = self.model(pixel_values=pixels).image_embeds
            score: Tensor = self.model.layers(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
            return score

        return self.of_frames(frames, call)
