"""Figures of an edit of a demo scene, from the judge and the ground truth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..demo.scenes import visible_pixels
from ..metrics.clip import ClipScorer
from ..metrics.preservation import changed_pixels, intersection_over_union, psnr, ssim
from ..metrics.temporal import frame_accuracy, temporal_consistency, warp_error
from ..video.flow import flow_estimator
from ..video.motion import visible
from .cases import AnyCase

LEAST_PIXELS = 0.02
"""The least share of unchanged pixels for which preservation is measured."""
OBJECT_CONTRAST = 0.1
"""The difference to the background, as a mean over channels, above which a pixel counts as the object's."""


def measure(case: AnyCase, frames: Tensor, clip: ClipScorer | None = None) -> dict[str, float]:
    """All figures of an edited clip (frames, 3, SIZE, SIZE) in 0..1.

    success: share of frames where the judge reads every word of the target and every outline is whole. changed, kept:
    for the words that should change, and for the others, where they are read; `changed` of a removal is that the object
    is gone. outline: where outlines are whole.
    preserved_db, preserved_ssim: over the pixels that should not change; NaN if there
    are too few, as in an edit of style. truth_db: PSNR to the ground truth, everywhere. object_iou: of the pixels that
    differ from the background, and should. warp_error: x 1000, along the flow of the ground truth; warp_error_dis:
    along DIS's flow of the source. tem_con, frame_acc: with CLIP, if given.
    """
    unchanged = unchanged_pixels(case)
    enough = unchanged.mean() >= LEAST_PIXELS
    estimated, visible_along = case_flow(case)
    judged = case.judged(frames)
    figures = {
        "success": share_of(map(all, judged)),
        "changed": share_of(changed for changed, _, _ in judged),
        "kept": share_of(kept for _, kept, _ in judged),
        "outline": share_of(whole for _, _, whole in judged),
        "preserved_db": psnr(frames, case.truth.frames, unchanged) if enough else math.nan,
        "preserved_ssim": ssim(frames, case.truth.frames, unchanged) if enough else math.nan,
        "truth_db": psnr(frames, case.truth.frames),
        "object_iou": object_iou(case, frames),
        "warp_error": 1000 * warp_error(frames, case.truth.flow, visible_pixels(case.truth)),
        "warp_error_dis": 1000 * warp_error(frames, estimated, visible_along),
    }
    if clip is not None:
        images = clip.images(frames)
        prompts = clip.text(case.source.caption), clip.text(case.target.caption)
        figures |= {"tem_con": temporal_consistency(images), "frame_acc": frame_accuracy(images, *prompts)}
    return figures


def share_of(found: Iterable[bool]) -> float:
    """The share of True."""
    every = list(found)
    return sum(every) / len(every)


@lru_cache(maxsize=4)
def case_flow(case: AnyCase) -> tuple[Tensor, Tensor]:
    """DIS's flow of the source, and its pixels that are not occluded."""
    _, estimate = flow_estimator("dis")
    pairs = list(pairwise(case.clip.frames))
    forward = torch.stack([estimate(a, b) for a, b in pairs])
    backward = torch.stack([estimate(b, a) for a, b in pairs])
    return forward, visible(forward, backward)


def unchanged_pixels(case: AnyCase) -> Tensor:
    """1 where source and ground truth are equal: (frames, SIZE, SIZE)."""
    return ((case.clip.frames - case.truth.frames).abs().amax(1) < 1 / 255).float()


def object_iou(case: AnyCase, frames: Tensor) -> float:
    """IoU of the pixels that differ from the background, in the edit and in the ground truth."""
    found, expected = (changed_pixels(case.ground, shown, OBJECT_CONTRAST) for shown in (frames, case.truth.frames))
    return intersection_over_union(found, expected)
