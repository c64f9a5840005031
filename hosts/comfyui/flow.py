"""Any MODEL that is sampled as a flow, for edits that need its predictions only: FlowEdit, masks, SDEdit.

No attention is hooked, so that the host calls the model as a KSampler does, with whatever conditioning it takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...attention.control import AttentionSite, Kind
from ...models.flow import FLOW
from ...store.identity import ModelIdentity
from .hook import ALL_KINDS, Hook, HostFamily, check_kinds
from .noise import FlowNoise, is_flow, noise_of
from .pair import join_pair, shapes_of_weights


def check_flow(model: Any) -> None:
    """Raise ValueError for a flow that edits cannot follow."""
    assert isinstance(noise_of(model), FlowNoise)


def identity_of_shapes(patcher: Any) -> ModelIdentity:
    """The architecture of a MODEL, with which any weights of it may read the store."""
    shapes = hashlib.sha256(repr(shapes_of_weights(patcher)).encode()).hexdigest()
    return ModelIdentity(type(patcher.model).__name__, shapes, "")


class PlainFlow(Hook):
    """A clone of a MODEL without hooks."""

    family = FLOW
    reads_latents = True

    def __init__(self, model: Any, kinds: Sequence[Kind] = ALL_KINDS, known: Hook | None = None) -> None:
        """known: the hook of a MODEL whose family controls attention, for its identity."""
        check_kinds(model, kinds)
        check_flow(model)
        super().__init__(model)
        self._known = known
        join_pair(self, model)

    def identity(self) -> ModelIdentity:
        """The architecture, or that of the known hook."""
        if self._known is None:
            return identity_of_shapes(self.patcher)
        self._known.memory = self.memory
        return self._known.identity()

    def sites(self, height: int, width: int) -> Mapping[Any, AttentionSite]:
        return {}


FAMILY = HostFamily(
    models="without attention control any model that is sampled as a flow",
    text_encoder="",
    hook=PlainFlow,
    matches=is_flow,
    check=check_flow,
    count_layers=lambda model: 0,
    tokenizer=lambda clip: None,
    frame_dim=2,
)
