"""`--keep pixels`: results at the video's own size, whose pixels outside the mask are the video's, bit for bit."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fatezero.cli.config.settings import EditConfig
from fatezero.cli.keep import keeps_pixels
from fatezero.files.bundled import CLIP
from fatezero.video.read import open_video

WORDS = ("--source", "a red square on water", "--target", "a green square on water", "--steps", 2, "--count", 2)


def enlarged(path, form="yuv420p10le", size=(150, 101), turn=0, aspect=None):
    """The demo clip at another size, in another format."""
    frames = torch.stack(list(open_video(CLIP, count=2).frames())).movedim(-1, 1).float()
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, form
        if turn:
            stream.set_display_rotation(turn)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, x in enumerate(F.interpolate(frames, size=size[::-1] if not turn else size, mode="bilinear")):
            pixels = x.movedim(0, -1).clamp(0, 255).byte().numpy()
            pixels = np.ascontiguousarray(np.rot90(pixels, -turn // 90) if turn else pixels)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=form)
            frame.pts, frame.time_base = i, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def left_mask(path, size):
    """White in a corner at the upper left."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 4, size[1] // 4))
    mask.save(path)
    return path


@pytest.mark.parametrize(
    ("options", "result"),
    [
        ({}, "o.mkv"),
        pytest.param({"form": "yuv422p", "size": (120, 90), "turn": 90}, "o.mkv", marks=pytest.mark.slow),
        pytest.param({"form": "yuv420p", "aspect": Fraction(16, 11)}, "o.mkv", marks=pytest.mark.slow),
        pytest.param({}, "o/", marks=pytest.mark.slow),
    ],
)
def test_pixels_outside_the_mask_are_the_videos(command, tmp_path, options, result):
    source = open_video(enlarged(tmp_path / "clip.mkv", **options))
    left_mask(tmp_path / "mask.png", source.size)
    run = ("edit", "clip.mkv", *WORDS, "--injection", "none", "--edit-mask", "mask.png", "--lossless", "-o", result)
    command(*run)
    made = open_video(tmp_path / result)
    width, height = made.size
    assert made.size == source.size
    for before, after in zip(source.frames(), made.frames(), strict=True):
        assert torch.equal(before[height * 3 // 4 :], after[height * 3 // 4 :])
        assert torch.equal(before[:, width * 3 // 4 :], after[:, width * 3 // 4 :])
        assert (before[: height // 5, : width // 5].int() - after[: height // 5, : width // 5]).abs().float().mean() > 1
    if result == "o.mkv":
        assert [f.format.name for f in made.stored()] == [f.format.name for f in source.stored()]
        record = json.loads((tmp_path / "o.mkv.json").read_text())
        assert record["keep"] == "pixels"
        assert "bit for bit" in command("edit", "--config", "o.mkv.json", "-o", "again.mkv")
        del record["keep"]  # a record of a version without the setting
        record["made"].pop("frames")
        (tmp_path / "old.json").write_text(json.dumps(record))
        command("edit", "--config", "old.json", "-o", "old.mkv")
        assert min(open_video(tmp_path / "old.mkv").size) == 64


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, False),
        ({"edit_mask": "m.png", "injection": "none"}, True),
        ({"edit_mask": "m.png", "injection": "none", "keep": "latents"}, False),
        ({"blend_latents": True, "blend_latents_until": 1.0}, True),
        ({"blend_latents": True}, False),
        ({"blend_self_attention": True, "edit_mask": "m.png"}, True),
        ({"blend_self_attention": True, "edit_mask": "m.png", "mask_mode": "union"}, False),
        ({"injection": "flow_mask", "noise": "drawn"}, True),
        ({"shift": ("square: 0:0.2,0",)}, True),
    ],
)
def test_pixels_stay_where_a_mask_limits_the_edit(settings, kept):
    config = EditConfig(video="v", source="a b", target="a c", **settings)
    assert keeps_pixels(config, True) is kept
    assert keeps_pixels(config, False) is False


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--preset", "style", "--keep", "pixels"), "no mask limits"), (("--keep", "all"), "keep is 'all'")],
)
def test_refusals(refused, options, says):
    said = refused("edit", CLIP, *WORDS, *options, "--model", "missing/model", "-o", "o.mp4")
    assert says in said and "missing/model" not in said


def test_a_region_is_edited_at_the_models_size_and_laid_back(command, tmp_path):
    source = open_video(enlarged(tmp_path / "clip.mkv", size=(200, 150)))
    (tmp_path / "masks").mkdir()
    for i in range(2):
        mask = Image.new("L", source.size)
        mask.paste(255, (60 + 4 * i, 40, 90 + 4 * i, 70))
        mask.save(tmp_path / "masks" / f"{i}.png")
    run = ("edit", "clip.mkv", *WORDS, "--injection", "none", "--edit-mask", "masks", "--region", "auto", "--lossless")
    said = command(*run, "-o", "o.mkv")
    assert "2 frames of 64x64" in said
    made = open_video(tmp_path / "o.mkv")
    for i, (before, after) in enumerate(zip(source.frames(), made.frames(), strict=True)):
        rows, columns = (before != after).any(-1).nonzero().T
        assert rows.min() >= 30 and rows.max() < 80 and columns.min() >= 50 and columns.max() < 104
        assert (before[42:68, 64 + 4 * i : 88 + 4 * i] != after[42:68, 64 + 4 * i : 88 + 4 * i]).any(
            -1
        ).float().mean() > 0.7


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--edit-mask"),
        (("--edit-mask", CLIP, "--keep", "latents"), "keep"),
        (("--edit-mask", CLIP, "--crop", "8,0,0,0"), "crop"),
        (("--edit-mask", CLIP, "--shift", "square: 0:0.2,0"), "shift"),
    ],
)
def test_regions_that_are_refused(refused, options, says):
    said = refused("edit", CLIP, *WORDS, "--preset", "shape+", "--region", "auto", *options, "--model", "missing/model")
    assert says in said and "missing/model" not in said
