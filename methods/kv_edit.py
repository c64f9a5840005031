"""KV-Edit (Zhu et al., 2025, arXiv 2502.17363), its simplest form: the background's keys and values are the source's.

In self-attention, tokens outside the edit mask m take the source's keys and values, tokens inside keep the edit's:
    K = m K_edit + (1 - m) K_source,   V = m V_edit + (1 - m) V_source,
and after every step the latents outside m are restored from the source. The new object fits into a background that does
not change. The paper saves the cost of the queries outside m; here they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from einops import rearrange

from ..attention.control import AttentionSite, Control
from ..attention.masks import GivenMask
from ..diffusion.parts import BaseInjection, Edit, EditContext, Injected, SourceControl
from ..diffusion.source import Needs
from ..settings import setting, whole_steps
from ..store.records import QueriesKeys, SourceStep
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "KV-Edit"


@dataclass(frozen=True)
class KVEditSettings(BaseInjection):
    """How long the background keeps the source's keys and values. Raises ValueError for a share outside 0 to 1."""

    background_steps: float = setting(
        1.0,
        "Share of the steps, from the noisy end, in which the background's keys and values are the source's.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Raise ValueError without an edit mask, or with a layout."""
        if edit.mask is None:
            raise ValueError("KV-Edit needs an edit mask that marks what may change")
        if edit.layout is not None:
            raise ValueError("KV-Edit keeps the background in place: use a layout with FateZero or no injection")

    def injected(self, edit: Edit, context: EditContext) -> Injected:
        return KVEdit(self, edit, context)

    def reads_source(self, step: int, steps: int) -> bool:
        return step < whole_steps(self.background_steps, steps)

    def summary(self, steps: int) -> str:
        taken = whole_steps(self.background_steps, steps)
        return f"background keys and values from the source in {taken} of {steps} steps"


class KVEdit(Injected):
    """KV-Edit in one edit. It acts on the target's branch only: a transformer's negative runs without its source."""

    def __init__(self, settings: KVEditSettings, edit: Edit, context: EditContext) -> None:
        super().__init__(edit, context)
        assert edit.mask is not None  # see `check`
        self.settings, self._mask = settings, edit.mask
        self._layers = {site.name for site in context.sites if site.kind == "self"}
        if not self._layers:
            raise ValueError("KV-Edit needs layers of self-attention; this model's are joint, of text and video")

    def needs(self, step: int) -> Needs:
        if not self.settings.reads_source(step, self.context.steps):
            return super().needs(step)
        return Needs(self._layers, own_level=self.own_level, values=True)

    def controls(self, source: SourceStep, step: int) -> tuple[Control, Control]:
        target, negative = super().controls(source, step)
        if self.settings.reads_source(step, self.context.steps):
            target = Background(source, self._mask, self.context.store.frames)
        return target, negative


class Background(SourceControl):
    """The control that gives tokens outside a mask the source's keys and values. frames: number of the clip's."""

    def __init__(self, source: SourceStep, mask: GivenMask, frames: int) -> None:
        super().__init__(source)
        self.mask, self.frames = mask, frames

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        record, values = self.source.record(site.name), self.source.captured.values
        assert isinstance(record, QueriesKeys) and values is not None
        inside = self.mask.at((site.height, site.width), self.frames)[list(self.chunk.frame_indices)]
        m = rearrange(inside, "f y x -> f 1 (y x) 1").to(k)
        k = m * k + (1 - m) * record.keys(k.dtype)
        v = m * v + (1 - m) * values[site.name]
        return super().self_attention(q, k, v, site)


METHOD = Method(
    name="kv_edit",
    title="KV-Edit",
    paper="Zhu et al., 2025, arXiv 2502.17363",
    sentence="Keeps the source's keys and values outside an edit mask, so that the background does not change.",
    part="injection",
    settings=KVEditSettings,
    presets={"kv_edit": {"injection": "kv_edit"}},
    needs_mask=True,
    aliases=("background preservation", "inpaint", "object removal"),
)
