"""Edits of objects a third as large, of the whole frames and of a window around them (`--region auto`).

    python benchmarks/region.py [--each 2]

Writes a table to QUALITY.md. The scenes are those of the demo world in frames of three times the width and height,
which whole edits scale down to the model's size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
import torch.nn.functional as F
from common import write_section
from torch import Tensor

from fatezero.attention.masks import changed_latents
from fatezero.benchmark.cases import Case, sample_cases
from fatezero.benchmark.measure import measure
from fatezero.benchmark.rows import BEST, METHODS, Trial, edited
from fatezero.demo import scenes
from fatezero.demo.scenes import SIZE, Clip, Motion, Scene
from fatezero.hosts.diffusers.checkpoint import Checkpoint, quiet
from fatezero.methods.flow_mask import area_of_prompts
from fatezero.metrics.preservation import psnr
from fatezero.video.region import region_of
from fatezero.video.restore import placed, restored_frames
from fatezero.video.size import resize_to_fill, to_bytes, to_unit

KINDS = ("attribute", "texture", "shape", "swap")
SEED, FRAMES, STEPS, WIDE, REACH = 4711, 4, 20, 3 * SIZE, 8
CALLS = 3 * STEPS + 8
"""Of the inversion, of an edit that reads a store, and of its own mask."""
ROWS = ("the whole frames", "a window around the true mask", "a window around where the prompts disagree")


def rendered(scene: Scene, motion: Motion) -> Clip:
    """A scene in the middle of wider frames."""
    tracks = tuple(replace(track, x=track.x + SIZE, y=track.y + SIZE) for track in motion.tracks)
    with mock.patch.object(scenes, "SIZE", WIDE):
        return scenes.render(scene, replace(motion, tracks=tracks), FRAMES)


def edit(trial: Trial, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The edited frames of a clip of the model's size, uint8, and where its latents changed."""
    trial.latents, trial.deviation = trial.checkpoint.encode_posterior(to_unit(frames))
    latents = edited(trial, [next(method for method in METHODS if method.name == BEST)])[BEST]
    return to_bytes(trial.checkpoint.decode_latents(latents).cpu()), changed_latents(latents, trial.latents)


def results(checkpoint: Checkpoint, case: Case) -> Iterator[tuple[str, Tensor, int]]:
    """The rows' frames, uint8 (frames, WIDE, WIDE, 3), and the width of the window."""
    source, truth = (rendered(scene, case.motion) for scene in (case.source, case.target))
    frames, trial = to_bytes(source.frames), Trial(checkpoint, case, STEPS)
    whole, changed = edit(trial, resize_to_fill(frames, SIZE, SIZE))
    yield ROWS[0], torch.stack(list(restored_frames(frames, whole, changed, REACH))), WIDE
    area = area_of_prompts(checkpoint.denoiser, trial.latents, trial.source, [trial.target], STEPS)
    found = [placed(F.interpolate(one[None, None], size=(SIZE, SIZE))[0], (WIDE, WIDE))[0] for one in area]
    for name, masks in ((ROWS[1], list(torch.maximum(source.mask, truth.mask))), (ROWS[2], found)):
        region = region_of(masks)
        window, changed = edit(trial, torch.stack(list(region.fitted(frames, (SIZE, SIZE)))))
        yield name, torch.stack(list(region.stitched(frames, window, changed, REACH))), region.size[0]


def figures(case: Case, frames: Tensor) -> tuple[float, float, float]:
    """The share of right frames, PSNR of unchanged pixels and to the truth."""
    source, truth = (rendered(scene, case.motion).frames for scene in (case.source, case.target))
    shown, middle = to_unit(frames), slice(SIZE, 2 * SIZE)
    unchanged = ((source - truth).abs().amax(1) < 1 / 255).float()
    right = measure(case, shown[..., middle, middle])["success"]
    return right, float(psnr(shown, truth, unchanged)), float(psnr(shown, truth))


def table(found: dict[str, list[tuple[float, ...]]]) -> str:
    lines = ["| edit of | right frames | kept | to truth | window | calls |", "|---|---:|---:|---:|---:|---:|"]
    for name, rows in found.items():
        right, kept, truth, width = (mean(column) for column in zip(*rows, strict=True))
        calls = CALLS + 8 * (name == ROWS[2])
        lines.append(f"| {name} | {100 * right:.0f} % | {kept:.1f} dB | {truth:.1f} dB | {width:.0f} px | {calls} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=2, help="cases of each kind")
    each = parser.parse_args(arguments).each
    with quiet():
        checkpoint = Checkpoint.load("demo", torch.device("cpu"))
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ROWS}
    cases = sample_cases(SEED, each, FRAMES, KINDS)
    for case in cases:
        for name, frames, width in results(checkpoint, case):
            found[name].append((*figures(case, frames), float(width)))
            print(case.name, name, found[name][-1])
    caption = f"{len(cases)} cases of seed {SEED}, {FRAMES} frames of {WIDE}x{WIDE}, {STEPS} steps, {BEST}."
    write_section("Table: region", f"{caption}\n\n{table(found)}", Path(__file__).parent / "QUALITY.md")


if __name__ == "__main__":
    main()
