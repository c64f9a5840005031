"""The models of world 2: stock classes like the demo world's, for pictures of twice the side.

Latents are (4, 32, 32). The UNet attends on 16x16 and 8x8 places, the transformer on 16x16 in each frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ...hosts.diffusers import VideoTransformer
from .. import video_model
from .scenes import SHAPES, SIZE

LATENT_SIZE = SIZE // 4
TEXT_TOKENS = 56
"""Tokens of every prompt of the transformer, padding included."""


def build_unet(width: int = 64) -> UNet2DConditionModel:
    """An epsilon-predicting UNet without attention at its first level. width: a multiple of 32."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(width,) * 3,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def build_transformer(heads: int = 5, ffn: int = 448) -> VideoTransformer:
    return video_model.build_transformer(heads=heads, ffn=ffn)


class ShapeReader(nn.Module):
    """Reads in training, from a layer's output, which shape covers each place.

    It makes attention bind words to places: at high noise only the text says which shape is there. It is no part of
    the trained model.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, len(SHAPES) + 1)
        self._output: Tensor | None = None
        self._hook = layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, given: object, output: Tensor) -> None:
        self._output = output

    def remove(self) -> None:
        self._hook.remove()
        self._output = None

    def forward(self, owner: Tensor) -> Tensor:
        """The cross entropy with the shapes (pictures, LATENT_SIZE, LATENT_SIZE) of the pictures of the last call."""
        assert self._output is not None
        features = self._output
        if features.ndim == 4:  # of a UNet
            features = features.flatten(2).transpose(1, 2)
        features = features.reshape(len(owner), -1, features.shape[-1])
        side = round(features.shape[1] ** 0.5)
        places = F.adaptive_max_pool2d(owner[:, None].float(), side).flatten().long()
        return F.cross_entropy(self.head(features).flatten(0, 1).float(), places)


class WordReader:
    """Measures in training whether cross-attention layers attend, from each place, to the words of what covers it.

    Without it, a small model in few steps mixes the colours of several things. It has no weights.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._inputs: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in layers]

    def _keep(self, layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        text = given[1] if len(given) > 1 else named["encoder_hidden_states"]
        self._inputs[layer] = given[0], text

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._inputs.clear()

    def __call__(self, owner: Tensor, words: Tensor) -> Tensor:
        """The mean of -log(attention, mean of heads, to the right words) of the last call.

        owner: the shapes (clips, frames, LATENT_SIZE, LATENT_SIZE). words: what tokens describe, (clips, tokens).
        """
        return torch.stack([self._error(layer, *given, owner, words) for layer, given in self._inputs.items()]).mean()

    @staticmethod
    def _error(layer: Any, x: Tensor, text: Tensor, owner: Tensor, words: Tensor) -> Tensor:
        norm_q, norm_k = (getattr(layer, name, None) or nn.Identity() for name in ("norm_q", "norm_k"))
        q, k = (
            norm(project(given)).unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()
            for norm, project, given in ((norm_q, layer.to_q, x), (norm_k, layer.to_k, text))
        )
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        side = round((x.shape[1] / owner.shape[1]) ** 0.5)
        places = F.adaptive_max_pool2d(owner.float(), side).flatten(1).byte()
        right = places[:, :, None] == words[:, None]
        told = right.any(-1) * area_weight(places)
        errors = -((attention * right).sum(-1) + 1e-4).log()
        return (told * errors).sum() / told.sum().clamp(min=1)


def area_weight(owner: Tensor, more: float = 2.0) -> Tensor:
    """The error's weight, increased on things, with a mean of one: of the same shape as `owner`."""
    weight = 1 + more * (owner > 0)
    return weight / weight.mean(dtype=torch.float32)
