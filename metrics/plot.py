"""Plots of a report by frame."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .evaluate import Report

_PANELS = {
    "PSNR in dB": ("PSNR", 5.0),
    "SSIM": ("SSIM", 0.1),
    "LPIPS": ("LPIPS", 0.1),
    "share of the change inside": ("share of the change", 0.1),
    "largest change outside, / 255": ("largest change", 5.0),
    "warp error, x 0.001": ("warp error", 1.0),
    "Tem-Con": ("Tem-Con", 0.1),
    "CLIP similarity": ("CLIP to", 0.1),
}
"""Each panel's title, the prefix of its figures' names, and the least range of its axis, so that small differences
look small.
"""


def plot_report(report: Report, width: int = 768, panel: int = 200) -> Tensor:
    """A panel for each kind of figure with values by frame: uint8 (height, width, 3).

    panel: height of each panel in pixels. Raises ValueError if no figure has values by frame, ImportError without
    matplotlib.
    """
    try:  # here, because it would dominate the pack's loading time
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Page
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    panels: dict[str, dict[str, tuple[float, ...]]] = {}
    for title, (start, _) in _PANELS.items():
        curves = {name: f.by_frame for name, f in report.figures.items() if name.startswith(start) and f.by_frame}
        if any(math.isfinite(v) for values in curves.values() for v in values):
            panels[title] = curves
    if not panels:
        raise ValueError("no figure of this report has values by frame")
    dpi = 100
    page = Page(figsize=(width / dpi, panel * len(panels) / dpi), dpi=dpi, layout="constrained")
    canvas = FigureCanvasAgg(page)
    for axes, (title, curves) in zip(page.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot([v if math.isfinite(v) else math.nan for v in values], marker=".", label=name)
        axes.set_ylim(*_limits([v for values in curves.values() for v in values], _PANELS[title][1]))
        axes.set_ylabel(title, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xlabel("frame", fontsize=8)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _limits(values: list[float], least: float) -> tuple[float, float]:
    """The ends of an axis around some values, at least `least` apart."""
    found = [value for value in values if math.isfinite(value)]
    middle, half = (min(found) + max(found)) / 2, max(max(found) - min(found), least) * 0.55
    low = max(middle - half, 0.0) if min(found) >= 0 else middle - half
    return low, low + 2 * half
