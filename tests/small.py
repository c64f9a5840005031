"""Small real models, and their inputs, that the tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = 16
"""Width of the small UNets' text."""


def small_unet(seed: int = 0, **options) -> UNet2DConditionModel:
    """A random UNet of SD's layout in float64: attention on the full, the half and the quarter grid."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **options}).double().eval().requires_grad_(False)


def random_latents(frames: int = 3, height: int = 16, width: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(frames, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_text(seed: int, columns: int = 77) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, columns, TEXT, dtype=torch.float64, generator=generator)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
