"""FlowEdit's effect by clip length: the share of the true change that an edit makes, on the demo's Wan."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import table, write_section
from torch import Tensor

from fatezero import Recipe, draw, edit
from fatezero.benchmark.cases import Case, sample_cases
from fatezero.demo.scenes import SIZE, random_motion
from fatezero.hosts.diffusers.load import open_model

PAGE = Path(__file__).with_name("QUALITY.md")
LENGTHS = (16, 33, 65, 121)


def cases(seed: int, count: int) -> list[Case]:
    """Edits of a colour in clips of the greatest length, held-out captions."""
    found = sample_cases(seed, count, 8, ["attribute"])
    return [replace(case, motion=random_motion(Random(seed), 1, LENGTHS[-1]), frames=LENGTHS[-1]) for case in found]


def share(model: Any, case: Case, frames: int, chunk: int | None, steps: int, preset: str) -> Tensor:
    """The share of the true change inside the object, by frame, in the first frames of a case's clip."""
    source, truth = case.clip.frames[:frames], case.truth.frames[:frames]
    clip = model.encode_clip(source)
    text = [model.encode_prompt(words, SIZE, SIZE) for words in (case.source.caption, case.target.caption, "")]
    recipe = Recipe.of_preset(preset)
    start = draw(model.denoiser, clip, text[0], steps, recipe.noise)
    done = edit(model.denoiser, start, *text[1:], recipe.guidance_scale, strength=recipe.strength, chunk_frames=chunk)
    before, after = (model.decode_clip(latents, frames) for latents in (clip, done))
    inside = case.clip.mask[:frames, None]
    change, wanted = (after - before) * inside, (truth - before) * inside
    return (change * wanted).flatten(1).sum(1) / wanted.square().flatten(1).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2303)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--preset", default="few_steps")
    parser.add_argument("--lora", default="demo-few-steps")
    parser.add_argument("--whole", action="store_true", help="also without chunks")
    given = parser.parse_args()
    model, rows = open_model("demo-wan", lora=given.lora or None), []
    for name, chunk in (("of 21 frames (default)", None), *([("whole", LENGTHS[-1])] if given.whole else [])):
        for frames in LENGTHS:
            found = [
                share(model, case, frames, chunk, given.steps, given.preset) for case in cases(given.seed, given.cases)
            ]
            first, every = (torch.stack([x[:to].mean() for x in found]).mean().item() for to in (16, frames))
            rows.append([name, str(frames), f"{first:.3f}", f"{every:.3f}"])
            print(*rows[-1], flush=True)
    head = ["calls", "frames", "share of the change, first 16 frames", "all frames"]
    text = (
        "FlowEdit in chunks of 21 frames was run on clips of 16 to 121 frames: its effect does not fade as clips grow. "
        f"{given.cases} edits of a colour, seed {given.seed}, preset {given.preset}, {given.steps} steps."
    )
    write_section("FlowEdit on long clips", f"{text}\n\n{table(head, rows)}", PAGE)


if __name__ == "__main__":
    main()
