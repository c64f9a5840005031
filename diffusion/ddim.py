"""Deterministic DDIM (arXiv 2010.02502, Eq. 12 with eta 0), forward and back."""

from __future__ import annotations

import torch
from torch import Tensor


def ddim_move(z: Tensor, noise: Tensor, alpha: Tensor, alpha_to: Tensor) -> Tensor:
    """Move a latent from one cumulative alpha to another along the predicted noise.

    z' = sqrt(a') (z - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps
    """
    alpha, alpha_to = as_exact(alpha, z), as_exact(alpha_to, z)
    clean = (z - root(1 - alpha) * noise) / root(alpha)
    return root(alpha_to) * clean + root(1 - alpha_to) * noise


def as_exact(alpha: Tensor, z: Tensor) -> Tensor:
    """A cumulative alpha in the latents' precision, at least in the schedule's own."""
    return alpha.to(torch.promote_types(alpha.dtype, z.dtype))


def root(x: Tensor) -> Tensor:
    """The square root, rounded right on every machine: the single precision one of torch's libraries is off by its last
    digit on some processors, and a guided run makes hundreds of times as much of it.
    """
    return x.double().sqrt().to(x.dtype)


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: eps_neg + scale (eps_pos - eps_neg)."""
    return negative + scale * (positive - negative)
