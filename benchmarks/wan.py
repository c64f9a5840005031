"""The cost of an edit on a video transformer relative to plain guided sampling, with the shapes of Wan 2.1 1.3B.

The transformer has random weights, and on a CPU fewer than its 30 blocks. Plain sampling is a separate loop over
diffusers' transformer, one call per prompt, like diffusers' pipeline. Memory is the size of live tensors on torch's
meta device at full size: 81 frames of 832x480, 32,760 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    guided_steps,
    machine,
    plain_flow,
    random_wan,
    side_by_side,
    table,
    weight_bytes,
    write_section,
)
from diffusers import FlowMatchEulerDiscreteScheduler

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, draw, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.masks import GivenMask
from fatezero.demo.video_model import build_tokenizer
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.hosts.diffusers.memory import LiveBytes
from fatezero.recipes.presets import PRESETS

FULL = (21, 60, 104)
"""Frames, height and width of the latents of 81 frames of 832x480."""
STYLE = FusionSettings(cross_replace_steps=0.5, self_replace_steps=0.5)
SHAPE = FusionSettings(cross_replace_steps=0.5, self_replace_steps=0.5, blend_self_attention=True, blend_latents=True)
PROMPT = PromptEdit(
    "a red square on water", "a blue star on water", build_tokenizer(), "refine", (["square"], ["star"])
)


@contextmanager
def attend_without_data() -> Iterator[None]:
    """Replace attention on torch's meta device by one without a map, like fused kernels."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, **_: torch.empty_like(query)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def full_memory() -> list[list[str]]:
    """Peak bytes of a guided step of Wan 2.1 1.3B in bfloat16 at full size, with and without its weights."""
    model = random_wan("1.3B", torch.device("meta"), torch.bfloat16)
    weights = weight_bytes(model)
    denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler())
    frames, height, width = FULL
    z = torch.empty(frames, 16, height, width, device="meta")
    text = Condition(torch.empty(1, 512, 4096, device="meta"))
    rows, base = [], 0
    names = {
        "plain": "plain guided sampling, diffusers' own model",
        "beside": "edit, the source beside, block by block",
        "before": "edit, the source before, its queries and keys kept",
    }
    for name, work in guided_steps(denoiser, z, text, PROMPT, STYLE).items():
        with attend_without_data(), LiveBytes(model) as live:
            work()
        whole = weights + live.most
        base = base or whole
        rows.append([names[name], format_bytes(live.most), format_bytes(whole), f"{whole / base:.3f}"])
    maps = 30 * 12 * (frames * height * width // 4) ** 2 * 2
    naive = weights + maps
    rows.append(["maps of a step's self-attention", format_bytes(maps), format_bytes(naive), f"{naive / base:.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--latents", default="5x40x40", help="frames x height x width")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--maps", action="store_true", help="also a naive edit with maps")
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    frames, height, width = map(int, given.latents.split("x"))
    model = random_wan("1.3B", device, dtype, given.blocks)
    denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler(shift=3.0))
    schedule, random = denoiser.schedule(given.steps), torch.Generator().manual_seed(1)
    z = torch.randn(frames, 16, height, width, generator=random).to(device)
    texts = [torch.randn(1, 512, 4096, generator=random).to(device) for _ in range(3)]
    source, target, negative = texts
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1  # a quarter of the picture

    inversion = invert(denoiser, z, source, given.steps)
    drawn = draw(denoiser, z, source, given.steps, FlowEditSettings())

    def edited(fusion: FusionSettings, of: Any = inversion, **more: Any) -> Callable[[], Any]:
        return lambda: edit(denoiser, of, target, negative, 5.0, PROMPT, fusion, **more)

    works: dict[str, Callable[[], Any]] = {
        "attention fused in half of the steps": edited(STYLE),
        "the same under a mask given, latents kept": edited(SHAPE, mask=GivenMask(mask)),
        "the same under a mask of both prompts": edited(
            FusionSettings(0.5, 0.5, blend_self_attention=True, blend_latents=True, mask_from="prompts")
        ),
        "preset style: 0.7 and 0.8 of the steps": edited(FusionSettings(0.7, 0.8)),
        "FlowEdit from 0.7 of the steps": lambda: edit(
            denoiser, drawn, target, negative, 10.0, strength=PRESETS["flow_edit"]["strength"]
        ),
    }
    if given.maps:
        kept = invert(denoiser, z, source, given.steps, memory="maps")
        works["naive: maps kept, half of the steps"] = edited(STYLE, kept)
    base = lambda: plain_flow(model, schedule, z, target, negative)  # noqa: E731
    rows = []
    for name, work in works.items():
        taken = side_by_side({"plain": base, "own": work}, device, given.rounds)
        rows.append([name, f"{taken['own'].median:.1f} s", f"{taken['own'].of(taken['plain']):.2f}"])
        print(*rows[-1], flush=True)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    tokens = frames * height * width // 4
    text = (
        f"{machine(device, dtype)}. {given.blocks} of Wan 1.3B's blocks, {weights:.0f} M parameters, {tokens} tokens, "
        f"{given.steps} steps, median of {given.rounds} rounds.\n\n"
        f"{table(['edit', 'time', 'of plain'], rows)}\n\n"
        "The source's branch is a third call besides plain sampling's two, in the steps that read it: in half of them "
        "that is 1.25, in 0.8 of them 1.4. The rest is fusion of words, which at this size are nearly as many as tokens"
        " are; a mask of both prompts is eight calls, whatever the steps. Maps of so few tokens are fast.\n\n"
        "Bytes alive in a step of the whole Wan 1.3B in bfloat16, 81 frames of 832x480, computed from shapes:\n\n"
        f"{table(['work', 'activations', 'with weights', 'of plain'], full_memory())}"
    )
    write_section(f"Wan: {device.type}, {given.dtype}", text)


if __name__ == "__main__":
    main()
