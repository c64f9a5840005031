"""LTX-2 by the command with a first frame and a control video, and what is refused before loading."""

import json
import re
import shutil

import pytest
import torch
from flow_models import write_ltx2
from PIL import Image
from safetensors.torch import save_file

from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.load import open_model
from fatezero.video.read import read_video

WORDS = ("--source", "a red square on water", "--target", "a green square on water")
SIZE = ("--count", 6, "--size", "64x64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ltx2(tmp_path_factory.mktemp("model"))


@pytest.fixture
def edit(command, folder, tmp_path):
    """Edit by the command; returns its output and the frames."""
    Image.new("RGB", (64, 64), (0, 200, 0)).save(tmp_path / "green.png")

    def run(*options, output="out.mkv"):
        said = command(
            "edit", CLIP, "--model", folder, *WORDS, *SIZE, "--steps", 3, "--lossless", *options, "-o", output
        )
        return " ".join(said.split()), read_video(tmp_path / output).frames

    return run


@pytest.fixture(scope="module")
def green(folder):
    """The green picture, as the model decodes it."""
    model, picture = open_model(str(folder)), torch.tensor([0, 200 / 255, 0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    return model.decode_clip(model.encode_clip(picture), 1)[0].permute(1, 2, 0)


@pytest.mark.parametrize("preset", ["flow_edit", "style", "attribute+"])
def test_the_results_first_frame_is_the_given_picture(edit, green, tmp_path, preset):
    given = ("--preset", preset, "--keep", "latents") if preset == "attribute+" else ("--preset", preset)
    _, plain = edit(*given, output="plain.mkv")
    _, own = edit(*given, "--first-frame", "green.png")
    assert own.shape == plain.shape == (6, 64, 64, 3)
    assert not torch.equal(own[1:], plain[1:])
    if preset != "attribute+":  # whose mask limits the edit
        assert (own[0] / 255 - green).abs().max() < 0.02
    record = json.loads((tmp_path / "out.mkv.json").read_text())
    assert record["made"]["files"]["first_frame"]


def test_a_control_video_in_a_store(command, edit, folder, tmp_path):
    _, plain = edit("--preset", "style", output="plain.mkv")
    said, fresh = edit("--preset", "style", "--control", CLIP)
    assert "control clip.mp4: in 3 of 3 steps" in said
    assert fresh.shape == plain.shape
    assert not torch.equal(fresh, plain)
    shared = ("invert", CLIP, "--model", folder, *WORDS[:2], *SIZE, "--steps", 3, "--control", CLIP)
    command(*shared, "-o", "store.safetensors")
    of_store = (
        "edit",
        "--model",
        folder,
        *WORDS[2:],
        "--preset",
        "style",
        "--lossless",
        "--store",
        "store.safetensors",
    )
    command(*of_store, "--control", CLIP, "-o", "stored.mkv")
    assert torch.equal(read_video(tmp_path / "stored.mkv").frames, fresh)


def test_several_edits_of_one_pass(command, edit, folder, tmp_path):
    given = ("--preset", "style", "--first-frame", "green.png", "--control", CLIP)
    alone = edit(*given)[1]
    both = (*WORDS, "--target", "a blue square on water", "--steps", 3, "--lossless")
    command("edit", CLIP, "--model", folder, *both, *SIZE, *given, "-o", "both.mkv")
    names = sorted(path.name for path in tmp_path.glob("both*.mkv"))
    assert len(names) == 2
    assert torch.equal(read_video(tmp_path / names[0]).frames, alone)


def test_guide_frames(command, edit, tmp_path):
    given = ("--preset", "flow_edit")
    _, plain = edit(*given, output="plain.mkv")
    _, own = edit(
        *given, "--guide-frame", "last: green.png", "--guide-frame", "3: green.png", "--first-frame", "green.png"
    )
    assert own.shape == plain.shape
    assert not torch.equal(own, plain)
    record = json.loads((tmp_path / "out.mkv.json").read_text())
    assert {"first_frame", "guide_frame last", "guide_frame 3"} <= set(record["made"]["files"])
    command("edit", "--config", "out.mkv.json", "-o", "again.mkv")
    assert torch.equal(read_video(tmp_path / "again.mkv").frames, own)


def test_an_ic_lora_with_a_smaller_control_video(command, refused, folder, tmp_path):
    random = torch.Generator().manual_seed(0)
    parts = {"lora_A": (2, 24), "lora_B": (24, 2)}
    weights = {
        f"transformer.transformer_blocks.0.attn1.to_q.{part}.weight": torch.randn(shape, generator=random)
        for part, shape in parts.items()
    }
    save_file(weights, tmp_path / "ic.safetensors", {"reference_downscale_factor": "2"})
    shared = ("edit", CLIP, "--model", folder, *WORDS, "--count", 6, "--steps", 2, "--lora", "ic.safetensors")
    assert "2 latents of 128x128" in command(*shared, "--size", "128x128", "--control", CLIP, "-o", "out.mp4")
    assert "multiples of 64" in refused(*shared, "--size", "128x96", "--control", CLIP, "-o", "odd.mp4")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--guide-frame", "green.png"), "guide_frame: invalid"),
        (("--guide-frame", "6: green.png"), "frame 6 is outside"),
        (("--guide-frame", "5: green.png", "--guide-frame", "last: green.png"), "frame 5 has two pictures"),
        (("--guide-frame", "3: none.png"), "guide_frame: "),
        (("--guide-frame", f"3: {CLIP}"), "guide_frame: .* has several frames"),
        (("--guide-frame", "3: green.png", "--crop", "64,0,0,0"), "guide_frame: crop .* does not fit 64x64"),
        (("--first-frame", "wide.png", "--crop", "8,0,0,0"), "first_frame: .* is 96x64 and the clip"),
        (("--guide-frame", "3: green.png", "--memory", "maps"), "maps cannot include"),
        (("--control", CLIP, "--controlnet-strength", 2), "at most 1"),
        (("--control", CLIP, "--control-end", 0.5), "control_end have no effect"),
        (("--control", CLIP, "--memory", "maps"), "maps cannot include"),
        (("--control", "none.mp4"), "control: "),
        (("--first-frame", "none.png"), "first_frame: "),
        (("--first-frame", "green.png", "--region", "auto"), "first_frame"),
        (("--control", CLIP, "--region", "auto"), "control"),
    ],
)
def test_refusals_before_loading(refused, folder, tmp_path, options, error):
    Image.new("RGB", (64, 64)).save(tmp_path / "green.png")
    Image.new("RGB", (96, 64)).save(tmp_path / "wide.png")
    broken = shutil.copytree(folder, tmp_path / "model")
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(b"nothing")
    said = " ".join(refused("edit", CLIP, "--model", broken, *WORDS, *SIZE, *options).split())
    assert re.search(error, said)


def test_a_first_frame_needs_the_clip(command, refused, folder, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "green.png")
    shared = ("--model", folder, "--steps", 3)
    command("invert", CLIP, *shared, *WORDS[:2], *SIZE, "-o", "store.safetensors")
    edit = ("edit", *shared[:2], *WORDS[2:], "--preset", "style", "--store", "store.safetensors")
    assert "first_frame cannot be used with store" in refused(*edit, "--first-frame", "green.png")
