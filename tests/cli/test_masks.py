"""Masks given to the command: of an edit, and of objects."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import frames_written
from PIL import Image
from transformers import CLIPTokenizer

from fatezero.cli.config.paths import files_of, renamed
from fatezero.cli.config.settings import EditConfig
from fatezero.cli.config.values import checked, completed
from fatezero.cli.masks import _by_latent, edit_mask, fitted_like, grey
from fatezero.cli.objects import layout_of
from fatezero.files.bundled import CLIP, DEMO
from fatezero.video.read import open_video

SOURCE, TARGET = "a red square on water", "a green square on water"
RUN = ("--source", SOURCE, "--target", TARGET, "--steps", 2, "--count", 3, "--size", "64x64")
SHAPE = ("--preset", "shape+")


def picture(path, white=()):
    """A black picture, white in the boxes (left, top, right, bottom)."""
    made = Image.new("L", (64, 64))
    for box in white:
        made.paste(255, box)
    made.save(path)
    return path


def pixels(path):
    return torch.stack(list(open_video(path).frames())).int()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("--preset", "flow_edit"), marks=pytest.mark.slow),
        ("--preset", "attribute+"),
        pytest.param(("--injection", "none"), marks=pytest.mark.slow),
    ],
)
def test_outside_its_mask_an_edit_equals_one_with_an_empty_mask(command, tmp_path, how):
    """FlowEdit, FateZero and plain edits; a half mask changes only its half."""
    picture(tmp_path / "none.png")
    picture(tmp_path / "left.png", [(0, 0, 32, 64)])
    picture(tmp_path / "all.png", [(0, 0, 64, 64)])
    made = {}
    for name in ("none", "left", "all"):
        run = partial(command, "edit", CLIP, *RUN, *how, "--strength", 0.6, "--keep", "latents", "-o", f"{name}/")
        run("--edit-mask", f"{name}.png")
        made[name] = pixels(tmp_path / name)
    change = {name: (frames - made["none"]).abs().float() for name, frames in made.items()}
    assert change["all"].mean() > 0.1
    assert change["left"][:, :, 48:].mean() < 0.5 * change["all"][:, :, 48:].mean()
    assert change["left"][:, :, :16].mean() > 0.5 * change["all"][:, :, :16].mean()


@pytest.mark.slow
def test_a_link_to_one_picture_equals_one_mask_for_each_frame(command, tmp_path):
    picture(tmp_path / "one.png", [(0, 0, 32, 64)])
    (tmp_path / "link.png").symlink_to("one.png")
    (tmp_path / "many").mkdir()
    for i in range(3):
        picture(tmp_path / "many" / f"{i}.png", [(0, 0, 32, 64)])
    for name, mask in (("a.mp4", "link.png"), ("b.mp4", "many")):
        command("edit", CLIP, *RUN, "--preset", "shape+", "--edit-mask", mask, "-o", name)
    assert frames_written(tmp_path / "a.mp4") == frames_written(tmp_path / "b.mp4")
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    assert record["edit_mask"] == str(tmp_path / "link.png") and "edit_mask" in record["made"]["files"]
    command("edit", "--config", "a.mp4.json", "--edit-mask", "one.png", "-o", "again.mp4")
    assert frames_written(tmp_path / "again.mp4") == frames_written(tmp_path / "a.mp4")
    error = command("edit", CLIP, *RUN, *SHAPE, "--edit-mask", "many", "-o", "many/", "--overwrite", code=1)
    assert "many" in error and len(list((tmp_path / "many").iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--edit-mask", "none.png"), "edit_mask: no video at none.png"),
        (("--edit-mask", "two"), "edit_mask: two has 2 frames; give one, or 3"),
        (("--edit-mask", "text.png"), "edit_mask: "),
        (("--mask", "square: two"), "mask square: two has 2 frames; give one, or 3"),
        (("--edit-mask", "one.png", "--preset", "attribute"), "edit_mask has no effect here"),
        (("--edit-mask", "one.png", "--injection", "none", "--mask-mode", "union"), "mask_mode is union"),
        (("--edit-mask", "one.png", "--mask-mode", "both"), "mask_mode is 'both'"),
        (("--mask-mode", "union"), "mask_mode has no effect here"),
        (("--edit-mask", "one.png", "--blend-source", "square"), "blend_source has no effect here"),
    ],
)
def test_invalid_masks_are_refused_before_the_model_is_loaded(refused, tmp_path, options, message):
    picture(tmp_path / "one.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "two").mkdir()
    for i in range(2):
        picture(tmp_path / "two" / f"{i}.png")
    preset = () if "--preset" in options else SHAPE
    error = refused("edit", CLIP, *RUN, *preset, "--model", "missing/model", *options, "-o", "o.mp4")
    assert message in error and "missing/model" not in error


def test_a_mask_path_is_resolved_like_other_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = EditConfig(**checked({"edit_mask": "~/m.png", "video": "~/v.mp4"}))
    assert files_of(config) == {"video": str(tmp_path / "v.mp4"), "edit_mask": str(tmp_path / "m.png")}
    assert renamed(config, lambda name: f"{name}!").edit_mask == f"{tmp_path}/m.png!"


def test_words_to_blend_are_not_needed_where_the_mask_is_given():
    config = EditConfig(video="v", source="a b", target="a b", blend_latents=True, edit_mask="m.png")
    assert completed(config).prompt_edit(None).blend_words is None
    with pytest.raises(ValueError, match="words"):
        replace(config, mask_mode="union").prompt_edit(None)


class _Latents:
    """Latents of four frames each, and one for the first frame."""

    frames_per_latent = 4


def test_a_latent_of_several_frames_has_the_union_of_their_masks():
    mask = torch.zeros(6, 1, 2)
    mask[3, :, 0] = mask[5, :, 1] = 1
    assert _by_latent(mask, _Latents).tolist() == [[[0, 0]], [[1, 0]], [[0, 1]]]


def test_a_mask_is_cropped_and_scaled_as_the_clip(tmp_path):
    picture(tmp_path / "m.png", [(32, 0, 64, 64)])
    config = EditConfig(edit_mask=str(tmp_path / "m.png"))
    mask = edit_mask(_Latents, config, (32, 0, 0, 0), (16, 16))
    assert mask.mask.shape == (1, 16, 16) and mask.mask.min() > 0.99
    assert grey(open_video(tmp_path / "m.png")).mean() == 0.5


def test_a_mask_of_another_size_is_cropped_as_the_clip(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "clip.png")
    picture(tmp_path / "large.png", [(32, 0, 64, 64)])
    Image.open(tmp_path / "large.png").resize((32, 32)).save(tmp_path / "m.png")
    config, clip = EditConfig(edit_mask=str(tmp_path / "m.png")), open_video(tmp_path / "clip.png")
    mask = edit_mask(_Latents, config, (16, 0, 0, 0), (48, 64), clip).mask
    assert mask[..., :14].max() < 0.1 and mask[..., 18:].min() > 0.9


def test_masks_of_objects_are_cropped_as_the_clip(tmp_path):
    file = picture(tmp_path / "m.png", [(32, 0, 64, 64)])
    text = "a red square"
    config = EditConfig(source=text, target=text, shift=("square: 0:0.1,0",), object_mask=(f"square: {file}",))
    fit = fitted_like((32, 0, 0, 0), (16, 32), open_video(file))
    (found,) = layout_of(config, CLIPTokenizer.from_pretrained(DEMO / "tokenizer"), text, 1, fit).objects
    assert found.source.shape == (1, 32, 16) and found.source.min() > 0.99


def test_one_picture_is_the_mask_of_an_object_in_all_frames(command, tmp_path):
    picture(tmp_path / "one.png", [(8, 8, 32, 32)])
    (tmp_path / "many").mkdir()
    for i in range(3):
        picture(tmp_path / "many" / f"{i}.png", [(8, 8, 32, 32)])
    for name, mask in (("a.mp4", "one.png"), ("b.mp4", "many")):
        command("edit", CLIP, *RUN, "--target", SOURCE, "--mask", f"square: {mask}", "-o", name)
    assert frames_written(tmp_path / "a_0.mp4") == frames_written(tmp_path / "b_0.mp4")
