"""Deterministic DDIM (arXiv 2010.02502, Eq. 12 with eta 0), in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ddim_move(z: Tensor, noise: Tensor, alpha: Tensor, alpha_to: Tensor) -> Tensor:
    """Move latents from one cumulative alpha to another along the predicted noise.

    z' = sqrt(a') (z - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps

    alpha, alpha_to: scalars in double precision; the result has the latents' precision.
    """
    clean = (z - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return alpha_to.sqrt() * clean + (1 - alpha_to).sqrt() * noise


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: eps_neg + scale (eps_pos - eps_neg)."""
    return negative + scale * (positive - negative)
