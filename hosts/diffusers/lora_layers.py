"""Matching of a LoRA file's layers to a model's, for the naming schemes of all common trainers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...files.lora import LoraFile
from ...models.unet import UNET
from ...models.wan import original_name
from .families import family_of
from .lora_files import LoraError, cut

ENDINGS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora.down.weight": "down", "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down", ".lora_up.weight": "up", ".lora_B.weight": "up", ".lora.up.weight": "up",
    "_lora.up.weight": "up", ".lora_linear_layer.up.weight": "up", ".lora_mid.weight": "mid", ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias", ".alpha": "alpha",
    "_lora.alpha": "alpha", ".lora.alpha": "alpha", ".dora_scale": "dora", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude", ".diff": "diff", ".w_norm": "diff", ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}  # fmt: skip
"""Suffixes of a layer's tensors."""
_BY_LENGTH = sorted(ENDINGS, key=len, reverse=True)
_NOT_APPLIED = {
    "OFT": r"\.oft_", "BOFT": r"\.boft_", "GLoRA": r"\.[ab][12]\.weight$", "(IA)^3": r"\.on_input$|\.ia3_l$",
    "VeRA": r"vera_lambda", "a set of whole weights": r"\.set_weight$|\.reshape_weight$",
    "LoRA of embeddings": r"lora_embedding_[AB]",
}  # fmt: skip
_PLAINER = (
    (r"(^|\.)(base_model\.model|_orig_mod|module)\.", r"\1"), (r"\.processor\.", "."), (r"\.default(?=\.|$)", ""),
    (r"\.(lora_[AB]|lora_magnitude_vector)\.[^.]+\.(weight|bias)$", r".\1.\2"), (r"\.diff_m$", ".modulation.diff"),
)  # fmt: skip
"""Substitutions that remove additions of wrappers, attention processors and adapter names."""
_PREFIXES = (
    ("lycoris_", ""), ("lora_transformer_", ""),
    ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"), ("lora_te_", "text_encoder"), ("lora_unet_", ""),
    ("text_encoders.clip_l.transformer.", "text_encoder"), ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"), ("text_encoder.", "text_encoder"), ("unet.", ""),
    ("model.diffusion_model.", ""), ("diffusion_model.", ""), ("transformer_2.", "transformer_2"),
    ("transformer.", "transformer"), ("connectors.", "connectors"),
)  # fmt: skip
"""Prefixes of names, and their network; "" is the denoising network."""


def layer_name(name: str) -> str:
    """The part of a tensor's name that names its layer."""
    ending = next((e for e in _BY_LENGTH if name.endswith(e)), "")
    return name.removesuffix(ending)


@dataclass(frozen=True)
class Layer:
    """A layer's tensors in a file, and the weights they change. key: one of its names in the file."""

    key: str
    network: str
    name: str
    target: Target
    parts: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(iter(self.target.parameters.values())).device

    def on(self, device: str | torch.device) -> Layer:
        """The layer with its tensors, except alpha, on a device."""
        parts = {name: tensor if name == "alpha" else tensor.to(device) for name, tensor in self.parts.items()}
        return replace(self, parts=parts)


@dataclass(frozen=True)
class Target:
    """A network's parameters, and its layers by all their names in files."""

    parameters: dict[str, nn.Parameter]
    names: dict[str, str]

    @classmethod
    def of(cls, network: nn.Module) -> Target:
        parameters = {n: p for n, p in network.named_parameters() if not n.startswith("temporal_layers.")}
        layers = {re.sub(r"\.(weight|bias)$", "", name) for name in parameters}
        names: dict[str, str] = {}
        for alias, layer in _aliases(network, layers):
            names.setdefault(_plain(alias), layer)
        return cls(parameters, names)

    def find(self, name: str) -> str | None:
        """The layer of a name, if any."""
        plain = _plain(name)
        return self.names.get(plain, self.names.get(f"{plain}_0") if plain.endswith("to_out") else None)


def _plain(name: str) -> str:
    """A layer's name in a normalized form."""
    return name.replace(".", "_").removeprefix("text_model_")


def _aliases(network: nn.Module, layers: set[str]) -> Iterator[tuple[str, str]]:
    """All names of each layer: diffusers' and the original code's."""
    yield from ((layer, layer) for layer in sorted(layers))
    original = _original(network)
    yield from ((theirs, layer) for layer in sorted(layers) if (theirs := original(layer)) != layer)


def _original(network: Any) -> Callable[[str], str]:
    """A function from diffusers' names to the original code's."""
    if hasattr(network, "blocks"):
        return original_name
    patterns = _of_unet(network) if hasattr(network, "down_blocks") else ()

    def renamed(layer: str) -> str:
        for ours, theirs in patterns:
            layer = re.sub(ours, theirs, layer)
        return layer

    return renamed


def _of_unet(unet: Any) -> list[tuple[str, str]]:
    """Patterns from diffusers' names of a UNet's layers to the original code's, in order of application."""
    found = [("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    found += [(f"{ours}.linear_{n}", theirs.format(2 * n - 2)) for n in (1, 2) for ours, theirs in
              (("time_embedding", "time_embed.{}"), ("add_embedding", "label_emb.0.{}"))]  # fmt: skip
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            found.append((f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"))
            found.append((f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"))
            number += 1
        if getattr(block, "downsamplers", None):
            found.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"))
            number += 1
    found += [(f"mid_block.{ours}", f"middle_block.{n}") for n, ours in
              enumerate(("resnets.0", "attentions.0", "resnets.1"))]  # fmt: skip
    number = 0
    for i, block in enumerate(unet.up_blocks):
        attends = bool(getattr(block, "attentions", None))
        for j in range(len(block.resnets)):
            found.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"))
            found.append((f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"))
            number += 1
        if getattr(block, "upsamplers", None):
            found.append((f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{1 + attends}.conv"))
    inner = (
        ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
    )  # fmt: skip
    patterns = [(rf"^{re.escape(ours)}(?=\.|$)", theirs) for ours, theirs in found]
    of_resnets = r"((?:input|output)_blocks\.\d+\.0|middle_block\.[02])"
    return patterns + [(rf"^{of_resnets}\.{ours}$", rf"\1.{theirs}") for ours, theirs in inner]


def layers_of(
    lora: LoraFile, tensors: Mapping[str, Tensor], targets: Mapping[str, Target], scope: Sequence[str]
) -> list[Layer]:
    """The layers of a file, matched to the model's; LoraError unless all match."""
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    unknown = []
    for key, tensor in tensors.items():
        named = key
        for pattern, plain in _PLAINER:
            named = re.sub(pattern, plain, named)
        ending = next((e for e in _BY_LENGTH if named.endswith(e)), None)
        if ending is None:
            unknown.append(key)
            continue
        prefix, network = next((p for p in _PREFIXES if named.startswith(p[0])), ("", "?"))
        place = network, named[len(prefix) : -len(ending)]
        grouped.setdefault(place, {})[ENDINGS[ending]] = tensor
        keys.setdefault(place, key)
    _refuse_unknown(lora, list(tensors), unknown, targets)

    found, lost = list[Layer](), []
    both = any(network == "transformer_2" for network, _ in grouped)
    for (network, name), parts in grouped.items():
        key = keys[network, name]
        within = _candidates(network, targets, scope, both)
        placed = [(n, layer) for n in within if n in targets and (layer := targets[n].find(name)) is not None]
        if network == "?" and placed:  # no prefix: the denoising network, else a text encoder
            placed = [one for one in placed if one[0] in scope] or placed[:1]
        found += [Layer(key, n, layer, targets[n], parts) for n, layer in placed]
        if not placed:
            lost.append(key)
    if lost:
        raise LoraError(_unmatched(lora, list(tensors), lost, len(grouped), targets))
    return found


def _candidates(network: str, targets: Mapping[str, Target], scope: Sequence[str], both: bool) -> Sequence[str]:
    """The possible networks of a layer. both: the file has layers of both transformers of Wan 2.2."""
    if network == "?":
        return [*scope, *(name for name in targets if name not in scope)]
    if network == "":
        return scope
    return scope if network == "transformer" and not both else (network,)


def _model_of(targets: Mapping[str, Target]) -> str:
    """The name of a model's family."""
    if "unet" not in targets:
        return family_of(targets["transformer"].names) or "a transformer"
    return "SDXL" if "text_encoder_2" in targets else UNET.title


def _refuse_unknown(lora: LoraFile, names: list[str], unknown: list[str], targets: Mapping[str, Target]) -> None:
    """Raise LoraError for tensors that are not part of a supported change."""
    if not unknown and names:
        return
    for kind, pattern in _NOT_APPLIED.items():
        if found := [name for name in unknown if re.search(pattern, name)]:
            raise LoraError(f"{lora.name} contains {kind} ({cut(found[0])}), which is not supported for this model")
    family, own = family_of(names), _model_of(targets)
    if len(unknown) == len(names):
        what = f"it looks like a file of {family}" if family else "it has none of a LoRA's tensors"
        example = f", e.g. {cut(unknown[0])}" if unknown else ""
        raise LoraError(f"{lora.name} is not a LoRA: {what}{example}")
    other = f"; it is made for {family}, not {own}" if family not in (None, own) else ""
    raise LoraError(
        f"{lora.name}: {len(unknown)} of its {len(names)} tensors are of unsupported kinds, e.g. "
        f"{cut(unknown[0])}{other}"
    )


def _unmatched(lora: LoraFile, names: list[str], lost: list[str], count: int, targets: Mapping[str, Target]) -> str:
    """The reason why layers do not match the model."""
    family, own = family_of(names), _model_of(targets)
    other = f"{lora.name} is a LoRA for {family}, but the model is {own}: " if family not in (None, own) else ""
    start = other or f"{lora.name}: "
    which = (
        f"none of its {count} layers matches"
        if len(lost) == count
        else f"{len(lost)} of its {count} layers match no layer"
    )
    return f"{start}{which}, e.g. {cut(lost[0])}"
