"""Time and memory by clip length, in chunks, on the bundled model, in one process each."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from common import machine, prompt_pair, table, timed, write_section

from fatezero import FusionSettings, edit, invert
from fatezero.cli.config.settings import PRESETS
from fatezero.hosts.diffusers.checkpoint import Checkpoint

LENGTHS = (8, 32, 128)


def run(frames: int, chunk: int | None, steps: int) -> dict[str, float]:
    """Seconds and peak bytes of one inversion and edit in this process."""
    checkpoint = Checkpoint.load("demo")
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(frames, 4, 16, 16, generator=random)
    prompt = prompt_pair(True)
    source, target, negative = (checkpoint.encode_prompt(text, 64, 64) for text in (prompt.source, prompt.target, ""))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def both() -> None:
        inversion = invert(checkpoint.denoiser, latents, source, steps, chunk_frames=chunk)
        fusion = FusionSettings(**PRESETS["shape"])
        edit(checkpoint.denoiser, inversion, target, negative, 7.5, prompt, fusion, chunk)

    seconds = timed(both, torch.device("cpu"))
    return {"seconds": seconds, "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--frames", type=int, help="measure only this length, as JSON")
    given = parser.parse_args()
    if given.frames:
        print(json.dumps(run(given.frames, given.chunk or None, given.steps)))
        return
    rows = []
    for chunk in (given.chunk, 0):
        for frames in LENGTHS:
            command = [sys.executable, __file__, "--frames", str(frames), "--chunk", str(chunk)]
            done = subprocess.run([*command, "--steps", str(given.steps)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            each = 1000 * found["seconds"] / frames / given.steps
            size = f"{found['bytes'] / 1e6:.0f} MB"
            rows.append([str(frames), str(chunk or "all"), f"{found['seconds']:.1f} s", f"{each:.1f} ms", size])
            print(*rows[-1], flush=True)
    head = ["frames", "in chunks of", "invert and edit", "a frame and step", "memory beyond the loaded model"]
    text = (
        f"{machine(torch.device('cpu'), torch.float32)}. The bundled model, {given.steps} steps, shape preset, key "
        f"frames self+middle, memory recompute.\n\n{table(head, rows)}"
    )
    write_section("Long clips", text)


if __name__ == "__main__":
    main()
