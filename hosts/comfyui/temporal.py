"""Temporal layers on a ComfyUI MODEL, by hooks that exist only during a UNet call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from torch import Tensor, nn

from ...attention.temporal_kind import Kind
from ...attention.temporal_layers import Blocks, TemporalLayers, is_temporal, trains
from .hook import unpatched
from .unet import check_unet

KEY = "fatezero_temporal"
_AROUND = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


@dataclass(frozen=True)
class HostLayers:
    """Temporal layers of a MODEL, and the differences of its queries."""

    layers: TemporalLayers
    queries: Mapping[str, Tensor]


def temporal_layers(model: Any) -> HostLayers | None:
    """The temporal layers of a MODEL, if any."""
    found: HostLayers | None = model.get_attachment(KEY)
    return found


def with_temporal_layers(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A copy of a MODEL with temporal layers, for which a batch is the frames of one clip.

    weights: Tune-A-Video's or FateZero's, under diffusers' names. Queries among them replace the model's; LoRA are
    applied on top. Raises ValueError for a MODEL with temporal layers, for other weights, and for layers that do not
    fit.
    """
    check_unet(model)
    if temporal_layers(model) is not None:
        raise ValueError("model: already has temporal layers: connect it without them")
    names = host_names(model)
    layers = TemporalLayers.of(weights, blocks_of(model, names))
    queries = {}
    for name, weight in weights.items():
        if is_temporal(name):
            continue
        base = unpatched(model, names[name]) if name in names and trains(name) else None
        if base is None:
            raise ValueError(
                f"the file has a weight {name}, which belongs neither to temporal layers nor to queries of this model"
            )
        if base.shape != weight.shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}; this model needs {tuple(base.shape)}")
        queries[name] = weight.float() - base.float().cpu()
    return attach(model, layers, queries)


def attach(model: Any, layers: TemporalLayers, queries: Mapping[str, Tensor]) -> Any:
    """A copy of a MODEL with these layers instead of its own, and these differences of its queries."""
    patcher, names, before = model.clone(), host_names(model), temporal_layers(model)
    known = before.queries if before else {}
    changed = {name: difference - known[name] if name in known else difference for name, difference in queries.items()}
    patcher.add_patches({names[name]: ("diff", (difference,)) for name, difference in changed.items()})
    layers = layers.requires_grad_(False).to(model.model.manual_cast_dtype or model.model.get_dtype())
    added = comfy.model_patcher.ModelPatcher(layers, model.load_device, model.offload_device)
    patcher.set_additional_models(KEY, [added])
    patcher.set_attachments(KEY, HostLayers(layers, dict(queries)))
    patcher.remove_wrappers_with_key(_AROUND, KEY)
    patcher.add_wrapper_with_key(_AROUND, KEY, _around(layers, names))
    return patcher


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights of a MODEL's temporal layers for a file, with full queries, without LoRA."""
    found, names = temporal_layers(model), host_names(model)
    assert found is not None
    queries = {name: unpatched(model, names[name]).float().cpu() + d for name, d in found.queries.items()}
    weights = {name: weight.detach().float().cpu() for name, weight in found.layers.named().items()}
    return queries | weights


def fresh_layers(model: Any, kind: Kind, rank: int | None, seed: int) -> TemporalLayers:
    """New layers for a MODEL, which change nothing yet."""
    names = host_names(model)
    convolved = convolutions_of(model, names) if kind == "fatezero" else None
    return TemporalLayers.fresh(blocks_of(model, names), convolved, rank, seed)


# --- names and places -----------------------------------------------------------------------


def host_names(model: Any) -> dict[str, str]:
    """The host's keys of a UNet's weights, by diffusers' names."""
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {name: f"diffusion_model.{key}" for name, key in table.items()}


def blocks_of(model: Any, names: Mapping[str, str]) -> Blocks:
    """Channels and heads of the transformer blocks."""
    found = {}
    for name, key in names.items():
        block, is_query, _ = name.partition(".attn1.to_q.weight")
        if is_query:
            module: Any = model.model.get_submodule(key.removesuffix(".attn1.to_q.weight"))
            assert isinstance(module, BasicTransformerBlock)
            found[block] = (module.attn1.to_q.weight.shape[0], module.attn1.heads)
    return found


def convolutions_of(model: Any, names: Mapping[str, str]) -> dict[str, int]:
    """Channels of the 3x3 convolutions."""
    found = {}
    for name, key in names.items():
        if not name.endswith(".weight"):
            continue
        try:
            module = model.model.get_submodule(key.removesuffix(".weight"))
        except AttributeError:
            continue  # the table also has names that this UNet does not
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            found[name.removesuffix(".weight")] = module.out_channels
    return found


def places_in(unet: nn.Module, layers: TemporalLayers, names: Mapping[str, str]) -> list[tuple[nn.Module, nn.Module]]:
    """(module, the layer after it) for each layer; unet: the host's `diffusion_model`."""
    found = []
    for place in layers.places:
        leaf = ".attn1.to_q.weight" if f"{place}.attn1.to_q.weight" in names else ".weight"
        key = names[place + leaf].removeprefix("diffusion_model.").removesuffix(leaf)
        found.append((unet.get_submodule(key), layers.after(place)))
    return found


# --- hooks ------------------------------------------------------------------------------------


@contextmanager
def hooked_layers(places: Sequence[tuple[nn.Module, nn.Module]], clips: int) -> Iterator[None]:
    """Run each module's layer after it; clips: the number of clips in a batch, one after another."""

    def followed_by(layer: nn.Module) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return torch.cat([layer(clip) for clip in output.chunk(clips)])

        return hook

    handles = [module.register_forward_hook(followed_by(layer)) for module, layer in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _around(layers: TemporalLayers, names: Mapping[str, str]) -> Callable[..., Tensor]:
    def around(
        executor: Any, x: Tensor, t: Tensor, context: Any, y: Any, control: Any, options: dict[str, Any], **more: Any
    ) -> Tensor:
        places = places_in(executor.class_obj, layers, names)
        with hooked_layers(places, len(options["cond_or_uncond"])):
            return executor(x, t, context, y, control, options, **more)

    return around
