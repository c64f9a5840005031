"""One long clip on one process and on several: time, and whether the latents are equal.

Each row is a separate run of `torch.distributed.run`, with one GPU per process if there are GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys

import torch
from accelerate import Accelerator
from common import SHAPES, denoiser_of, machine, prompt_pair, random_inputs, random_unet, table, timed, write_section

from fatezero import Edit, FusionSettings, edit_many, invert
from fatezero.cli.config.settings import PRESETS
from fatezero.diffusion.spread import ONE_PROCESS
from fatezero.hosts.diffusers.processes import Processes

MARK = "measured: "


def run(shape: str, frames: int, chunk: int, size: int, steps: int, cpu: bool, dtype: torch.dtype) -> None:
    """Time an inversion and an edit on all processes; the main one prints the result."""
    team = Processes(Accelerator(cpu=cpu))
    spread = team if team.count > 1 else ONE_PROCESS
    unet = random_unet(shape, team.device, dtype)
    latents, (source, target, negative) = random_inputs(unet, frames, size)
    denoiser, made = denoiser_of(unet), []

    def both() -> None:
        inversion = invert(denoiser, latents, source, steps, chunk_frames=chunk, spread=spread)
        chosen = Edit(target, negative, 7.5, prompt_pair(True), FusionSettings(**PRESETS["shape"]))
        made.extend(edit_many(denoiser, inversion, [chosen], chunk, spread=spread))

    seconds = timed(both, team.device)
    digest = hashlib.sha256(made[0].float().cpu().numpy().tobytes()).hexdigest()
    if team.is_main:
        print(MARK + json.dumps({"seconds": seconds, "digest": digest, "machine": machine(team.device, dtype)}))


def measured(processes: int, threads: int) -> dict[str, str | float]:
    """The result of this script with the same arguments on several processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__, "--one"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*launch, *sys.argv[1:]], capture_output=True, text=True, check=True, env=env)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(MARK))
    found: dict[str, str | float] = json.loads(line.removeprefix(MARK))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    on_cpu = given.device == "cpu"
    if given.one:
        dtype = getattr(torch, given.dtype)
        run(given.model, given.frames, given.chunk, given.size, given.steps, on_cpu, dtype)
        return
    cores = len(os.sched_getaffinity(0)) if on_cpu else 1
    kinds = [(1, 1), (given.processes, 1)] + ([(1, cores)] if on_cpu and cores > 1 else [])
    rows, first = [], None
    for processes, threads in kinds:
        found = measured(processes, threads)
        first = first or found
        same = "yes" if found["digest"] == first["digest"] else "to rounding" if threads > 1 else "no"
        ratio = float(found["seconds"]) / float(first["seconds"])
        rows.append([str(processes), str(threads), f"{float(found['seconds']):.1f} s", f"{ratio:.2f}", same])
        print(*rows[-1], flush=True)
    head = ["processes", "threads of each", "invert and edit", "times one process", "the same latents"]
    assert first is not None
    text = (
        f"{first['machine']}. {given.frames} frames of {given.size}x{given.size} in chunks of {given.chunk}, "
        f"{given.steps} steps, shape preset, key frames self+middle, memory recompute; the model's loading is not "
        f"counted.\n\n{table(head, rows)}"
    )
    write_section(f"One clip on several processes: {given.model}, {given.device}", text)


if __name__ == "__main__":
    main()
