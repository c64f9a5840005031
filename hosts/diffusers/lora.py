"""LoRAs and similar adapters, fused into a model's weights. Each file is fused completely or rejected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...files.lora import LoraFile
from .lora_changes import changes
from .lora_files import LoraError, cut, read
from .lora_layers import Target, layer_name, layers_of

Networks = Mapping[str, nn.Module]
"""A model's networks by their names in diffusers: unet, text_encoder, text_encoder_2, transformer, transformer_2."""
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]

_TITLES = {
    "unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
    "transformer": "transformer", "transformer_2": "low-noise transformer",
    "connectors": "text connectors",
}  # fmt: skip


def lora_files(texts: str | Sequence[str] | None) -> list[LoraFile]:
    """LoRAs given as FILE or FILE=STRENGTH; LoraError for a missing file."""
    try:
        found = [LoraFile.parse(text) for text in ([texts] if isinstance(texts, str) else texts or ())]
        for one in found:
            one.file()
    except ValueError as error:
        raise LoraError(str(error)) from error
    return found


def add_loras(pipeline: Any, loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """`fuse_loras` for the networks of a pipeline that take LoRAs: a transformer's, or a UNet's with its text encoders.

    Names of a transformer's original code that are not diffusers' are converted by the pipeline.
    """
    names: Sequence[str] = ("unet", "text_encoder", "text_encoder_2")
    if getattr(pipeline, "transformer", None) is not None:
        names = getattr(pipeline, "_lora_loadable_modules", ("transformer", "transformer_2"))
    networks = {name: network for name in names if (network := getattr(pipeline, name, None)) is not None}
    renames = "transformer" in networks and not hasattr(pipeline.transformer, "blocks")  # Wan's names are known
    convert = getattr(pipeline, "lora_state_dict", None) if renames else None
    return tuple(fuse_loras(networks, loras, convert))


def fuse_loras(networks: Networks, loras: Sequence[LoraFile], convert: Convert | None = None) -> list[str]:
    """Fuse LoRAs into the weights of a model's networks; returns a line of text about each.

    convert: from the tensors of a file with other names to those with diffusers' names.

    Raises LoraError for a file that does not fit, before it changes any weight, and for weights out of range.
    """
    targets = {name: Target.of(network) for name, network in networks.items()}
    return [_fuse(lora, targets, scope, convert) for lora, scope in zip(loras, _scopes(networks, loras), strict=True)]


def _fuse(lora: LoraFile, targets: Mapping[str, Target], scope: Sequence[str], convert: Convert | None) -> str:
    tensors, adapter = read(lora)
    try:
        layers = layers_of(lora, tensors, targets, scope)
    except LoraError:
        converted = _converted(tensors, convert)
        if not converted:
            raise
        layers = layers_of(lora, converted, targets, scope)
    for layer in layers:  # check shapes before changing any weight
        list(changes(lora, layer.on("meta"), adapter))
    for layer in layers:
        for change in changes(lora, layer.on(layer.device), adapter):
            if not change.add(lora.strength):
                raise LoraError(f"{lora.name}: {cut(layer.key)} makes a weight infinite or NaN: lower its strength")
    done = len(layers)
    counted = Counter(layer.network for layer in layers)
    where = ", ".join(f"{counted[network]} in the {_TITLES[network]}" for network in targets if counted[network])
    how = "" if lora.strength == 1 else f" at strength {lora.strength:g}"
    return f"LoRA {lora.name}: {done} of {done} layers{how} ({where})"


def _converted(tensors: Mapping[str, Tensor], convert: Convert | None) -> dict[str, Tensor] | None:
    """A file's tensors with diffusers' names; None where they cannot be converted without loss. Layer by layer, because
    diffusers leaves out layers that it does not know.
    """
    if convert is None or any("dora_scale" in name for name in tensors):  # which it leaves out too
        return None
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(layer_name(name), {})[name] = tensor
    found: dict[str, Tensor] = {}
    try:
        for layer in layers.values():
            own = convert(layer)
            if not own:
                return None
            found |= own
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        return None
    return found


# --- the transformers of Wan 2.2 ------------------------------------------------------------

_NOISE = re.compile(r"(high|low)[-_ ]?noise|(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)


def _scopes(networks: Networks, loras: Sequence[LoraFile]) -> list[tuple[str, ...]]:
    """For each LoRA, the networks of names without a network's prefix."""
    if "transformer_2" not in networks:
        return [(next(iter(networks)),)] * len(loras)
    pairs = Counter(_NOISE.sub("*", lora.name) for lora in loras)
    return [_scope_of_pair(lora, pairs[_NOISE.sub("*", lora.name)] > 1) for lora in loras]


def _scope_of_pair(lora: LoraFile, paired: bool) -> tuple[str, ...]:
    """The transformers of Wan 2.2 for a file, by its name: "..._high_noise.safetensors", or a pair of files that differ
    only in high and low; both for other names.
    """
    found = [(match[1] or match[2]).lower() for match in _NOISE.finditer(lora.name)]
    clear = paired or all(match[1] for match in _NOISE.finditer(lora.name))
    if len(set(found)) > 1 or not clear:
        raise LoraError(
            f"{lora.name}: unclear whether this LoRA is for one transformer of Wan 2.2 or both: rename it with "
            "high_noise or low_noise, or without high and low for both"
        )
    return {"high": ("transformer",), "low": ("transformer_2",)}.get(
        "".join(set(found)), ("transformer", "transformer_2")
    )
