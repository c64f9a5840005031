"""The cost of an edit on a video transformer relative to plain guided sampling, with the shapes of Wan 2.1 1.3B.

The transformer has random weights, and on a CPU fewer than its 30 blocks. Plain sampling is a separate loop over
diffusers' transformer, one call per prompt, like diffusers' pipeline. Memory is the size of live tensors on torch's
meta device at full size: 81 frames of 832x480, 32,760 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import (
    attend_without_data,
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
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, Windows, draw, edit, invert
from fatezero.attention.capture import Captured
from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import ALL, Chunk, ClipCalls, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.demo.video_model import build_tokenizer
from fatezero.diffusion.denoiser import Guidance, chunks_of, frames_of, joined
from fatezero.diffusion.parts import Injection
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.hosts.diffusers.memory import LiveBytes
from fatezero.methods.kv_edit import Inside, KVEditSettings
from fatezero.recipes.presets import PRESETS
from fatezero.store.backends import RecordsOnDemand
from fatezero.store.records import KeysValues, PairedBranch, Recorder, SourceStep

FULL = (21, 60, 104)
"""Frames, height and width of the latents of 81 frames of 832x480."""
FIFTH = 0.2
"""The share of the tokens inside KV-Edit's mask."""
STYLE = FusionSettings(cross_replace_steps=0.5, self_replace_steps=0.5)
SHAPE = FusionSettings(cross_replace_steps=0.5, self_replace_steps=0.5, blend_self_attention=True, blend_latents=True)
OF_BRANCHES = (
    "The source's branch is a third call besides plain sampling's two, in the steps that read it: in half of them that "
    "is 1.25, in 0.8 of them 1.4. The rest is fusion of words, which at this size are nearly as many as tokens are; a "
    "mask of both prompts is eight calls, whatever the steps. Maps of so few tokens are fast."
)
OF_TOKENS = (
    "A fifth of the tokens is inside the mask: a call for the source and a fifth of both calls of the edit are 0.7 of "
    "plain sampling, and 0.2 with kept keys and values. The text's projection, keys and values, which all calls "
    "compute, have a larger share with so few tokens and blocks: with 2 blocks the first is 0.77."
)
OF_WINDOWS = (
    "Bytes alive in a guided step of an edit that fuses attention, its source beside, with Wan 1.3B in bfloat16 at "
    "832x480. Weights are another 2.8 GB. Windows overlap by half."
)
PROMPT = PromptEdit(
    "a red square on water", "a blue star on water", build_tokenizer(), "refine", (["square"], ["star"])
)


def inside_steps(
    denoiser: VideoTransformerDenoiser, z: Tensor, text: Condition, share: float
) -> dict[str, Callable[[], None]]:
    """One guided step of KV-Edit with a share of the tokens, its source beside or its keys and values on another
    device.
    """
    keys, chunk = KeyFrames((ALL,)), Chunk.whole(len(z))
    sites = denoiser.sites(z.shape[-2], z.shape[-1])
    layers = {site.name for site in sites if site.kind == "self"}
    tokens = torch.zeros(len(z), sites[0].height, sites[0].width, dtype=torch.bool)
    tokens.view(-1)[: round(share * tokens.numel())] = True

    def edited(source: SourceStep, paired: PairedBranch | None = None) -> None:
        controls = [Inside(source, tokens, z) for _ in range(2)]
        for control in controls:
            control.rows = torch.empty(int(tokens.sum()), dtype=torch.long, device=z.device)
        target, negative = controls
        with denoiser.hooked():
            denoiser.predict_noise(z, 500.0, text, target, Guidance(text, negative, 5.0), paired)

    @torch.no_grad()
    def inside() -> None:
        recorder = Recorder(keys, chunk, layers, values=True)
        pair = PairedBranch(z, text, recorder)
        edited(SourceStep(recorder.captured, keys, chunk, paired=pair), pair)

    def fetched(name: str) -> KeysValues:
        shape = len(z), sites[0].heads, sites[0].tokens, sites[0].head_dim
        return KeysValues(*(torch.empty(shape, dtype=denoiser.dtype, device=z.device) for _ in "kv"))

    @torch.no_grad()
    def kept() -> None:
        edited(SourceStep(Captured(RecordsOnDemand(fetched)), keys, chunk, stored=True))

    return {"inside": inside, "kept": kept}


def full_costs(inside: bool) -> str:
    """Peak bytes of a guided step of Wan 2.1 1.3B in bfloat16 at full size, with and without its weights, and its FLOP
    relative to plain sampling. inside: of KV-Edit with a fifth of the tokens.
    """
    model = random_wan("1.3B", torch.device("meta"), torch.bfloat16)
    weights = weight_bytes(model)
    denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler())
    frames, height, width = FULL
    z = torch.empty(frames, 16, height, width, device="meta")
    text = Condition(torch.empty(1, 512, 4096, device="meta"))
    rows, base, plain = [], 0, 0
    names = {
        "plain": "plain guided sampling, diffusers' own model",
        "beside": "edit, the source beside, block by block",
        "before": "edit, the source before, its queries and keys kept",
        "inside": "KV-Edit, the source beside, block by block",
        "kept": "KV-Edit, keys and values kept elsewhere",
    }
    works = guided_steps(denoiser, z, text, PROMPT, STYLE)
    if inside:
        works = {"plain": works["plain"], **inside_steps(denoiser, z, text, FIFTH)}
    for name, work in works.items():
        with attend_without_data(), LiveBytes(model) as live:
            work()
        with attend_without_data() as attention, FlopCounterMode(display=False) as counter:
            work()
        whole, flops = weights + live.most, counter.get_total_flops() + sum(attention)
        base, plain = base or whole, plain or flops
        ratios = [f"{whole / base:.3f}", f"{flops / plain:.2f}"]
        rows.append([names[name], format_bytes(live.most), format_bytes(whole), *ratios])
    if not inside:
        maps = 30 * 12 * (frames * height * width // 4) ** 2 * 2
        naive = weights + maps
        own = ["maps of a step's self-attention", format_bytes(maps), format_bytes(naive), f"{naive / base:.0f}", ""]
        rows.append(own)
    return table(["work", "activations", "with weights", "of plain", "FLOP of plain"], rows)


def window_costs() -> str:
    """Peak bytes of a guided step of an edit of long clips, the source beside, in one call and in windows; and those of
    the latents of all levels.
    """
    model = random_wan("1.3B", torch.device("meta"), torch.bfloat16)
    denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler())
    text, rows = Condition(torch.empty(1, 512, 4096, device="meta")), []
    for frames in (81, 161, 321):
        z = torch.empty((frames - 1) // 4 + 1, 16, *FULL[1:], device="meta")
        levels = format_bytes(51 * z.nbytes)
        for windows in (None, Windows(FULL[0], FULL[0] // 2)):
            chunks = chunks_of(denoiser, ClipCalls(KeyFrames((ALL,)), windows=windows), z, 500.0)
            if windows and len(chunks) == 1:
                continue
            with attend_without_data(), LiveBytes(model) as live:
                predicted = []
                for chunk in chunks:
                    part = frames_of(z, chunk)
                    guided_steps(denoiser, part, text, PROMPT, STYLE)["beside"]()
                    predicted.append(part.clone())
                joined(chunks, predicted)
            calls = "one call" if windows is None else f"{len(chunks)} windows of 81"
            rows.append([str(frames), calls, format_bytes(live.most), levels])
    return table(["frames", "calls", "activations of a step", "latents of 50 steps, in RAM or on disk"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--latents", default="5x40x40", help="frames x height x width")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--inside", action="store_true", help="measure KV-Edit with a fifth of the tokens instead")
    parser.add_argument("--maps", action="store_true", help="also a naive edit with maps")
    parser.add_argument("--windows", action="store_true", help="count the memory of long clips instead")
    given = parser.parse_args()
    if given.windows:
        write_section("Wan, long clips: memory from shapes", f"{OF_WINDOWS}\n\n{window_costs()}")
        return
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

    def edited(fusion: Injection, of: Any = inversion, **more: Any) -> Callable[[], Any]:
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
    if given.inside:
        mask = torch.zeros(1, height, width)
        mask[..., : round(FIFTH * width)] = 1
        kept, fifth = invert(denoiser, z, source, given.steps, memory="keys_values"), {"mask": GivenMask(mask)}
        works = {
            "KV-Edit, a fifth of the tokens inside": edited(KVEditSettings(grow=0), **fifth),
            "the same, keys and values kept": edited(KVEditSettings(grow=0), kept, **fifth),
        }
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
        f"{OF_TOKENS if given.inside else OF_BRANCHES}\n\n"
        "Bytes alive and FLOP in a step of the whole Wan 1.3B in bfloat16, 81 frames of 832x480, computed from "
        "shapes:\n\n"
        f"{full_costs(given.inside)}"
    )
    title = "Wan, tokens inside a mask" if given.inside else "Wan"
    write_section(f"{title}: {device.type}, {given.dtype}", text)


if __name__ == "__main__":
    main()
