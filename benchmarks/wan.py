"""What an edit on a video transformer costs beside plain guided sampling, in one run, on shapes of Wan 2.1 1.3B.

The transformer has random weights, and on a CPU some of its 30 blocks. Plain sampling is a loop of its own over the
transformer as diffusers has it, one call for each prompt, as diffusers' pipeline does. Memory is counted by the tensors
that are alive, on torch's meta device at full size: 81 frames of 832x480, 32,760 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import machine, table, timed, write_section
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from einops import rearrange
from torch import Tensor

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, draw, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import ALL, Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.demo.wan import build_tokenizer
from fatezero.diffusion.ddim import guide
from fatezero.diffusion.denoiser import Guidance
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers_memory import LiveBytes, attend_without_data
from fatezero.hosts.diffusers_transformer import VideoTransformerDenoiser
from fatezero.methods.fatezero import Fuser, StepPlan
from fatezero.methods.flow_edit import PRESET
from fatezero.store.records import Beside, Recorder, SourceStep

FULL = (21, 60, 104)
"""Frames, height and width of the latents of 81 frames of 832x480."""
STYLE = FusionSettings(cross_replace_steps=0.5, self_replace_steps=0.5)
SHAPE = FusionSettings(cross_replace_steps=0.5, self_replace_steps=0.5, blend_self_attention=True, blend_latents=True)
PROMPT = PromptEdit(
    "a red square on water", "a blue star on water", build_tokenizer(), "refine", (["square"], ["star"])
)


def wan(blocks: int, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """Wan 2.1 1.3B with so many of its blocks and random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=blocks, text_dim=4096)
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def plain(model: Any, schedule: FlowSchedule, z: Tensor, text: Tensor, negative: Tensor) -> Tensor:
    """Guided sampling, the prompts one after another."""
    for step, timestep in enumerate(schedule.timesteps):
        clip, at = rearrange(z, "f c y x -> 1 c f y x").to(model.dtype), torch.tensor([timestep], device=z.device)
        away, towards = (model(clip, at, t.to(model.dtype), return_dict=False)[0][0] for t in (negative, text))
        velocity = rearrange(guide(away, towards, 5.0), "c f y x -> f c y x").to(z.dtype)
        z = schedule.move(z, velocity, schedule.steps - step, schedule.steps - step - 1)
    return z


def full_memory() -> list[list[str]]:
    """The most bytes alive in a guided step of Wan 2.1 1.3B in bfloat16 at full size, with its weights."""
    model = wan(30, "meta", torch.bfloat16)
    weights = sum(weight.nbytes for weight in model.parameters())
    denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler())
    frames, height, width = FULL
    z = torch.empty(frames, 16, height, width, device="meta")
    text = Condition(torch.empty(1, 512, 4096, device="meta"))
    keys, chunk = KeyFrames((ALL,)), Chunk.whole(frames)
    layers = {site.name for site in denoiser.sites(height, width)}
    alignment = PROMPT.align(512, 512).to(z.to(torch.bfloat16))

    def fused(source: SourceStep) -> Fuser:
        return Fuser(source, alignment, STYLE, StepPlan(True, True, False, False))

    def guided(control: Control, beside: Beside | None = None) -> None:
        denoiser.predict_noise(z, 500.0, text, control, Guidance(text, Control(keys, chunk), 5.0), beside)

    def beside() -> None:
        recorder = Recorder(keys, chunk, layers)
        pair = Beside(z, text, recorder)
        guided(fused(SourceStep(recorder.records, keys, chunk, beside=pair)), pair)

    def before() -> None:
        recorder = Recorder(keys, chunk, layers)
        denoiser.predict_noise(z, 500.0, text, recorder)
        guided(fused(recorder.step))

    def unhooked() -> None:
        clip = rearrange(z, "f c y x -> 1 c f y x").to(model.dtype)
        at, embeddings = torch.empty(1, device="meta"), text.embeddings.to(model.dtype)
        guide(*(model(clip, at, embeddings, return_dict=False)[0] for _ in range(2)), 5.0)

    rows, base = [], 0
    works = {
        "plain guided sampling, diffusers' own model": unhooked,
        "edit, the source beside, block by block": beside,
        "edit, the source before, its queries and keys kept": before,
    }
    for name, work in works.items():
        hooked = contextlib.nullcontext() if work is unhooked else denoiser.hooked()
        with hooked, attend_without_data(), LiveBytes(model) as live, torch.no_grad():
            work()
        whole = weights + live.most
        base = base or whole
        rows.append([name, format_bytes(live.most), format_bytes(whole), f"{whole / base:.3f}"])
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
    model = wan(given.blocks, given.device, dtype)
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
            denoiser, drawn, target, negative, 10.0, strength=PRESET["strength"]
        ),
    }
    if given.maps:
        kept = invert(denoiser, z, source, given.steps, memory="maps")
        works["naive: maps kept, half of the steps"] = edited(STYLE, kept)
    base = lambda: plain(model, schedule, z, target, negative)  # noqa: E731
    base()
    rows = []
    for name, work in works.items():
        rounds = [(timed(base, device), timed(work, device)) for _ in range(given.rounds)]
        ratio, took = median(own / once for once, own in rounds), median(own for _, own in rounds)
        rows.append([name, f"{took:.1f} s", f"{ratio:.2f}"])
        print(*rows[-1], flush=True)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    tokens = frames * height * width // 4
    text = (
        f"{machine(device, dtype)}. {given.blocks} of Wan 1.3B's blocks, {weights:.0f} M parameters, {tokens} tokens, "
        f"{given.steps} steps, median of {given.rounds} rounds.\n\n"
        f"{table(['edit', 'time', 'of plain'], rows)}\n\n"
        "The source's branch is a third call beside plain sampling's two, in the steps that read it: in half of them "
        "that is 1.25, in 0.8 of them 1.4. The rest is fusion of words, which at this size are nearly as many as tokens"
        " are; a mask of both prompts is eight calls, whatever the steps. Maps are quick of so few tokens.\n\n"
        "Bytes alive in a step of the whole Wan 1.3B in bfloat16, 81 frames of 832x480, as shapes tell them:\n\n"
        f"{table(['work', 'activations', 'with weights', 'of plain'], full_memory())}"
    )
    write_section(f"Wan: {device.type}, {given.dtype}", text)


if __name__ == "__main__":
    main()
