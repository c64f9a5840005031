"""Memory of one-shot tuning: computed in advance, and counted in a real step.

    python benchmarks/tuning.py

Stable Diffusion 1.x is computed on torch's meta device, without memory; a smaller UNet takes a real step on the CPU,
where every tensor is counted.
"""

from __future__ import annotations

from typing import Any

import torch
from common import write_section
from diffusers import UNet2DConditionModel

from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import KeyFrames
from fatezero.demo.model import build_scheduler
from fatezero.diffusion.training import clip_loss
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers import DiffusersDenoiser, with_temporal_layers
from fatezero.hosts.diffusers.memory import LiveBytes, activation_bytes

KEYS = KeyFrames(("first", "previous"))
SD = {"cross_attention_dim": 768, "attention_head_dim": 8}
SMALL = SD | {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1, "cross_attention_dim": 128}
AUTHORS_OTHER = (83_653_863 + 123_060_480) * 2
"""Bytes of SD 1.x's autoencoder and text encoder in fp16, which the authors' code leaves on the device."""


def denoiser_of(dtype: torch.dtype, device: str, **config: Any) -> DiffusersDenoiser:
    with torch.device(device):
        unet = with_temporal_layers(UNet2DConditionModel(**config).to(dtype))
    return DiffusersDenoiser(unet, build_scheduler())


def rows_of(frames: int, side: int) -> list[str]:
    """Rows of SD 1.x: ours, the authors' way, and without recomputing activations."""
    shape, text = (frames, 4, side // 8, side // 8), Condition(torch.empty(1, 77, 768))
    half, single = (denoiser_of(dtype, "meta", **SD) for dtype in (torch.float16, torch.float32))
    numbers = sum(weight.numel() for weight in half.trained().values())
    least, wide = (activation_bytes(half, shape, text, KEYS, True, recompute) for recompute in (True, False))
    of_half, of_single = (sum(p.nbytes for p in d.unet.parameters()) for d in (half, single))
    rows = {
        "ours, fp16": (of_half, numbers * 16, least),
        "ours, fp16, adamw8bit": (of_half, numbers * 10, least),
        "as the authors: UNet in fp32, autoencoder and text encoder beside": (
            of_single - numbers * 4 + AUTHORS_OTHER, numbers * 16, least,
        ),
        "fp16, activations kept": (of_half, numbers * 16, wide),
        "gradients and moments of every weight": (of_half, sum(p.numel() for p in half.unet.parameters()) * 16, least),
    }  # fmt: skip
    return [
        f"| {name} | {' | '.join(map(format_bytes, parts))} | {format_bytes(sum(parts))} |"
        for name, parts in rows.items()
    ]


def counted() -> str:
    """Computed bytes of a smaller UNet's step, and those of its actual tensors."""
    torch.manual_seed(0)
    denoiser, shape = denoiser_of(torch.float32, "cpu", **SMALL), (8, 4, 32, 32)
    text = Condition(torch.randn(1, 77, 128))
    before = activation_bytes(denoiser, shape, text, KEYS, True)
    with torch.enable_grad(), denoiser.training(), denoiser.hooked(True):
        gradients = sum(weight.nbytes for weight in denoiser.trained().values())
        with LiveBytes() as live:
            clip_loss(denoiser, torch.randn(shape), torch.randn(shape), 500, text, KEYS).backward()
    return f"{format_bytes(before)} computed, {format_bytes(live.most - gradients)} counted"


def main() -> None:
    frames, side = 24, 512
    head = (
        "| | weights | what is trained, its gradients and moments | activations | together |\n|---|---:|---:|---:|---:|"
    )
    section = "\n".join(
        [
            f"{frames} frames of {side}x{side}, Stable Diffusion 1.x's UNet with temporal layers, from shapes only "
            "(without the kernels' own workspace):",
            "",
            head,
            *rows_of(frames, side),
            "",
            f"A smaller UNet (8 frames, 32x32 latents, fp32): {counted()}.",
            "The authors' activations are at least these: under autocast their norms give fp32.",
        ]
    )
    write_section("Tuning: memory", section)


if __name__ == "__main__":
    main()
