"""The cost of an edit on a transformer of joint layers relative to plain guided sampling, with MiniMax H3's shapes.

The transformer has random weights, and for times a narrow one of a few blocks. Plain sampling calls diffusers'
transformer once per prompt. Memory is the size of live tensors on torch's meta device at full size: 124 frames of
1344x768, 37,296 tokens of the video.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import (
    attend_without_data,
    edit_steps,
    machine,
    random_model,
    side_by_side,
    table,
    weight_bytes,
    write_section,
)
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from torch import Tensor

from fatezero import FusionSettings
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import ALL, Chunk, KeyFrames
from fatezero.attention.prompt import Alignment
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers.h3 import JointDenoiser
from fatezero.hosts.diffusers.memory import LiveBytes
from fatezero.methods.fatezero_branch import Fuser, StepPlan
from fatezero.store.records import SourceStep

FULL = ((1, 24, 37, 48, 84), (1, 32, 2, 207))
"""The latents of the video and the sound of 124 frames of 1344x768."""
TEXT = 200
"""Tokens of a prompt."""
NARROW = {
    "hidden_size": 672, "num_attention_heads": 7, "ffn_dim": 1792, "num_layers": 3, "num_refiner_layers": 1,
    "text_dim": 640, "time_embed_hidden_dim": 672, "time_embed_dim": 336,
}  # fmt: skip
"""A transformer of an eighth of H3's width."""
SMALL = ((1, 24, 2, 24, 42), (1, 32, 2, 8))


def guided_steps(denoiser: JointDenoiser, z: Tensor, text: Condition) -> dict[str, Callable[[], None]]:
    """A step with guidance: plain, and as an edit."""
    control, plan = Control(KeyFrames((ALL,)), Chunk.whole(1)), StepPlan(False, True, False, False)

    @torch.no_grad()
    def plain() -> None:
        for _ in range(2):
            denoiser._called((z, text, control), 500.0)

    def fused(source: SourceStep) -> Control:
        return Fuser(source, Alignment.nothing(), FusionSettings(), plan)

    return {"plain": plain} | edit_steps(denoiser, z, text, fused)


def full_memory() -> list[list[str]]:
    """Peak bytes of a guided step of MiniMax H3 in bfloat16 at full size, with and without its weights."""
    model = random_model(MiniMaxH3Transformer3DModel, torch.device("meta"), torch.bfloat16)
    denoiser = JointDenoiser(model, MiniMaxH3Scheduler(), FULL)
    with torch.device("meta"):
        z, text = denoiser.packed(*map(torch.empty, FULL)), Condition(torch.empty(1, TEXT, 5120))
    rows, base, weights = [], 0, weight_bytes(model)
    names = {
        "plain": "plain guided sampling, diffusers' own model",
        "beside": "edit, the source beside, block by block",
        "before": "edit, the source before, its queries and keys kept",
    }
    for name, shown in names.items():
        with attend_without_data(), LiveBytes(model) as live:
            guided_steps(denoiser, z, text)[name]()
        base = base or weights + live.most
        whole = weights + live.most
        rows.append([shown, format_bytes(live.most), format_bytes(whole), f"{whole / base:.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.float32
    model = random_model(lambda: MiniMaxH3Transformer3DModel(**NARROW), device, dtype)
    denoiser, random = JointDenoiser(model, MiniMaxH3Scheduler(), SMALL), torch.Generator().manual_seed(1)
    z = denoiser.packed(*(torch.randn(shape, generator=random) for shape in SMALL))
    text = Condition(torch.randn(1, TEXT, 640, generator=random))
    steps = guided_steps(denoiser, z, text)
    works = {name: steps[name] for name in ("plain", "beside")}
    taken = side_by_side(works, device, given.rounds)
    ratio = taken["beside"].of(taken["plain"])
    section = (
        f"{machine(device, dtype)}. {NARROW['num_layers']} blocks of an eighth of MiniMax H3's width, "
        f"{2 * 12 * 21} tokens of the video, median of {given.rounds} rounds: a step with "
        f"guidance that fuses attention takes {ratio:.2f} of the time of a plain one. The source's branch is a "
        "third call, and its two calls without blocks cost the embedding.\n\n"
        "Bytes alive in a step of the whole model in bfloat16, 124 frames of 1344x768 with sound, from shapes:\n\n"
        f"{table(['work', 'activations', 'with weights', 'of plain'], full_memory())}"
    )
    write_section("MiniMax H3: cpu, float32", section)


if __name__ == "__main__":
    main()
