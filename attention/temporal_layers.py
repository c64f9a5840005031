"""The temporal layers of Tune-A-Video (arXiv 2212.11565), and of FateZero's code, for an image model.

After each transformer block, every place attends over the frames; FateZero's variant also convolves over them after
each 3x3 convolution. The layers are separate modules, which a host attaches to its UNet and detaches again. New layers
change nothing: their output weights and biases are zero (both official codes initialize biases randomly).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .temporal_kind import Kind

NAMES: dict[Kind, tuple[str, str]] = {
    "official": ("attn_temp", "norm_temp"),
    "fatezero": ("attn_temporal", "norm_temporal"),
}
"""Each code's names of the attention over frames and its norm."""
CONV = "conv_temporal"
OTHERS = {
    "temp_convs.": "ModelScope's",
    "temp_attentions.": "ModelScope's",
    "motion_modules.": "AnimateDiff's",
    "temporal_transformer.": "AnimateDiff's",
}
"""Parts of names that identify other temporal layers."""
Blocks = Mapping[str, tuple[int, int]]
"""Channels and heads of a UNet's transformer blocks, by name."""


# --- the layers ---------------------------------------------------------------------------


class CastLinear(nn.Linear):
    """A linear layer that computes in its input's precision, whatever the precision of its weights; for training."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class CastConv(nn.Conv1d):
    """The same for a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class TemporalLayer(nn.Module):
    """A layer that mixes the frames of one clip."""

    bypassed = False
    """Whether it returns its input, as for single pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.bypassed else self.mixed(x)

    def mixed(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class TemporalAttention(TemporalLayer):
    """Every place attends over the frames, without a mask or positions: (f t c) -> (f t c)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.to_q, self.to_k, self.to_v = (CastLinear(channels, channels, bias=False) for _ in range(3))
        self.to_out = CastLinear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def mixed(self, x: Tensor) -> Tensor:
        places = rearrange(self.norm(x), "f t c -> t f c")
        q, k, v = (
            rearrange(to(places), "t f (h d) -> t h f d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v)
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "t h f d -> t f (h d)")
        return x + rearrange(self.to_out(attended), "t f c -> f t c")


class TemporalConv(TemporalLayer):
    """A convolution over three frames, (f c y x) -> (f c y x): full, or low-rank with a residual connection.

    rank: None for a full one, initialized as the identity.
    """

    def __init__(self, channels: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.full = CastConv(channels, channels, 3, padding=1)
            nn.init.dirac_(self.full.weight)
            nn.init.zeros_(self.full.bias)  # type: ignore[arg-type]
        else:
            self.down = CastConv(channels, rank, 3, padding=1, bias=False)
            self.up = CastConv(rank, channels, 3, padding=1, bias=False)
            nn.init.normal_(self.down.weight, std=1 / rank)
            nn.init.zeros_(self.up.weight)

    @property
    def is_identity(self) -> bool:
        """Whether the output equals the input."""
        if self.rank is not None:
            return not self.up.weight.any()
        same = nn.init.dirac_(torch.empty_like(self.full.weight))
        return torch.equal(self.full.weight, same) and not self.full.bias.any()  # type: ignore[union-attr]

    def mixed(self, x: Tensor) -> Tensor:
        places = rearrange(x, "f c y x -> (y x) c f")
        done = self.full(places) if self.rank is None else places + self.up(self.down(places))
        return rearrange(done, "(y x) c f -> f c y x", y=x.shape[2])


class TemporalLayers(nn.Module):
    """The temporal layers of a UNet, by the names of the modules they follow.

    attentions: after transformer blocks; convolutions: after 3x3 convolutions. kind: whose names they have in a file.
    """

    def __init__(
        self, attentions: Mapping[str, TemporalAttention], convolutions: Mapping[str, TemporalConv], kind: Kind
    ) -> None:
        super().__init__()
        self.kind = kind
        self._names = {_key(name): name for name in (*attentions, *convolutions)}
        self.attentions = nn.ModuleDict({_key(name): layer for name, layer in attentions.items()})
        self.convolutions = nn.ModuleDict({_key(name): layer for name, layer in convolutions.items()})

    @classmethod
    def fresh(
        cls, blocks: Blocks, convolved: Mapping[str, int] | None = None, rank: int | None = None, seed: int = 0
    ) -> TemporalLayers:
        """New layers, which change nothing yet: the official ones, or FateZero's if there are 3x3 convolutions.

        blocks: channels and heads of each transformer block. convolved: channels of each 3x3 convolution. rank: of the
        convolutions over frames, None for full ones. seed: of the random weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convolutions = {name: TemporalConv(channels, rank) for name, channels in (convolved or {}).items()}
            attentions = {name: TemporalAttention(*shape) for name, shape in blocks.items()}
        return cls(attentions, convolutions, "fatezero" if convolutions else "official")

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], blocks: Blocks) -> TemporalLayers:
        """From a checkpoint's weights, by name; ignores those that are not temporal.

        Raises ValueError for another model's layers, or a missing or wrong one.
        """
        kind = kind_of(weights)
        convolutions = {}
        for name, tensor in weights.items():
            module, found, part = name.partition(f".{CONV}.")
            if found and part in ("weight", "down.weight"):
                rank = None if part == "weight" else tensor.shape[0]
                convolutions[module] = TemporalConv(tensor.shape[1], rank)
        layers = cls({name: TemporalAttention(*shape) for name, shape in blocks.items()}, convolutions, kind)
        layers.load(weights)
        return layers

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter by its name in a file."""
        attention, norm = NAMES[self.kind]
        found: dict[str, nn.Parameter] = {}
        for key, layer in self.attentions.items():
            for name, parameter in layer.named_parameters():
                part, _, leaf = name.partition(".")
                home = norm if part == "norm" else f"{attention}.{'to_out.0' if part == 'to_out' else part}"
                found[f"{self._names[key]}.{home}.{leaf}"] = parameter
        for key, layer in self.convolutions.items():
            for name, parameter in layer.named_parameters():
                found[f"{self._names[key]}.{CONV}.{name.removeprefix('full.')}"] = parameter
        return found

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a file; ValueError, naming the weight, for a missing, unknown or wrongly shaped one."""
        own = self.named()
        given = {name: tensor for name, tensor in weights.items() if is_temporal(name)}
        for problem, names in (("lacks", own.keys() - given.keys()), ("should not have", given.keys() - own.keys())):
            if names:
                raise ValueError(f"the checkpoint {problem} {min(names)} ({len(names)} such weights)")
        for name, parameter in own.items():
            if parameter.shape != given[name].shape:
                raise ValueError(f"{name} is {tuple(given[name].shape)}; this model needs {tuple(parameter.shape)}")
            parameter.data = given[name].clone()

    def converted(self, convolved: Mapping[str, int]) -> TemporalLayers:
        """The same layers for the other code, with identity convolutions for FateZero's and without for the official.

        convolved: channels of each 3x3 convolution. Raises ValueError if a convolution is not the identity.
        """
        attentions = {self._names[key]: layer for key, layer in self.attentions.items()}
        if self.kind == "official":
            identities = {name: TemporalConv(channels, None) for name, channels in convolved.items()}
            return TemporalLayers(attentions, identities, "fatezero")  # type: ignore[arg-type]
        changing = [name for name, layer in self.convolutions.items() if not layer.is_identity]
        if changing:
            raise ValueError(
                f"Tune-A-Video's code has no convolution over frames, but that at {self._names[changing[0]]} is not "
                f"the identity ({len(changing)} are not)"
            )
        return TemporalLayers(attentions, {}, "official")  # type: ignore[arg-type]

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Leave the layers out of calls, and of gradients, in the `with` block."""
        layers = [layer for layer in self.modules() if isinstance(layer, TemporalLayer)]
        before = [layer.bypassed for layer in layers]
        try:
            for layer in layers:
                layer.bypassed = True
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer.bypassed = was

    def after(self, name: str) -> nn.Module:
        """The layer after a module."""
        key = _key(name)
        return self.attentions[key] if key in self.attentions else self.convolutions[key]

    @property
    def places(self) -> list[str]:
        """The names of the modules with layers after them."""
        return list(self._names.values())


def _key(name: str) -> str:
    """A module's name as a ModuleDict key."""
    return name.replace(".", "/")


def kind_of(weights: Iterable[str]) -> Kind:
    """The kind of a checkpoint's temporal layers; ValueError for other kinds, or none."""
    names = list(weights)
    for kind, (attention, _) in NAMES.items():
        if any(f".{attention}." in name for name in names):
            return kind
    for part, whose in OTHERS.items():
        if any(part in name for name in names):
            raise ValueError(f"the checkpoint has {whose} temporal layers: use Tune-A-Video's or FateZero's")
    raise ValueError("the checkpoint has no temporal layers (attn_temp, attn_temporal)")


def is_temporal(name: str) -> bool:
    """Whether a weight of a checkpoint belongs to a temporal layer."""
    parts = {part for names in NAMES.values() for part in names} | {CONV}
    return not parts.isdisjoint(name.split("."))


def trains(name: str) -> bool:
    """Whether Tune-A-Video trains a weight of a UNet itself: queries of self- and cross-attention."""
    return name.endswith((".attn1.to_q.weight", ".attn2.to_q.weight"))


def trained_of(layers: TemporalLayers, convolutions: bool = False) -> dict[str, nn.Parameter]:
    """The trained temporal weights: all of the attention over frames, without its norm.

    convolutions: train the convolutions over frames too, as the configuration files of FateZero's authors do. Raises
    ValueError for layers without any.
    """
    if convolutions and not layers.convolutions:
        raise ValueError("train_convolutions has no effect: these temporal layers have no convolutions over frames")
    parts = (NAMES[layers.kind][0], *((CONV,) if convolutions else ()))
    return {name: weight for name, weight in layers.named().items() if any(f".{part}." in name for part in parts)}
