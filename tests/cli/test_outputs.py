"""Outputs never replace inputs, under any name, and belong to one run."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from fatezero.files.bundled import CLIP, DEMO
from fatezero.files.whole import reserved

WORDS = ("--source", "a red square on water", "--target", "a green square on water", "--steps", 2, "--count", 2)


@pytest.fixture
def inputs(tmp_path):
    """A folder of pictures `e`, another name for it, masks, a video, a model and layers."""
    for folder in ("e", "m", "other"):
        (tmp_path / folder).mkdir()
        for i in range(2):
            Image.new("RGB", (64, 64), (90 * i, 20, 200)).save(tmp_path / folder / f"f_{i:04d}.png")
    (tmp_path / "link").symlink_to(tmp_path / "e")
    (tmp_path / "linked.png").symlink_to(tmp_path / "e" / "f_0000.png")
    shutil.copy(CLIP, tmp_path / "clip.mp4")
    (tmp_path / "hard.mp4").hardlink_to(tmp_path / "clip.mp4")
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EDITS = [
    ("e/f_%04d.png", "e/f_%04d.png"),
    ("e/*.png", "e/f_%04d.png"),
    ("e", "e/f_%04d.png"),
    ("e", "e/"),
    ("e", "link/"),
    ("e", "other/../e/new_%d.png"),
    ("link", "e/f_%04d.png"),
    ("./link/f_%04d.png", "other/../e/f_%04d.png"),
    ("e/f_%04d.png", "e/f_%d.png"),
    ("link/*.png", "e/"),
    ("linked.png", "e/f_%04d.png"),
    ("clip.mp4", "hard.mp4"),
]


@pytest.mark.parametrize(("source", "output"), EDITS)
def test_no_edit_overwrites_or_adds_to_its_source(refused, inputs, source, output):
    before = contents(inputs)
    words = [1 if one == 2 and source == "linked.png" else one for one in WORDS]
    error = refused("edit", source, *words, "-o", output, "--overwrite")
    assert "is an input of this run" in error or "would become part of the input" in error
    assert contents(inputs) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", "clip.mp4", *WORDS, "--mask", "square: m", "-o", "m/f_%04d.png"),
        ("edit", "clip.mp4", *WORDS, "--mask", "square: m/f_%04d.png", "-o", "m/f_%04d.png"),
        ("edit", "clip.mp4", *WORDS, "--model", "model", "-o", "model/unet/config.mp4"),
        ("invert", "clip.mp4", *WORDS[:2], "-o", "clip.mp4"),
        ("invert", "clip.mp4", *WORDS[:2], "--model", "model", "-o", "model/model_index.json"),
        ("evaluate", "e", "other", "--comparison", "e/f_%04d.png"),
        ("evaluate", "e", "other", "--plot", "other/f_0001.png"),
        ("evaluate", "e", "other", "--plot", "e/plot.png"),
        ("evaluate", "e", "other", "--mask", "linked.png", "--comparison", "other/../e/f_%04d.png"),
        ("evaluate", "clip.mp4", "hard.mp4", "-o", "clip.mp4"),
        ("tune", "clip.mp4", "--prompt", "a square", "--model", "model", "--folder", "-o", "model"),
        ("generate", "--prompt", "a red square", "--mask", "square: m", "--frames", 2, "-o", "m/"),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_no_command_replaces_an_input(refused, inputs, arguments):
    if "model/unet/config.mp4" in arguments:
        shutil.copy(CLIP, inputs / "model" / "unet" / "config.mp4")
    before = contents(inputs)
    error = refused(*arguments, "--overwrite")
    assert "is an input of this run" in error or "would become part of the input" in error
    assert contents(inputs) == before


def test_outputs_may_share_a_folder_with_inputs(command, inputs):
    for source, output in (
        ("e/f_%04d.png", "e/g_%04d.png"),
        ("e/f_*.png", "e/h_%d.png"),
        ("e", "e/out/"),
        ("e", "e/o.gif"),
    ):
        command("edit", source, *WORDS, "-o", output, "--dry-run")
    assert "is given for two outputs" in command("evaluate", "e", "other", "-o", "x.png", "--plot", "x.png", code=1)


@pytest.mark.parametrize(
    ("taken", "arguments"),
    [
        ("o.mp4", ("edit", "clip.mp4", *WORDS, "-o", "o.mp4")),
        ("o.mp4.json", ("edit", "clip.mp4", *WORDS, "-o", "o.mp4", "--overwrite")),
        ("new/00000.png", ("edit", "clip.mp4", *WORDS, "-o", "new/")),
        ("s.safetensors", ("invert", "clip.mp4", *WORDS[:2], "-o", "s.safetensors")),
        ("t/temporal.safetensors", ("tune", "clip.mp4", "--prompt", "a square", "-o", "t")),
        ("g.mp4", ("generate", "--prompt", "a red square", "-o", "g.mp4")),
        ("c.mp4", ("evaluate", "e", "other", "--comparison", "c.mp4")),
    ],
)
def test_an_output_of_another_run_is_refused_at_the_start(refused, inputs, taken, arguments):
    with reserved(inputs / taken):
        assert "is being written by another run" in refused(*arguments)


def test_sizes_beyond_memory_are_refused_before_decoding(refused, inputs):
    Image.new("RGB", (100_000, 1)).save(inputs / "long.png")
    new, drawn = ("-o", "o.mp4"), ("--prompt", "a red square", "-o", "o.mp4")
    error = refused("edit", "long.png", *WORDS[:4])  # its short side is scaled to the model's size
    assert "6400000x64: the autoencoder takes 629.15 GB" in error
    assert "choose a smaller --size, or crop the video" in error
    assert "6400000x64: the" in refused("generate", *drawn, "--size", "6400000x64")
    assert "scaled to 1000000x1000000 takes" in refused("edit", "clip.mp4", *WORDS, "--size", "1000000x1000000", *new)


def test_names_that_are_not_utf8_are_refused_before_the_run(refused, inputs):
    bad = b"o\xff.mp4".decode(errors="surrogateescape")
    assert "'o\\udcff.mp4' is not UTF-8" in refused("edit", "clip.mp4", *WORDS, "-o", bad)
    (inputs / bad).write_bytes((inputs / "clip.mp4").read_bytes())
    assert "'o\\udcff.mp4' is not UTF-8" in refused("edit", bad, *WORDS, "-o", "a.mp4")


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (("generate", "--prompt", "a", "-o", "o.mp4", "--size", "0x0"), "size is 0x0; both sides must be"),
        (("generate", "--prompt", "a", "-o", "o.mp4", "--model", "n" * 300), "model: the name 'nnn"),
        (("generate", "--prompt", "a", "-o", "o.mp4", "--mask", f"a: {'n' * 300}"), "mask a: the name 'nnn"),
        (("generate", "--prompt", "a", "-o", "o.mp4", "--mask", "a: nothing.mp4"), "mask: no video at nothing.mp4"),
        (("generate", "--prompt", "a", "-o", f"{'n' * 300}.mp4"), "output: the name 'nnn"),
        (("generate", "--prompt", "a", "-o", "loop/o.mp4"), "cannot write loop/o.mp4: loop is not a folder"),
        (("generate", "--prompt", "a", "-o", "loop.mp4"), "cannot write loop.mp4: Too many levels"),
        (("tune", "n" * 300, "--prompt", "a"), "video: the name 'nnn"),
        (("evaluate", "clip.mp4", "n" * 300), "EDITED: the name 'nnn"),
        (("evaluate", "clip.mp4", "clip.mp4", "--clip", "loop"), "clip: loop is a broken link"),
        (("tune", "clip.mp4", "--prompt", "a", "--model", "loop"), "model: loop is a broken link"),
        (("evaluate", "clip.mp4", "clip.mp4", "--lpips", "clip.mp4"), "clip.mp4 is not a valid safetensors"),
    ],
)
def test_invalid_names_are_reported_with_their_setting(refused, inputs, arguments, output):
    for name in ("loop", "loop.mp4"):
        (inputs / name).symlink_to(name)
    before = sorted(inputs.rglob("*"))
    assert output in refused(*arguments)
    assert sorted(inputs.rglob("*")) == before
