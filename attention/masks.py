"""Blend masks from cross-attention (FateZero Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .control import AttentionSite


def mask_sites(sites: Iterable[AttentionSite], mask_tokens: int) -> list[AttentionSite]:
    """The cross-attention layers on the finest grid of at most `mask_tokens` tokens.

    Raises ValueError where every grid is finer.
    """
    cross = [site for site in sites if site.kind == "cross"]
    grids = {site.tokens for site in cross if site.tokens <= mask_tokens}
    if not grids:
        smallest = min((site.tokens for site in cross), default=0)
        raise ValueError(f"mask_tokens={mask_tokens}: the smallest cross-attention grid has {smallest} tokens")
    return [site for site in cross if site.tokens == max(grids)]


def word_heat(maps: Sequence[tuple[AttentionSite, Tensor]], columns: Sequence[int]) -> Tensor:
    """Attention to some columns, summed over them, averaged over heads and layers.

    maps: layers of one grid, each (f h t s). Returns (f, height, width).
    """
    site = maps[0][0]
    heat = torch.stack([m[..., list(columns)].sum(-1).mean(1) for _, m in maps]).mean(0)
    return rearrange(heat, "f (y x) -> f y x", y=site.height, x=site.width)


def threshold_mask(heat: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """3x3 max pool, nearest resize, each frame over its own maximum, then `> threshold`.

    heat (f, y, x) to a mask of 0 and 1, (f, *size).
    """
    grown = F.max_pool2d(heat[:, None], 3, stride=1, padding=1)
    resized = F.interpolate(grown, size=size, mode="nearest")[:, 0]
    peak = resized.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    return (resized / peak > threshold).to(heat.dtype)
