"""How steadily an edit moves (TokenFlow, arXiv 2307.10373, and Lai et al., ECCV 2018)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Sample (n, c, h, w) at x + flow(x), flow (n, 2, h, w) in pixels (dx, dy); zero outside."""
    n, _, h, w = frames.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    grid_x = (x.to(flow) + flow[:, 0] + 0.5) * 2 / w - 1
    grid_y = (y.to(flow) + flow[:, 1] + 0.5) * 2 / h - 1
    grid = torch.stack([grid_x, grid_y], -1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def inside(flow: Tensor) -> Tensor:
    """Where the flow stays in the picture: boolean (n, h, w)."""
    n, _, h, w = flow.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at_x, at_y = x.to(flow) + flow[:, 0], y.to(flow) + flow[:, 1]
    return (at_x >= 0) & (at_x <= w - 1) & (at_y >= 0) & (at_y <= h - 1)


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels not occluded, after Lai et al.: boolean (n, h, w) from flows (n, 2, h, w).

    Occluded where |w~b + wf|^2 > 0.01 (|w~b|^2 + |wf|^2) + 0.5, w~b being the backward flow brought
    to frame t, or at motion boundaries, |grad wf|^2 > 0.01 |wf|^2 + 0.002. The paper tells it for the
    pixels of frame t + 1, with the flows in each other's place.
    """
    back = warp(backward, forward)
    size = (forward**2).sum(1) + (back**2).sum(1)
    consistent = ((forward + back) ** 2).sum(1) <= 0.01 * size + 0.5
    dx = F.pad(forward.diff(dim=-1), (0, 1))
    dy = F.pad(forward.diff(dim=-2), (0, 0, 0, 1))
    smooth = (dx**2 + dy**2).sum(1) <= 0.01 * (forward**2).sum(1) + 0.002
    return consistent & smooth & inside(forward)


def warp_error(frames: Tensor, flow: Tensor, seen: Tensor) -> float:
    """Mean of (warp(I[t+1]) - I[t])^2 over visible pixels and channels.

    frames (f, 3, h, w) in 0..1; flow (f - 1, 2, h, w) of the source; seen (f - 1, h, w).
    NaN, for "undefined", where no pixel is visible.
    """
    if not seen.any():
        return math.nan
    error = ((warp(frames[1:], flow) - frames[:-1]) ** 2).mean(1)
    return error[seen].mean().item()


def temporal_consistency(embeddings: Tensor) -> float:
    """FateZero's Tem-Con: mean cosine similarity of consecutive frames' embeddings (f, d)."""
    return F.cosine_similarity(embeddings[1:], embeddings[:-1], dim=-1).mean().item() if len(embeddings) > 1 else 1.0


def frame_accuracy(frames: Tensor, source: Tensor, target: Tensor) -> float:
    """FateZero's Frame-Acc: share of frames (f, d) at least as near to the target (d,) as to the source (d,)."""
    to_target, to_source = (F.cosine_similarity(frames, text[None], dim=-1) for text in (target, source))
    return (to_target >= to_source).float().mean().item()
