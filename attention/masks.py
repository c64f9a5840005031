"""Blend masks from cross-attention (FateZero Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from einops import rearrange

from ..imports import F, torch
from .control import AttentionSite

if TYPE_CHECKING:
    from torch import Tensor


def mask_sites(sites: Iterable[AttentionSite], mask_tokens: int) -> list[AttentionSite]:
    """The cross-attention layers on the finest grid of at most `mask_tokens` tokens.

    Of a transformer, whose blocks have one grid, the middle half: the first know little of the picture, the last paint.
    Raises ValueError where every grid of a UNet is finer.
    """
    cross = [site for site in sites if site.kind == "cross"]
    if cross and all(site.place == "block" for site in cross):
        return cross[len(cross) // 4 : -(len(cross) // 4) or None]
    grids = {site.tokens for site in cross if site.tokens <= mask_tokens}
    if not grids:
        smallest = min((site.tokens for site in cross), default=0)
        raise ValueError(f"mask_tokens={mask_tokens}: the smallest cross-attention grid has {smallest} tokens")
    return [site for site in cross if site.tokens == max(grids)]


def token_heat(maps: Sequence[tuple[AttentionSite, Tensor]]) -> Tensor:
    """Attention to each text token, averaged over heads and layers.

    maps: layers of one grid, each (f h t s). Returns (f, s, height, width).
    """
    site = maps[0][0]
    heat = torch.stack([m.mean(1) for _, m in maps]).mean(0)
    return rearrange(heat, "f (y x) s -> f s y x", y=site.height, x=site.width)


def word_heat(maps: Sequence[tuple[AttentionSite, Tensor]], tokens: Sequence[int]) -> Tensor:
    """Attention to some text tokens, summed over them: (f, height, width), from maps as `token_heat` takes them."""
    return token_heat(maps)[:, list(tokens)].sum(1)


def foreign_tokens(heat: Tensor, tokens: Sequence[int], wordless: Sequence[int]) -> Tensor:
    """Where each text token belongs to something else: 1 where the places of `tokens` are, and it is looked at less.

    heat (f, s, y, x) to zeros and ones of the same shape. A token and the mean of `tokens` are compared each over
    its own maximum in the frame; `tokens` themselves are nowhere foreign, nor are columns without words.
    """
    here = heat[:, list(tokens)].mean(1, keepdim=True)
    foreign = (over_maximum(here) > over_maximum(heat)).to(heat.dtype)
    foreign[:, list(tokens)] = 0
    foreign[:, list(wordless)] = 0
    return foreign


def over_maximum(heat: Tensor) -> Tensor:
    """Each picture of (..., y, x) over its own maximum."""
    return heat / heat.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def threshold_mask(heat: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """3x3 max pool, nearest resize, each frame over its own maximum, then `> threshold`.

    heat (f, y, x) to a mask of 0 and 1, (f, *size).
    """
    pooled = F.max_pool2d(heat[:, None], 3, stride=1, padding=1)
    resized = F.interpolate(pooled, size=size, mode="nearest")[:, 0]
    return (over_maximum(resized) > threshold).to(heat.dtype)


def reach_on(size: Sequence[int]) -> int:
    """How many places count as near on a grid: a sixteenth of the shorter side."""
    return max(1, min(size) // 16)


def grown(mask: Tensor) -> Tensor:
    """A mask (f, y, x) and what is near it."""
    reach = reach_on(mask.shape[1:])
    return F.max_pool2d(mask[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]


def soft_mask(heat: Tensor, threshold: float) -> Tensor:
    """A blurred heat, each frame over its own maximum, then a ramp from 0 at half the threshold to 1 at one and a half.

    heat (f, y, x) to a mask in 0..1 of the same shape; at threshold 0 all of it is 1. The blur is a mean over
    three sixteenths of the shorter side.
    """
    reach = reach_on(heat.shape[1:])
    even = F.avg_pool2d(heat[:, None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[:, 0]
    return (over_maximum(even) / threshold - 0.5).clamp(0, 1) if threshold > 0 else torch.ones_like(heat)


@dataclass(frozen=True)
class GivenMask:
    """A blend mask from outside, in place of the attention's or joined with the attention's.

    mask: (frames or 1, height, width) of any size, from 0 (keep the source) to 1 (take the
    edit). how: "replace" the attention's mask, or take its "union" or "intersection" with it.

    Raises ValueError for another shape or word.
    """

    mask: Tensor
    how: Literal["replace", "union", "intersection"] = "replace"

    def __post_init__(self) -> None:
        if self.mask.ndim != 3:
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}; it must be (frames, height, width)")
        if self.how not in ("replace", "union", "intersection"):
            raise ValueError(f'how is {self.how!r}; it must be "replace", "union" or "intersection"')

    @property
    def replaces(self) -> bool:
        return self.how == "replace"

    def at(self, size: tuple[int, int], frames: int) -> Tensor:
        """On a grid, by area: (frames, *size)."""
        if len(self.mask) not in (1, frames):
            raise ValueError(f"mask has {len(self.mask)} frames; the clip has {frames} (one mask serves all)")
        scaled = F.interpolate(self.mask[:, None].float(), size=size, mode="area")[:, 0].clamp(0, 1)
        return scaled.expand(frames, -1, -1)

    def joined(self, own: Tensor, found: Tensor) -> Tensor:
        """This mask with the attention's, both (frames, height, width) on one grid."""
        own = own.to(found)
        return torch.maximum(own, found) if self.how == "union" else torch.minimum(own, found)
