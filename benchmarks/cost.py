"""The cost of an inversion and an edit relative to plain DDIM on the same frames.

The UNet has random weights. Plain DDIM is a separate loop over diffusers' UNet with independent frames and guidance in
one batch. Each method alternates with its plain counterpart; the results are medians of their ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import (
    SHAPES,
    denoiser_of,
    flops_of_call,
    machine,
    matrix_rate,
    plain_inversion,
    plain_sampling,
    prompt_pair,
    random_inputs,
    random_unet,
    side_by_side,
    table,
    write_section,
)

from fatezero import PRESETS, FusionSettings, StoreSettings, edit, invert
from fatezero.recipes.recipe import Recipe

KEY_FRAMES = (("middle",), ("self", "middle"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "xformers"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", default="auto", choices=["auto", "device", "ram", "disk"])
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)

    unet = random_unet(given.model, device, dtype)
    if given.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    denoiser = denoiser_of(unet)
    schedule = denoiser.schedule(given.steps)
    latents, (source, target, negative) = random_inputs(unet, given.frames, given.size)
    style, shape = (
        FusionSettings(**PRESETS["style"], max_tokens=1024),
        FusionSettings(**PRESETS["shape"], max_tokens=1024),
    )

    works: dict[tuple[str, str, str], tuple[int, Callable[[], Any]]] = {}
    noise = plain_inversion(unet, schedule, latents, source)
    works["plain DDIM", "own", "inversion"] = (
        given.steps,
        lambda: plain_inversion(unet, schedule, latents, source),
    )
    works["plain DDIM", "own", "sampling"] = (
        2 * given.steps,
        lambda: plain_sampling(unet, schedule, noise, target, negative),
    )
    for keys in KEY_FRAMES:
        for memory in ("recompute", "queries_keys"):
            settings = StoreSettings(memory, given.place, max_tokens=1024)

            def run(keys: Any = keys, settings: Any = settings) -> Any:
                return invert(denoiser, latents, source, given.steps, keys, memory=settings)

            works[memory, "+".join(keys), "inversion"] = (given.steps, run)
            inversion = run()
            for name, fusion, prompt in (("style", style, prompt_pair(False)), ("shape", shape, prompt_pair(True))):
                calls = Recipe(injection=fusion).calls(given.steps, inversion.store.kept_steps)
                works[memory, "+".join(keys), f"{name} edit"] = (
                    calls.edit + calls.source,
                    lambda inversion=inversion, prompt=prompt, fusion=fusion: edit(
                        denoiser, inversion, target, negative, 7.5, prompt, fusion
                    ),
                )

    rate, flops = matrix_rate(device, dtype), flops_of_call(given.model, given.frames, given.size)
    rows = []
    for name, (calls, work) in works.items():
        base_calls, base = works["plain DDIM", "own", "inversion" if name[2] == "inversion" else "sampling"]
        taken = side_by_side({"plain": base, "own": work}, device, given.rounds)
        own, plain = taken["own"], taken["plain"]
        ratio, took = own.of(plain), own.median
        rows.append([
            *name, str(calls), f"{took:.2f} s", f"{ratio:.2f}", f"{ratio * base_calls / calls:.2f}",
            f"{100 * calls * flops / rate / took:.0f} %", f"{(own.bytes - plain.bytes) / 1e6:+.0f} MB",
        ])  # fmt: skip
        print(*rows[-1], flush=True)
    head = ["memory", "key frames", "work", "UNet calls", "time", "of plain", "of plain, a call", "floor", "peak"]
    parameters = sum(p.numel() for p in unet.parameters()) / 1e6
    text = (
        f"{machine(device, dtype)}, {given.attention}. {parameters:.0f} M parameters, {given.frames} frames of "
        f"{given.size}x{given.size}, {given.steps} steps, layers up to 32x32 fused, median of {given.rounds} rounds. "
        f"A call is {flops / 1e9:.0f} GFLOP; matrices multiply at {rate / 1e12:.2f} TFLOP/s. "
        "With key frames self+middle a frame attends to twice as many keys, in every layer; the inversion with memory "
        f"recompute is plain DDIM but for the key frames, and shows what they cost.\n\n{table(head, rows)}"
    )
    write_section(f"Cost: {given.model}, {device.type}, {given.dtype}, {given.attention}", text)


if __name__ == "__main__":
    main()
