"""Motion fidelity: whether an edit's tracks move as the source's do (Yatim et al., CVPR 2024, arXiv 2311.17009)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..video.flow import Estimator

Tracker = Callable[[Tensor], Tensor]
"""Tracks (n, f, 2) in pixels of frames (f, 3, h, w) in 0..1, the same n for every clip of a size."""
GRID = 55
"""Tracks start on a grid of 55 x 55 points in the first frame."""


def motion_fidelity(edited: Tensor, source: Tensor) -> float:
    """Mean over the edit's tracks (n, f, 2) of the largest similarity to a track of the source (n, f, 2).

    The similarity of two tracks is the mean cosine of their steps. As in the authors' code, 1 is subtracted from that
    of a track and the source's track of the same start, which is therefore hardly ever the largest. A point that does
    not move has no direction: its cosine is 0. Raises ValueError for a single frame.
    """
    if edited.shape != source.shape or edited.shape[1] < 2:
        given = f"{tuple(edited.shape)} and {tuple(source.shape)}"
        raise ValueError(f"tracks have shapes {given}; they must be equal, with at least 2 frames")
    a, b = (F.normalize(tracks.diff(dim=1), dim=-1) for tracks in (edited, source))
    similarity = torch.einsum("ntc,mtc->nm", a, b) / a.shape[1] - torch.eye(len(a)).to(a)
    return similarity.amax(1).mean().item()


def flow_tracker(estimate: Estimator) -> Tracker:
    """Tracks that follow the optical flow from frame to frame, without a test of occlusion."""

    def track(frames: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        size = torch.tensor([width, height], dtype=torch.float32)
        along = [torch.linspace(width / 64, side - width / 64, GRID) for side in (height, width)]
        y, x = torch.meshgrid(*along, indexing="ij")
        points = [torch.stack([x, y], -1).reshape(-1, 2)]
        for a, b in pairwise(frames):
            at = ((points[-1] + 0.5) * 2 / size - 1)[None, None]
            flow = F.grid_sample(estimate(a, b)[None].cpu(), at, padding_mode="border", align_corners=False)
            points.append(points[-1] + flow[0, :, 0].T)
        return torch.stack(points, 1)

    return track


def load_cotracker(path: str, device: torch.device | str = "cpu") -> Tracker:
    """CoTracker (Karaev et al., ECCV 2024) of the `cotracker` package; FiVE-Bench uses scaled_offline.pth.

    Raises ImportError if the package is not installed.
    """
    from cotracker.predictor import CoTrackerPredictor  # type: ignore[import-not-found, unused-ignore]

    model = CoTrackerPredictor(checkpoint=path).to(device).eval()

    @torch.no_grad()
    def track(frames: Tensor) -> Tensor:
        tracks, _ = model((255 * frames[None]).to(device), grid_size=GRID)
        found: Tensor = tracks[0].transpose(0, 1).float().cpu()
        return found

    return track
