"""Edits of objects a third as large, of the whole frames and of a window around them (`--region auto`).

    python benchmarks/region.py [--each 2] [--method "Wan: few_steps"]

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
from fatezero.benchmark.rows import BEST, METHODS, Method, Trial, edited_alike
from fatezero.demo import scenes
from fatezero.demo.scenes import SIZE, Clip, Motion, Scene
from fatezero.hosts.diffusers.checkpoint import Checkpoint, quiet
from fatezero.methods.flow_mask import area_of_prompts
from fatezero.metrics.preservation import psnr
from fatezero.models.family import frames_of_latents
from fatezero.video.region import Region, region_of, searched_region
from fatezero.video.restore import placed, restored_frames
from fatezero.video.size import resize_to_fill, to_bytes, to_unit

SEED, STEPS, WIDE, REACH = 4711, 20, 3 * SIZE, 8
WAN = "Wan: few_steps"
FRAMES = {BEST: 4, WAN: 9}
KINDS = {BEST: ("attribute", "texture", "shape", "swap"), WAN: ("attribute", "texture")}
"""The demo's Wan does not bind shapes well."""
CALLS = {BEST: 3 * STEPS + 8, WAN: 2 * 5}
"""Of the inversion, an edit that reads a store and its own mask; of source and edit in FlowEdit's 5 steps of 7."""
SEARCH = 16
"""Calls to find a window: 8 in the whole frames, 8 in the window found there."""
ROWS = ("the whole frames", "a window around the true mask", "a window around where the prompts disagree")


def rendered(scene: Scene, motion: Motion, frames: int) -> Clip:
    """A scene in the middle of wider frames."""
    tracks = tuple(replace(track, x=track.x + SIZE, y=track.y + SIZE) for track in motion.tracks)
    with mock.patch.object(scenes, "SIZE", WIDE):
        return scenes.render(scene, replace(motion, tracks=tracks), frames)


def edit(trial: Trial, method: Method, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The edited frames of a clip of the model's size, uint8, and where each changed, on the grid of its latents."""
    model = trial.checkpoint
    trial.latents = model.encode_clip(to_unit(frames))
    latents = edited_alike(trial, [method])[method.name]
    changed = changed_latents(latents, trial.latents)[list(frames_of_latents(len(frames), model.frames_per_latent))]
    return to_bytes(model.decode_clip(latents, len(frames)).cpu()), changed


def results(trial: Trial, method: Method) -> Iterator[tuple[str, Tensor, int]]:
    """The rows' frames, uint8 (frames, WIDE, WIDE, 3), and the width of the window."""
    case, model, count = trial.case, trial.checkpoint, FRAMES[method.name]
    source, truth = (rendered(scene, case.motion, count) for scene in (case.source, case.target))
    frames = to_bytes(source.frames)
    whole, changed = edit(trial, method, resize_to_fill(frames, SIZE, SIZE))
    yield ROWS[0], torch.stack(list(restored_frames(frames, whole, changed, REACH))), WIDE

    def area(region: Region) -> Iterator[Tensor]:
        latents = model.encode_clip(to_unit(torch.stack(list(region.fitted(frames, (SIZE, SIZE))))))
        found = area_of_prompts(model.denoiser, latents, trial.source, [trial.target], STEPS)
        for i in frames_of_latents(count, model.frames_per_latent):
            yield placed(F.interpolate(found[i][None, None], size=(SIZE, SIZE))[0], region.size)[0]

    true = region_of(torch.maximum(source.mask, truth.mask))
    for name, region in ((ROWS[1], true), (ROWS[2], searched_region(area, (WIDE, WIDE), count))):
        window, changed = edit(trial, method, torch.stack(list(region.fitted(frames, (SIZE, SIZE)))))
        yield name, torch.stack(list(region.stitched(frames, window, changed, REACH))), region.size[0]


def figures(case: Case, frames: Tensor) -> tuple[float, float, float]:
    """The share of right frames, PSNR of unchanged pixels and to the truth."""
    source, truth = (rendered(scene, case.motion, len(frames)).frames for scene in (case.source, case.target))
    shown, middle = to_unit(frames), slice(SIZE, 2 * SIZE)
    unchanged = ((source - truth).abs().amax(1) < 1 / 255).float()
    right = measure(case, shown[..., middle, middle])["success"]
    return right, float(psnr(shown, truth, unchanged)), float(psnr(shown, truth))


def table(found: dict[str, list[tuple[float, ...]]], calls: int) -> str:
    lines = ["| edit of | right frames | kept | to truth | window | calls |", "|---|---:|---:|---:|---:|---:|"]
    for name, rows in found.items():
        right, kept, truth, width = (mean(column) for column in zip(*rows, strict=True))
        cost = calls + SEARCH * (name == ROWS[2])
        lines.append(f"| {name} | {100 * right:.0f} % | {kept:.1f} dB | {truth:.1f} dB | {width:.0f} px | {cost} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=2, help="cases of each kind")
    parser.add_argument("--method", choices=FRAMES, default=BEST)
    given = parser.parse_args(arguments)
    method = next(one for one in METHODS if one.name == given.method)
    with quiet():
        checkpoint = Checkpoint.load("demo", torch.device("cpu"))
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ROWS}
    cases = sample_cases(SEED, given.each, FRAMES[method.name], KINDS[method.name])
    for case in cases:
        trial = Trial(checkpoint, case, STEPS)
        for name, frames, width in results(trial.on_transformer(method.lora) if method.transformer else trial, method):
            found[name].append((*figures(case, frames), float(width)))
            print(case.name, name, found[name][-1], flush=True)
    about = "Whole frames and windows for small objects ([small objects](#small-objects))."
    caption = (
        f"{about} {len(cases)} cases of seed {SEED}, {FRAMES[method.name]} frames of {WIDE}x{WIDE}, {method.name}."
    )
    title = "Table: region" if method.name == BEST else "Table: region, Wan"
    write_section(title, f"{caption}\n\n{table(found, CALLS[method.name])}", Path(__file__).parent / "QUALITY.md")


if __name__ == "__main__":
    main()
