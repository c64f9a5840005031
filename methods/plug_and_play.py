"""Plug-and-Play (Tumanyan et al., CVPR 2023, arXiv 2211.12572): the source's queries, keys and one residual feature.

TokenFlow (arXiv 2307.10373) edits with it. In its first steps an edit takes, in both guided branches, the source's
self-attention queries and keys in the decoder, and the source's feature in one ResNet block there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.control import AttentionSite, Control
from ..attention.records import QueriesKeys, SourceStep


@dataclass(frozen=True)
class PnPSettings:
    """How long an edit takes the source's attention and feature.

    attention_steps, feature_steps: the share of steps, from the noisy end, whose queries and keys, and whose
    feature, are the source's (the paper's tau_A and tau_f): int(share * steps) of them.

    Raises ValueError for a share outside 0 to 1.
    """

    attention_steps: float = 0.5
    feature_steps: float = 0.8

    def __post_init__(self) -> None:
        for name in ("attention_steps", "feature_steps"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be between 0 and 1")

    def takes_attention(self, step: int, steps: int) -> bool:
        return step < int(self.attention_steps * steps + 1e-9)

    def takes_feature(self, step: int, steps: int) -> bool:
        return step < int(self.feature_steps * steps + 1e-9)

    def wanted(self, step: int, steps: int, sites: list[AttentionSite]) -> set[str]:
        """Names of the layers whose queries and keys a step takes."""
        return {site.name for site in sites if takes(site)} if self.takes_attention(step, steps) else set()

    def control(self, source: SourceStep, step: int, steps: int) -> Control:
        """What a guided branch does at a step; the same for the target and the negative prompt."""
        return PlugAndPlay(source, self.takes_attention(step, steps), self.takes_feature(step, steps))


def takes(site: AttentionSite) -> bool:
    """Whether a layer takes the source's queries and keys: self-attention of the decoder, but its first."""
    return site.kind == "self" and site.place == "up" and site.index > 0


class PlugAndPlay(Control):
    """A guided branch with the source's queries and keys, and its feature."""

    def __init__(self, source: SourceStep, takes_attention: bool, takes_feature: bool) -> None:
        super().__init__(source.key_frames, source.piece)
        self.source = source
        self.takes_attention = takes_attention
        self.takes_feature = takes_feature

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        record = self.source.records.get(site.name) if self.takes_attention and takes(site) else None
        if isinstance(record, QueriesKeys):
            q, k = record.queries(q.dtype), record.keys(k.dtype)
        return super().self_attention(q, k, v, site)

    def feature(self, x: Tensor, name: str) -> Tensor:
        return self.source.features[name].to(x) if self.takes_feature else x
