"""The attention layers, features and weights of a ComfyUI UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from torch import Tensor, nn

from ...attention.control import SEPARATE, AttentionSite, Kind, Place
from ...models.unet import clip_norms, feature_level
from ...store.identity import IdentityCache, ModelIdentity
from .noise import prediction_name

_IDENTITIES = IdentityCache()
BLOCKS = (ResBlock, SpatialTransformer)
"""The modules that are recomputed for gradients."""
OWN_LAYERS = (ResBlock, SpatialTransformer, Downsample, Upsample, nn.Conv2d)
"""The modules of a UNet's blocks."""

Layer = tuple[str, int, int, Kind]
"""The host's place of an attention layer: block name, block number, transformer index, kind."""


@dataclass(frozen=True)
class LayerShape:
    """An attention layer for any size of picture: its site, and the number of halvings of the picture there."""

    place: Place
    index: int
    heads: int
    head_dim: int
    level: int

    def site(self, kind: Kind, height: int, width: int) -> AttentionSite:
        grid = (-(-height // 2**self.level), -(-width // 2**self.level))
        return AttentionSite(self.place, self.index, kind, self.heads, self.head_dim, *grid)


def attention_layers(unet: UNetModel) -> dict[Layer, LayerShape]:
    """The attention layers of a UNet, in the order of its blocks."""
    found: dict[Layer, LayerShape] = {}
    level = 0

    def add(block: nn.Module, name: str, number: int, place: Place) -> None:
        nonlocal level
        for module in block.children():
            if isinstance(module, SpatialTransformer):
                for i, transformer in enumerate(module.transformer_blocks):
                    index = sum(shape.place == place and at[3] == "self" for at, shape in found.items())
                    for kind in SEPARATE:
                        attn = transformer.attn1 if kind == "self" else transformer.attn2
                        found[name, number, i, kind] = LayerShape(place, index, attn.heads, attn.dim_head, level)
            level += isinstance(module, Downsample) or (isinstance(module, ResBlock) and _resizes(module, Downsample))
            level -= isinstance(module, Upsample) or (isinstance(module, ResBlock) and _resizes(module, Upsample))

    for number, block in enumerate(unet.input_blocks):
        add(block, "input", number, "down")
    if unet.middle_block is not None:
        add(unet.middle_block, "middle", 0, "mid")
    for number, block in enumerate(unet.output_blocks):
        add(block, "output", number, "up")
    return found


def _resizes(block: ResBlock, kind: type) -> bool:
    return isinstance(getattr(block, "h_upd", None), kind)


@dataclass(frozen=True)
class Feature:
    """The convolution whose output Plug-and-Play uses, and its name."""

    name: str
    conv: nn.Module


def feature_of(unet: UNetModel) -> Feature | None:
    """The last convolution of the second ResNet block in the first level of the decoder that has attention."""
    levels: list[list[nn.Module]] = [[]]
    for block in unet.output_blocks:
        levels[-1].append(block)
        if any(
            isinstance(m, Upsample) or (isinstance(m, ResBlock) and _resizes(m, Upsample)) for m in block.children()
        ):
            levels.append([])
    found = feature_level((len(level), any(map(_attends, level))) for level in levels)
    if found is None:
        return None
    resnet = next(m for m in levels[found][1].children() if isinstance(m, ResBlock))
    return Feature(f"up.{found}.1", resnet.out_layers[-1])


def _attends(block: nn.Module) -> bool:
    return any(isinstance(module, SpatialTransformer) for module in block.children())


def norms_of_clip(unet: UNetModel) -> list[nn.GroupNorm]:
    """The GroupNorms over the whole clip in the authors' 5-D UNet."""
    blocks = (m for m in unet.modules() if isinstance(m, ResBlock))
    return clip_norms(((block.in_layers[0], block.out_layers[0]) for block in blocks), unet.out[0])


def identity_of(patcher: Any) -> ModelIdentity:
    """The identity of a MODEL, regardless of LoRA."""
    model = patcher.model
    config = model.model_config.unet_config
    layers = attention_layers(model.diffusion_model)
    layout = (
        f"{type(model).__name__} in={config['in_channels']} width={config['model_channels']}"
        f"x{tuple(config['channel_mult'])} text={config['context_dim']} attention={len(layers)} "
        f"predicts={prediction_name(patcher.get_model_object('model_sampling'))}"
    )
    return _IDENTITIES.of(model, layout, model.get_dtype(), own_weights(patcher))


def own_weights(patcher: Any) -> dict[str, Tensor]:
    """The checkpoint's weights of a MODEL's UNet, by the host's keys.

    Ignores layers that another node inserts into the blocks while its MODEL is loaded (AnimateDiff's motion modules),
    and corrects the keys of the layers after them.
    """
    found = {}
    for key, weight in patcher.model.state_dict().items():
        if own := own_key(patcher.model.diffusion_model, key):
            found[own] = patcher.backup[own].weight if own in patcher.backup else weight
    return found


def own_key(unet: UNetModel, key: str) -> str | None:
    """The checkpoint's key of a weight in a UNet with inserted layers; None for an inserted layer's weight."""
    if not key.startswith("diffusion_model."):
        return None
    parts = key.split(".")
    at = {"input_blocks": 3, "output_blocks": 3, "middle_block": 2}.get(parts[1])
    if at is None:
        return key
    block = list(unet.get_submodule(".".join(parts[1:at])).children())
    place = int(parts[at])
    if not isinstance(block[place], OWN_LAYERS):
        return None
    parts[at] = str(sum(isinstance(layer, OWN_LAYERS) for layer in block[:place]))
    return ".".join(parts)
