"""Structure distance: how far the self-similarity of DINO's keys changes (Splice, Tumanyan et al., CVPR 2022, arXiv
2201.00424), as FiVE-Bench and PIE-Bench measure it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT_SIDE, LONG_SIDE = 224, 480
_MEAN, _STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


@dataclass(frozen=True)
class Dino:
    """A DINO ViT of transformers; FiVE-Bench uses "facebook/dino-vitb8"."""

    model: Any

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu", local_files_only: bool = False) -> Dino:
        """Load from a folder, or from the hub by name, which may use the network.

        Raises OSError if it is missing, ValueError for a model of another kind.
        """
        from transformers import AutoConfig, ViTModel

        kind = AutoConfig.from_pretrained(name, local_files_only=local_files_only).model_type
        if kind != "vit":
            raise ValueError(f"{name} is a {kind!r} model: give a ViT such as facebook/dino-vitb8")
        model = ViTModel.from_pretrained(name, local_files_only=local_files_only, add_pooling_layer=False)
        return cls(model.to(device).eval())

    @torch.no_grad()
    def keys(self, frame: Tensor) -> Tensor:
        """The keys of the last layer, all heads together: (tokens, d), of a frame (3, h, w) in 0..1.

        The frame is scaled to a short side of 224 pixels, and normalized from 0..255, not 0..1, as in the authors' code
        (published distances depend on it).
        """
        pixels = F.interpolate(255 * frame[None], size=_scaled(*frame.shape[-2:]), mode="bilinear", antialias=True)
        pixels = (pixels - _MEAN.to(pixels)) / _STD.to(pixels)
        found: list[Tensor] = []
        handle = self._last_keys.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            self.model(pixel_values=pixels.to(self.model.device), interpolate_pos_encoding=True)
        finally:
            handle.remove()
        return found[-1][0].float().cpu()

    @property
    def _last_keys(self) -> Any:
        """The projection to keys; its name depends on the version of transformers."""
        return [layer for name, layer in self.model.named_modules() if name.endswith((".k_proj", ".key"))][-1]

    def distance(self, a: Tensor, b: Tensor) -> float:
        """The structure distance of two frames (3, h, w) in 0..1."""
        return structure_distance(self.keys(a), self.keys(b))


def structure_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of the cosine similarities among tokens, of two sets of keys (tokens, d)."""
    return F.mse_loss(_self_similarity(a), _self_similarity(b)).item()


def _self_similarity(keys: Tensor) -> Tensor:
    norm = keys.norm(dim=-1, keepdim=True)
    return (keys @ keys.T) / (norm @ norm.T).clamp(min=1e-8)


def _scaled(height: int, width: int) -> tuple[int, int]:
    """The size with a short side of 224, or a long side of 480 if that is smaller."""
    short, long = min(height, width), max(height, width)
    sides = SHORT_SIDE, int(SHORT_SIDE * long / short)
    if sides[1] > LONG_SIDE:
        sides = int(LONG_SIDE * sides[0] / sides[1]), LONG_SIDE
    return sides if height <= width else (sides[1], sides[0])
