"""Changes of weights by a LoRA: W + strength * (alpha / rank) * change.

The change is `up @ down` (LoRA, arXiv 2106.09685), `(a1 @ b1) * (a2 @ b2)` (LoHa, arXiv 2108.06098), `kron(w1, w2)`
(LoKr, arXiv 2309.14859) or a plain difference; DoRA (arXiv 2402.09353) then rescales the weight to its magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...files.lora import LoraFile
from .lora_files import Adapter, LoraError, cut
from .lora_layers import ENDINGS, Layer


@dataclass(frozen=True)
class Change:
    """A change of a parameter. magnitude: DoRA's, with its axis."""

    parameter: nn.Parameter
    change: Tensor
    magnitude: tuple[Tensor, int] | None = None

    def add(self, strength: float) -> bool:
        """Apply it to the parameter, at least in single precision; returns whether the result is finite."""
        weight = self.parameter.data
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        change = self.change.to(exact.dtype).view(exact.shape)
        if self.magnitude is not None:
            change = decomposed(exact + change, self.magnitude[0].to(exact), self.magnitude[1]) - exact
        self.parameter.data = torch.add(exact, change, alpha=strength).to(weight.dtype)
        return all(bool(torch.isfinite(side)) for side in self.parameter.data.aminmax())


def decomposed(weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """DoRA, Eq. 5: m V / |V|, with a magnitude for each entry of an axis (0: outputs, 1: inputs)."""
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
    ({name for name in ENDINGS.values() if name.startswith("hada")}, hadamard, "hada_w1_b"),
    ({name for name in ENDINGS.values() if name.startswith("lokr")}, kronecker, None),
)
"""For each kind: its tensors, the function of the change, and the tensor whose first dimension is the rank."""


def changes(lora: LoraFile, layer: Layer, adapter: Adapter) -> Iterator[Change]:
    """The changes of a layer's parameters; LoraError for missing, unknown or misfitting tensors."""
    try:
        yield from _checked_changes(lora, layer, adapter)
    except KeyError as error:
        raise LoraError(f"{lora.name}: the layer of {cut(layer.key)} has no {error.args[0]}") from error
    except RuntimeError as error:
        raise LoraError(f"{lora.name}: the tensors of {cut(layer.key)} have conflicting shapes") from error


def _checked_changes(lora: LoraFile, layer: Layer, adapter: Adapter) -> Iterator[Change]:
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
    layer: Layer, own: Mapping[str, Tensor], ranked: str | None, alpha: Tensor | None, adapter: Adapter
) -> float:
    """alpha / rank. LoKr's rank is that of its low-rank factor; with two full factors alpha is ignored."""
    if ranked is None:
        factor = next((own[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in own), None)
    else:
        factor = own[ranked]
    rank = None if factor is None else len(factor)
    if alpha is None:
        scale = adapter.scale(layer.network, layer.name, rank)
        return 1.0 if scale is None else scale
    return 1.0 if rank is None else alpha.item() / rank


def _magnitude(
    lora: LoraFile, layer: Layer, dora: Tensor | None, magnitude: Tensor | None
) -> tuple[Tensor, int] | None:
    """DoRA's magnitudes with their axis: outputs for PEFT, outputs or inputs by shape for LyCORIS."""
    if dora is None and magnitude is None:
        return None
    sides = layer.target.parameters[f"{layer.name}.weight"].shape[:2]
    axis = 0 if dora is None or dora.ndim < 2 or dora.shape[0] != 1 or sides[0] == 1 else 1
    values = (magnitude if dora is None else dora).flatten()  # type: ignore[union-attr]
    if len(values) != sides[axis]:
        raise LoraError(f"{lora.name}: {cut(layer.key)} has {len(values)} magnitudes; {sides[axis]} are needed")
    return values, axis


def _fitting(
    lora: LoraFile, layer: Layer, of: str, change: Tensor, magnitude: tuple[Tensor, int] | None = None
) -> Change:
    """A change of a layer's weight or bias; LoraError if it does not fit."""
    parameters, name = layer.target.parameters, f"{layer.name}.{of}"
    if of == "weight" and name not in parameters:
        name = layer.name
    parameter = parameters.get(name)
    if parameter is None:
        raise LoraError(f"{lora.name}: {cut(layer.key)} changes a {of}, but the model's layer {layer.name} has none")
    shape = parameter.shape if parameter.ndim < 2 else parameter.flatten(1).shape
    given = change.shape if change.ndim < 2 else change.flatten(1).shape
    if given != shape and change.shape != parameter.shape:
        raise LoraError(
            f"{lora.name}: {cut(layer.key)} is for a layer of {'x'.join(map(str, given))}, but the model's is "
            f"{'x'.join(map(str, shape))}: use a LoRA for this kind of model (SD 1.x, SD 2.x, SDXL, ...)"
        )
    return Change(parameter, change, magnitude)
