"""The cost of TokenFlow relative to the same edit frame by frame, of its search, and memory by clip length.

Time with random weights of SD 1.5's layout; memory with the bundled model, in one process per length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
from common import SHAPES, denoiser_of, machine, random_inputs, random_unet, settle, table, timed, write_section

from fatezero import PnPSettings, TokenFlowSettings, edit, invert
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.methods import tokenflow
from fatezero.metrics.memory import PeakMemory

CPU = torch.device("cpu")
PNP = PnPSettings(1.0, 1.0)
"""In every step, so that both run the source equally often."""
LENGTHS = ((16, None, 16), (16, 8, 8), (64, 8, 8), (300, 20, 8))
"""Frames, TokenFlow's batch (None: frame by frame), and frames per call."""


def key_frame_bytes(size: int) -> int:
    """Bytes stored per pivot in a step of SD 1.5 in half precision: the source's tokens, three branches' outputs."""
    sites = denoiser_of(random_unet("sd15", torch.device("meta"), torch.float16)).sites(size // 8, size // 8)
    return sum(4 * 2 * site.tokens * site.channels for site in sites if site.kind == "self")


def measure_time(given: argparse.Namespace) -> str:
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    unet = random_unet(given.model, device, dtype)
    denoiser = denoiser_of(unet)
    latents, (source, target, negative) = random_inputs(unet, given.frames, given.size)
    inversion = invert(denoiser, latents, source, given.steps, "self", chunk_frames=given.batch)
    flow, searched = TokenFlowSettings(given.batch), [0.0]
    search = tokenflow.search

    def timed_search(*tokens: Any) -> Any:
        settle(device)
        start = time.perf_counter()
        found = search(*tokens)
        settle(device)
        searched[0] += time.perf_counter() - start
        return found

    def run(propagation: TokenFlowSettings | None) -> float:
        work = lambda: edit(  # noqa: E731
            denoiser, inversion, target, negative, 7.5, None, PNP, given.batch, propagation=propagation
        )
        return timed(work, device)

    run(None)
    tokenflow.search = timed_search
    rounds = []
    for _ in range(given.rounds):
        searched[0] = 0.0
        plain, flowing = run(None), run(flow)
        rounds.append((flowing, flowing / plain, flowing / plain / flow.evaluated(given.frames), searched[0] / flowing))
    tokenflow.search = search
    seconds, ratio, each, share = (median(column) for column in zip(*rounds, strict=True))
    head = [
        "work",
        "frames through the UNet, a step",
        "time",
        "of frame by frame",
        "of it, a frame",
        "neighbour search",
    ]
    count = 3 * given.frames
    rows = [
        ["PnP, frame by frame", str(count), f"{seconds / ratio:.1f} s", "1", "1", ""],
        ["PnP, TokenFlow", f"{count * flow.evaluated(given.frames):.0f}", f"{seconds:.1f} s", f"{ratio:.2f}",
         f"{each:.2f}", f"{100 * share:.1f} %"],
    ]  # fmt: skip
    return (
        f"{machine(device, dtype)}. UNet {given.model}, {given.frames} frames of {given.size}x{given.size}, "
        f"{given.steps} steps, batches of {given.batch}, median of {given.rounds} rounds. TokenFlow runs its key "
        f"frames once more, and no self-attention for the others.\n\n{table(head, rows)}"
    )


def measure_memory(frames: int, batch: int | None, chunk: int) -> dict[str, float]:
    """Peak bytes of an edit in this process."""
    checkpoint = Checkpoint.load("demo")
    latents = torch.randn(frames, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    source, target, negative = (checkpoint.encode_prompt(t, 64, 64) for t in ("a red square", "a blue star", ""))
    inversion = invert(checkpoint.denoiser, latents, source, 2, "self", chunk_frames=chunk)
    flow = None if batch is None else TokenFlowSettings(batch)
    with PeakMemory(CPU) as before:
        time.sleep(0.2)
    with PeakMemory(CPU) as peak:
        edit(checkpoint.denoiser, inversion, target, negative, 7.5, None, PNP, chunk, propagation=flow)
    return {"bytes": peak.bytes - before.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", type=json.loads, help="measure only [frames, batch, chunk], as JSON")
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(measure_memory(*given.memory)))
        return
    text = measure_time(given)
    rows = []
    for case in LENGTHS:
        command = [sys.executable, __file__, "--memory", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size = json.loads(done.stdout.strip().splitlines()[-1])["bytes"]
        frames, batch, chunk = case
        keys = 0 if batch is None else len(TokenFlowSettings(batch).batches(frames))
        name = "frame by frame" if batch is None else f"TokenFlow, batches of {batch}"
        rows.append([str(frames), name, str(chunk), str(keys), f"{size / 1e6:.0f} MB"])
        print(*rows[-1], flush=True)
    head = ["frames", "PnP", "frames of a call", "key frames", "memory of the edit, beyond model and store"]
    text += (
        f"\n\nThe bundled model, memory recompute. A key frame of SD 1.5 at 512x512 in half precision keeps "
        f"{format_bytes(key_frame_bytes(512))} during a step.\n\n{table(head, rows)}"
    )
    write_section(f"TokenFlow: {given.model}, {given.device}, {given.dtype}", text)


if __name__ == "__main__":
    main()
