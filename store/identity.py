"""A model's identity: all its weights, and what they predict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor


_SIGNS = 65521
"""Period of the signs: a prime, so that they do not align with a tensor's rows."""


@dataclass(frozen=True)
class ModelIdentity:
    """Identifies a model by its weights.

    layout: class, width, attention layers and kind of prediction. digest: SHA-256 of all weights. dtype: of the
    weights. traces: two numbers for each tensor, its norm and the sum of its weights under fixed signs, which match
    across dtypes up to rounding.
    """

    layout: str
    digest: str
    dtype: str
    traces: tuple[float, ...] = ()

    @classmethod
    def of(cls, layout: str, dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]) -> ModelIdentity:
        """Read every weight once: about a second per gigabyte."""
        digest, traces = hashlib.sha256(), list[float]()
        signs = torch.randint(2, (_SIGNS,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
        for name, weight in sorted(weights, key=lambda named: named[0]):
            plain = _plain(weight)
            digest.update(f"{name} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
            parts = [part.float() for part in plain.reshape(-1).split(_SIGNS)]
            traces.append(sum(float(part.dot(part)) for part in parts) ** 0.5)
            traces.append(sum(float(part.dot(signs[: len(part)])) for part in parts))
        return cls(layout, digest.hexdigest(), str(dtype), tuple(traces))

    @classmethod
    def read(cls, value: Any) -> ModelIdentity:
        """From a file's JSON; ValueError if invalid."""
        traces = value["traces"]
        if not isinstance(traces, list) or not all(type(trace) in (int, float) for trace in traces):
            raise ValueError("invalid traces of the model")
        identity = cls(**{**value, "traces": tuple(map(float, traces))})
        if not all(isinstance(text, str) for text in (identity.layout, identity.digest, identity.dtype)):
            raise ValueError("invalid identity of the model")
        return identity

    def matches(self, other: ModelIdentity) -> bool:
        """Whether the weights are the same, up to rounding where the dtypes differ."""
        if self.layout != other.layout or len(self.traces) != len(other.traces):
            return False
        if self.dtype == other.dtype:
            return self.digest == other.digest
        rounding = 4 * max(_spacing(self.dtype), _spacing(other.dtype))
        pairs = list(zip(self.traces, other.traces, strict=True))
        norms = [max(a, b) for (a, b) in pairs[::2] for _ in range(2)]
        return all(abs(a - b) <= rounding * norm for (a, b), norm in zip(pairs, norms, strict=True))


def _plain(weight: Tensor) -> Tensor:
    """A weight's values in RAM, dequantized."""
    weight = weight.detach()
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    return weight.cpu().contiguous()


def _spacing(dtype: str) -> float:
    kind = getattr(torch, dtype.removeprefix("torch."), None)
    return torch.finfo(kind).eps if isinstance(kind, torch.dtype) and kind.is_floating_point else 0.0


class IdentityCache:
    """Identities of models, computed once and again only when the weights change."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, tuple[object, ModelIdentity]] = WeakKeyDictionary()

    def of(self, model: Any, layout: str, dtype: torch.dtype, weights: dict[str, Tensor]) -> ModelIdentity:
        """The identity of a model (any object that supports weak references) with these weights."""
        state = (layout, dtype, tuple((name, w.data_ptr(), _version(w)) for name, w in weights.items()))
        known = self._known.get(model)
        if known is None or known[0] != state:
            known = (state, ModelIdentity.of(layout, dtype, weights.items()))
            self._known[model] = known
        return known[1]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
