"""Plots of a report by frame."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .evaluate import Report

_PANELS = {
    "PSNR in dB": "PSNR",
    "SSIM": "SSIM",
    "LPIPS": "LPIPS",
    "warp error, x 0.001": "warp error",
    "Tem-Con": "Tem-Con",
    "CLIP similarity": "CLIP to",
}
"""Each panel's title and the prefix of its figures' names."""


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
    for title, start in _PANELS.items():
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
        axes.set_ylabel(title, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xlabel("frame", fontsize=8)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())
