"""`fatezero demo`: three edits of the bundled clip, by the paper's presets and those with a plus."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..attention.masks import threshold_mask
from ..attention.prompt import PromptEdit
from ..diffusion.edit import edit_many
from ..diffusion.invert import Inversion, invert
from ..diffusion.source import source_heat
from ..files.bundled import CLIP
from ..files.whole import whole_file
from ..hosts.diffusers.checkpoint import Checkpoint, quiet
from ..methods.fatezero import FusionSettings
from ..metrics.memory import PeakMemory
from ..metrics.preservation import psnr
from ..metrics.temporal import warp_error
from ..recipes.recipe import Recipe
from ..video.fitted import FittedVideo
from ..video.read import open_video
from ..video.sheet import contact_sheet, enlarge, mask_frames, side_by_side
from ..video.size import to_bytes, to_unit
from ..video.write import write_picture, write_video
from .judge import load_judge
from .model import labels
from .outline import whole_outlines
from .scenes import SIZE, Clip, Motion, Scene, Track, render, visible_pixels

SCENE = Scene.parse("a red square on water")
MOTION = Motion(
    (Track(x=22.0, y=34.0, radius=16.0, vx=2.6, vy=-0.7, angle=-0.12, spin=0.05),), pan=(-0.8, 0.2), phase=3.0
)
FRAMES = 8
FPS = 8
ENLARGED = 4
"""Enlargement of the stored clips, so that 4:2:0 chroma preserves edges."""

EDITS: dict[str, tuple[str, Scene]] = {
    "attribute": ("colour", SCENE.with_thing(colour="green")),
    "shape": ("shape", SCENE.with_thing(shape="circle")),
    "style": ("style", Scene(SCENE.things, SCENE.background, "watercolor")),
}
"""For each preset: the kind of word that changes, and the target scene."""


@dataclass(frozen=True)
class Outcome:
    """One edit with one method: frames (f, 3, h, w) in 0..1, and its cost."""

    frames: Tensor
    seconds: float
    peak_bytes: int


def show(
    folder: Path,
    steps: int,
    device: torch.device,
    console: Console,
    bars: Callable[[], AbstractContextManager[Callable[[str], Callable[[int, int], None]]]],
) -> list[dict[str, float | str]]:
    """Run the demo and write its results to a folder; returns the rows of its table."""
    with quiet():
        checkpoint = Checkpoint.load("demo", device)
    frames = FittedVideo.of(open_video(str(CLIP), count=FRAMES), (0, 0, 0, 0), (SIZE, SIZE)).read().frames
    rows: list[dict[str, float | str]] = []
    shown = {"": [(f"source: {SCENE.caption}", frames[::2])], "+": [("", frames[::2])]}
    with bars() as bar:
        start = time.perf_counter()
        with PeakMemory(device) as memory:
            latents = checkpoint.encode_posterior(to_unit(frames))[0].float()
            source = checkpoint.encode_prompt(SCENE.caption, SIZE, SIZE)
            inversion = invert(
                checkpoint.denoiser, latents, source, steps, prompt=SCENE.caption, progress=bar("invert")
            )
        console.print(f"inverted in {time.perf_counter() - start:.0f} s, peak {memory.bytes / 1e6:.0f} MB")
        for preset, (head, target) in EDITS.items():
            recipe, plus = (Recipe.of_preset(name, SCENE.caption, target.caption) for name in (preset, f"{preset}+"))
            recipes = {"FateZero": recipe, "FateZero+": plus, "DDIM + prompt": replace(recipe, injection=None)}
            truth = render(target, MOTION, FRAMES)
            methods = {n: _run(checkpoint, inversion, one, bar(f"{preset}: {n}")) for n, one in recipes.items()}
            for method, outcome in methods.items():
                measures = _measures(outcome, truth, head, target)
                rows.append({"edit": preset, "method": method, **measures, "store bytes": inversion.store.nbytes})
            for sign, found in shown.items():
                edited = to_bytes(methods[f"FateZero{sign}"].frames[::2])
                found.append((f"{preset}{sign}: {target.caption}", edited))
            _write(folder, preset, recipe, frames, methods, truth, _mask(checkpoint, inversion, recipe))
    titles = {"": "the paper's presets", "+": "the presets with a plus"}
    write_picture(folder / "overview.png", side_by_side([contact_sheet(shown[p], titles[p]) for p in shown]))
    _summary(folder, rows, console)
    return rows


def _run(checkpoint: Checkpoint, inversion: Inversion, recipe: Recipe, progress: Callable[[int, int], None]) -> Outcome:
    target, negative = (checkpoint.encode_prompt(text, SIZE, SIZE) for text in (recipe.target, recipe.negative))
    edit = recipe.edit(target, negative, recipe.pair(checkpoint.tokenizer))
    start = time.perf_counter()
    with PeakMemory(checkpoint.unet.device) as memory:
        (latents,) = edit_many(checkpoint.denoiser, inversion, [edit], progress=progress)
        frames = checkpoint.decode_latents(latents)
    return Outcome(frames, time.perf_counter() - start, memory.bytes)


def _mask(checkpoint: Checkpoint, inversion: Inversion, recipe: Recipe) -> Tensor:
    """The object's blend mask halfway through the run, at the frames' size."""
    thing = SCENE.things[0]
    words: tuple[list[str], list[str]] = ([thing.colour, thing.shape], [])
    prompt = PromptEdit(recipe.source, recipe.target, checkpoint.tokenizer, blend_words=words)
    heat = source_heat(checkpoint.denoiser, inversion, prompt, inversion.store.steps // 2)
    assert isinstance(recipe.injection, FusionSettings)
    return threshold_mask(heat, (SIZE, SIZE), recipe.injection.blend_threshold).cpu()


def _measures(outcome: Outcome, truth: Clip, head: str, target: Scene) -> dict[str, float]:
    """Success by the judge, and preservation and motion against the ground truth."""
    read, right = load_judge().read(outcome.frames), labels(target)[head]
    whole = whole_outlines(target, truth, outcome.frames, MOTION.tracks)
    source = render(SCENE, MOTION, FRAMES)
    outside = (1 - truth.mask) * (1 - source.mask)
    return {
        "success": sum(words[head] == right and ok for words, ok in zip(read, whole, strict=True)) / len(read),
        "preserved dB": psnr(outcome.frames, truth.frames, outside),
        "warp x1000": 1000 * warp_error(outcome.frames, source.flow, visible_pixels(source)),
        "seconds": outcome.seconds,
        "peak MB": outcome.peak_bytes / 1e6,
    }


def _write(
    folder: Path,
    preset: str,
    recipe: Recipe,
    source: Tensor,
    methods: dict[str, Outcome],
    truth: Clip,
    mask: Tensor,
) -> None:
    edited, plus = (to_bytes(methods[name].frames) for name in ("FateZero", "FateZero+"))
    for name, frames in ((preset, edited), (f"{preset}+", plus)):
        write_video(folder / f"{name}.mp4", enlarge(frames, ENLARGED), Fraction(FPS))
    rows = [
        (f"source: {recipe.source}", source),
        (f"FateZero, the paper's preset: {recipe.target}", edited),
        (f"FateZero+, --preset {preset}+", plus),
        ("DDIM inversion + prompt", to_bytes(methods["DDIM + prompt"].frames)),
        ("ground truth", to_bytes(truth.frames)),
        ("mask from attention", mask_frames(mask)),
    ]
    write_picture(folder / f"{preset}.png", contact_sheet(rows, f"{preset} edit"))


def _summary(folder: Path, rows: list[dict[str, float | str]], console: Console) -> None:
    table = Table(
        title="FateZero (paper), FateZero+ (presets with a plus), DDIM + prompt",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in rows[0]:
        words = name in ("edit", "method")
        table.add_column(name.replace(" ", "\n"), justify="left" if words else "right", no_wrap=words)
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    console.print(table)
    with whole_file(folder / "summary.json") as partial:
        partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(n, v) for n, v in row.items()) + " |" for row in rows]
    with whole_file(folder / "summary.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ", ".join(f"{preset}.mp4, {preset}+.mp4, {preset}.png" for preset in EDITS)
    text = f"wrote {folder.resolve()}: {names}, overview.png, summary.md, summary.json"
    console.print(text, markup=False, soft_wrap=True)


def _cell(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if name == "success":
        return f"{value:.0%}"
    return f"{value:,.0f}" if name in ("store bytes", "peak MB") else f"{value:.1f}"
