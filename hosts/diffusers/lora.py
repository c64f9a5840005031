"""LoRAs and similar adapters, fused into a model's weights. Each file is fused completely or rejected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...files.lora import LoraFile
from .lora_changes import changes
from .lora_files import LoraError, cut, read
from .lora_layers import Target, layers_of

Networks = Mapping[str, nn.Module]
"""A model's networks by their names in diffusers: unet, text_encoder, text_encoder_2, transformer, transformer_2."""

_TITLES = {
    "unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
    "transformer": "transformer", "transformer_2": "low-noise transformer",
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
    """`fuse_loras` for the networks of a pipeline: a transformer's, or a UNet's with its text encoders."""
    names = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2")
    networks = {name: network for name in names if (network := getattr(pipeline, name, None)) is not None}
    if "transformer" in networks:
        networks = {name: network for name, network in networks.items() if name.startswith("transformer")}
    return tuple(fuse_loras(networks, loras))


def fuse_loras(networks: Networks, loras: Sequence[LoraFile]) -> list[str]:
    """Fuse LoRAs into the weights of a model's networks; returns a line of text about each.

    Raises LoraError for a file that does not fit, before it changes any weight, and for weights out of range.
    """
    targets = {name: Target.of(network) for name, network in networks.items()}
    return [_fuse(lora, targets, scope) for lora, scope in zip(loras, _scopes(networks, loras), strict=True)]


def _fuse(lora: LoraFile, targets: Mapping[str, Target], scope: Sequence[str]) -> str:
    tensors, adapter = read(lora)
    layers = layers_of(lora, tensors, targets, scope)
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
