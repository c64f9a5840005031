"""What an edit left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of frames (f, 3, h, w) in 0..1.

    where: (f, h, w), weights of pixels, e.g. one minus the object's mask. Equal frames give
    infinity; ValueError for shapes that differ or a mask that is empty.
    """
    if a.shape != b.shape:
        raise ValueError(f"frames differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a - b) ** 2
    if where is None:
        mse = error.mean().item()
    else:
        if not where.sum() > 0:
            raise ValueError("the mask leaves no pixel to compare")
        mse = ((error * where[:, None]).sum() / (where.sum() * a.shape[1])).item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def intersection_over_union(a: Tensor, b: Tensor) -> float:
    """Of two boolean masks; two empty ones agree wholly."""
    union = torch.logical_or(a, b).sum().item()
    return 1.0 if union == 0 else torch.logical_and(a, b).sum().item() / union
