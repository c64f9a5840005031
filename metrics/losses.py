"""A plot of training losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LEFT, _BELOW, _MARGIN = 64, 36, 14
_GREY, _PALE, _LINE, _DOT = (96, 96, 96), (225, 225, 225), (200, 60, 20), (170, 190, 215)


def running_mean(values: Sequence[float], window: int = 25) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    return [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]


def plot_losses(losses: Sequence[float], width: int = 768, height: int = 384) -> Tensor:
    """Losses as dots and their running mean as a line: uint8 (height, width, 3). ValueError for no losses."""
    if not losses:
        raise ValueError("no losses to plot")
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    low, high = 0.0, max(losses) * 1.05 or 1.0
    right, bottom = width - _MARGIN, height - _BELOW

    def at(step: int, loss: float) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * step / max(1, len(losses) - 1)
        return x, bottom - (bottom - _MARGIN) * (loss - low) / (high - low)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value, y = low + share * (high - low), at(0, low + share * (high - low))[1]
        draw.line([(_LEFT, y), (right, y)], _PALE)
        draw.text((_LEFT - 8, y), f"{value:.3g}", _GREY, font, anchor="rm")
    for step in sorted({round(share * (len(losses) - 1)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}):
        draw.text((at(step, low)[0], bottom + 6), str(step + 1), _GREY, font, anchor="mt")
    draw.text(((_LEFT + right) / 2, height - 2), "step", _GREY, font, anchor="mb")
    draw.text((right, _MARGIN), "loss of each step (dots), mean of the last 25 (line)", _GREY, font, anchor="rt")
    for step, loss in enumerate(losses):
        x, y = at(step, loss)
        draw.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], _DOT)
    line = [at(step, mean) for step, mean in enumerate(running_mean(losses))]
    if len(line) > 1:
        draw.line(line, _LINE, 2)
    return torch.from_numpy(np.array(page))
