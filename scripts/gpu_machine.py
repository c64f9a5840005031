"""Parts of the rows of `gpu.py`: device, models with clips, results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fatezero.benchmarks.common import (
    denoiser_of,
    plain_flow,
    plain_inversion,
    plain_sampling,
    random_inputs,
    random_unet,
    random_wan,
    weight_bytes,
)
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.store.budget import available_bytes

Units = dict[str, str]
"""The numbers of a row and their units; "x" is a ratio, "" a difference as a share of the largest value."""


class UnavailableError(Exception):
    """The row cannot be measured on this machine."""


@dataclass(frozen=True)
class Measured:
    """The numbers of a row and their shape and precision. scaled: how the numbers were extrapolated, if they were."""

    numbers: dict[str, float]
    shape: str
    dtype: torch.dtype | None = None
    scaled: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the results. seconds: its time limit, half of which is for its rounds."""

    group: str
    name: str
    units: Units
    work: Callable[[Machine], Measured]
    seconds: float = 25.0


@dataclass(frozen=True)
class Machine:
    """A device, and whether rows run on tiny models."""

    device: torch.device
    tiny: bool
    seconds: float = 10.0
    """Time limit of a row's rounds."""

    @property
    def rounds(self) -> int:
        return 1 if self.tiny else 3

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def half(self, name: str) -> torch.dtype:
        """A precision on a GPU, or single on a CPU. Raises UnavailableError if the GPU does not support it."""
        if not self.cuda:
            return torch.float32
        if name == "bfloat16" and torch.cuda.get_device_capability(self.device) < (8, 0):
            raise UnavailableError("this GPU does not compute in bfloat16")
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def need_cuda(self, what: str) -> None:
        if not self.cuda:
            raise UnavailableError(f"{what} need a CUDA device")

    def need(self, nbytes: float) -> None:
        """Raise UnavailableError if the device has fewer bytes free."""
        free = available_bytes(self.device)
        if free is not None and nbytes > free:
            raise UnavailableError(f"takes about {format_bytes(int(nbytes))} of {format_bytes(free)} free")


@dataclass
class Clip:
    """A model with a clip and texts. plain: guided sampling without fatezero, of the same number of steps."""

    denoiser: Any
    latents: Tensor
    source: Any
    target: Any
    negative: Any
    steps: int
    shape: str
    plain: Callable[[], Any]
    plain_inversion: Callable[[], Any] | None = None
    weights: int = field(init=False)

    def __post_init__(self) -> None:
        model = self.denoiser.transformers[0] if self.spans_clip else self.denoiser.unet
        self.weights = weight_bytes(model)

    @property
    def spans_clip(self) -> bool:
        return bool(self.denoiser.spans_clip)


PARAMETERS = {"mid": 0.08e9, "sd15": 0.86e9, "sdxl": 2.57e9, "1.3B": 1.42e9, "14B": 14.3e9}
"""Approximate parameters, to check that a model fits before it is created."""


def unet_clip(at: Machine, shape: str = "sd15", frames: int = 8, size: int = 512, steps: int = 10) -> Clip:
    """A UNet in fp16, and a clip of size x size pixels."""
    dtype = at.half("float16")
    if at.tiny:
        shape, frames, size, steps = "tiny-sdxl" if shape == "sdxl" else "tiny", min(frames, 4), 128, 5
    else:
        at.need(PARAMETERS[shape] * dtype.itemsize + frames * size**2 * 500)
    unet = random_unet(shape, at.device, dtype)
    denoiser = denoiser_of(unet)
    latents, (source, target, negative) = random_inputs(unet, frames, size)
    schedule = denoiser.schedule(steps)
    return Clip(
        denoiser,
        latents,
        source,
        target,
        negative,
        steps,
        f"{frames} frames of {size}x{size}",
        lambda: plain_sampling(unet, schedule, latents, target, negative),
        lambda: plain_inversion(unet, schedule, latents, source),
    )


FULL = (21, 60, 104)
"""Frames, height and width of the latents of 81 frames of 832x480."""


def wan_clip(
    at: Machine,
    shape: str = "1.3B",
    blocks: int | None = None,
    latents: tuple[int, int, int] = FULL,
    steps: int = 5,
) -> Clip:
    """A Wan transformer in bf16, optionally with fewer blocks, and a clip of its latents."""
    dtype, words, all_blocks = at.half("bfloat16"), 512, {"1.3B": 30, "14B": 40}[shape]
    of_blocks = "all blocks" if blocks is None else f"{blocks} of {all_blocks} blocks"
    if at.tiny:
        shape, blocks, latents, steps, words, of_blocks = "tiny", None, (3, 8, 8), 5, 32, "all blocks"
    else:
        share = 1 if blocks is None else blocks / all_blocks
        tokens = latents[0] * latents[1] * latents[2] // 4
        at.need(PARAMETERS[shape] * share * dtype.itemsize + tokens * (60e3 if shape == "1.3B" else 200e3))
    model = random_wan(shape, at.device, dtype, blocks)
    denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler(shift=3.0))
    random, (frames, height, width) = torch.Generator().manual_seed(1), latents
    z = torch.randn(frames, 16, height, width, generator=random).to(at.device)
    width_of_text = model.config["text_dim"]
    source, target, negative = (torch.randn(1, words, width_of_text, generator=random).to(at.device) for _ in range(3))
    schedule = denoiser.schedule(steps)
    return Clip(
        denoiser,
        z,
        source,
        target,
        negative,
        steps,
        f"{of_blocks}, {4 * frames - 3} frames of {8 * width}x{8 * height}",
        lambda: plain_flow(model, schedule, z, target, negative),
    )
