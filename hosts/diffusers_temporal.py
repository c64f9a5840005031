"""Temporal layers on a diffusers UNet: attached by forward hooks to the stock class, and taken off without trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files.whole import whole_file
from ..methods.tune_a_video import TemporalLayers, is_temporal, trains

NAME = "temporal_layers"
"""The submodule that holds them while they are attached."""


def with_temporal_layers(
    unet: UNet2DConditionModel, state_dict: Mapping[str, Tensor] | None = None
) -> UNet2DConditionModel:
    """Attach temporal layers to a UNet, and return it; its batch then is the frames of one clip.

    state_dict: of Tune-A-Video, or of FateZero with low-rank or full convolutions, told by its keys; other weights in
    it take the place of the UNet's. None attaches a fresh set, with which the UNet computes what it did.
    Raises ValueError for ModelScope's and AnimateDiff's layers, and for weights that do not fit.
    """
    blocks = {
        name: (module.norm1.normalized_shape[0], module.attn1.heads)
        for name, module in unet.named_modules()
        if isinstance(module, BasicTransformerBlock)
    }
    layers = TemporalLayers.fresh(blocks) if state_dict is None else TemporalLayers.of(state_dict, blocks)
    for name in layers.places:
        _submodule(unet, name)
    base = {} if state_dict is None else {name: w for name, w in state_dict.items() if not is_temporal(name)}
    for name, weight in base.items():
        _check_fits(unet, name, weight)
    without_temporal_layers(unet)
    attached = _Attached(layers.to(unet.device, unet.dtype), unet, base)
    unet.add_module(NAME, attached)
    return unet


def without_temporal_layers(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Take temporal layers off again, if there are any: the UNet is the one it was."""
    attached = getattr(unet, NAME, None)
    if attached is not None:
        attached.remove(unet)
        delattr(unet, NAME)
    return unet


def temporal_layers(unet: UNet2DConditionModel) -> TemporalLayers | None:
    """The layers attached to a UNet."""
    attached = getattr(unet, NAME, None)
    return None if attached is None else attached.layers


def save_temporal_layers(unet: UNet2DConditionModel, path: str | Path) -> None:
    """Write the layers attached to a UNet, and the queries that are tuned with them, whole or not at all.

    For any model of the same shape; `load_temporal_layers` reads it. Raises ValueError for a UNet without layers.
    """
    layers = temporal_layers(unet)
    if layers is None:
        raise ValueError("unet has no temporal layers to save")
    weights = {name: w for name, w in unet.named_parameters() if trains(name)} | layers.named()
    with whole_file(Path(path)) as partial:
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial)


def load_temporal_layers(path: str | Path) -> dict[str, Tensor]:
    """The weights of a file for `with_temporal_layers`; FileNotFoundError, or ValueError for no safetensors file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no temporal layers at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


class _Attached(nn.Module):
    """Layers with their hooks on a UNet, and the weights that others have taken the place of."""

    def __init__(self, layers: TemporalLayers, unet: UNet2DConditionModel, base: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        self._handles = [
            unet.get_submodule(name).register_forward_hook(_followed_by(layers.after(name))) for name in layers.places
        ]
        self._replaced: dict[str, Tensor] = {}
        for name, weight in base.items():
            own = unet.get_parameter(name)
            if not torch.equal(own.data.to(weight), weight):
                self._replaced[name] = own.data
                own.data = weight.to(own)

    def remove(self, unet: UNet2DConditionModel) -> None:
        for handle in self._handles:
            handle.remove()
        for name, weight in self._replaced.items():
            unet.get_parameter(name).data = weight


def _followed_by(layer: nn.Module) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return layer(output)

    return hook


def _submodule(unet: nn.Module, name: str) -> nn.Module:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the checkpoint has a temporal layer at {name}, which this model lacks") from None


def _check_fits(unet: nn.Module, name: str, weight: Tensor) -> None:
    try:
        own = unet.get_parameter(name)
    except AttributeError:
        raise ValueError(f"the checkpoint has a weight {name}, which this model lacks") from None
    if own.shape != weight.shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}; this model needs {tuple(own.shape)}")
