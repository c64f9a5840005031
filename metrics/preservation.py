"""Preservation of the source by an edit, over whole frames or the pixels of a mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels, with deviation 1.5 (Wang et al., 2004)."""


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of frames (f, 3, h, w) in 0..1.

    where: (f, h, w), weights of pixels, e.g. one minus the object's mask. Equal frames give infinity. Raises
    ValueError for shapes that differ or an empty mask.
    """
    _check(a, b)
    mse = weighted_mean((a - b) ** 2, where)
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Structural similarity of frames (f, 3, h, w) in 0..1, mean over channels (Wang et al., IEEE TIP 2004).

    Windows stay inside the frame, so five pixels at each side have no value. Errors as `psnr`, and ValueError for
    frames smaller than the window.
    """
    _check(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels a side, not {tuple(a.shape[-2:])}")
    border = SSIM_WINDOW // 2
    inner = None if where is None else where[:, border:-border, border:-border]
    return weighted_mean(_ssim_map(a, b), inner)


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """((2 ma mb + c1) (2 sab + c2)) / ((ma^2 + mb^2 + c1) (sa^2 + sb^2 + c2)) at every whole window."""
    along = torch.arange(SSIM_WINDOW).to(a) - SSIM_WINDOW // 2
    bell = torch.exp(-(along**2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    channels = a.shape[1]
    down, across = (bell.view(s).expand(channels, *s[1:]) for s in ((1, 1, -1, 1), (1, 1, 1, -1)))

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, down, groups=channels), across, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def weighted_mean(values: Tensor, where: Tensor | None) -> float:
    """Mean of (f, c, h, w), optionally with weights of pixels (f, h, w).

    Raises ValueError if all weights are zero.
    """
    if where is None:
        return values.mean().item()
    total = where.sum()
    if not total > 0:
        raise ValueError("the mask is empty: no pixels to compare")
    return ((values * where[:, None]).sum() / (total * values.shape[1])).item()


def intersection_over_union(a: Tensor, b: Tensor) -> float:
    """IoU of two boolean masks; 1 if both are empty."""
    union = torch.logical_or(a, b).sum().item()
    return 1.0 if union == 0 else torch.logical_and(a, b).sum().item() / union


def largest_change(a: Tensor, b: Tensor, where: Tensor) -> float:
    """The largest difference of frames (f, 3, h, w) in 0..1 where weights of pixels (f, h, w) are above 0."""
    _check(a, b)
    return ((a - b).abs().amax(1) * (where > 0)).max().item()


def share_of_change(a: Tensor, b: Tensor, where: Tensor) -> float:
    """The share of the absolute difference of frames that weights of pixels (f, h, w) in 0..1 select.

    NaN for equal frames.
    """
    _check(a, b)
    change = (a - b).abs().mean(1)
    total = change.sum()
    return ((change * where).sum() / total).item() if total > 0 else math.nan


def changed_pixels(source: Tensor, other: Tensor, threshold: float = 0.1) -> Tensor:
    """Where a clip differs from its source, as a mean over channels and 3x3 pixels: boolean (f, h, w)."""
    _check(source, other)
    difference = (source - other).abs().mean(1, keepdim=True)
    return F.avg_pool2d(difference, 3, stride=1, padding=1, count_include_pad=False)[:, 0] > threshold


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"frames differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
