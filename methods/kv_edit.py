"""KV-Edit (Zhu et al., 2025, arXiv 2502.17363): the background's keys and values are the source's.

Wan computes the edit's tokens inside the edit mask m only. In self-attention they attend to the source's keys and
values outside m:
    K = [K_edit inside, K_source outside],   V = [V_edit inside, V_source outside],
and after every step the latents outside m are restored from the source. The new object fits into a background that does
not change. The source's keys and values are those of the inversion's call at the step's timestep, as in the authors'
code: from the store, or computed again block by block with the edit.

A UNet, whose convolutions need all positions, computes all tokens:
    K = m K_edit + (1 - m) K_source,   V = m V_edit + (1 - m) V_source.
So do joint layers, for the video's tokens, and an edit that follows FlowEdit, where the difference to the source's
guided prediction counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..attention.control import AttentionSite, Control
from ..attention.key_frames import as_one
from ..attention.masks import GivenMask
from ..diffusion.parts import BaseInjection, Edit, EditContext, Injected, SourceControl
from ..diffusion.source import Needs
from ..imports import F, torch
from ..settings import setting, whole_steps
from ..store.records import KeysValues, Memory, SourceStep
from ..store.streams import mask_of_video, video_shape
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
    tokens: Literal["inside", "all"] = setting(
        "inside",
        "Tokens of the edit to compute: those inside the edit mask, or all (slower; the negative prompt then does not "
        "read the source). Models other than Wan, and edits with FlowEdit, compute all.",
        group=GROUP,
    )
    grow: int = setting(
        2, "Patches by which the tokens inside reach beyond the edit mask; the result changes inside the mask only.",
        least=0, most=16, group=GROUP,
    )  # fmt: skip

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Raise ValueError without an edit mask, or with a layout."""
        if edit.mask is None:
            raise ValueError("KV-Edit needs an edit mask that marks what may change")
        if edit.layout is not None:
            raise ValueError("KV-Edit keeps the background in place: use a layout with FateZero or no injection")

    def injected(self, edit: Edit, context: EditContext) -> Injected:
        inside = self.tokens == "inside" and context.subset_grid is not None and context.store.drawn is None
        return (InsideTokens if inside else KVEdit)(self, edit, context)

    def reads_store(self, memory: Memory, grid: tuple[int, int] | None) -> bool:
        return memory == "keys_values" and self.tokens == "inside" and grid is not None

    def token_share(self, edit: Edit, frames: int, grid: tuple[int, int] | None) -> float:
        if grid is None or self.tokens == "all" or edit.mask is None:
            return 1.0
        return tokens_inside(edit.mask.at(grid, frames)[:, None], grid, self.grow).float().mean().item()

    def reads_source(self, step: int, steps: int) -> bool:
        return step < whole_steps(self.background_steps, steps)

    def summary(self, steps: int) -> str:
        taken = whole_steps(self.background_steps, steps)
        return f"background keys and values from the source in {taken} of {steps} steps"


class KVEdit(Injected):
    """KV-Edit with all tokens. A transformer's negative branch runs without its source."""

    def __init__(self, settings: KVEditSettings, edit: Edit, context: EditContext) -> None:
        super().__init__(edit, context)
        assert edit.mask is not None  # see `check`
        self.settings, self._mask = settings, edit.mask
        self._layers = {site.name for site in context.sites if site.kind in ("self", "joint")}

    def needs(self, step: int) -> Needs:
        if not self.settings.reads_source(step, self.context.steps):
            return super().needs(step)
        return Needs(self._layers, own_level=self.own_level, values=True)

    def controls(self, source: SourceStep, step: int) -> tuple[Control, Control]:
        target, negative = super().controls(source, step)
        if self.settings.reads_source(step, self.context.steps):
            return self.reading(source, negative)
        return target, negative

    def reading(self, source: SourceStep, plain: Control) -> tuple[Control, Control]:
        """The controls of both branches in a step that reads the source."""
        store = self.context.store
        return Background(source, mask_of_video(store, self._mask), video_shape(store)[0]), plain


class InsideTokens(KVEdit):
    """KV-Edit with the tokens inside the mask only, in both branches."""

    own_level = False
    own_source = True

    def __init__(self, settings: KVEditSettings, edit: Edit, context: EditContext) -> None:
        super().__init__(settings, edit, context)
        assert context.subset_grid is not None
        self._tokens = tokens_inside(self.of_latents(self._mask), context.subset_grid, settings.grow)

    def reading(self, source: SourceStep, plain: Control) -> tuple[Control, Control]:
        frames = list(source.chunk.frame_indices)
        tokens, clean = self._tokens[frames], self.store.level(0)[frames].to(self.context.latents_like)
        return Inside(source, tokens, clean), Inside(source, tokens, clean)


def tokens_inside(mask: Tensor, grid: tuple[int, int], grow: int) -> Tensor:
    """The tokens of a grid with a part of a mask of latents, (f 1 h w), grown by so many patches: bool (f y x)."""
    patch = [-(-side // tokens) for side, tokens in zip(mask.shape[-2:], grid, strict=True)]
    tokens = F.max_pool2d((mask > 0).float(), patch, ceil_mode=True)
    return F.max_pool2d(tokens, 2 * grow + 1, stride=1, padding=grow)[:, 0] > 0


class Background(SourceControl):
    """The control that gives tokens outside a mask the source's keys and values. frames: number of the clip's."""

    def __init__(self, source: SourceStep, mask: GivenMask, frames: int) -> None:
        super().__init__(source)
        self.mask, self.frames = mask, frames

    def inside(self, site: AttentionSite) -> Tensor:
        """The mask on a layer's tokens of the call's frames."""
        inside = self.mask.at((site.height, site.width), self.frames)
        return inside if self.chunk.clip < self.frames else self.chunk.cut(inside)  # the whole clip packed in one row

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        record = self.source.record(site.name)
        assert isinstance(record, KeysValues)
        m = self.inside(site).reshape(len(q), 1, -1, 1).to(k)
        k = m * k + (1 - m) * record.keys(k.dtype)
        v = m * v + (1 - m) * record.values(v.dtype)
        return super().self_attention(q, k, v, site)

    def joint_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        record, video = self.source.record(site.name), site.rows("video")
        assert isinstance(record, KeysValues)
        m = self.inside(site).reshape(-1, 1).to(k)
        pairs = ((k.clone(), record.keys(k.dtype)), (v.clone(), record.values(v.dtype)))
        for own, around in pairs:
            own[:, :, video] = m * own[:, :, video] + (1 - m) * around
        return self.attend(q, pairs[0][0], pairs[1][0])


class Inside(SourceControl):
    """The control of a branch that has some tokens only, with the source's keys and values for the others.

    tokens: (f y x), true for those. clean: the source's latents, (f c h w).
    """

    def __init__(self, source: SourceStep, tokens: Tensor, clean: Tensor) -> None:
        super().__init__(source)
        self.tokens, self.clean = tokens, clean
        self.rows = tokens.flatten().nonzero()[:, 0]

    def completed(self, clean: Tensor) -> Tensor:
        inside = F.interpolate(self.tokens[:, None].float(), scale_factor=-(-clean.shape[-1] // self.tokens.shape[-1]))
        height, width = clean.shape[-2:]
        return torch.where(inside[..., :height, :width] > 0, clean, self.clean.to(clean))

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        record = self.source.record(site.name)
        assert isinstance(record, KeysValues)
        k, v = (self._whole(*pair) for pair in ((record.keys(k.dtype), k), (record.values(v.dtype), v)))
        return self.attend(q, k, v)

    def _whole(self, around: Tensor, own: Tensor) -> Tensor:
        """The source's keys or values with the branch's own in their rows; a recorded tensor is overwritten, since the
        branches that read it have the same rows.
        """
        assert self.rows is not None
        put = as_one(around).index_copy if self.source.stored else as_one(around).index_copy_
        return put(2, self.rows, own)


METHOD = Method(
    name="kv_edit",
    title="KV-Edit",
    paper="Zhu et al., 2025, arXiv 2502.17363",
    sentence="Keeps the source's keys and values outside an edit mask, so that the background does not change.",
    part="injection",
    settings=KVEditSettings,
    presets={"kv_edit": {"injection": "kv_edit"}},
    needs_mask=True,
    advanced=("tokens", "grow"),
    later=("tokens", "grow"),
    aliases=("background preservation", "inpaint", "object removal"),
)
