"""The error of an inversion and its replay at guidance 1, by the solver's order, at equal numbers of calls.

Measured on held-out demo clips with the bundled model; writes to QUALITY.md.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from common import table, write_section

from fatezero import edit, invert
from fatezero.demo.scenes import SIZE, render, scenes
from fatezero.diffusion.schedule import reused_steps
from fatezero.hosts.diffusers.checkpoint import Checkpoint, quiet
from fatezero.hosts.diffusers.load import open_model
from fatezero.metrics.preservation import psnr
from fatezero.models import DEMOS

FRAMES = 8
SOLVERS = (("1", 1, 1, False), ("2", 1, 2, False), ("2, middle predictions reused", 2, 2, True))
"""Name, factor on the steps, order, and whether the middle predictions of pairs are reused."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", choices=DEMOS)
    parser.add_argument("--clips", type=int, default=6)
    given = parser.parse_args()
    with quiet():
        pictures = Checkpoint.load("demo")
        checkpoint = open_model(given.model)
    clips = []
    for scene, motion in islice(scenes(321, held_out=True), given.clips):
        frames = render(scene, motion, FRAMES).frames
        latents, text = pictures.encode_frames(frames), checkpoint.encode_prompt(scene.caption, SIZE, SIZE)
        clips.append((frames, latents, text))
    sources = torch.cat([frames for frames, *_ in clips])
    rows = [["autoencoder only", "", "", "", f"{psnr(_decoded(pictures, [z for _, z, _ in clips]), sources):.1f} dB"]]
    for steps in (10, 20, 50):
        for solver, times, order, reuse in SOLVERS:
            replays = []
            for _, latents, text in clips:
                inversion = invert(checkpoint.denoiser, latents, text, times * steps, order=order, reuse_midpoint=reuse)
                replays.append(edit(checkpoint.denoiser, inversion, text, guidance_scale=1.0))
            far = torch.cat([a - z for a, (_, z, _) in zip(replays, clips, strict=True)]).square().mean().sqrt()
            reused = reused_steps(checkpoint.denoiser.schedule(times * steps), order) if reuse else ()
            calls = times * steps - len(reused)
            decoded = f"{psnr(_decoded(pictures, replays), sources):.1f} dB"
            rows.append([f"{times * steps} steps", solver, str(calls), f"{far:.3f}", decoded])
            print(*rows[-1], flush=True)
    text = (
        "Solvers of first and second order were compared by how exactly they replay a clip that they inverted: with as "
        "many calls, the second order's\nlatents are about half as far from the clip's.\n\n"
        f"{given.clips} clips of {FRAMES} frames whose captions are held out; latents have a deviation of 1 "
        f"(`python benchmarks/replay.py --model {given.model}`).\n\n"
        f"{table(['inversion', 'order', 'calls', 'latents apart', 'replay'], rows)}"
    )
    write_section(f"Replay, first and second order: {given.model}", text, Path(__file__).parent / "QUALITY.md")


def _decoded(checkpoint: Checkpoint, clips: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([checkpoint.decode_latents(latents) for latents in clips])


if __name__ == "__main__":
    main()
