"""Plug-and-Play (Tumanyan et al., CVPR 2023, arXiv 2211.12572): inject queries, keys and one residual feature.

In the first steps both guided branches take the source's self-attention queries and keys in the decoder, and the
source's feature of one ResNet block there. TokenFlow (arXiv 2307.10373) edits with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attention.control import AttentionSite, Control
from ..diffusion.parts import BaseInjection, Edit, EditContext, Injected, SourceControl
from ..diffusion.source import Needs
from ..settings import setting, whole_steps
from ..store.records import QueriesKeys, SourceStep
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "Plug-and-Play"


@dataclass(frozen=True)
class PnPSettings(BaseInjection):
    """How long an edit uses the source's attention and feature.

    Shares of steps count from the noisy end. Raises ValueError for a share outside 0 to 1.
    """

    attention_steps: float = setting(
        0.5,
        "Share of steps in which the decoder's self-attention uses the source's queries and keys, for the layout.",
        least=0, most=1, symbol="tau_A", step=0.01, group=GROUP,
    )  # fmt: skip
    feature_steps: float = setting(
        0.8,
        "Share of steps in which one ResNet block of the decoder uses the source's feature, for coarse shapes.",
        least=0, most=1, symbol="tau_f", step=0.01, group=GROUP,
    )  # fmt: skip

    def takes_attention(self, step: int, steps: int) -> bool:
        return step < whole_steps(self.attention_steps, steps)

    def takes_feature(self, step: int, steps: int) -> bool:
        return step < whole_steps(self.feature_steps, steps)

    # --- for the loop -------------------------------------------------------------------

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Needs a UNet's decoder, and no layout, because the source's attention and feature keep objects in place."""
        if spans_clip:
            raise ValueError(
                "Plug-and-Play needs a UNet, because it injects a feature of the decoder; use FateZero or no injection"
            )
        if edit.layout is not None:
            raise ValueError("Plug-and-Play keeps objects in place: use a layout with FateZero or no injection")

    def injected(self, edit: Edit, context: EditContext) -> Injected:
        return PnPInjection(self, edit, context)

    def reads_source(self, step: int, steps: int) -> bool:
        return self.takes_attention(step, steps) or self.takes_feature(step, steps)

    def summary(self, steps: int) -> str:
        return (
            f"injected queries and keys in {whole_steps(self.attention_steps, steps)} and the feature in "
            f"{whole_steps(self.feature_steps, steps)} of {steps} steps"
        )


def takes(site: AttentionSite) -> bool:
    """Whether a layer uses the source's queries and keys: self-attention of the decoder, except the first."""
    return site.kind == "self" and site.place == "up" and site.index > 0


class PnPInjection(Injected):
    """Plug-and-Play in one edit: the same for the target and the negative prompt."""

    def __init__(self, settings: PnPSettings, edit: Edit, context: EditContext) -> None:
        super().__init__(edit, context)
        self.settings = settings

    def needs(self, step: int) -> Needs:
        steps = self.context.steps
        layers = {site.name for site in self.context.sites if takes(site)}
        return Needs(
            layers if self.settings.takes_attention(step, steps) else set(),
            self.settings.takes_feature(step, steps),
            self.own_level,
        )

    def controls(self, source: SourceStep, step: int) -> tuple[Control, Control]:
        attention = self.settings.takes_attention(step, self.context.steps)
        feature = self.settings.takes_feature(step, self.context.steps)
        return PlugAndPlay(source, attention, feature), PlugAndPlay(source, attention, feature)


class PlugAndPlay(SourceControl):
    """A guided branch with the source's queries, keys and feature."""

    def __init__(self, source: SourceStep, takes_attention: bool, takes_feature: bool) -> None:
        super().__init__(source)
        self.takes_attention, self.takes_feature = takes_attention, takes_feature

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        record = self.source.record(site.name) if self.takes_attention and takes(site) else None
        if isinstance(record, QueriesKeys):
            q, k = record.queries(q.dtype), record.keys(k.dtype)
        return super().self_attention(q, k, v, site)

    def feature(self, x: Tensor, name: str) -> Tensor:
        return self.source.feature(name).to(x) if self.takes_feature else x


METHOD = Method(
    name="pnp",
    title="Plug-and-Play",
    paper="Tumanyan et al., CVPR 2023, arXiv 2211.12572",
    sentence="Injects the source's self-attention queries and keys and one residual feature of the decoder.",
    part="injection",
    settings=PnPSettings,
    presets={"pnp": {"injection": "pnp", "key_frames": ("self",)}},
    node_id="FateZeroPnP",
    node_title="Plug-and-Play Settings (FateZero)",
    node_text="For how many steps an edit uses the source's queries, keys and one feature (arXiv 2211.12572), for "
    "preset custom of Edit Video. The prompts need no words in common.",
    aliases=("pnp", "plug and play", "feature injection"),
)
