"""Shapes and colours of files read and written."""

import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from clips import flashes
from fatezero.video.colour import WHITE, to_hdr, tone_mapped
from fatezero.video.read import VideoError, open_video, read_video
from fatezero.video.write import FrameDigest, shortcomings, write_video

RGB = (200, 50, 90)


def coloured(path: Path, height: int, matrix: Colorspace | None, full: bool = False, tagged: bool = True) -> Path:
    """A clip of one colour with a matrix and range, which the file's metadata contain or omit."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=5, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        if tagged:
            stream.codec_context.colorspace = matrix
            stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        frame = av.VideoFrame.from_ndarray(np.full((height, 64, 3), RGB, np.uint8), format="rgb24")
        yuv = frame.reformat(
            format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG
        )
        for i in range(3):
            yuv.pts, yuv.time_base = i, Fraction(1, 5)
            file.mux(stream.encode(yuv))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601])
@pytest.mark.parametrize("height", [64, 720])
def test_matrix_and_range_are_read_from_the_file(tmp_path, height, matrix, full):
    frames = read_video(coloured(tmp_path / "a.mp4", height, matrix, full)).frames
    assert (frames.int() - torch.tensor(RGB)).abs().max() <= 3


@pytest.mark.parametrize(("height", "matrix"), [(64, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_a_file_without_colour_metadata_is_read_as_by_players(tmp_path, height, matrix):
    frames = read_video(coloured(tmp_path / "a.mp4", height, matrix, tagged=False)).frames
    assert (frames.int() - torch.tensor(RGB)).abs().max() <= 3


@pytest.mark.parametrize("height", [64, 720])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_results_have_colour_metadata_and_look_right_without(tmp_path, height, suffix):
    frames = torch.tensor(RGB, dtype=torch.uint8).expand(3, height, 64, 3)
    path = write_video(tmp_path / f"a{suffix}", frames, Fraction(5), crf=4)
    assert (read_video(path).frames.int() - torch.tensor(RGB)).abs().max() <= 4
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
    assert frame.colorspace in ((Colorspace.ITU709,) if height == 720 else (5, 6))
    assert frame.color_range == ColorRange.MPEG
    guessed = Colorspace.ITU709 if height >= 720 else Colorspace.ITU601
    shown = frame.reformat(format="rgb24", src_colorspace=guessed, src_color_range=1, dst_color_range=2).to_ndarray()
    assert np.abs(shown.astype(int) - RGB).max() <= 4


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (128, 48)), ("1/2", (32, 48)), ("16/11", (93, 48))])
def test_non_square_pixels(tmp_path, aspect, size):
    path = flashes(tmp_path / "a.mp4", audio=None, sample_aspect_ratio=Fraction(aspect))
    assert open_video(path).size == read_video(path).size == size


def test_interlaced_clips_are_reported(tmp_path):
    options = {"flags": "+ilme+ildct", "x264-params": "tff=1"}
    path = flashes(tmp_path / "a.mp4", audio=None, options=options)
    assert any("interlaced" in note for note in open_video(path).notes)
    assert open_video(flashes(tmp_path / "b.mp4", audio=None)).notes == ()


@pytest.mark.parametrize("kind", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr_is_tone_mapped_and_reported(tmp_path, kind):
    path = flashes(
        tmp_path / "a.mp4", "libx265", None, pixels="yuv420p10le", color_trc=kind,
        color_primaries=ColorPrimaries.BT2020, colorspace=Colorspace.BT2020, options={"x265-params": "log-level=none"},
    )  # fmt: skip
    found = open_video(path)
    assert any("tone-mapped" in note for note in found.notes)
    bright, dark = (float(found.read().frames[i].float().mean()) for i in (0, 10))
    assert dark < 30 and 200 < bright <= 255


def test_tone_mapping_keeps_grey_grey_white_light_and_order():
    def pq(nits: float) -> int:
        y = (nits / 10000) ** (2610 / 16384)
        return round(65535 * ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32))

    levels = [0, 1, 10, 50, 100, WHITE, 400, 1000, 4000]
    greys = tone_mapped(np.array([[[pq(n)] * 3 for n in levels]], np.uint16), "PQ")[0].astype(int)
    assert (np.ptp(greys, axis=1) <= 1).all()
    values = greys[:, 1].tolist()
    assert values == sorted(values) and values[0] == 0 and values[-1] == 255
    assert 225 < values[levels.index(WHITE)] < 245
    assert values[levels.index(50)] == pytest.approx(255 * (50 / WHITE) ** (1 / 2.4), abs=1), "dark is unchanged"
    red = tone_mapped(np.array([[[pq(150), pq(0.1), pq(0.1)]]], np.uint16), "PQ")[0, 0]
    assert red[0] > 200 and red[1] < 5 and red[2] < 5
    hlg = tone_mapped(np.array([[[round(65535 * x)] * 3 for x in (0, 0.25, 0.5, 0.75, 1)]], np.uint16), "HLG")[0, :, 0]
    assert hlg.tolist() == sorted(hlg.tolist()) and 225 < hlg[3] < 245 and hlg[-1] == 255


# --- pictures -------------------------------------------------------------------------------


def test_pictures_are_sorted_by_the_numbers_in_their_names(tmp_path):
    for i in (1, 2, 10, 11):
        Image.new("RGB", (8, 6), (10 * i,) * 3).save(tmp_path / f"f{i}.png")
    (tmp_path / ".hidden.png").write_text("no picture")
    expected = [10, 20, 100, 110]
    for path in (tmp_path, tmp_path / "f%d.png", tmp_path / "f*.png"):
        assert read_video(path).frames[:, 0, 0, 0].tolist() == expected
    assert open_video(tmp_path, fps=Fraction(24)).fps == 24
    with pytest.raises(FileNotFoundError, match="no pictures at"):
        open_video(tmp_path / "g_%04d.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="folder without pictures"):
        open_video(tmp_path / "empty")


@pytest.mark.parametrize("single", [True, False])
def test_exif_orientation_is_applied(tmp_path, single):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotate by a quarter to the right
    picture.save(tmp_path / "p.jpg", exif=exif)
    video = read_video(tmp_path / "p.jpg" if single else tmp_path)
    assert video.size == (20, 40)
    assert video.frames[0, 5, 10, 0] > 200 and video.frames[0, 35, 10, 0] < 50


def test_16_bit_grey(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "p.png")
    assert np.abs(read_video(tmp_path / "p.png").frames[0, 0, :, 1].int().numpy() - np.arange(256)).max() <= 1


def test_damaged_pictures(tmp_path):
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match="not a readable picture"):
        open_video(tmp_path / "p.png")


def test_pictures_are_written_by_folder_and_pattern(tmp_path):
    frames = torch.stack([torch.full((6, 8, 3), 10 * i, dtype=torch.uint8) for i in range(12)])
    write_video(f"{tmp_path}/out/", frames, Fraction(8))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i:05d}.png" for i in range(12)]
    assert torch.equal(read_video(tmp_path / "out").frames, frames)
    write_video(tmp_path / "g" / "x_%d.webp", frames[:2], Fraction(8))
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == ["x_0.webp", "x_1.webp"]


def test_a_failed_sequence_leaves_no_files(tmp_path):
    def frames():
        yield torch.zeros(6, 8, 3, dtype=torch.uint8)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_video(f"{tmp_path}/out/", frames(), Fraction(8))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_gif_keeps_times_and_colours_of_frames(tmp_path):
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    frames = colours[:, None, None].expand(3, 12, 16, 3)
    path = write_video(tmp_path / "a.gif", frames, Fraction(8), times=[Fraction(0), Fraction(1, 2), Fraction(1)])
    with Image.open(path) as picture:
        durations, found = [], []
        for i in range(picture.n_frames):
            picture.seek(i)
            durations.append(picture.info["duration"])
            found.append(picture.convert("RGB").getpixel((3, 3)))
    assert durations[:2] == [500, 500] and durations[2] == pytest.approx(125, abs=5)
    assert np.abs(np.array(found) - colours.numpy()).max() <= 8


@pytest.mark.parametrize(("fps", "kept"), [(50, 12), (60, 10), (100, 6), (240, 3), (1000, 1)])
def test_a_gif_avoids_times_that_browsers_change(tmp_path, fps, kept):
    """Browsers show frames of less than 20 ms for 100 ms."""
    frames = (20 * torch.arange(12, dtype=torch.uint8))[:, None, None, None].expand(12, 8, 8, 3)
    with Image.open(write_video(tmp_path / "a.gif", frames, Fraction(fps))) as picture:
        durations = [picture.info["duration"]]
        for i in range(1, getattr(picture, "n_frames", 1)):
            picture.seek(i)
            durations.append(picture.info["duration"])
    assert min(durations) >= 20 and sum(durations) == pytest.approx(12000 / fps, abs=10)
    assert abs(len(durations) - kept) <= 2
    notes = shortcomings(tmp_path / "a.gif", Fraction(fps), 12, sound=True)
    assert len(notes) == (2 if len(durations) < 12 else 1) and "no sound" in notes[0]
    assert fps == 50 or f"will have {len(durations)} of the 12 frames" in notes[1]
    assert shortcomings(tmp_path / "a.mp4", Fraction(fps), 12, sound=True) == []


def test_a_digest_depends_on_frames_sizes_and_order():
    frames = torch.randint(256, (3, 8, 6, 3), dtype=torch.uint8)

    def digest(frames) -> str:
        found = FrameDigest()
        assert len(list(found.passing(frames))) == len(frames)
        return str(found)

    assert digest(frames) == digest(frames.clone()) == digest(frames.transpose(1, 2).contiguous().transpose(1, 2))
    assert len({digest(f) for f in (frames, frames.flip(0), frames[:2], frames.reshape(3, 6, 8, 3), frames ^ 1)}) == 5


def test_the_same_frames_are_decoded_to_the_same_pixels(tmp_path):
    frames = (torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    for suffix in (".mp4", ".mkv", ".webm"):
        paths = [write_video(tmp_path / f"{name}{suffix}", frames, Fraction(8)) for name in "ab"]
        assert torch.equal(read_video(paths[0]).frames, read_video(paths[1]).frames)


# --- memory -----------------------------------------------------------------------------------

STREAM = """
import resource, sys
from pathlib import Path
import torch
from fatezero.video.fitted import FittedVideo
from fatezero.video.read import open_video
from fatezero.video.write import write_video
torch.set_num_threads(1)
source = open_video(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fitted = FittedVideo.of(source, (0, 0, 0, 0), (912, 512))
write_video(sys.argv[2], fitted.frames(), fitted.fps, fitted.sound())
print(len(fitted), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
def test_long_clips_of_large_frames_are_streamed(tmp_path):
    """60 frames of 1080p would take 373 MB at once."""
    assert resource.RLIM_INFINITY
    times = tuple(Fraction(i, 25) for i in range(60))
    path = flashes(tmp_path / "a.mp4", times=times, size=(1920, 1080), options={"preset": "ultrafast"})
    done = subprocess.run([sys.executable, "-c", STREAM, path, tmp_path / "b.mp4"], capture_output=True, text=True)
    frames, kilobytes = map(int, done.stdout.split())
    assert frames == 60
    assert kilobytes < 250_000


@pytest.mark.parametrize("kind", ["PQ", "HLG"])
def test_sdr_becomes_the_hdr_that_is_tone_mapped_to_it(kind):
    greys = np.repeat(np.arange(256.0)[None, :, None], 3, 2)
    np.testing.assert_array_equal(tone_mapped(to_hdr(greys, kind), kind), greys)
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    off = np.abs(tone_mapped(to_hdr(colours, kind), kind).astype(int) - colours)
    assert off.mean() < 0.1 and (off.max(-1) > 2).mean() < 0.02  # HLG clips the brightest saturated colours
