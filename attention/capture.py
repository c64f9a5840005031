"""What a call of the model leaves behind for the edit to use."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class TokenHeat:
    """A branch's attention to some text tokens in some cross-attention layers of one grid.

    shares: by layer, averaged over heads, (f n y x).
    """

    layers: AbstractSet[str]
    tokens: Sequence[int]
    shares: dict[str, Tensor] = field(default_factory=dict)

    def of_all(self, text_tokens: int) -> Tensor:
        """The mean over layers, like `attention.masks.token_heat`: (f s y x), 0 for other tokens."""
        first, *others = self.shares.values()
        whole = first.new_zeros(len(first), text_tokens, *first.shape[-2:])
        whole[:, list(self.tokens)] = sum(others, first) / len(self.layers)
        return whole


@dataclass
class Captured:
    """What one branch leaves behind in one call, by layer name. A dict that is None is not captured.

    records: two of the queries, keys and values, or maps, of attention layers (`store.records.Record`). inputs,
    outputs: (f t c) of self-attention layers, outputs before or after their last projection. features: (f c y x) of
    ResNet blocks. prediction: the model's result, (f c y x). heat: the attention to some text tokens.
    """

    records: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] | None = None
    outputs: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None
    prediction: Tensor | None = None
    heat: TokenHeat | None = None

    def emptied(self) -> Captured:
        """A new one that captures the same."""
        inputs, outputs, features = (
            None if kept is None else dict[str, Any]() for kept in (self.inputs, self.outputs, self.features)
        )
        heat = self.heat and TokenHeat(self.heat.layers, self.heat.tokens)
        return Captured({}, inputs, outputs, features, heat=heat)
