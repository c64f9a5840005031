"""A report on an edit of any video: preservation, motion, CLIP scores, distance to the ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..video.flow import Estimator
from ..video.motion import visible
from .clip import ClipScorer
from .lpips import Lpips
from .preservation import (
    SSIM_WINDOW,
    changed_pixels,
    intersection_over_union,
    largest_change,
    psnr,
    share_of_change,
    ssim,
)
from .temporal import frame_accuracy, temporal_consistency, warp_error

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Figure:
    """One measure: value, unit, and the values by frame (or pair of frames), if any."""

    value: float
    unit: str = ""
    by_frame: tuple[float, ...] = ()

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        return f"{self.value:.4g}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True)
class Report:
    """Figures by name, in order of display."""

    figures: dict[str, Figure] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.figures), default=0)
        return "\n".join(f"{name:<{width}}  {figure}" for name, figure in self.figures.items())


OF_CLIP = "Tem-Con"
"""A figure that is present if CLIP was used."""


def evaluate(
    source: Tensor,
    edited: Tensor,
    *,
    mask: Tensor | None = None,
    truth: Tensor | None = None,
    prompts: tuple[str, str] = ("", ""),
    flow: tuple[Tensor, Tensor] | Estimator | None = None,
    clip: ClipScorer | None = None,
    lpips: Lpips | None = None,
    progress: Progress | None = None,
) -> Report:
    """All available figures of an edited clip; frames are (f, 3, h, w) in 0..1.

    mask: (f or 1, h, w), 1 where the edit should be; adds PSNR, SSIM and LPIPS to the source inside and outside of it,
    the share of the change inside, and the largest change of a pixel where it is 0.
    truth: the correct edit, if known. prompts: source and target, for CLIP. flow: (forward, backward) of the source,
    each (f - 1, 2, h, w) in pixels, or an estimator; None skips the warp error. clip, lpips: models; None skips them.

    Raises ValueError, naming the argument, for wrong shapes.
    """
    _same("edited", edited, source)
    figures = _likeness(source, edited, "to source", None, lpips)
    if mask is not None:
        inside = _clips_mask(mask, source)
        for name, where in (("inside the mask", inside), ("outside the mask", 1 - inside)):
            figures |= _likeness(source, edited, name, where, lpips) if where.sum() > 0 else {}
        figures |= _exclusivity(source, edited, inside)
    if truth is not None:
        _same("truth", truth, source)
        figures |= _likeness(truth, edited, "to truth", None, lpips)
        overlap = intersection_over_union(changed_pixels(source, edited), changed_pixels(source, truth))
        figures["IoU of what changed, with truth"] = Figure(overlap)
    if flow is not None and len(source) > 1:
        figures |= _warp_errors(source, edited, flow, progress)
    if clip is not None:
        figures |= _clip_scores(clip, edited, *prompts)
    return Report(figures)


def _likeness(a: Tensor, b: Tensor, what: str, where: Tensor | None, lpips: Lpips | None) -> dict[str, Figure]:
    """PSNR, SSIM and LPIPS of the clip and by frame (NaN where the mask is empty)."""
    measures: dict[str, tuple[Callable[[Tensor, Tensor, Tensor | None], float], str]] = {"PSNR": (psnr, "dB")}
    if min(a.shape[-2:]) > 2 * SSIM_WINDOW:
        measures["SSIM"] = (ssim, "")
    if lpips is not None:
        measures["LPIPS"] = (lpips, "")

    def by_frame(measure: Callable[[Tensor, Tensor, Tensor | None], float]) -> tuple[float, ...]:
        weights = [None] * len(a) if where is None else where.split(1)
        parts = zip(a.split(1), b.split(1), weights, strict=True)
        return tuple(math.nan if _is_empty(w) else measure(x, y, w) for x, y, w in parts)

    found = {}
    for name, (measure, unit) in measures.items():
        frames = by_frame(measure)
        value = psnr(a, b, where) if name == "PSNR" else _weighted(frames, where)
        found[f"{name} {what}"] = Figure(value, unit, frames)
    return found


def _exclusivity(source: Tensor, edited: Tensor, inside: Tensor) -> dict[str, Figure]:
    """How far the change is limited to a mask: the share of it inside, and the largest where the mask is 0."""
    outside = (inside == 0).to(inside)
    pairs = list(zip(source.split(1), edited.split(1), strict=True))
    shares = tuple(share_of_change(*pair, own) for pair, own in zip(pairs, inside.split(1), strict=True))
    largest = tuple(255 * largest_change(*pair, own) for pair, own in zip(pairs, outside.split(1), strict=True))
    found = {"share of the change inside the mask": Figure(share_of_change(source, edited, inside), "", shares)}
    return found | (
        {"largest change outside the mask": Figure(max(largest), "/ 255", largest)} if outside.any() else {}
    )


def _is_empty(weights: Tensor | None) -> bool:
    border = SSIM_WINDOW // 2
    return weights is not None and not weights[:, border:-border, border:-border].sum() > 0


def _weighted(frames: tuple[float, ...], where: Tensor | None) -> float:
    """The mean over frames, weighted by the mask's area."""
    shares = [1.0] * len(frames) if where is None else where.sum((1, 2)).tolist()
    counted = [(value, share) for value, share in zip(frames, shares, strict=True) if not math.isnan(value)]
    total = sum(share for _, share in counted)
    return sum(value * share for value, share in counted) / total if total else math.nan


def _warp_errors(
    source: Tensor, edited: Tensor, flow: tuple[Tensor, Tensor] | Estimator, progress: Progress | None
) -> dict[str, Figure]:
    """TokenFlow's warp error of the edit and, for comparison, of the source, one pair of frames at a time."""
    pairs = len(source) - 1
    if not callable(flow):
        for name, given in zip(("forward", "backward"), flow, strict=True):
            expected = (pairs, 2, *source.shape[-2:])
            if tuple(given.shape) != expected:
                raise ValueError(f"flow ({name}) has shape {tuple(given.shape)}; it must be {expected}")
    errors: dict[str, list[float]] = {"edited": [], "source": []}
    visible_pixels = []
    for t in range(pairs):
        if callable(flow):
            forward, backward = flow(source[t], source[t + 1])[None], flow(source[t + 1], source[t])[None]
        else:
            forward, backward = flow[0][t : t + 1], flow[1][t : t + 1]
        mask = visible(forward, backward)
        visible_pixels.append(mask.sum().item())
        for name, frames in (("edited", edited), ("source", source)):
            errors[name].append(1000 * warp_error(frames[t : t + 2], forward, mask))
        if progress:
            progress(t + 1, pairs)

    def mean(values: list[float]) -> float:
        defined = [(v, n) for v, n in zip(values, visible_pixels, strict=True) if n]
        total = sum(n for _, n in defined)
        return sum(v * n for v, n in defined) / total if total else math.nan

    return {
        "warp error": Figure(mean(errors["edited"]), "x 0.001", tuple(errors["edited"])),
        "warp error of the source": Figure(mean(errors["source"]), "x 0.001", tuple(errors["source"])),
        "pixels not occluded": Figure(sum(visible_pixels) / (pairs * source[0, 0].numel())),
    }


def _clip_scores(clip: ClipScorer, edited: Tensor, source_prompt: str, target_prompt: str) -> dict[str, Figure]:
    """Tem-Con, Frame-Acc and the similarity to both prompts (FateZero Sec. 4.2, Table 1)."""
    images = clip.images(edited)
    steady = tuple((images[1:] * images[:-1]).sum(-1).tolist())
    found = {OF_CLIP: Figure(temporal_consistency(images), "", steady)}
    if source_prompt and target_prompt:
        before, after = clip.text(source_prompt), clip.text(target_prompt)
        found["Frame-Acc"] = Figure(frame_accuracy(images, before, after))
        for name, text in (("source", before), ("target", after)):
            likeness = tuple((images @ text).tolist())
            found[f"CLIP to {name} prompt"] = Figure(sum(likeness) / len(likeness), "", likeness)
    return found


def _clips_mask(mask: Tensor, source: Tensor) -> Tensor:
    if mask.ndim != 3 or len(mask) not in (1, len(source)) or mask.shape[-2:] != source.shape[-2:]:
        expected = f"({len(source)} or 1, {source.shape[-2]}, {source.shape[-1]})"
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be {expected}")
    return mask.to(source).clamp(0, 1).expand(len(source), -1, -1)


def _same(name: str, frames: Tensor, source: Tensor) -> None:
    if source.ndim != 4 or not len(source):
        raise ValueError(f"source has shape {tuple(source.shape)}; it must be (frames, 3, height, width)")
    if frames.shape != source.shape:
        raise ValueError(f"{name} has shape {tuple(frames.shape)}, but the source {tuple(source.shape)}")
    if not torch.isfinite(frames).all():
        raise ValueError(f"{name} contains NaN or infinite values")
