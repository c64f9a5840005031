"""The command on a Wan pipeline."""

import pytest
import torch
from wan import write_wan

from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.wan import WanCheckpoint
from fatezero.video.read import open_video, read_video

WORDS = ("--source", "a red square on water", "--target", "a green square on water")
SIZE = ("--count", 6, "--size", "48x32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("preset", ["style", "shape", "attribute+", "flow_edit", "wan_edit"])
def test_it_edits_the_given_number_of_frames(command, folder, tmp_path, preset):
    output = command("edit", CLIP, "--model", folder, *WORDS, *SIZE, "--preset", preset, "--steps", 3, "-o", "out.mp4")
    assert "3 latents of 48x32" in output
    assert ("for the inversion" in output) == (preset not in ("flow_edit", "wan_edit"))
    width, height = open_video(CLIP).size if preset == "attribute+" else (48, 32)  # a mask keeps the clip's own pixels
    assert read_video(tmp_path / "out.mp4").frames.shape == (6, height, width, 3)


def test_a_pair_of_transformers_and_a_store_in_a_file(command, tmp_path):
    folder = write_wan(tmp_path / "pair", pair=True)
    assert WanCheckpoint.load(str(folder)).boundary == 0.875
    shared = (CLIP, "--model", folder, *WORDS[:2], *SIZE, "--steps", 4, "--order", 2)
    command("invert", *shared, "-o", "store.safetensors")
    command("edit", "--model", folder, *WORDS[2:], "--store", "store.safetensors", "-o", "kept.mp4")
    command("edit", *shared, *WORDS[2:], "-o", "fresh.mp4")
    kept, fresh = (read_video(tmp_path / name).frames for name in ("kept.mp4", "fresh.mp4"))
    assert kept.shape == (6, 32, 48, 3)
    assert torch.equal(kept, fresh)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--preset", "pnp"), "Plug-and-Play"),
        (("--propagation", "tokenflow"), "TokenFlow"),
        (("--smoothing", "0.5"), "smoothing needs a UNet"),
        (("--clip-norm",), "clip_norm"),
        (("--shift", "square: 0:0.1,0"), "layout needs a UNet"),
        (("--temporal", "demo"), "--temporal is for image models"),
        (("--size", "40x32"), "multiples of 16"),
    ],
)
def test_options_a_transformer_does_not_support(refused, folder, tmp_path, options, error):
    assert error in refused("edit", CLIP, "--model", folder, *WORDS, *options, "-o", "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_it_generates_clips(command, folder, tmp_path):
    command("generate", "--model", folder, "--prompt", "a red square on water", "--frames", 5, "--size", "48x32",
            "--steps", 2, "-o", "new.mp4")  # fmt: skip
    assert read_video(tmp_path / "new.mp4").frames.shape == (5, 32, 48, 3)
