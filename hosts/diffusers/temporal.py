"""Temporal layers on a diffusers UNet, attached to the stock class by forward hooks, and removable."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file
from torch import Tensor, nn

from ...attention.temporal_kind import Kind
from ...attention.temporal_layers import TemporalLayers, is_temporal, kind_of, trains
from ...files.temporal_layers import load_temporal_layers, write_temporal_layers
from ...files.whole import whole_file

__all__ = [
    "convert_temporal_layers",
    "load_temporal_layers",
    "save_temporal_layers",
    "temporal_layers",
    "with_temporal_layers",
    "without_temporal_layers",
]

NAME = "temporal_layers"
"""The submodule of attached layers."""


def with_temporal_layers(
    unet: UNet2DConditionModel,
    state_dict: Mapping[str, Tensor] | None = None,
    kind: Kind = "official",
    rank: int | None = None,
    seed: int = 0,
) -> UNet2DConditionModel:
    """Attach temporal layers to a UNet, and return it; its batch is then the frames of one clip.

    state_dict: Tune-A-Video's layers, or FateZero's with low-rank or full convolutions, detected by keys; other weights
    in it replace the UNet's. None attaches new layers, which do not change the UNet's results yet: Tune-A-Video's, or
    for `kind` "fatezero" with convolutions over frames of a rank (None: full), initialized from a seed. Raises
    ValueError for ModelScope's and AnimateDiff's layers, and for weights that do not fit.
    """
    blocks = {
        name: (module.norm1.normalized_shape[0], module.attn1.heads)
        for name, module in unet.named_modules()
        if isinstance(module, BasicTransformerBlock)
    }
    if state_dict is None:
        layers = TemporalLayers.fresh(blocks, convolutions_of(unet) if kind == "fatezero" else None, rank, seed)
    else:
        layers = TemporalLayers.of(state_dict, blocks)
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
    """Remove temporal layers, if any, and restore the UNet."""
    attached = getattr(unet, NAME, None)
    if attached is not None:
        attached.remove(unet)
        delattr(unet, NAME)
    return unet


def convert_temporal_layers(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Convert a UNet's layers to the other code's form of the same function: see `TemporalLayers.converted`.

    Raises ValueError for a UNet without layers, and if a convolution over frames is not the identity.
    """
    converted = _attached_layers(unet).converted(convolutions_of(unet)).named()
    return with_temporal_layers(unet, {name: w.detach() for name, w in (queries_of(unet) | converted).items()})


def queries_of(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The weights of the UNet itself that Tune-A-Video trains, by name."""
    return {name: weight for name, weight in unet.named_parameters() if trains(name)}


def convolutions_of(unet: UNet2DConditionModel) -> dict[str, int]:
    """The output channels of a UNet's 3x3 convolutions, by name; FateZero's layers follow these."""
    return {
        name: module.out_channels
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    }


def temporal_layers(unet: UNet2DConditionModel) -> TemporalLayers | None:
    """The temporal layers of a UNet, if any."""
    attached = getattr(unet, NAME, None)
    return None if attached is None else attached.layers


def _attached_layers(unet: UNet2DConditionModel) -> TemporalLayers:
    layers = temporal_layers(unet)
    if layers is None:
        raise ValueError("unet has no temporal layers")
    return layers


def save_temporal_layers(unet: UNet2DConditionModel, path: str | Path, about: Mapping[str, str] | None = None) -> None:
    """Write a UNet's temporal layers and tuned queries atomically, for any model of the same architecture.

    `load_temporal_layers` reads the file. about: metadata, such as `key_frames` and `clip_norm` of the tuning. Raises
    ValueError for a UNet without layers.
    """
    write_temporal_layers(path, queries_of(unet) | _attached_layers(unet).named(), about)


# --- folders of the official codes ----------------------------------------------------------


def inflated_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel | None:
    """The UNet of a folder written by Tune-A-Video's or FateZero's code; None for another UNet.

    Their classes are image UNets with temporal layers, whose names collide with diffusers' video UNets, so they are
    detected by weights. Raises ValueError for other temporal layers, or weights that do not fit.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("_class_name") not in ("UNet3DConditionModel", "UNetPseudo3DConditionModel"):
        return None
    if not any((folder / name).is_file() for name in (_SAFE, _BIN)):  # a variant or shards, which theirs do not write
        return None
    weights = _weights_of(folder)
    if any(name.partition(".temp_convs.")[1] for name in weights):  # ModelScope's, which has the same class name
        return None
    kind_of(weights)
    unet = UNet2DConditionModel.from_config(_as_pictures(config))
    unet.load_state_dict({name: w for name, w in weights.items() if not is_temporal(name)})
    return with_temporal_layers(unet.to(dtype), {n: w.to(dtype) for n, w in weights.items() if is_temporal(n)})


def save_inflated_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write a UNet with its temporal layers to a folder, for the official code of their kind."""
    layers = _attached_layers(unet)
    name, block = _CLASSES[layers.kind]
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    config |= {key: _renamed(config[key], "2D", block) for key in _BLOCKS if config.get(key)}
    weights = {n: w for n, w in unet.state_dict().items() if not n.startswith(f"{NAME}.")} | layers.named()
    with whole_file(folder / _BIN) as partial:
        torch.save({n: w.detach().cpu().contiguous() for n, w in weights.items()}, partial)
    with whole_file(folder / "config.json") as partial:
        partial.write_text(json.dumps({"_class_name": name, **config}, indent=2) + "\n", encoding="utf-8")


_CLASSES = {"official": ("UNet3DConditionModel", "3D"), "fatezero": ("UNetPseudo3DConditionModel", "Pseudo3D")}
_BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")
_SAFE, _BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
"""The official codes write the second; the first is preferred if present."""


def _weights_of(folder: Path) -> dict[str, Tensor]:
    if (folder / _SAFE).is_file():
        return load_file(folder / _SAFE)
    loaded: dict[str, Tensor] = torch.load(folder / _BIN, map_location="cpu", weights_only=True)
    return loaded


def _as_pictures(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the underlying image UNet: its block names, without options of video UNets."""
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    plain = {key: value for key, value in config.items() if key in known}
    for inflated in ("Pseudo3D", "3D"):
        plain |= {key: _renamed(plain[key], inflated, "2D") for key in _BLOCKS if plain.get(key)}
    return plain


def _renamed(blocks: Any, old: str, new: str) -> Any:
    return blocks.replace(old, new) if isinstance(blocks, str) else [block.replace(old, new) for block in blocks]


class _Attached(nn.Module):
    """Layers with their hooks on a UNet, and the UNet's replaced weights."""

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
        raise ValueError(f"the checkpoint has a temporal layer at {name}, which this model does not have") from None


def _check_fits(unet: nn.Module, name: str, weight: Tensor) -> None:
    try:
        own = unet.get_parameter(name)
    except AttributeError:
        raise ValueError(f"the checkpoint has a weight {name}, which this model does not have") from None
    if own.shape != weight.shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}; this model needs {tuple(own.shape)}")
