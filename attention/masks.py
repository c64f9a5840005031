"""Blend masks from cross-attention (FateZero Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from einops import rearrange

from ..imports import F, torch
from .control import WITH_TEXT, AttentionSite

if TYPE_CHECKING:
    from torch import Tensor


def mask_sites(sites: Iterable[AttentionSite], mask_tokens: int) -> list[AttentionSite]:
    """The cross-attention layers, or joint ones, on the finest grid of at most `mask_tokens` tokens.

    For transformers, whose blocks share one grid, the middle half of the blocks: early ones carry little about the
    picture, late ones paint it. Raises ValueError if every grid of a UNet is finer.
    """
    cross = [site for site in sites if site.kind in WITH_TEXT]
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
    """Attention to some text tokens, summed over them: (f, height, width), from maps as in `token_heat`."""
    return token_heat(maps)[:, list(tokens)].sum(1)


class HeatOverSteps:
    """The sum of an edit's heat maps over its steps so far, as the authors' code masks latents."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, Tensor]] = {}
        """By step, of each frame (y, x)."""

    @property
    def state(self) -> Any:
        """The maps of the steps so far, for `States.save`."""
        return [(step, [*rows.items()]) for step, rows in self._rows.items()]

    @state.setter
    def state(self, found: Any) -> None:
        self._rows = {step: dict(rows) for step, rows in found}

    def add(self, heat: Tensor, frames: Sequence[int], step: int) -> Tensor:
        """The sum up to a step, given the step's heat (f, y, x) of some frames of the clip."""
        self._rows.setdefault(step, {}).update(zip(frames, heat, strict=True))
        so_far = [rows for at, rows in sorted(self._rows.items()) if at <= step]
        return torch.stack([torch.stack([rows[f] for rows in so_far if f in rows]).sum(0) for f in frames])


def foreign_tokens(heat: Tensor, tokens: Sequence[int], wordless: Sequence[int]) -> Tensor:
    """Where each text token belongs to another object: 1 where its attention is weaker than that to `tokens`.

    heat (f, s, y, x) to zeros and ones of the same shape. Each token, and the mean of `tokens`, is first divided by its
    maximum in the frame. `tokens` and columns without words are 0 everywhere.
    """
    here = heat[:, list(tokens)].mean(1, keepdim=True)
    foreign = (over_maximum(here) > over_maximum(heat)).to(heat.dtype)
    foreign[:, list(tokens)] = 0
    foreign[:, list(wordless)] = 0
    return foreign


def over_maximum(heat: Tensor) -> Tensor:
    """Each picture of (..., y, x), divided by its maximum."""
    return heat / heat.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def threshold_mask(heat: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """3x3 max pool, nearest resize, each frame divided by its maximum, then `> threshold`.

    heat (f, y, x) to a mask of 0 and 1, (f, *size).
    """
    pooled = F.max_pool2d(heat[:, None], 3, stride=1, padding=1)
    resized = F.interpolate(pooled, size=size, mode="nearest")[:, 0]
    return (over_maximum(resized) > threshold).to(heat.dtype)


def reach_on(size: Sequence[int]) -> int:
    """The radius of a neighbourhood on a grid: a sixteenth of the shorter side."""
    return max(1, min(size) // 16)


def grown(mask: Tensor) -> Tensor:
    """A mask (f, y, x), dilated by `reach_on` its grid."""
    reach = reach_on(mask.shape[1:])
    return F.max_pool2d(mask[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]


def soft_mask(heat: Tensor, threshold: float) -> Tensor:
    """A blurred heat, each frame divided by its maximum, then a ramp from 0 at half the threshold to 1 at 1.5 times it.

    heat (f, y, x) to a mask in 0..1 of the same shape; all 1 at threshold 0. The blur is a mean over three sixteenths
    of the shorter side.
    """
    reach = reach_on(heat.shape[1:])
    blurred = F.avg_pool2d(heat[:, None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[:, 0]
    return (over_maximum(blurred) / threshold - 0.5).clamp(0, 1) if threshold > 0 else torch.ones_like(heat)


LEAST = 0.03
"""A change of latents, relative to the clip's largest, that counts as none."""


def changed_latents(edited: Tensor, source: Tensor, least: float = LEAST) -> Tensor:
    """Where an edit changed latents (f, c, h, w): bool (f, h, w).

    least: changes up to this share of the clip's largest count as none, as at the rim of soft masks; 0 compares bit for
    bit.
    """
    change = (edited - source.to(edited)).float().square().mean(1).sqrt()
    return change > least * change.max()


def mask_by_latent(mask: Tensor, latents: Sequence[int]) -> Tensor:
    """A mask of frames as a mask of latents, which may each cover several frames: the maximum of their masks.

    mask: (frames, h, w). latents: of each frame, rising from 0.
    """
    own = torch.tensor(latents)
    return torch.stack([mask[own == i].amax(0) for i in range(latents[-1] + 1)])


MaskMode = Literal["replace", "union", "intersection"]
"""Whether a given mask replaces the computed one, or is joined with it."""


@dataclass(frozen=True)
class GivenMask:
    """An edit mask from the user, used instead of the blend mask or joined with it.

    mask: (frames or 1, height, width) of any size, from 0 (the source) to 1 (the edit). how: "replace" the blend mask,
    or take the "union" or "intersection" with it.

    Raises ValueError for a wrong shape or `how`.
    """

    mask: Tensor
    how: MaskMode = "replace"

    def __post_init__(self) -> None:
        if self.mask.ndim != 3:
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}; it must be (frames, height, width)")
        if self.how not in get_args(MaskMode):
            raise ValueError(f'how is {self.how!r}; it must be "replace", "union" or "intersection"')

    @property
    def replaces(self) -> bool:
        return self.how == "replace"

    def at(self, size: tuple[int, int], frames: int) -> Tensor:
        """The mask on a grid, by area interpolation: (frames, *size)."""
        if len(self.mask) not in (1, frames):
            raise ValueError(f"mask has {len(self.mask)} frames, but the clip has {frames}: give one, or one per frame")
        scaled = F.interpolate(self.mask[:, None].float(), size=size, mode="area")[:, 0].clamp(0, 1)
        return scaled.expand(frames, -1, -1)

    def joined(self, own: Tensor, found: Tensor) -> Tensor:
        """This mask joined with the blend mask, both (frames, height, width) on one grid."""
        own = own.to(found)
        return torch.maximum(own, found) if self.how == "union" else torch.minimum(own, found)
