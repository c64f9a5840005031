"""LoRAs and their kin, added to a model's own weights: W + strength * (alpha / rank) * change.

The change of a weight is `up @ down` (LoRA, arXiv 2106.09685), `(a1 @ b1) * (a2 @ b2)` (LoHa, arXiv 2108.06098),
`kron(w1, w2)` (LoKr, arXiv 2309.14859) or a plain difference; DoRA (arXiv 2402.09353) then gives it its own magnitudes.
All the layers of a file are added, or the file is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...files.lora import PICKLED, LoraFile
from ...files.safetensors import is_pointer
from .families import family_of


class LoraError(ValueError):
    """A LoRA that cannot be read or does not fit the model."""


Networks = Mapping[str, nn.Module]
"""A model's networks by their names in diffusers: unet, text_encoder, text_encoder_2, transformer, transformer_2."""

_TITLES = {
    "unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
    "transformer": "transformer", "transformer_2": "low-noise transformer",
}  # fmt: skip


def fuse_loras(networks: Networks, loras: Sequence[LoraFile]) -> list[str]:
    """Add LoRAs to the weights of a model's networks, one after another; a line on each.

    Raises LoraError for one that does not fit, before that file changes a weight, and where weights leave their range.
    """
    targets = {name: _Target.of(network) for name, network in networks.items()}
    return [_fuse(lora, targets, scope) for lora, scope in zip(loras, _scopes(networks, loras), strict=True)]


def _fuse(lora: LoraFile, targets: Mapping[str, _Target], scope: Sequence[str]) -> str:
    tensors, adapter = _read(lora)
    layers = _layers(lora, tensors, targets, scope)
    for layer in layers:  # by their shapes, before any weight is changed
        list(_changes(lora, layer.on("meta"), adapter))
    for layer in layers:
        for change in _changes(lora, layer.on(layer.device), adapter):
            if not change.add(lora.strength):
                raise LoraError(f"{lora.name}: with {_cut(layer.key)} a weight is no finite number: lower its strength")
    done = len(layers)
    counted = Counter(layer.network for layer in layers)
    where = ", ".join(f"{counted[network]} in the {_TITLES[network]}" for network in targets if counted[network])
    how = "" if lora.strength == 1 else f" at strength {lora.strength:g}"
    return f"LoRA {lora.name}: {done} of {done} layers{how} ({where})"


# --- which transformer of Wan 2.2 -----------------------------------------------------------

_NOISE = re.compile(r"(high|low)[-_ ]?noise|(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)


def _scopes(networks: Networks, loras: Sequence[LoraFile]) -> list[tuple[str, ...]]:
    """For each LoRA, the networks that names without a network's prefix are of."""
    if "transformer_2" not in networks:
        return [(next(iter(networks)),)] * len(loras)
    pairs = Counter(_NOISE.sub("*", lora.name) for lora in loras)
    return [_scope_of_pair(lora, pairs[_NOISE.sub("*", lora.name)] > 1) for lora in loras]


def _scope_of_pair(lora: LoraFile, paired: bool) -> tuple[str, ...]:
    """The transformers of Wan 2.2 that a file is for by its name: "..._high_noise.safetensors", or a pair of files that
    differ in high and low alone; both for other names.
    """
    found = [(match[1] or match[2]).lower() for match in _NOISE.finditer(lora.name)]
    clear = paired or all(match[1] for match in _NOISE.finditer(lora.name))
    if len(set(found)) > 1 or not clear:
        raise LoraError(
            f"{lora.name}: unclear whether this LoRA is for one transformer of Wan 2.2 or for both: rename it with "
            "high_noise or low_noise, or without high and low for both"
        )
    return {"high": ("transformer",), "low": ("transformer_2",)}.get(
        "".join(set(found)), ("transformer", "transformer_2")
    )


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapter:
    """What PEFT keeps beside the weights: alphas and ranks of its layers, by network; "" is of all."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scale(self, network: str, layer: str, rank: int | None) -> float | None:
        """A layer's scale; None where nothing is said of it."""
        about = self.settings.get(network, self.settings.get("", {}))
        alpha = about.get("lora_alpha", about.get("alpha"))
        if alpha is None or (rank is None and about.get("r") is None):
            return None
        alpha = _by_pattern(about.get("alpha_pattern"), layer, alpha)
        rank = rank or int(_by_pattern(about.get("rank_pattern"), layer, about["r"]))
        return float(alpha) / (rank**0.5 if about.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, usual: Any) -> Any:
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, usual)


def _read(lora: LoraFile) -> tuple[dict[str, Tensor], _Adapter]:
    """The tensors of a file, and what PEFT says beside them."""
    try:
        path = lora.file()
    except ValueError as error:
        raise LoraError(str(error)) from error
    try:
        if path.suffix in PICKLED:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            tensors = (
                {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
            )
            return tensors, _adapter_of(path, {})
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            return tensors, _adapter_of(path, file.metadata() or {})
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise LoraError(f"{path}: {why_unreadable(path, error)}") from error


def why_unreadable(path: Path, error: Exception) -> str:
    """Why a file of weights could not be read, in one line."""
    if is_pointer(path):
        return "is a Git LFS pointer and not the file itself: run `git lfs pull`"
    if isinstance(error, UnpicklingError):
        return "is damaged, or a pickle of more than weights, which is not read"
    first = next(iter(str(error).splitlines()), "")
    return f"is damaged, or no file of weights: {first}"


def _adapter_of(path: Path, metadata: Mapping[str, str]) -> _Adapter:
    """PEFT's `adapter_config.json` beside a file, or what diffusers writes into it."""
    try:
        if "lora_adapter_metadata" in metadata:
            found: dict[str, dict[str, Any]] = {}
            for name, value in json.loads(metadata["lora_adapter_metadata"]).items():
                network, _, setting = name.partition(".")
                found.setdefault(network, {})[setting] = value
            return _Adapter(found)
        beside = path.parent / "adapter_config.json"
        if path.stem == "adapter_model" and beside.is_file():
            return _Adapter({"": json.loads(beside.read_text(encoding="utf-8"))})
    except (ValueError, AttributeError) as error:
        raise LoraError(f"{path}: its adapter settings are damaged: {error}") from error
    return _Adapter()


# --- names ----------------------------------------------------------------------------------

_ENDINGS = {
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
"""What the tensors of a layer are called, longest first where one ends another."""
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)
_NOT_APPLIED = {
    "OFT": r"\.oft_", "BOFT": r"\.boft_", "GLoRA": r"\.[ab][12]\.weight$", "(IA)^3": r"\.on_input$|\.ia3_l$",
    "VeRA": r"vera_lambda", "a set of whole weights": r"\.set_weight$|\.reshape_weight$",
    "LoRA of embeddings": r"lora_embedding_[AB]",
}  # fmt: skip
_PLAINER = (
    (r"(^|\.)(base_model\.model|_orig_mod|module)\.", r"\1"), (r"\.processor\.", "."), (r"\.default(?=\.|$)", ""),
    (r"\.(lora_[AB]|lora_magnitude_vector)\.[^.]+\.(weight|bias)$", r".\1.\2"), (r"\.diff_m$", ".modulation.diff"),
)  # fmt: skip
"""What wrappers, attention processors and the names of adapters add to a name, taken off."""
_PREFIXES = (
    ("lycoris_", ""), ("lora_transformer_", ""),
    ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"), ("lora_te_", "text_encoder"), ("lora_unet_", ""),
    ("text_encoders.clip_l.transformer.", "text_encoder"), ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"), ("text_encoder.", "text_encoder"), ("unet.", ""),
    ("model.diffusion_model.", ""), ("diffusion_model.", ""), ("transformer_2.", "transformer_2"),
    ("transformer.", "transformer"),
)  # fmt: skip
"""What names begin with, and the network that they are of; "" is the one that denoises."""


@dataclass(frozen=True)
class _Layer:
    """The tensors of one layer in a file, and the weights they change. key: one of its names in the file."""

    key: str
    network: str
    name: str
    target: _Target
    parts: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(iter(self.target.parameters.values())).device

    def on(self, device: str | torch.device) -> _Layer:
        """The same with its tensors elsewhere, but its alpha."""
        parts = {name: tensor if name == "alpha" else tensor.to(device) for name, tensor in self.parts.items()}
        return replace(self, parts=parts)


@dataclass(frozen=True)
class _Target:
    """A network's parameters, and its layers by each name that files may call them."""

    parameters: dict[str, nn.Parameter]
    names: dict[str, str]

    @classmethod
    def of(cls, network: nn.Module) -> _Target:
        parameters = {n: p for n, p in network.named_parameters() if not n.startswith("temporal_layers.")}
        layers = {re.sub(r"\.(weight|bias)$", "", name) for name in parameters}
        names: dict[str, str] = {}
        for alias, layer in _aliases(network, layers):
            names.setdefault(_plain(alias), layer)
        return cls(parameters, names)

    def find(self, name: str) -> str | None:
        """The layer of a name; None for none."""
        plain = _plain(name)
        return self.names.get(plain, self.names.get(f"{plain}_0") if plain.endswith("to_out") else None)


def _plain(name: str) -> str:
    """A layer's name in the form in which names of all writers agree."""
    return name.replace(".", "_").removeprefix("text_model_")


def _aliases(network: nn.Module, layers: set[str]) -> Iterator[tuple[str, str]]:
    """Every name of each layer: diffusers' own, and that of the original code."""
    yield from ((layer, layer) for layer in sorted(layers))
    renamed = _WAN if hasattr(network, "blocks") else _of_unet(network) if hasattr(network, "down_blocks") else ()
    for layer in sorted(layers):
        original = layer
        for ours, theirs in renamed:
            original = re.sub(ours, theirs, original)
        if original != layer:
            yield original, layer


_WAN = (
    (r"attn1\.(to_)?", "self_attn."), (r"attn2\.(to_)?", "cross_attn."), (r"attn\.out\.0$", "attn.o"),
    (r"add_([kv])_proj$", r"\1_img"), (r"ffn\.net\.0\.proj$", "ffn.0"), (r"ffn\.net\.2$", "ffn.2"),
    (r"\.norm2$", ".norm3"), (r"^blocks\.(\d+)\.scale_shift_table$", r"blocks.\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"), (r"^proj_out$", "head.head"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
)  # fmt: skip
"""diffusers' names of Wan's layers to those of Wan's own code."""


def _of_unet(unet: Any) -> list[tuple[str, str]]:
    """diffusers' names of a UNet's layers to those of the original code, as patterns in the order they apply."""
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


def _layers(
    lora: LoraFile, tensors: Mapping[str, Tensor], targets: Mapping[str, _Target], scope: Sequence[str]
) -> list[_Layer]:
    """The layers of a file with the layers of the model that they are for; LoraError unless all are found."""
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
        grouped.setdefault(place, {})[_ENDINGS[ending]] = tensor
        keys.setdefault(place, key)
    _refuse_unknown(lora, list(tensors), unknown, targets)

    found, lost = list[_Layer](), []
    both = any(network == "transformer_2" for network, _ in grouped)
    for (network, name), parts in grouped.items():
        key = keys[network, name]
        within = _candidates(network, targets, scope, both)
        placed = [(n, layer) for n in within if n in targets and (layer := targets[n].find(name)) is not None]
        if network == "?" and placed:  # no prefix: of the network that denoises, else of a text encoder
            placed = [one for one in placed if one[0] in scope] or placed[:1]
        found += [_Layer(key, n, layer, targets[n], parts) for n, layer in placed]
        if not placed:
            lost.append(key)
    if lost:
        raise LoraError(_lost(lora, list(tensors), lost, len(grouped), targets))
    return found


def _candidates(network: str, targets: Mapping[str, _Target], scope: Sequence[str], both: bool) -> Sequence[str]:
    """The networks that a layer may be of. both: the file names both transformers of Wan 2.2."""
    if network == "?":
        return [*scope, *(name for name in targets if name not in scope)]
    if network == "":
        return scope
    return scope if network == "transformer" and not both else (network,)


def _model_of(targets: Mapping[str, _Target]) -> str:
    """The family of a model in a few words."""
    if "unet" not in targets:
        return "Wan"
    return "SDXL" if "text_encoder_2" in targets else "Stable Diffusion"


def _refuse_unknown(lora: LoraFile, names: list[str], unknown: list[str], targets: Mapping[str, _Target]) -> None:
    """LoraError for tensors that are no part of a change of weights."""
    if not unknown and names:
        return
    for kind, pattern in _NOT_APPLIED.items():
        if found := [name for name in unknown if re.search(pattern, name)]:
            raise LoraError(f"{lora.name} holds {kind} ({_cut(found[0])}), which cannot be applied to this model")
    family, own = family_of(names), _model_of(targets)
    if len(unknown) == len(names):
        what = f"it looks like a file of {family}" if family else "it has no tensors of one"
        example = f", e.g. {_cut(unknown[0])}" if unknown else ""
        raise LoraError(f"{lora.name} is no LoRA: {what}{example}")
    other = f"; it is made for {family}, not {own}" if family not in (None, own) else ""
    raise LoraError(
        f"{lora.name}: {len(unknown)} of its {len(names)} tensors are of no kind that can be applied, "
        f"e.g. {_cut(unknown[0])}{other}"
    )


def _lost(lora: LoraFile, names: list[str], lost: list[str], count: int, targets: Mapping[str, _Target]) -> str:
    """Why layers have no place in the model."""
    family, own = family_of(names), _model_of(targets)
    other = f"{lora.name} is a LoRA for {family}, and the model is {own}: " if family not in (None, own) else ""
    start = other or f"{lora.name}: "
    which = (
        f"none of its {count} layers matches"
        if len(lost) == count
        else f"{len(lost)} of its {count} layers match no layer"
    )
    return f"{start}{which}, e.g. {_cut(lost[0])}"


def _cut(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:117]}..."


# --- changes of weights ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """What is added to a parameter. magnitude: DoRA's, and the axis it is along."""

    parameter: nn.Parameter
    change: Tensor
    magnitude: tuple[Tensor, int] | None = None

    def add(self, strength: float) -> bool:
        """To the parameter, computed in single precision at least; whether it still holds finite numbers."""
        weight = self.parameter.data
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        change = self.change.to(exact.dtype).view(exact.shape)
        if self.magnitude is not None:
            change = decomposed(exact + change, self.magnitude[0].to(exact), self.magnitude[1]) - exact
        self.parameter.data = torch.add(exact, change, alpha=strength).to(weight.dtype)
        return all(bool(torch.isfinite(side)) for side in self.parameter.data.aminmax())


def decomposed(weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """DoRA, Eq. 5: m V / |V|, with a magnitude for each entry of an axis (outputs 0, inputs 1)."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    length = weight.transpose(0, axis).flatten(1).norm(dim=1)
    return magnitude.view(shape) * weight / length.view(shape)


def low_rank(up: Tensor, down: Tensor, mid: Tensor | None = None) -> Tensor:
    """up @ down, (outputs, inputs); with a core tensor between, a convolution's Tucker form."""
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    return torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1)).flatten(1)


def hadamard(p: Mapping[str, Tensor]) -> Tensor:
    """(w1_a @ w1_b) * (w2_a @ w2_b), each with a core tensor for convolutions."""
    factors = []
    for n in "12":
        a, b, core = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"], p.get(f"hada_t{n}")
        factors.append(a @ b if core is None else _with_core(core, a, b).flatten(1))
    return factors[0] * factors[1]


def kronecker(p: Mapping[str, Tensor]) -> Tensor:
    """kron(w1, w2), (outputs, inputs); each factor may be of low rank."""
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        w2 = _with_core(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        w2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2).flatten(1)


def _with_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """LyCORIS's Tucker form: a (rank, outputs), b (rank, inputs)."""
    return torch.einsum("rskl,ro,si->oikl", core, a, b)


_OF_KINDS = (
    ({"up", "down", "mid"}, lambda p: low_rank(p["up"], p["down"], p.get("mid")), "down"),
    ({name for name in _ENDINGS.values() if name.startswith("hada")}, hadamard, "hada_w1_b"),
    ({name for name in _ENDINGS.values() if name.startswith("lokr")}, kronecker, None),
)
"""The tensors of a kind of change, the change, and the tensor whose first side is its rank."""


def _changes(lora: LoraFile, layer: _Layer, adapter: _Adapter) -> Iterator[_Change]:
    """The changes of a layer's parameters; LoraError for tensors that are missing, left over, or do not fit."""
    try:
        yield from _checked_changes(lora, layer, adapter)
    except KeyError as error:
        raise LoraError(f"{lora.name}: the layer of {_cut(layer.key)} lacks its {error.args[0]}") from error
    except RuntimeError as error:
        raise LoraError(f"{lora.name}: the tensors of {_cut(layer.key)} do not fit each other") from error


def _checked_changes(lora: LoraFile, layer: _Layer, adapter: _Adapter) -> Iterator[_Change]:
    left = {name: tensor.float() if tensor.dtype != torch.float64 else tensor for name, tensor in layer.parts.items()}
    alpha, dora, magnitude = left.pop("alpha", None), left.pop("dora", None), left.pop("magnitude", None)
    scale = 1.0
    for parts, change_of, ranked in _OF_KINDS:
        own = {name: left.pop(name) for name in parts if name in left}
        if not own:
            continue
        change = change_of(own)
        scale = _scale(layer, own, ranked, alpha, adapter)
        yield _fitting(lora, layer, "weight", change.mul_(scale), _magnitude(lora, layer, dora, magnitude))
        dora = magnitude = None
    for name, of in (("diff", "weight"), ("diff_b", "bias"), ("up_bias", "bias")):
        if name in left:
            change = left.pop(name)
            yield _fitting(lora, layer, of, scale * change if name == "up_bias" else change)
    if left or dora is not None or magnitude is not None:
        raise KeyError("up and down weights")


def _scale(
    layer: _Layer, own: Mapping[str, Tensor], ranked: str | None, alpha: Tensor | None, adapter: _Adapter
) -> float:
    """alpha / rank. LoKr's rank is that of its low-rank factor; with two whole ones its file's alpha says nothing."""
    if ranked is None:
        factor = next((own[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in own), None)
    else:
        factor = own[ranked]
    rank = None if factor is None else len(factor)
    if alpha is None:
        told = adapter.scale(layer.network, layer.name, rank)
        return 1.0 if told is None else told
    return 1.0 if rank is None else alpha.item() / rank


def _magnitude(
    lora: LoraFile, layer: _Layer, dora: Tensor | None, magnitude: Tensor | None
) -> tuple[Tensor, int] | None:
    """DoRA's magnitudes with the axis they are along; PEFT's are of outputs, LyCORIS's of either, by their shape."""
    if dora is None and magnitude is None:
        return None
    sides = layer.target.parameters[f"{layer.name}.weight"].shape[:2]
    axis = 0 if dora is None or dora.ndim < 2 or dora.shape[0] != 1 or sides[0] == 1 else 1
    values = (magnitude if dora is None else dora).flatten()  # type: ignore[union-attr]
    if len(values) != sides[axis]:
        raise LoraError(f"{lora.name}: the magnitudes of {_cut(layer.key)} are {len(values)}; {sides[axis]} are needed")
    return values, axis


def _fitting(
    lora: LoraFile, layer: _Layer, of: str, change: Tensor, magnitude: tuple[Tensor, int] | None = None
) -> _Change:
    """A change of a layer's weight or bias; LoraError for one that it does not fit."""
    parameters, name = layer.target.parameters, f"{layer.name}.{of}"
    if of == "weight" and name not in parameters:
        name = layer.name
    parameter = parameters.get(name)
    if parameter is None:
        raise LoraError(f"{lora.name}: {_cut(layer.key)} changes a {of} that the model's layer {layer.name} has not")
    shape = parameter.shape if parameter.ndim < 2 else parameter.flatten(1).shape
    given = change.shape if change.ndim < 2 else change.flatten(1).shape
    if given != shape and change.shape != parameter.shape:
        raise LoraError(
            f"{lora.name}: {_cut(layer.key)} is for a layer of {'x'.join(map(str, given))}, and the model's is "
            f"{'x'.join(map(str, shape))}: a LoRA for another size of model (SD 1.x, SD 2.x, SDXL, ...)"
        )
    return _Change(parameter, change, magnitude)
