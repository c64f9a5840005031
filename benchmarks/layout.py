"""Layout guidance on demo scenes: objects of generated clips on a path, and moved objects of existing clips.

    python benchmarks/layout.py [--cases 9]

Writes three tables to QUALITY.md and the rows of two to `results/`. Times are ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import write_section
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor

from fatezero import FusionSettings, PromptEdit, edit, generate, invert
from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import KeyFrames
from fatezero.demo.evaluate import _moves
from fatezero.demo.judge import read_words
from fatezero.demo.model import build_scheduler
from fatezero.demo.scenes import COLOURS, SIZE, Motion, Scene, Track, random_motion, render, scenes, visible_pixels
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers import DiffusersDenoiser, DiffusersVideoDenoiser
from fatezero.hosts.diffusers.checkpoint import Checkpoint, quiet
from fatezero.hosts.diffusers.memory import guidance_bytes
from fatezero.methods.layout import Layout, LayoutObject, Move, Shift, Stop
from fatezero.methods.layout import Path as Way
from fatezero.methods.layout_guidance import EnergyControl, LayoutGuidance, LayoutSettings
from fatezero.methods.move_objects import MoveSettings, moves_of
from fatezero.metrics.preservation import changed_pixels, psnr
from fatezero.metrics.temporal import warp_error
from fatezero.video.flow import flow_estimator

HERE = Path(__file__).parent
PAGE = HERE / "QUALITY.md"
PARAGRAPH = "[layouts](#layouts-objects-moved-and-new-clips-with-objects-on-paths)"
STEPS, GUIDANCE = 20, 5.0
INSIDE: dict[str, Any] = {"energy": "inside", "scale": 60.0, "most_change": 0.1}
Row = dict[str, float | str]


def mean(x: Tensor) -> float:
    return x.float().mean().item()


def centre(masks: Tensor) -> Tensor:
    """Centres of masks (frames, h, w) in pixels: (frames, 2); the middle of the frame for empty masks."""
    places = torch.arange(SIZE) + 0.5
    total = masks.sum((1, 2))
    x, y = (masks * places).sum((1, 2)), (masks * places[:, None]).sum((1, 2))
    return torch.where(total[:, None] > 0, torch.stack([x, y], 1) / total.clamp(min=1)[:, None], SIZE / 2)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each frame."""
    return (a * b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2)).clamp(min=1)


# --- new clips ------------------------------------------------------------------------------

NEW: dict[str, dict[str, Any] | None] = {
    "no guidance": None,
    "backward, the paper's": {},
    "backward, inside": INSIDE,
    "backward, inside, 3 times a step": {**INSIDE, "repeats": 3},
    "forward": {"mode": "forward"},
}
NEW_FRAMES = 8


def new_cases(count: int) -> list[tuple[Scene, Motion]]:
    """Held-out captions of one plain thing in a photo, which its colour locates, and random paths."""
    found = (
        (scene, motion)
        for scene, motion in scenes(777, held_out=True, things=1)
        if scene.style == "photo" and scene.things[0].texture == "plain"
    )
    return [(scene, random_motion(Random(i), 1, NEW_FRAMES)) for i, (scene, _) in enumerate(islice(found, count))]


def run_new(index: int, scene: Scene, motion: Motion) -> list[Row]:
    checkpoint = loaded(True)
    thing, track = scene.things[0], motion.tracks[0]
    truth = render(scene, motion, NEW_FRAMES)
    t = torch.arange(NEW_FRAMES)
    stops = tuple(
        Stop(int(f), x / SIZE, y / SIZE, 2 * r / SIZE, 2 * r / SIZE)
        for f, x, y, r in zip(t, *[v.tolist() for v in (*track.centre(t), track.scale(t))], strict=True)
    )
    text, empty = (checkpoint.encode_prompt(words, SIZE, SIZE) for words in (scene.caption, ""))
    noise = torch.randn(NEW_FRAMES, 4, 16, 16, generator=torch.Generator().manual_seed(index))
    _, estimate = flow_estimator("dis")
    rows, plain = list[Row](), 0.0
    for name, settings in NEW.items():
        layout = None
        if settings is not None:
            paths = Layout(
                scene.caption, checkpoint.tokenizer,
                (LayoutObject(f"{thing.colour} {thing.shape}", Way(stops, "ellipse")),), LayoutSettings(**settings),
            )  # fmt: skip
            layout = paths.guidance(NEW_FRAMES, SIZE, SIZE, text.text_tokens)
        begun = time.perf_counter()
        latents = generate(checkpoint.denoiser, noise, text, empty, STEPS, GUIDANCE, layout=layout)
        took = time.perf_counter() - begun
        plain = plain or took
        frames = checkpoint.decode_latents(latents)
        colour = torch.tensor(COLOURS[thing.colour]).view(1, 3, 1, 1)
        found = ((frames - colour).abs().mean(1) < 0.15).float()
        expected = (truth.mask > 0.5).float()
        rows.append(
            {
                "case": index, "method": name, "caption": scene.caption,
                "there": mean(overlap(found, expected) >= 0.5),
                "apart": mean((centre(found) - centre(expected)).norm(dim=1)),
                "right": read_words(scene, scene, frames)[0], "warp": _moves(frames, estimate)[0], "time": took / plain,
            }
        )  # fmt: skip
    return rows


# --- moved objects ----------------------------------------------------------------------------

FRAMES = 4
KINDS = ("elsewhere", "another path", "grown")


@dataclass(frozen=True)
class Case:
    """A clip, and the same clip with its object on another track."""

    kind: str
    scene: Scene
    motion: Motion
    shift: Shift

    @property
    def moved(self) -> Motion:
        first, last = self.shift.at(0), self.shift.at(FRAMES - 1)
        track, steps = self.motion.tracks[0], FRAMES - 1
        other = replace(
            track, x=track.x + first.x * SIZE, y=track.y + first.y * SIZE, radius=track.radius * first.growth,
            vx=track.vx + (last.x - first.x) * SIZE / steps, vy=track.vy + (last.y - first.y) * SIZE / steps,
        )  # fmt: skip
        return replace(self.motion, tracks=(other,))


def inside(track: Track) -> bool:
    """Whether a thing stays inside the frame."""
    t = torch.arange(FRAMES).float()
    reach = 1.25 * track.scale(t) + 1
    return all(((reach <= c) & (c <= SIZE - reach)).all() for c in track.centre(t))


def moved_cases(count: int) -> list[Case]:
    """Equal numbers of each kind: shifts by at least a fifth of the frame, another path, growth by a third."""
    found, random = list[Case](), Random(5)
    stream = scenes(4242, held_out=True, things=1)
    while len(found) < count:
        scene, motion = next(stream)
        kind = KINDS[len(found) % len(KINDS)]
        for _ in range(200):
            a, b = ((random.uniform(-0.4, 0.4), random.uniform(-0.4, 0.4)) for _ in range(2))
            growth = 1.0
            if kind == "elsewhere":
                b = a
            elif kind == "grown":
                a = b = (random.uniform(-0.1, 0.1), random.uniform(-0.1, 0.1))
                growth = 1.35
            elif max(abs(a[0] - b[0]), abs(a[1] - b[1])) * SIZE / (FRAMES - 1) > 2.5:
                continue
            if kind != "grown" and min(sum(v * v for v in p) for p in (a, b)) < 0.04:
                continue
            case = Case(kind, scene, motion, Shift((Move(0, *a, growth), Move(FRAMES - 1, *b, growth))))
            if inside(case.moved.tracks[0]):
                found.append(case)
                break
    return found


@dataclass(frozen=True)
class Method:
    """How an object is moved. settings: of the move, if any. guided_only: use guidance to the true place only.
    known: use the object's true mask.
    """

    settings: dict[str, Any] | None = None
    guided_only: bool = False
    known: bool = False
    fused: bool = True
    video: bool = False


MOVED: dict[str, Method] = {
    "inversion + prompt": Method(fused=False),
    "FateZero": Method(),
    "guidance only": Method(INSIDE, guided_only=True, fused=False),
    "carried, not guided": Method({"scale": 0.0}),
    "guided, not carried": Method({"carry": 0.0}),
    "without fusion": Method({}, fused=False),
    "all (ours)": Method({}),
    "with the paper's energy": Method({"energy": "shape", "scale": 15.0, "most_change": 0.0}),
    "with the object's true mask": Method({}, known=True),
    "on the video model": Method({}, video=True),
}


def run_moved(index: int, case: Case) -> list[Row]:
    source, truth = (render(case.scene, motion, FRAMES) for motion in (case.motion, case.moved))
    ground = render(replace(case.scene, things=()), replace(case.motion, tracks=()), FRAMES).frames
    expected = changed_pixels(ground, truth.frames, 0.1).float()
    kept = ((source.frames - truth.frames).abs().amax(1) < 1 / 255).float()
    thing, caption = case.scene.things[0], case.scene.caption
    words, rows, inversions = f"{thing.colour} {thing.shape}", list[Row](), {}
    for name, method in MOVED.items():
        checkpoint = loaded(method.video)
        text, empty = (checkpoint.encode_prompt(some, SIZE, SIZE) for some in (caption, ""))
        keys, norm = (("first", "previous"), True) if method.video else (("self", "middle"), False)
        if method.video not in inversions:
            latents = checkpoint.encode_frames(source.frames)
            inversions[method.video] = invert(
                checkpoint.denoiser, latents, text, STEPS, keys, norm, "queries_keys", prompt=caption
            )
        layout: Any = None
        if method.settings is not None:
            known = source.mask if method.known else None
            moves = Layout(
                caption,
                checkpoint.tokenizer,
                (LayoutObject(words, case.shift, known),),
                MoveSettings(**method.settings),
            )
            if method.guided_only:
                columns = moves.columns(words, text.text_tokens)
                layout = LayoutGuidance(target=truth.mask, columns=columns, **method.settings)
            else:
                layout = moves_of(moves, caption, text.text_tokens, text.text_tokens)
        pair = PromptEdit(caption, caption, checkpoint.tokenizer) if method.fused else None
        fusion = FusionSettings(0.8, 0.8) if method.fused else None
        made = edit(
            checkpoint.denoiser, inversions[method.video], text, empty, GUIDANCE, prompt=pair, fusion=fusion,
            layout=layout,
        )  # fmt: skip
        frames = checkpoint.decode_latents(made)
        found = changed_pixels(ground, frames, 0.1).float()
        rows.append(
            {
                "case": index, "kind": case.kind, "method": name, "caption": caption,
                "overlap": mean(overlap(found, expected)),
                "apart": mean((centre(found) - centre(expected)).norm(dim=1)),
                "right": read_words(case.scene, case.scene, frames, case.moved.tracks)[0],
                "kept": psnr(frames, truth.frames, kept), "truth": psnr(frames, truth.frames),
                "warp": 1000 * warp_error(frames, truth.flow, visible_pixels(truth)),
            }
        )  # fmt: skip
    return rows


# --- the run -------------------------------------------------------------------------------

_MODELS: dict[bool, Checkpoint] = {}


def loaded(video: bool) -> Checkpoint:
    """The demo model, with its temporal layers for videos."""
    if video not in _MODELS:
        with quiet():
            _MODELS[video] = Checkpoint.load("demo", temporal="demo" if video else None)
    return _MODELS[video]


def job(given: tuple[Callable[..., list[Row]], tuple[Any, ...]]) -> list[Row]:
    torch.set_num_threads(1)
    run, arguments = given
    return run(*arguments)


def rows_of(run: Callable[..., list[Row]], cases: list[tuple[Any, ...]]) -> Iterator[list[Row]]:
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap(job, [(run, case) for case in cases])


def table(rows: list[Row], columns: dict[str, tuple[str, str]]) -> str:
    """Means of each method; columns: figure -> (heading, format)."""
    lines = [f"| | {' | '.join(head for head, _ in columns.values())} |", f"|---|{'---:|' * len(columns)}"]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        cells = [form.format(sum(float(r[figure]) for r in own) / len(own)) for figure, (_, form) in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def saved_rows(name: str, run: Callable[..., list[Row]], cases: list[tuple[Any, ...]]) -> list[Row]:
    found = list[Row]()
    for n, rows in enumerate(rows_of(run, cases)):
        found += [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        print(f"{name}: {n + 1} of {len(cases)} cases", flush=True)
    (HERE / "results" / f"{name}.jsonl").write_text(
        "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in found), encoding="utf-8"
    )
    return found


def memory() -> str:
    """Memory of a guided step besides the weights, from shapes only: SD 1.x and ModelScope in half precision."""
    with torch.device("meta"):
        image = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).half()
        video = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64).half()
    kinds = {
        "SD 1.x, 16 frames of 512x512": (DiffusersDenoiser(image, build_scheduler()), 64, 768),
        "ModelScope, 16 frames of 256x256": (DiffusersVideoDenoiser(video, build_scheduler()), 32, 1024),
    }
    lines = ["| | weights | a plain call | a gradient |", "|---|---:|---:|---:|"]
    for name, (denoiser, side, wide) in kinds.items():
        layout = LayoutGuidance(torch.ones(16, side, side), columns=[2])
        text = Condition(torch.empty(1, 77, wide))
        guide, keys = partial(EnergyControl, layout=layout), KeyFrames(("self",))
        most, plain = guidance_bytes(denoiser, (16, 4, side, side), text, keys, False, guide)
        weights = sum(weight.nbytes for weight in denoiser.unet.parameters())
        lines.append(f"| {name} | {' | '.join(map(format_bytes, (weights, plain, most)))} |")
    return f"A step of layout guidance, from shapes in half precision ({PARAGRAPH}).\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="print only the memory")
    given = parser.parse_args()
    count = given.cases
    write_section("Table: memory of guidance", memory(), PAGE)
    if given.memory:
        return
    percent, pixels, decibel = "{:.0%}", "{:.1f} px", "{:.1f} dB"
    moved = saved_rows("layout_moved", run_moved, list(enumerate(moved_cases(count))))
    columns = {
        "overlap": ("overlap", percent), "apart": ("centres apart", pixels), "right": ("frames right", percent),
        "kept": ("kept", decibel), "truth": ("to the truth", decibel), "warp": ("warp x1000", "{:.1f}"),
    }  # fmt: skip
    text = f"Ways to move an object in a clip ({PARAGRAPH}). {count} clips of {FRAMES} frames, {STEPS} steps, "
    text += f"guidance {GUIDANCE:g}. Carried: the object's noise is moved. Guided: by the gradient of attention."
    write_section("Table: moved objects", f"{text}\n\n{table(moved, columns)}", PAGE)
    new = saved_rows("layout_new", run_new, [(i, *case) for i, case in enumerate(new_cases(count))])
    columns = {
        "there": ("overlap by half", percent), "apart": ("centres apart", pixels), "right": ("frames right", percent),
        "warp": ("warp x1000", "{:.2f}"), "time": ("time", "{:.1f}"),
    }  # fmt: skip
    text = (
        f"Ways to place an object in a new clip ({PARAGRAPH}). {count} captions, {NEW_FRAMES} frames, {STEPS} steps, "
    )
    text += f"guidance {GUIDANCE:g}; time relative to no guidance."
    write_section("Table: layouts of new clips", f"{text}\n\n{table(new, columns)}", PAGE)


if __name__ == "__main__":
    main()
