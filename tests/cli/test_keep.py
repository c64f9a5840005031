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
from fatezero.video.orientation import Mastering
from fatezero.video.planes import planar, planes_of
from fatezero.video.read import open_video
from fatezero.video.stills import save_frame
from fatezero.video.write import write_video

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


def stored_values(video):
    """The values of each frame in planes, with its format, its transfer curve and its primaries."""
    for frame in video.stored():
        stored = planar(frame)
        yield (stored.format.name, int(frame.color_trc), int(frame.color_primaries)), planes_of(stored)


def written(path, form, codec="ffv1", size=(150, 102), hdr=0, options=()):
    """A noisy clip whose alpha, if any, falls from left to right."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=8, options={"profile": "4444"} if codec == "prores_ks" else dict(options))
        stream.width, stream.height, stream.pix_fmt = *size, form
        if hdr:
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = hdr, 9, 9
        for i in range(2):
            pixels = generator.integers(0, 65536, (size[1], size[0], 4)).astype(np.uint16)
            pixels[..., 3] = np.linspace(65535, 0, size[0])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba64le").reformat(format=form)
            frame.pts, frame.time_base = i, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def pictures(path, form="RGB", deep=False):
    """Two noisy pictures of 151x101 pixels, transparent or of 16 bits, or one animated WebP."""
    generator = np.random.default_rng(0)
    if deep:
        form = "rgba64le" if form == "RGBA" else "rgb48le"
        values = [generator.integers(0, 65536, (101, 151, 4 if "a" in form else 3)).astype(np.uint16) for _ in "ab"]
        path.mkdir()
        for i, pixels in enumerate(values):
            save_frame(planar(av.VideoFrame.from_ndarray(pixels, format=form)), path / f"{i}.png")
        return path
    made = [Image.fromarray(generator.integers(0, 256, (101, 151, len(form))).astype(np.uint8)) for _ in "ab"]
    if path.suffix:
        made[0].save(path, save_all=True, append_images=made[1:], duration=125, lossless=True, exact=True)
    else:
        path.mkdir()
        for i, picture in enumerate(made):
            picture.save(path / f"{i}.png")
    return path


HLG, PQ = 18, 16
SCREEN = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
MASTERED = {"x265-params": f"log-level=none:master-display={SCREEN}:max-cll=1000,400:bframes=0"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("make", "result", "options"),
    [
        (lambda p: written(p / "s.mkv", "yuv420p10le", hdr=HLG), "o.mp4", ()),
        pytest.param(lambda p: written(p / "s.mkv", "yuv420p10le", hdr=PQ, size=(151, 101)), "o.mkv", (), marks=SLOW),
        pytest.param(lambda p: written(p / "s.mkv", "yuv420p10le", hdr=PQ, size=(151, 101)), "o.webm", (), marks=SLOW),
        pytest.param(lambda p: written(p / "s.mkv", "yuv420p10le", size=(151, 101)), "o.mp4", (), marks=SLOW),
        pytest.param(lambda p: written(p / "s.mkv", "yuv420p", size=(151, 101)), "o.mp4", (), marks=SLOW),
        (lambda p: written(p / "s.mkv", "yuva420p"), "o.webm", ()),
        pytest.param(lambda p: written(p / "s.mov", "yuva444p10le", "prores_ks"), "o.mkv", (), marks=SLOW),
        pytest.param(lambda p: written(p / "s.mov", "argb", "qtrle"), "o.mov", (), marks=SLOW),
        pytest.param(lambda p: written(p / "s.mov", "argb", "qtrle"), "o.mkv", (), marks=SLOW),
        (lambda p: pictures(p / "s", "RGBA"), "o/", ()),
        pytest.param(lambda p: pictures(p / "s.webp", "RGBA"), "o.mkv", (), marks=SLOW),
        pytest.param(lambda p: pictures(p / "s", deep=True), "o/", (), marks=SLOW),
        pytest.param(lambda p: pictures(p / "s", "RGBA", deep=True), "o/", ("--crop", "3,5,7,9"), marks=SLOW),
        pytest.param(lambda p: pictures(p / "s", deep=True), "o.mkv", (), marks=SLOW),
        (lambda p: written(p / "s.mkv", "yuv420p10le"), "o.mkv", ("--crop", "6,4,8,3")),
    ],
)
def test_sources_of_every_kind_keep_their_values(command, tmp_path, make, result, options):
    """HDR, transparent, deep, odd and cropped ones: format, curve and every value outside the mask are the source's."""
    path = make(tmp_path)
    source = open_video(path)
    left, top, right, bottom = map(int, options[1].split(",")) if options else (0, 0, 0, 0)
    left_mask(tmp_path / "mask.png", source.size)
    run = ("edit", path.name, *WORDS, "--injection", "none", "--edit-mask", "mask.png", "--lossless", *options)
    command(*run, "-o", result)
    made = open_video(tmp_path / result)
    assert made.size == (source.size[0] - left - right, source.size[1] - top - bottom)
    for (kind, before), (now, after) in zip(stored_values(source), stored_values(made), strict=True):
        assert now == kind or (now[0] == kind[0] and kind[1] == 2)  # files without colours get those of their size
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            across, down = (-(-n // m) for n, m in zip(source.size, a.shape[::-1], strict=True))
            a = a[top // down :, left // across :][: b.shape[0], : b.shape[1]]
            high, wide = a.shape
            np.testing.assert_array_equal(a[high * 3 // 4 :], b[high * 3 // 4 :])
            np.testing.assert_array_equal(a[:, wide * 3 // 4 :], b[:, wide * 3 // 4 :])
            corner = a[: high // 6, : wide // 6] != b[: high // 6, : wide // 6]
            assert corner.mean() > 0.8 if i < 3 else not corner.any()  # alpha stays


@pytest.mark.parametrize("result", ["o.mp4", pytest.param("o.webm", marks=SLOW)])
def test_the_light_of_hdr_stays(command, tmp_path, result):
    written(tmp_path / "s.mp4", "yuv420p10le", "libx265", hdr=PQ, options=MASTERED)
    left_mask(tmp_path / "mask.png", (150, 102))
    command("edit", "s.mp4", *WORDS, "--injection", "none", "--edit-mask", "mask.png", "-o", result)
    source, made = (Mastering.of(next(open_video(tmp_path / name).stored())) for name in ("s.mp4", result))
    assert source.light == made.light == (1000, 400)
    assert source.white == (Fraction(15635, 50000), Fraction(16450, 50000))
    for name in ("red", "green", "blue", "white", "nits"):
        assert getattr(made, name) == pytest.approx(getattr(source, name), abs=1e-4)  # AV1 has steps of 2^-16


def test_what_a_format_cannot_have_is_noted(command, tmp_path):
    written(tmp_path / "s.mkv", "yuva420p")
    left_mask(tmp_path / "mask.png", (150, 102))
    run = ("edit", "s.mkv", *WORDS, "--injection", "none", "--edit-mask", "mask.png", "--dry-run")
    assert "transparent" in command(*run, "-o", "o.mp4") and ".mov" in command(*run, "-o", "o/f_%d.jpg")
    assert "cannot be transparent" not in command(*run, "-o", "o.webm")
    written(tmp_path / "odd.mkv", "yuv420p", size=(151, 101))
    left_mask(tmp_path / "odd.png", (151, 101))
    odd = ("edit", "odd.mkv", *WORDS, "--injection", "none", "--edit-mask", "odd.png", "--dry-run")
    assert "no odd sizes" in command(*odd, "-o", "o.mov") and "no odd sizes" not in command(*odd, "-o", "o.mp4")
    assert "no odd sizes" not in command(*run, "-o", "o.mov")
    pictures(tmp_path / "p")
    assert "no odd sizes" in command("edit", "p", *odd[2:], "-o", "o.mov")
    mastered = written(tmp_path / "hdr.mp4", "yuv420p10le", "libx265", hdr=PQ, options=MASTERED)
    hdr = ("edit", mastered.name, *run[2:], "--lossless")
    assert "mastering" in command(*hdr, "-o", "o.mkv") and "mastering" not in command(*hdr, "-o", "o.mp4")
    written(tmp_path / "t.mkv", "yuv420p")
    assert "multiples of 2" in command("edit", "t.mkv", *run[2:], "--crop", "3,0,0,0", "-o", "o.mkv")


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


def test_a_region_of_both_prompts(command, tmp_path):
    """The demo clip in a corner of a larger frame: the window is around its square, which alone changes."""
    small = torch.stack(list(open_video(CLIP, count=2).frames()))[:, ::4, ::4]
    frames = small[:, :1, :1].expand(-1, 192, 192, -1).clone()
    frames[:, 100:164, 20:84] = small
    write_video(tmp_path / "clip.mkv", frames, Fraction(8), crf=None)
    run = ("edit", "clip.mkv", *WORDS[:4], "--steps", 4, "--preset", "attribute+", "--region", "auto", "--lossless")
    assert "where the prompts disagree" in command(*run, "-o", "o.mkv")
    after = torch.stack(list(open_video(tmp_path / "o.mkv").frames()))
    changed = (after != frames).any(-1)
    assert changed.any() and not changed[:, :80].any() and not changed[:, :, 110:].any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--edit-mask", CLIP, "--keep", "latents"), "keep"),
        (("--edit-mask", CLIP, "--crop", "8,0,0,0"), "crop"),
        (("--edit-mask", CLIP, "--shift", "square: 0:0.2,0"), "shift"),
    ],
)
def test_regions_that_are_refused(refused, options, says):
    said = refused("edit", CLIP, *WORDS, "--preset", "shape+", "--region", "auto", *options, "--model", "missing/model")
    assert says in said and "missing/model" not in said
