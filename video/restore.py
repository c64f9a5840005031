"""The source's own pixels where an edit changed nothing.

An edit that is limited to a mask keeps the source's latents outside it, but decoding them loses detail, and the frames
have the model's size. Here the edit is scaled to the source's frames and laid over them: fully on the pixels of changed
latents, and less and less up to the reach of the autoencoder, as far as a latent's change spreads in decoded pixels.
Beyond, every pixel is the source's. Colours that the decoder shifts are measured on the rim beyond the reach, where
the edit shows the decoded source, and the shift is undone inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

from ..imports import F, no_grad, torch
from .size import covering

if TYPE_CHECKING:
    from torch import Tensor

REACH = 16
"""The default reach in pixels of the edit: about that of the autoencoders of Stable Diffusion."""
SHIFT = 0.05
"""The largest shift of colours that counts as the decoder's, relative to the brightest value."""
_WINDOW = 33
"""Latents along a side of the picture on which the reach is measured."""
_SPREAD = 0.03
"""A mean change of decoded pixels, relative to that in the latent's own pixels, that counts as none."""
_CELLS = 48
"""Cells along the shorter side of the grid on which shifts of colour are computed."""


@no_grad
def reach_of(decode: Callable[[Tensor], Tensor], latents: Tensor) -> int:
    """How many pixels beyond its own a latent's change spreads in a decoded picture, measured on one.

    decode: latents (1, c, h, w) to a picture (1, 3, y, x). latents: of a picture, (1, c, h, w); a window in its middle
    is decoded twice.
    """
    top, left = (max(0, side - _WINDOW) // 2 for side in latents.shape[-2:])
    window = latents[:1, :, top : top + _WINDOW, left : left + _WINDOW]
    other, (y, x) = window.clone(), (side // 2 for side in window.shape[-2:])
    other[..., y, x] += window.std()
    change = (decode(other).float() - decode(window).float()).abs().mean((0, 1)).cpu()
    factor = change.shape[0] // window.shape[-2]
    rows, columns = (
        ((torch.arange(side) - (at + 0.5) * factor + 0.5).abs() - (factor - 1) / 2).clamp(min=0).ceil()
        for side, at in zip(change.shape, (y, x), strict=True)
    )
    distance = torch.maximum(rows[:, None], columns).long()
    counts = torch.bincount(distance.flatten()).clamp(min=1)
    profile = torch.bincount(distance.flatten(), change.flatten().double()) / counts
    none = (profile < _SPREAD * profile[0]).nonzero()
    return int(none[0]) if len(none) else len(profile)


Sides = tuple[bool, bool, bool, bool]
"""Of a picture: left, right, top and bottom."""
NO_SIDES = (False, False, False, False)


class Feather(NamedTuple):
    """Weights on a source's frame, (height, width) each.

    inside: of the edit; 1 where it may have changed anything, 0 from the reach on. rim: beyond the reach, for
    comparing colours.
    """

    inside: Tensor
    rim: Tensor


def feather(
    changed: Tensor, edit: tuple[int, int], full: tuple[int, int], reach: int, sides: Sides = NO_SIDES
) -> Feather:
    """The weights of a frame's edit. changed: (y, x) on any grid. edit, full: width and height of edit and source.

    The edit shows the source as `resize_to_fill` fits it; towards margins that it does not show, and towards the given
    sides, it is feathered too.
    """
    width, height = edit
    high, wide = covering(*full, width, height)
    top, left = (high - height) // 2, (wide - width) // 2
    around = (left, wide - width - left, top, high - height - top)
    own = F.interpolate((changed > 0).float()[None, None], size=(height, width), mode="nearest-exact")
    own, margin = F.pad(own, around), F.pad(torch.zeros_like(own), around, value=1.0)
    if any(sides):
        thin = tuple(map(int, sides))
        wider = F.pad(margin, thin, value=1.0)
        beyond = _ramp(wider, reach)[..., thin[2] : thin[2] + high, thin[0] : thin[0] + wide]
    else:
        beyond = _ramp(margin, reach)
    inside = _ramp(own, reach) * (1 - beyond)
    rim = _ramp(own, 3 * reach) * (1 - margin)
    inside, rim = (
        F.interpolate(x, size=(full[1], full[0]), mode="bilinear", align_corners=False)[0, 0] for x in (inside, rim)
    )
    return Feather(inside, rim * (inside == 0))


def _ramp(mask: Tensor, reach: int) -> Tensor:
    """1 where a mask (1, 1, h, w) is 1, smoothly falling to 0 within `reach` pixels."""
    grow, *blurs = (reach - 2 * (reach // 4), reach // 4, reach // 4)
    for kernel in ((2 * grow + 1, 1), (1, 2 * grow + 1)):
        mask = F.max_pool2d(mask, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return _blurred(_blurred(mask, blurs[0]), blurs[1])


def _blurred(x: Tensor, radius: int) -> Tensor:
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
        x = F.avg_pool2d(x, kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
    return x


def placed(edited: Tensor, full: tuple[int, int]) -> Tensor:
    """An edited frame (c, h, w) on its source's frame: (c, height, width), the inverse of `resize_to_fill`.

    full: width and height of the source. Margins repeat the edit's border.
    """
    height, width = edited.shape[-2:]
    if full == (width, height):
        return edited
    high, wide = covering(*full, width, height)
    top, left = (high - height) // 2, (wide - width) // 2
    canvas = F.pad(edited[None], (left, wide - width - left, top, high - height - top), mode="replicate")
    return F.interpolate(canvas, size=(full[1], full[0]), mode="bicubic", antialias=True)[0]


def laid_over(source: Tensor, edited: Tensor, weights: Feather, most: float) -> Tensor:
    """An edited frame on its source's, both float (c, h, w): the source's own values where `inside` is 0.

    most: the largest shift of colours to undo, which the rim shows (`SHIFT` of the brightest value); 0 for none.
    """
    inside, rim = weights
    edited = matched(source, edited, rim, most) if most else edited
    return torch.where(inside > 0, source + inside * (edited - source), source)


def matched(source: Tensor, edited: Tensor, rim: Tensor, most: float) -> Tensor:
    """An edited frame without the shift of colours, of up to `most`, that it has against its source on the rim."""
    return edited + _shift(source - edited, rim).clamp(-most, most) if rim.any() else edited


def _shift(difference: Tensor, rim: Tensor) -> Tensor:
    """A smooth field (c, h, w) that has the mean differences of the rim, and continues them."""
    size = difference.shape[-2:]
    grid = [max(1, side * _CELLS // max(_CELLS, min(size))) for side in size]
    weight = F.interpolate(rim[None, None], size=grid, mode="area")
    mean = F.interpolate((difference * rim)[None], size=grid, mode="area")
    field = _filled(mean / weight.clamp(min=1e-6), (4 * weight).clamp(max=1))
    return F.interpolate(_blurred(field, 1), size=size, mode="bilinear", align_corners=False)[0]


def _filled(values: Tensor, weight: Tensor) -> Tensor:
    """Values (1, c, h, w), filled in from coarser grids where their weight (1, 1, h, w) is below 1 (push-pull)."""
    size = values.shape[-2:]
    if max(size) == 1:
        return values
    half = F.avg_pool2d(weight, 2, ceil_mode=True, count_include_pad=False)
    mean = F.avg_pool2d(values * weight, 2, ceil_mode=True, count_include_pad=False) / half.clamp(min=1e-6)
    coarse = F.interpolate(_filled(mean, (2 * half).clamp(max=1)), size=size, mode="bilinear", align_corners=False)
    return weight * values + (1 - weight) * coarse


def restored_frames(
    sources: Iterable[Tensor],
    edits: Iterable[Tensor],
    masks: Iterable[Tensor],
    reach: int = REACH,
    match: bool = True,
    sides: Iterable[Sides] | None = None,
) -> Iterator[Tensor]:
    """The edited frames on their sources, one at a time, as the sources' dtype: uint8, or float in 0..1.

    sources: (height, width, 3). edits: (h, w, 3) of the same dtype and any size. masks: (y, x) on any grid, above 0
    where the edit may have changed anything. reach: see `reach_of`, in pixels of the edit. match: undo a shift of
    colours of up to `SHIFT`. sides: of each frame, see `feather`.
    """
    each = zip(sources, edits, masks, strict=True)
    for (source, edited, mask), open_sides in zip(each, sides or repeat(NO_SIDES), strict=False):
        full, own = (source.shape[1], source.shape[0]), (edited.shape[1], edited.shape[0])
        weights = feather(mask, own, full, reach, open_sides)
        if not weights.inside.any():
            yield source
            continue
        before, after = (x.movedim(-1, 0).float() for x in (source, edited))
        most = 1.0 if source.dtype.is_floating_point else 255.0
        mixed = laid_over(before, placed(after, full), weights, SHIFT * most if match else 0)
        mixed = torch.where(weights.inside > 0, mixed.clamp(0, most), before).movedim(0, -1)
        yield mixed.to(source.dtype) if source.dtype.is_floating_point else mixed.round().to(source.dtype)


def restore_unchanged(source: Tensor, edited: Tensor, mask: Tensor, reach: int = REACH, match: bool = True) -> Tensor:
    """The source's frames, at their size, with the edit where the mask is above 0: (f, height, width, 3).

    source, edited: (f, height, width, 3) and (f, h, w, 3), uint8 or float in 0..1. mask: (f or 1, y, x) on any grid.
    Pixels farther from the mask than `reach` pixels of the edit are the source's, bit for bit.

    Raises ValueError for other numbers of frames.
    """
    if len(edited) != len(source) or len(mask) not in (1, len(source)):
        raise ValueError(
            f"source has {len(source)} frames, edited {len(edited)} and mask {len(mask)}: the numbers must agree"
        )
    masks = mask.expand(len(source), -1, -1)
    return torch.stack(list(restored_frames(source, edited, masks, reach, match)))
