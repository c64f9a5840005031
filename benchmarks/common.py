"""Random UNets, their inputs, and the page of results, shared by the benchmarks."""

from __future__ import annotations

import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fatezero import PromptEdit
from fatezero.demo.model import build_scheduler, build_tokenizer
from fatezero.hosts.diffusers import DiffusersDenoiser

RESULTS = Path(__file__).parent / "RESULTS.md"
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "mid": {"cross_attention_dim": 256, "attention_head_dim": 8, "block_out_channels": (96, 192, 384, 384)},
}
"""UNets of SD 1.5's layout: its own width of 860 M parameters, and one for CPUs. Weights are random:
speed does not depend on them."""


def random_unet(shape: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet of a known shape with random weights, the same at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**SHAPES[shape])
    return unet.to(dtype).eval().requires_grad_(False)


def denoiser_of(unet: UNet2DConditionModel) -> DiffusersDenoiser:
    """With SD 1.5's schedule."""
    return DiffusersDenoiser(unet, build_scheduler())


def random_inputs(unet: UNet2DConditionModel, frames: int, size: int) -> tuple[Tensor, list[Tensor]]:
    """Latents of a square clip of so many pixels, and three texts: source, target, negative."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(frames, 4, size // 8, size // 8, generator=random)
    width = unet.config["cross_attention_dim"]
    texts = [torch.randn(1, 77, width, generator=random) for _ in range(3)]
    return latents.to(unet.device), [text.to(unet.device) for text in texts]


def prompt_pair(words: bool) -> PromptEdit:
    """A prompt pair of a style edit, or of a shape edit with blend words."""
    tokenizer = build_tokenizer(Path(tempfile.mkdtemp()))
    source = "a red square on water"
    if words:
        return PromptEdit(source, "a red circle on water", tokenizer, "replace", (["square"], ["circle"]))
    return PromptEdit(source, f"watercolor painting of {source}", tokenizer)


def flops_of_call(shape: str, frames: int, size: int) -> int:
    """Operations (two for a multiply-add) of one plain UNet call, counted on shapes alone."""
    unet = random_unet(shape, torch.device("meta"), torch.float32)
    latents = torch.empty(frames, 4, size // 8, size // 8, device="meta")
    text = torch.empty(frames, 77, SHAPES[shape]["cross_attention_dim"], device="meta")
    with FlopCounterMode(display=False) as counter:
        unet(latents, torch.zeros((), device="meta"), text)
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of several."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(8))
    return 2 * side**3 / best


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that some work takes, the device's queue emptied before and after."""
    settle(device)
    start = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait for what is queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))):
        name = found[1]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__.partition('+')[0]}, {str(dtype).removeprefix('torch.')}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(title: str, text: str, page_path: Path = RESULTS) -> None:
    """Put a section into a page (RESULTS.md), in the place of the one with its title."""
    print(f"## {title}\n\n{text}\n")
    page = page_path.read_text(encoding="utf-8") if page_path.exists() else "# Results\n"
    sections = re.split(r"(?m)^## ", page)
    others = [s for s in sections[1:] if s.partition("\n")[0] != title]
    at = next((i for i, s in enumerate(sections[1:]) if s.partition("\n")[0] == title), len(others))
    others.insert(at, f"{title}\n\n{text}\n\n")
    whole = "\n\n".join([sections[0].strip(), *(f"## {section.strip()}" for section in others)])
    page_path.write_text(whole + "\n", encoding="utf-8")
