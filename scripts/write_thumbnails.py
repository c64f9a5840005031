"""Make the thumbnails of workflows for real models, the small Wan and measured edits, with the bundled demo models.

    python scripts/write_thumbnails.py [NAME ...]

A workflow's preset edits the demo clip, or a clip of two objects, with prompts of the demo world. The title of each
picture names the model. `tests/scripts/test_thumbnails.py` compares the preset and prompts that each picture shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fatezero.demo.scenes import SIZE, Scene, random_motion, render
from fatezero.demo.show import MOTION, SCENE
from fatezero.diffusion.edit import edit, edit_many
from fatezero.diffusion.invert import Inversion, invert
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import Model
from fatezero.methods.flow_edit import FlowEditSettings, draw
from fatezero.metrics.evaluate import evaluate
from fatezero.metrics.plot import plot_report
from fatezero.recipes.recipe import Recipe
from fatezero.video.sheet import contact_sheet
from fatezero.video.size import to_bytes

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
FRAMES, STEPS = 8, 20
Rows = Iterator[tuple[str, Tensor]]
"""Labels and frames."""


@dataclass(frozen=True)
class Thumbnail:
    """target: the edit's prompt in the demo world. source: its clip's. model: a demo model. drawn: with FlowEdit too.
    note: an addition to its title. stands_for: the model of a workflow of FlowEdit, whose own steps, guidance and
    strength the edit has. lora: of the demo model.
    """

    target: str
    source: str = SCENE.caption
    model: str = "demo"
    drawn: bool = False
    note: str = ""
    stands_for: str = ""
    lora: str = ""


GREEN = "a green square on water"
WEAK, TOY = ", which is weak at outlines", ", in place of {}"
THUMBNAILS = {
    "style": Thumbnail("watercolor painting of a red square on water"),
    "attribute": Thumbnail(GREEN),
    "shape": Thumbnail("a red circle on water"),
    "remove": Thumbnail("a red square on water", "a red square and a yellow star on water"),
    "enhance": Thumbnail("a red square on water, high quality, 8K", note=", which has no words of quality"),
    "h3": Thumbnail("a watercolor painting of a red square on water", model="demo-wan", note=TOY.format("MiniMax H3")),
    "ltx2": Thumbnail("a watercolor painting of a red square on water", model="demo-wan", note=TOY.format("LTX-2.3")),
    "wan": Thumbnail("a red square on grass", model="demo-wan", note=WEAK),
    "wan_demo": Thumbnail("a red square on grass", model="demo-wan", drawn=True, note=WEAK),
    "wan_i2v": Thumbnail(GREEN, model="demo-wan", note=TOY.format("Wan 2.2 I2V")),
    "wan_vace": Thumbnail(
        "a watercolor painting of a red square on water", model="demo-wan", note=TOY.format("Wan 2.1 VACE")
    ),
    "measure": Thumbnail(GREEN),
    "flow_edit_h3": Thumbnail(GREEN, model="demo-wan", stands_for="MiniMax H3"),
    "flow_edit_ltx2": Thumbnail(GREEN, model="demo-wan", stands_for="LTX-2.3"),
    "flow_edit_qwen_image": Thumbnail(GREEN, model="demo-wan", stands_for="Qwen-Image"),
    "flow_edit_wan_4_steps": Thumbnail(GREEN, model="demo-wan", stands_for="Wan 2.2", lora="demo-few-steps"),
}
TITLES = {"demo": "Made with the bundled toy model", "demo-wan": "Made with the bundled toy Wan"}


def inputs_of(name: str, *kinds: str) -> dict[str, Any]:
    """The inputs of a workflow's first node of some kinds."""
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = next(node["inputs"] for node in graph.values() if node["class_type"] in kinds)
    return found


def shown_settings(name: str) -> tuple[Any, ...]:
    """What a picture shows of its workflow: the preset, or FlowEdit's steps, both guidances, gain and strength."""
    if not THUMBNAILS[name].stands_for:
        return (inputs_of(name, "FateZeroSampler")["preset"],)
    start, after = inputs_of(name, "FateZeroFlowEdit"), inputs_of(name, "FateZeroSampler", "FateZeroEditGuider")
    return start["steps"], start["source_guidance"], start["gain"], after["guidance"], after["strength"]


def mark_of(name: str) -> str:
    """What a picture shows: settings and prompts."""
    one = THUMBNAILS[name]
    return json.dumps([*shown_settings(name), one.source, one.target, one.model, one.drawn])


def clip_of(source: str) -> Tensor:
    """The frames (FRAMES, 3, SIZE, SIZE) of a clip of a caption."""
    scene = Scene.parse(source)
    motion = MOTION if scene == SCENE else random_motion(Random(3), len(scene.things))
    return render(scene, motion, FRAMES).frames


def edited(model: Model, frames: Tensor, one: Thumbnail, preset: str) -> Rows:
    """Each edit's label and frames."""
    latents = model.encode_clip(frames)
    source = model.encode_prompt(one.source, SIZE, SIZE)
    inverted = invert(model.denoiser, latents, source, STEPS, prompt=one.source)
    starts: list[tuple[str, Inversion]] = [(preset, inverted)]
    if one.drawn:
        starts.append(("flow_edit", draw(model.denoiser, latents, source, STEPS, FlowEditSettings())))
    for name, start in starts:
        recipe = Recipe.of_preset(name, one.source, one.target)
        target, negative = (model.encode_prompt(text, SIZE, SIZE) for text in (one.target, ""))
        (found,) = edit_many(model.denoiser, start, [recipe.edit(target, negative, recipe.pair(model.tokenizer))])
        yield f"{name}: {one.target}", model.decode_clip(found, FRAMES)


def with_plot(sheet: Image.Image, source: Tensor, edited: Tensor) -> Image.Image:
    """A sheet, and under it the plot of Evaluate Edit."""
    plot = Image.fromarray(plot_report(evaluate(source, edited.cpu()), sheet.width, 110).numpy())
    page = Image.new("RGB", (sheet.width, sheet.height + plot.height), "white")
    page.paste(sheet, (0, 0))
    page.paste(plot, (0, sheet.height))
    return page


def flow_edited(
    model: Model, frames: Tensor, one: Thumbnail, settings: tuple[Any, ...]
) -> Iterator[tuple[str, Tensor]]:
    """The label and frames of an edit by FlowEdit, with settings of `shown_settings`."""
    steps, source_guidance, gain, guidance, strength = settings
    source, target, negative = (model.encode_prompt(text, SIZE, SIZE) for text in (one.source, one.target, ""))
    start = draw(model.denoiser, model.encode_clip(frames), source, steps, FlowEditSettings(source_guidance, gain=gain))
    found = edit(model.denoiser, start, target, negative, guidance, strength=strength)
    yield f"{steps} steps, guidance {guidance:g}: {one.target}", model.decode_clip(found, FRAMES)


def main(names: list[str]) -> None:
    """Take all pictures, or those of the named workflows."""
    for name in names or THUMBNAILS:
        one = THUMBNAILS[name]
        model, frames = open_model(one.model, torch.device("cpu"), lora=one.lora or None), clip_of(one.source)
        settings = shown_settings(name)
        made = flow_edited(model, frames, one, settings) if one.stands_for else edited(model, frames, one, *settings)
        rows = [(f"source: {one.source}", frames), *made]
        title = TITLES[one.model] + (f", not {one.stands_for}" if one.stands_for else one.note)
        sheet = contact_sheet([(label, to_bytes(shown[::2])) for label, shown in rows], title)
        if name == "measure":
            sheet = with_plot(sheet, frames, rows[-1][1])
        sheet.save(FOLDER / f"{name}.jpg", quality=90, comment=mark_of(name))
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
