"""What a call of the model leaves behind for the edit to use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Captured:
    """What one branch leaves behind in one call, by layer name. A dict that is None is not captured.

    records: queries and keys, or maps, of attention layers (`store.records.Record`). values: (f h t d) of
    self-attention layers. inputs, outputs: (f t c) of self-attention layers, outputs before or after their last
    projection. features: (f c y x) of ResNet blocks. prediction: the model's result, (f c y x).
    """

    records: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Tensor] | None = None
    inputs: dict[str, Tensor] | None = None
    outputs: dict[str, Tensor] | None = None
    features: dict[str, Tensor] | None = None
    prediction: Tensor | None = None

    def emptied(self) -> Captured:
        """A new one that captures the same."""
        values, inputs, outputs, features = (
            None if kept is None else dict[str, Any]()
            for kept in (self.values, self.inputs, self.outputs, self.features)
        )
        return Captured({}, values, inputs, outputs, features)
