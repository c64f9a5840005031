"""What the demo worlds draw with: signed distances, the ground, textures and styles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.12),
    "yellow": (0.96, 0.86, 0.10),
    "green": (0.08, 0.66, 0.16),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.12, 0.20, 0.85),
    "purple": (0.58, 0.12, 0.72),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "grass": (0.40, 0.50, 0.30),
    "sand": (0.80, 0.72, 0.58),
    "water": (0.34, 0.46, 0.58),
    "bricks": (0.58, 0.40, 0.34),
}
# --- signed distances, in units of the thing's radius ---------------------------------


def polygon(u: Tensor, v: Tensor, points: list[tuple[float, float]]) -> Tensor:
    """Exact signed distance to a polygon: nearest edge, sign by crossings."""
    nearest = torch.full_like(u, math.inf)
    inside = torch.zeros_like(u, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(u - ax - along * ex, v - ay - along * ey))
        if ay != by:
            crosses = (ay > v) != (by > v)
            inside = inside ^ (crosses & (u < ax + (v - ay) * ex / ey))
    return torch.where(inside, -nearest, nearest)


def corners(count: int, radii: tuple[float, ...], turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Corners of a regular or star polygon, starting at the top."""
    return [
        (
            radii[i % len(radii)] * math.cos(turn + 2 * math.pi * i / count),
            radii[i % len(radii)] * math.sin(turn + 2 * math.pi * i / count),
        )
        for i in range(count)
    ]


# --- paint ----------------------------------------------------------------------------


def rgb(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1, 1)


def ground(name: str, x: Tensor, y: Tensor, phase: float) -> Tensor:
    """Background colour at scene coordinates (frames, H, W): (3, frames, H, W)."""
    base = rgb(BACKGROUNDS[name])
    x, y = x + 13.7 * phase, y + 7.3 * phase
    if name == "grass":
        light = 0.10 * torch.sin(1.05 * x + 1.5 * torch.sin(0.30 * y)) * torch.sin(0.35 * y + 0.2 * x)
    elif name == "sand":
        light = 0.06 * torch.sin(0.55 * y + 1.2 * torch.sin(0.13 * x))
    elif name == "water":
        light = 0.11 * torch.sin(0.80 * y + 1.6 * torch.sin(0.22 * x))
    else:
        row = torch.floor(y / 8)
        across, up = (x + 8 * (row % 2)) % 16, y % 8
        edge = torch.minimum(torch.minimum(across, 16 - across), torch.minimum(up, 8 - up))
        light = 0.16 * (1.5 - edge).clamp(0, 1)
    return base + light


def textured(texture: str, colour: Tensor, px: Tensor, py: Tensor) -> Tensor:
    """The thing's texture at its own pixel coordinates: (3, frames, H, W)."""
    if texture == "striped":
        pale = (0.5 + 2.0 * torch.sin(2 * math.pi * (px + py) / 11.0)).clamp(0, 1)
    elif texture == "dotted":
        dx, dy = (px + 4.5) % 9 - 4.5, (py + 4.5) % 9 - 4.5
        pale = (2.9 - torch.hypot(dx, dy)).clamp(0, 1)
    else:
        pale = torch.zeros_like(px)
    return colour + 0.75 * pale * (1 - colour)


def stylised(style: str, colour: Tensor, distance: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Apply a style to colours; distance in pixels, to the nearest edge."""
    if style == "photo":
        return colour * (1.06 - 0.16 * (x + y) / (2 * x.shape[-1]))
    if style == "watercolor":
        paper = rgb((0.97, 0.95, 0.90))
        grain = 0.04 * torch.sin(0.9 * x + 2 * torch.sin(0.31 * y)) * torch.sin(0.7 * y + torch.sin(0.4 * x))
        rim = 0.22 * torch.exp(-((distance / 1.6) ** 2))
        return 0.56 * colour + 0.44 * paper + grain - rim * (1 - colour)
    ink = (1.9 - distance.abs()).clamp(0, 1)
    return (0.5 + 1.35 * (colour - 0.45)).clamp(0, 1) * (1 - 0.92 * ink)
