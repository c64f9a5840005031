"""Temporal consistency (TokenFlow, arXiv 2307.10373, and Lai et al., ECCV 2018)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..video.motion import warp


def warp_error(frames: Tensor, flow: Tensor, visible: Tensor) -> float:
    """Mean of (warp(I[t+1]) - I[t])^2 over visible pixels and channels.

    frames (f, 3, h, w) in 0..1; flow (f - 1, 2, h, w) of the source; visible (f - 1, h, w). NaN if no pixel is
    visible.
    """
    if not visible.any():
        return math.nan
    error = ((warp(frames[1:], flow) - frames[:-1]) ** 2).mean(1)
    return error[visible].mean().item()


def temporal_consistency(embeddings: Tensor) -> float:
    """FateZero's Tem-Con: mean cosine similarity of consecutive frames' embeddings (f, d)."""
    return F.cosine_similarity(embeddings[1:], embeddings[:-1], dim=-1).mean().item() if len(embeddings) > 1 else 1.0


def frame_accuracy(frames: Tensor, source: Tensor, target: Tensor) -> float:
    """FateZero's Frame-Acc: share of frames (f, d) at least as near to the target (d,) as to the source (d,)."""
    to_target, to_source = (F.cosine_similarity(frames, text[None], dim=-1) for text in (target, source))
    return (to_target >= to_source).float().mean().item()
