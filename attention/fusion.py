"""FateZero's attention fusion, without ever building a self-attention map.

The blend of self-attention (paper Eq. 7) has one mask value for each query row, so
    (M A_edit + (1 - M) A_src) V = M attn(Q_edit, K_edit, V) + (1 - M) attn(Q_src, K_src, V)
exactly, with V from the edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from .control import AttentionSite, Control, attention_map
from .prompt import Alignment
from .records import SourceStep

MaskFrom = Literal["attention", "prompts"]


def steps_of_share(share: float, steps: int) -> int:
    """int(share * (steps + 1)) steps, as Prompt-to-Prompt counts cross-attention's; at most all."""
    return min(steps, int(share * (steps + 1) + 1e-9))


@dataclass(frozen=True)
class FusionSettings:
    """How much of the source's attention the edit takes.

    cross_replace_steps, self_replace_steps: the share of steps, counted from the noisy
    end, in which cross- and self-attention are fused (1 - t_c/T and 1 - t_s/T).
    blend_self_attention: fuse self-attention only outside the blend mask.
    blend_latents: outside the mask, put back the inversion's latents, from 20% of the steps up to the share
    blend_latents_until of them (the authors' 0.8; 1 is to the last, which keeps most).
    mask_from: "attention", the paper's mask of the source's cross-attention to the blend words, anew in each
    step; or "prompts", a soft mask of where the two prompts' predictions differ and their blend words are
    looked at, the same in all steps (`diffusion.prompt_mask`).
    separate_words: with the mask of both prompts, how little a place inside of it looks at words that belong
    elsewhere, to a neighbour or the ground: where the source looks more at its blend words than at another, each
    over its own maximum, this share of the attention to that other goes to the rest (0 leaves it). A given mask
    that replaces that of the prompts leaves it too.
    blend_threshold: tau of the mask; from 1 on the mask of attention is empty. max_tokens: fuse layers of up to
    this many tokens a frame, None for all. mask_tokens: masks of attention come from the finest grid of at
    most this many.

    Raises ValueError for a value outside its range.
    """

    cross_replace_steps: float = 0.8
    self_replace_steps: float = 0.8
    blend_self_attention: bool = False
    blend_latents: bool = False
    blend_threshold: float = 0.3
    max_tokens: int | None = None
    mask_tokens: int = 256
    mask_from: MaskFrom = "attention"
    blend_latents_until: float = 0.8
    separate_words: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cross_replace_steps", "self_replace_steps", "blend_latents_until", "separate_words"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be between 0 and 1")
        if not (isfinite(self.blend_threshold) and self.blend_threshold >= 0):
            raise ValueError(f"blend_threshold is {self.blend_threshold}; it must be a number of at least 0")
        if self.mask_from not in get_args(MaskFrom):
            raise ValueError(f"mask_from is {self.mask_from!r}; it must be one of {', '.join(get_args(MaskFrom))}")
        if self.separate_words and not self.masks_by_prompts:
            raise ValueError(
                'separate_words needs a mask of both prompts: mask_from="prompts", with blend_self_attention or '
                "blend_latents"
            )
        for name in ("max_tokens", "mask_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def cross_steps(self, steps: int) -> int:
        """How many steps fuse cross-attention."""
        return steps_of_share(self.cross_replace_steps, steps)

    def self_steps(self, steps: int) -> int:
        """How many steps fuse self-attention: int(share * steps)."""
        return int(self.self_replace_steps * steps + 1e-9)

    def latent_steps(self, steps: int) -> range:
        """The steps after which latents are blended."""
        if not self.blend_latents:
            return range(0)
        until = self.blend_latents_until
        return range(int(0.2 * steps + 1e-9), steps if until == 1 else int(until * steps + 1e-9) - 1)

    @property
    def blends(self) -> bool:
        return self.blend_self_attention or self.blend_latents

    @property
    def masks_by_step(self) -> bool:
        """Whether it takes the paper's mask, anew in each step."""
        return self.blends and self.mask_from == "attention"

    @property
    def masks_by_prompts(self) -> bool:
        """Whether it takes the mask of both prompts."""
        return self.blends and self.mask_from == "prompts"

    def fuses(self, site: AttentionSite) -> bool:
        return self.max_tokens is None or site.tokens <= self.max_tokens


@dataclass(frozen=True)
class StepPlan:
    """What one step of the edit fuses, and whether it needs a mask of the source's attention."""

    fuse_cross: bool
    fuse_self: bool
    blend_latents: bool
    mask: bool

    @classmethod
    def of(cls, fusion: FusionSettings, step: int, steps: int) -> StepPlan:
        """The plan of step `step` of `steps`, 0 being the noisiest."""
        fuse_self = step < fusion.self_steps(steps)
        blend_latents = step in fusion.latent_steps(steps)
        mask = blend_latents or (fuse_self and fusion.blend_self_attention)
        return cls(step < fusion.cross_steps(steps), fuse_self, blend_latents, mask and fusion.masks_by_step)

    def wanted(self, fusion: FusionSettings, sites: list[AttentionSite], mask_sites: list[AttentionSite]) -> set[str]:
        """Names of the layers whose source attention this step reads."""
        fused = {"cross": self.fuse_cross, "self": self.fuse_self}
        names = {site.name for site in sites if fusion.fuses(site) and fused[site.kind]}
        return names | {site.name for site in mask_sites} if self.mask else names


class Fuser(Control):
    """The conditional branch of the edit at one step, fused with the source's.

    masks: (height, width) of a grid -> its mask (f, height, width) of the piece's frames, 1 where
    the edit keeps its own self-attention; None for none. shares: grid -> what each place keeps of its
    attention to each target column, (f, c, height, width) in 0..1; None for all of it. keep: names of the
    layers whose own cross maps are kept in `maps`.
    """

    def __init__(
        self,
        source: SourceStep,
        alignment: Alignment,
        fusion: FusionSettings,
        plan: StepPlan,
        masks: dict[tuple[int, int], Tensor] | None = None,
        shares: dict[tuple[int, int], Tensor] | None = None,
        keep: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(source.key_frames, source.piece)
        self.source = source
        self.alignment = alignment
        self.fusion = fusion
        self.plan = plan
        self.masks = masks
        self.shares = shares
        self.keep = keep
        self.maps: dict[str, Tensor] = {}
        """A host's guidance may evaluate the branch again; the first time counts."""

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if not (self.plan.fuse_self and self.fusion.fuses(site)):
            return super().self_attention(q, k, v, site)
        seen = self.seen(v, site)
        source = self.source.apply_self(site, seen, self.attend)
        if self.masks is None:
            return source
        mask = rearrange(self.masks[site.height, site.width], "f y x -> f 1 (y x) 1").to(q)
        return mask * self.attend(q, self.seen(k, site), seen) + (1 - mask) * source

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        fuses, keeps = self.plan.fuse_cross and self.fusion.fuses(site), site.name in self.keep
        if not (fuses or keeps or self.shares):
            return super().cross_attention(q, k, v, site)
        attend = self.attend
        if keeps or self.shares:
            own = attention_map(q, k)
            attend = lambda q, k, v: own @ v  # noqa: E731
        if keeps:
            self.maps.setdefault(site.name, own)
        if self.shares:
            fused = self.alignment.fused(self.source.cross_map(site, q.dtype), own) if fuses else own
            return _shared(fused, self.shares[site.height, site.width]) @ v
        if not fuses:
            return attend(q, k, v)
        of_source, of_own = self.alignment.values(v)
        return self.source.apply_cross(site, of_source, self.attend) + attend(q, k, of_own)


def _shared(map: Tensor, shares: Tensor) -> Tensor:
    """A map (f h t c) without what places do not keep of it (shares of `Fuser`); what they do has the same sum."""
    kept = map * rearrange(shares, "f c y x -> f 1 (y x) c").to(map)
    tiny = torch.finfo(map.dtype).tiny
    return kept * (map.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=tiny))
