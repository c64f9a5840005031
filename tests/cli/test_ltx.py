"""LTX-2's attention control by the command: presets, edit masks, stores, and what is refused before loading."""

import re
import shutil

import pytest
import torch
from flow_models import write_ltx2
from PIL import Image

from fatezero.files.bundled import CLIP
from fatezero.video.read import open_video, read_video

WORDS = ("--source", "a red square on water", "--target", "a green square on water")
SIZE = ("--count", 6, "--size", "64x64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ltx2(tmp_path_factory.mktemp("model"))


@pytest.fixture
def edit(command, folder, tmp_path):
    """Edit by the command; returns its output and the frames."""

    def run(*options, output="out.mkv"):
        shared = ("edit", CLIP, "--model", folder, *WORDS, *SIZE, "--steps", 3, "--lossless")
        said = command(*shared, *options, "-o", output)
        return " ".join(said.split()), read_video(tmp_path / output).frames

    return run


@pytest.fixture
def mask(tmp_path):
    """The left half of a picture."""
    picture = Image.new("L", open_video(CLIP).size)
    picture.paste(255, (0, 0, picture.width // 2, picture.height))
    picture.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_presets(edit):
    plain = edit("--injection", "none")[1]
    for preset in ("style", "style+", "attribute+", "shape+"):
        said, frames = edit("--preset", preset, output=f"{preset}.mkv")
        assert "2 latents of 64x64" in said
        assert not torch.equal(frames, plain)


@pytest.mark.parametrize("preset", ["shape", "kv_edit"])
def test_an_edit_mask_needs_no_words(edit, mask, preset):
    _, masked = edit("--preset", preset, "--edit-mask", mask, "--keep", "latents")
    Image.new("L", open_video(CLIP).size, 255).save(mask)
    _, whole = edit("--preset", preset, "--edit-mask", mask, "--keep", "latents", output="whole.mkv")
    assert masked.shape == whole.shape
    assert not torch.equal(masked, whole)


def test_a_store_gives_the_same_edit_in_every_memory(command, edit, folder, tmp_path):
    _, fresh = edit("--preset", "style")
    for memory in ("recompute", "queries_keys"):
        invert = ("invert", CLIP, "--model", folder, *WORDS[:2], *SIZE, "--steps", 3)
        command(*invert, "--memory", memory, "-o", f"{memory}.safetensors")
        shared = ("edit", "--model", folder, *WORDS[2:], "--preset", "style", "--lossless")
        command(*shared, "--store", f"{memory}.safetensors", "-o", f"{memory}.mkv")
        found = read_video(tmp_path / f"{memory}.mkv").frames
        assert (found.int() - fresh.int()).abs().max() <= (memory != "recompute")


def test_maps_have_masks_and_no_words(edit, mask, tmp_path):
    said, _ = edit("--preset", "shape", "--edit-mask", mask, "--maps", "maps")
    assert "no heat maps" in said
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert names == {"mask_attention.png", "mask_attention.mp4", "slice.png", "slice.mp4"}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--preset", "shape"), "mask_from attention"),
        (("--preset", "shape+", "--blend-source", "square"), "blend_source: .*mixes words"),
        (("--reweight", "green=2"), "reweight: .*mixes words"),
        (("--preset", "pnp"), "Plug-and-Play needs a UNet"),
        (("--propagation", "tokenflow"), "TokenFlow"),
        (("--shift", "square: 0:0.1,0"), "layout needs a UNet"),
    ],
)
def test_refusals_before_loading(refused, folder, tmp_path, options, error):
    broken = shutil.copytree(folder, tmp_path / "model")
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(b"nothing")
    said = " ".join(refused("edit", CLIP, "--model", broken, *WORDS, *SIZE, *options).split())
    assert re.search(error, said)
