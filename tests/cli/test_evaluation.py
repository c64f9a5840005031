"""`fatezero evaluate` and `fatezero benchmark`."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fatezero.demo.scenes import Scene, render
from fatezero.demo.show import FRAMES, MOTION, SCENE
from fatezero.files.bundled import CLIP
from fatezero.video.read import read_video
from fatezero.video.sheet import enlarge
from fatezero.video.size import to_bytes
from fatezero.video.write import write_video

PROMPTS = ("--source", "a red square on water", "--target", "a green square on water")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The true edit of the bundled clip as a video, its mask, and the source's flow in both directions."""
    made = tmp_path_factory.mktemp("evaluate")
    green = render(Scene.parse("a green square on water"), MOTION, FRAMES).frames
    write_video(made / "green.mp4", enlarge(to_bytes(green), 4), Fraction(8), crf=6)
    clip = render(SCENE, MOTION, FRAMES)
    grown = torch.nn.functional.max_pool2d(clip.mask[:, None], 9, stride=1, padding=4)[:, 0]
    (made / "mask").mkdir()
    for t, mask in enumerate(grown):
        Image.fromarray((mask > 0).numpy().astype(np.uint8) * 255).resize((256, 256)).save(
            made / "mask" / f"{t:02d}.png"
        )
    flow = 4 * torch.nn.functional.interpolate(clip.flow, size=(256, 256))
    save_file({"forward": flow.contiguous(), "backward": -flow}, made / "flow.safetensors")
    return made


@pytest.fixture
def run(folder, command):
    return lambda *arguments, code=0, name="evaluate": command(name, *arguments, code=code, cwd=folder)


def test_an_edit_is_measured_and_the_results_written(run, folder):
    output = run(
        CLIP, "green.mp4", *PROMPTS, "--mask", "mask", "--truth", "green.mp4", "--judge", "-o", "report.json",
        "--plot", "plot.png", "--comparison", "both.mp4", "--how", "wipe",
    )  # fmt: skip
    assert "PSNR outside the mask" in output and "flow: dis" in output and "written to plot.png" in output
    figures = json.loads((folder / "report.json").read_text())
    assert figures["edit success"]["value"] == figures["other words kept"]["value"] == 1
    assert figures["PSNR to truth"]["value"] == "inf"
    assert figures["IoU of what changed, with truth"]["value"] == 1
    assert figures["PSNR outside the mask"]["value"] > 35, "except for losses of the codec"
    assert figures["PSNR inside the mask"]["value"] < 15
    assert len(figures["warp error"]["by_frame"]) == FRAMES - 1
    assert Image.open(folder / "plot.png").size[0] == 768
    both = read_video(folder / "both.mp4")
    assert both.frames.shape == (FRAMES, 256, 256, 3) and both.fps == 8


def test_an_edit_without_effect_is_reported(run, folder):
    run(CLIP, CLIP, *PROMPTS, "--judge", "--flow", "none", "-o", "same.json")
    figures = json.loads((folder / "same.json").read_text())
    assert figures["PSNR to source"]["value"] == "inf"
    assert (figures["edit success"]["value"], figures["other words kept"]["value"]) == (0, 1)
    assert "warp error" not in figures


def test_a_known_flow_is_taken_from_a_file(run, folder):
    run(CLIP, "green.mp4", "--flow", "flow.safetensors", "-o", "known.json")
    known = json.loads((folder / "known.json").read_text())
    run(CLIP, "green.mp4", "--flow", "dis", "-o", "found.json")
    found = json.loads((folder / "found.json").read_text())
    for figures in (known, found):
        assert figures["warp error"]["value"] < 5, "the ground truth moves like its source"
    assert known["warp error"] != found["warp error"]


def test_the_source_is_cut_and_scaled_as_the_edit_was(run, folder):
    write_video(folder / "part.mp4", read_video(CLIP, 2, 2, 3).frames[:, :128, :128], Fraction(4), crf=6)
    cut = ("--start", 2, "--stride", 2, "--crop", "0,0,128,128")
    run(CLIP, "part.mp4", *cut, "--flow", "none", "-o", "cut.json")
    assert json.loads((folder / "cut.json").read_text())["PSNR to source"]["value"] > 35


def test_other_frame_rates_are_noted(run, folder):
    clip = read_video(CLIP)
    write_video(folder / "half.mp4", clip.frames[::2], clip.fps / 2)
    assert "other frame rates" in run(CLIP, "half.mp4", "--flow", "none")
    assert "other frame rates" not in run(CLIP, "half.mp4", "--flow", "none", "--stride", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CLIP, "none.mp4"), "none.mp4"),
        ((CLIP, "green.mp4", "--flow", "lucas"), "flow is 'lucas'"),
        ((CLIP, "green.mp4", "--flow", "gone.safetensors"), "no flow at gone.safetensors"),
        ((CLIP, "green.mp4", "--judge", "--source", "a dog", "--target", "a cat"), "not a caption of the demo scenes"),
        ((CLIP, "green.mp4", "--start", "3"), "has 5 frames from 3"),
        ((CLIP, "green.mp4", "--lpips", "gone.safetensors"), "no LPIPS weights"),
        ((CLIP, "green.mp4", "--crop", "1,2"), "4 whole numbers"),
        ((CLIP, "green.mp4", *PROMPTS), "source and target have no effect"),
        ((CLIP, "green.mp4", "--how", "wipe"), "how has no effect"),
        ((CLIP, "green.mp4", "-o", "green.mp4", "--overwrite"), "green.mp4 is an input of this run"),
        ((CLIP, "green.mp4", "--comparison", "green.mp4", "--overwrite"), "green.mp4 is an input of this run"),
        ((CLIP, "green.mp4", "--comparison", "x.mp4", "--how", "fade"), "must be one of side by side"),
    ],
)
def test_bad_input_gives_one_line(run, arguments, message):
    assert message in run(*arguments, code=1).replace("\n", " ")


def test_a_benchmark_with_custom_captions(run, folder):
    (folder / "pairs.yaml").write_text('- ["a red star on sand", "a dotted blue star on sand"]\n')
    small = (
        "--pairs",
        "pairs.yaml",
        "--frames",
        2,
        "--steps",
        2,
        "--method",
        "SDEdit 0.6",
        "-o",
        "bench",
        "--workers",
        1,
    )
    error = run(*small, name="benchmark")
    assert "| SDEdit 0.6 |" in error and "1/1" in error
    assert {path.name for path in (folder / "bench").iterdir()} >= {"table.md", "table.csv", "page.html"}
    assert "seed 2303, not 7" in run(*small, "--seed", 7, name="benchmark", code=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "must be a list of"),
        ("- [a red star on sand]", "must be a list of"),
        ("- [a car on a road, a bus on a road]", "not a caption of the demo scenes"),
        ("[", "is not YAML"),
    ],
)
def test_unusable_pairs_of_captions_are_refused(run, folder, text, message):
    (folder / "bad.yaml").write_text(text)
    assert message in run("--pairs", "bad.yaml", "-o", "never", name="benchmark", code=1).replace("\n", " ")
