"""`fatezero edit --maps` and `fatezero evaluate --slice`."""

import json

import numpy as np
import pytest
import torch
import yaml
from commands import frames_written
from PIL import Image

from fatezero.files.bundled import CLIP
from fatezero.video.read import read_video
from fatezero.video.slice import slice_picture

SOURCE, CIRCLE = "a red square on water", "a red circle on water"
EDIT = ("edit", CLIP, "--source", SOURCE, "--steps", 4, "--count", 2, "--size", "64x64")
WORDS = {
    f"{name}_{word}_{i}.mp4"
    for name, words in (("source", SOURCE), ("target", CIRCLE))
    for i, word in enumerate(words.split(), 1)
}
SHEETS = {"source_frames.png", "source_steps.png", "target_frames.png", "target_steps.png"}
SLICES = {"slice.png", "slice.mp4"}
MASKS = {"mask_attention.png", "mask_attention.mp4"}


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_an_edit_writes_heats_masks_and_slices(command, refused, tmp_path):
    shape = (*EDIT, "--target", CIRCLE, "--preset", "shape")
    command(*shape, "-o", "plain.mp4")
    output = command(*shape, "--maps", "new/maps", "-o", "out.mp4")
    assert "heat maps and slices written to new/maps" in output and "no masks" not in output
    assert frames_written(tmp_path / "out.mp4") == frames_written(tmp_path / "plain.mp4"), "the result is the same"
    maps = tmp_path / "new" / "maps"
    assert files(maps) == WORDS | SHEETS | MASKS | SLICES
    assert read_video(maps / "target_circle_3.mp4").frames.shape == (2, 64, 64, 3)
    assert len(read_video(maps / "slice.mp4").frames) == 64, "one frame for each row"
    tiles = picture(maps / "mask_attention.png")[60:188, 4:132]
    assert set(np.unique(tiles)) == {0, 255} and tiles.mean() > 20
    assert "exists" in refused(*shape, "--maps", "new/maps", "-o", "again.mp4")
    assert not (tmp_path / "again.mp4").exists()


def test_the_slice_is_of_the_frames(command, tmp_path):
    command(*EDIT, "--target", CIRCLE, "--maps", "maps", "-o", "out/")
    edited = torch.stack([torch.from_numpy(picture(path).copy()) for path in sorted((tmp_path / "out").glob("*.png"))])
    shown = picture(tmp_path / "maps" / "slice.png")
    assert shown.shape == (512, 512, 3)
    below = torch.from_numpy(shown[256:].copy())
    row = next(y for y in range(64) if _is_row(below, edited[:, y]))
    assert 0 <= row < 64


def _is_row(slice_, row):
    """Whether a slice, enlarged eightfold, shows a row, outside its label."""
    return torch.equal(slice_[40:128:8, 80::8][0], row[0, 10:]) and torch.equal(slice_[128::128, ::8][0], row[1])


def test_each_of_several_edits_has_a_folder_and_missing_maps_are_reported(command, tmp_path):
    command("invert", CLIP, "--source", SOURCE, "--steps", 4, "--count", 2, "--size", "64x64", "-o", "s.safetensors")
    both = ("--target", "a green square on water", "--target", "a blue square on water", "--preset", "attribute")
    output = " ".join(command("edit", "--store", "s.safetensors", *both, "--maps", "maps", "-o", "out.mp4").split())
    assert output.count("maps: no masks, because this edit uses none") == 2
    folders = [tmp_path / "maps" / f"out_{i}" for i in (0, 1)]
    assert "target_blue_2.mp4" in files(folders[1]) and files(folders[0]) >= SHEETS | SLICES
    assert not files(folders[0]) & MASKS


def test_folders_are_refused_before_anything_loads(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    nothing = ("--model", "nowhere/at-all", "--target", CIRCLE, "-o", "out.mp4")
    assert "maps: " in refused(*EDIT, *nothing, "--maps", "file")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "slice.png").write_text("x")
    assert "there/slice.png" in refused(*EDIT, *nothing, "--maps", "there")


@pytest.mark.slow
def test_a_batch_writes_maps_next_to_each_result(command, refused, tmp_path):
    job = {"video": str(CLIP), "source": SOURCE, "target": CIRCLE, "steps": 2, "count": 1, "size": [64, 64]}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [{**job, "preset": "shape"}]}))
    assert "maps are written on this machine only" in refused("batch", "jobs.yaml", "--maps", "--ray", "local")
    command("batch", "jobs.yaml", "--maps", "--no-measure", "-o", "b", threads=1)
    (folder,) = (tmp_path / "b").glob("*_maps")
    assert files(folder) >= MASKS | SHEETS and (tmp_path / "b" / f"{folder.name.removesuffix('_maps')}.mp4").exists()


def test_evaluate_writes_a_slice(command, refused, tmp_path):
    run = ("evaluate", CLIP, CLIP, "--flow", "none")
    command(*run, "--slice", "s.png", "--slice-row", 100, "-o", "figures.json")
    clip = read_video(CLIP).frames
    assert np.array_equal(picture(tmp_path / "s.png"), slice_picture(clip, clip, 100).numpy())
    assert json.loads((tmp_path / "figures.json").read_text())
    command(*run, "--slice", "moving.png")
    assert np.array_equal(picture(tmp_path / "moving.png"), slice_picture(clip, clip).numpy())
    assert "0 to 255" in refused(*run, "--slice", "t.png", "--slice-row", 256)
    assert "no effect without --slice" in refused(*run, "--slice-row", 2)
    assert "slice is 's.mp4'" in refused(*run, "--slice", "s.mp4")
    assert "exists" in refused(*run, "--slice", "s.png")


@pytest.mark.slow
def test_a_video_transformer_has_maps(command, tmp_path):
    wan = ("edit", CLIP, "--model", "demo-wan", "--source", SOURCE, "--target", CIRCLE, "--steps", 4, "--count", 5)
    command(*wan, "--preset", "flow_edit", "--maps", "maps", "-o", "out.mp4")
    assert files(tmp_path / "maps") == WORDS | SHEETS | SLICES
    assert len(read_video(tmp_path / "maps" / "target_circle_3.mp4").frames) == 5
