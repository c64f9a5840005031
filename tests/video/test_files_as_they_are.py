"""Unusual files: cut, concatenated, rotated, without container, transparent."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clips import bars, counted, heard_at, number
from fatezero.video.read import VideoError, open_video, read_video
from fatezero.video.size import resize_to_fill
from fatezero.video.which import colour_of
from fatezero.video.write import write_video

ONE = 65536


def numbers(video) -> list[int]:
    return [number(frame) for frame in video.frames]


# --- display matrices -------------------------------------------------------------------------

TURNS = {  # (a, b, c, d) of x' = a x + c y, y' = b x + d y, and the transformed picture
    (1, 0, 0, 1): lambda p: p,
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),  # an upright phone: a quarter to the right
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (0, 1, 1, 0): lambda p: p.swapaxes(0, 1),
    (0, -1, -1, 0): lambda p: np.rot90(p.swapaxes(0, 1), 2),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_every_orientation_of_a_display_matrix(tmp_path, matrix):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :16], picture[:16, 48:], picture[16:, :16] = (220, 20, 20), (20, 220, 20), (20, 20, 220)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *stream.encode(None)]:
            file.mux(packet)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4
    at += 4 + (32 if data[at] else 20) + 16
    a, b, c, d = matrix
    data[at : at + 36] = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    shown = TURNS[matrix](picture)
    video = read_video(path)
    assert video.size == open_video(path).size == (shown.shape[1], shown.shape[0])
    assert np.abs(video.frames[0].numpy().astype(int) - shown).mean() < 8


# --- clocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.m2ts", "mpeg2video")])
def test_concatenated_parts_play_in_sequence(tmp_path, name, codec):
    rate = 25 if codec == "mpeg2video" else 10
    format = "mpegts" if name.endswith("m2ts") else None
    counted(tmp_path / name, codec, rate=rate, format=format)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() * 3)
    found = open_video(tmp_path / name)
    assert numbers(found.read()) == list(range(24)) * 3
    assert found.even and found.fps == rate
    assert any("3 parts" in note for note in found.notes)
    assert numbers(read_video(tmp_path / name, start=20, stride=10, count=5)) == [20, 6, 16, 2, 12]


def test_sound_of_concatenated_parts_is_in_sequence_without_hours_of_gap(tmp_path):
    first = counted(tmp_path / "a.ts", sound=True).read_bytes()
    for late in (0, 36_000):  # a second part with timestamps from 0, and one an hour later
        (tmp_path / "both.ts").write_bytes(first + counted(tmp_path / "b.ts", late=late, sound=True).read_bytes())
        video = open_video(tmp_path / "both.ts").read()
        assert numbers(video) == list(range(24)) * 2 and video.times is None
        for frame in (3, 15, 27, 40):
            assert heard_at(video.sound, frame / 10) == frame % 24
    part = read_video(tmp_path / "both.ts", start=30, count=10)
    assert [heard_at(part.sound, i / 10) for i in (0, 5)] == numbers(part)[:6:5] == [6, 11]


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4"])
def test_a_clip_cut_between_key_frames_starts_at_its_first_readable_frame(tmp_path, name):
    path = counted(tmp_path / name, frames=30, skip=5)
    found = open_video(path)
    assert numbers(found.read()) == list(range(12, 30))
    assert found.even and any("first 7 frames" in note for note in found.notes)
    assert numbers(read_video(path, start=3, count=2)) == [15, 16]
    assert numbers(open_video(path, at_most=8).read()) == list(range(12, 20))


def test_edit_lists_are_applied_without_losing_frames_at_the_end(tmp_path):
    """Cut without re-encoding: packets start at a key frame, and the edit list skips some."""
    counted(tmp_path / "whole.mp4", frames=30)
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        shift = round(Fraction(17, 10) / whole.streams.video[0].time_base)
        for packet in list(whole.demux(video=0))[12:]:
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                cut.mux(packet)
    found = open_video(tmp_path / "cut.mp4")
    assert found.notes == () and numbers(found.read()) == list(range(17, 30))
    data = bytearray((tmp_path / "cut.mp4").read_bytes())
    at = data.find(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", 800)  # duration in milliseconds
    (tmp_path / "cut.mp4").write_bytes(data)
    found = open_video(tmp_path / "cut.mp4")
    shown = numbers(found.read())
    assert found.notes == () and shown == list(range(17, 17 + len(shown))) and 7 <= len(shown) <= 9


@pytest.mark.parametrize(
    ("name", "codec", "format"),
    [("a.h264", "libx264", "h264"), ("a.hevc", "libx265", "hevc"), ("a.m1v", "mpeg1video", "mpeg1video")],
)
def test_streams_without_a_container(tmp_path, name, codec, format):
    path = counted(tmp_path / name, codec, rate=30, format=format)
    found = open_video(path)
    assert (numbers(found.read()), found.fps, found.even, found.notes) == (list(range(24)), 30, True, ())
    assert numbers(read_video(path, start=13, stride=3, count=3)) == [13, 16, 19]


@pytest.mark.parametrize("sizes", [((64, 64), (96, 64)), ((64, 64), (64, 96))])
def test_a_change_of_size_is_reported(tmp_path, sizes):
    parts = []
    for width, height in sizes:
        with av.open(str(tmp_path / "a.ts"), "w") as file:
            stream = file.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(4):
                grey = np.full((height, width, 3), 90, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            file.mux(stream.encode(None))
        parts.append((tmp_path / "a.ts").read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    width, height = sizes[1]
    with pytest.raises(VideoError, match=f"frame 4 is {width}x{height}, unlike the 64x64"):
        read_video(tmp_path / "a.ts")
    assert len(read_video(tmp_path / "a.ts", count=4).frames) == 4


# --- transparency -----------------------------------------------------------------------------


def seen_through(noise: int = 0) -> np.ndarray:
    """A red square surrounded by transparent pixels with colours that must not show."""
    picture = np.random.default_rng(noise).integers(0, 255, (64, 64, 4)).astype(np.uint8)
    picture[..., 3] = 0
    picture[16:48, 16:48] = (220, 30, 30, 255)
    return picture


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("vp8.webm", "libvpx", "yuva420p"),
        ("a.mkv", "libvpx-vp9", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("b.mov", "qtrle", "argb"),
        ("c.mov", "png", "rgba"),
    ],
)
def test_transparent_videos_are_shown_over_the_background(tmp_path, name, codec, pixels):
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream(codec, rate=8, options={"auto-alt-ref": "0"} if codec == "libvpx" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(seen_through(i), format="rgba")
            frame.pts, frame.time_base = i, Fraction(1, 8)
            file.mux(stream.encode(frame.reformat(format=pixels)))
        file.mux(stream.encode(None))
    assert any("transparency" in note for note in open_video(tmp_path / name).notes)
    for background in ((0, 0, 0), (20, 160, 250)):
        frames = open_video(tmp_path / name, background=background).read().frames
        assert len(frames) == 3
        for frame in frames.int():
            around = torch.cat([frame[:12].flatten(0, 1), frame[52:].flatten(0, 1)])
            assert (around - torch.tensor(background)).abs().max() <= 3
            assert (frame[24:40, 24:40] - torch.tensor([220, 30, 30])).abs().max() <= 12


@pytest.mark.parametrize("opaque", [True, False])
def test_only_a_gif_with_transparent_pixels_is_called_transparent(tmp_path, opaque):
    frames = [Image.fromarray(seen_through(i), "RGBA") for i in range(2)]
    frames = [frame.convert("RGB") if opaque else frame for frame in frames]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert any("transparency" in note for note in open_video(tmp_path / "a.gif").notes) != opaque


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("pixels", ["rgba", "gbrap", "ya8", "yuva420p", "yuva422p", "yuva444p"])
@pytest.mark.parametrize("suffix", [".webm", ".mkv", ".mov"])
def test_transparent_frames_of_any_format_are_written(tmp_path, suffix, pixels, lossless):
    frames = [av.VideoFrame.from_ndarray(seen_through(i), format="rgba").reformat(format=pixels) for i in range(2)]
    write_video(tmp_path / f"a{suffix}", frames, Fraction(8), crf=None if lossless else 18)
    found = open_video(tmp_path / f"a{suffix}", background=(20, 160, 250)).read().frames.int()
    assert len(found) == 2 and (found[:, :12] - torch.tensor([20, 160, 250])).abs().max() <= 3
    inside = found[:, 24:40, 24:40].float().mean((0, 1, 2))
    assert (inside - torch.tensor([92.0] * 3 if pixels == "ya8" else [220.0, 30.0, 30.0])).abs().max() <= 12


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "webp", "tif"])
def test_transparent_pictures_are_shown_over_the_background(tmp_path, kind):
    picture = Image.fromarray(seen_through(), "RGBA")
    name = tmp_path / f"a.{kind if kind.islower() else 'png'}"
    if kind == "P":
        palette = Image.new("P", (64, 64), 1)
        palette.putpalette([220, 30, 30, 9, 99, 9])
        palette.paste(0, (16, 16, 48, 48))
        palette.save(name, transparency=1)
    else:
        (picture.convert("LA") if kind == "LA" else picture).save(
            name, **({"lossless": True} if kind == "webp" else {})
        )
    frame = open_video(name, background=(20, 160, 250)).read().frames[0]
    assert frame[5, 5].tolist() == [20, 160, 250]
    assert frame[30, 30].tolist() == ([87] * 3 if kind == "LA" else [220, 30, 30])
    half = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    half.save(tmp_path / "half.png")
    assert open_video(tmp_path / "half.png", background=(0, 0, 255)).read().frames[0, 0, 0].tolist() == [100, 50, 127]


def test_colours_by_name():
    assert colour_of("white") == (255, 255, 255) and colour_of("#102030") == (16, 32, 48)
    for wrong in ("", "nocolour", "#12", "300"):
        with pytest.raises(ValueError, match="unknown colour"):
            colour_of(wrong)


# --- pictures of every kind -------------------------------------------------------------------


def test_floats_and_many_bits(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    Image.fromarray(ramp, "F").save(tmp_path / "f.tif")
    Image.fromarray((ramp * 65535).astype(np.int32), "I").save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        assert np.abs(read_video(tmp_path / name).frames[0, 0, :, 1].int().numpy() - np.arange(256)).max() <= 1
    for name, values, message in (
        ("g.tif", 200 * ramp, "floats up to 200: scale"),
        ("h.tif", np.where(ramp > 0.5, np.nan, ramp).astype(np.float32), "floats up to nan"),
        ("j.tif", (ramp * 1e6).astype(np.int32), "whole numbers up to 1e"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(VideoError, match=message):
            read_video(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".tif", ".avif"])
def test_all_frames_of_an_animated_picture(tmp_path, suffix):
    pictures = [Image.fromarray(bars(i)) for i in range(6)]
    how = {".webp": {"lossless": True}, ".avif": {"quality": 95}}.get(suffix, {})
    pictures[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=pictures[1:], duration=120, loop=0, **how)
    found = open_video(tmp_path / f"a{suffix}")
    assert numbers(found.read()) == list(range(6))
    assert found.even and float(found.fps) == pytest.approx(8 if suffix == ".tif" else 25 / 3, abs=0.01)
    assert numbers(read_video(tmp_path / f"a{suffix}", start=1, stride=2)) == [1, 3, 5]
    assert numbers(open_video(tmp_path / f"a{suffix}", "0.25s", end="0.5s").read()) in ([2, 3], [3, 4])


def test_varying_times_of_animated_pictures_and_files_with_a_preview(tmp_path):
    pictures = [Image.fromarray(bars(i)) for i in range(3)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=[500, 0, 250])
    found = open_video(tmp_path / "a.png")
    assert [float(t) for t in found.times] == [0, 0.5, 0.6] and not found.even
    pictures[0].save(tmp_path / "b.tif", save_all=True, append_images=[pictures[1].resize((16, 16))])
    pictures[0].save(tmp_path / "c.jpg", "MPO", save_all=True, append_images=[pictures[1]])
    for name in ("b.tif", "c.jpg"):
        assert numbers(read_video(tmp_path / name)) == [0]


def test_pictures_with_special_characters_in_their_names(tmp_path):
    for name in ("my%20dog.png", "100%.png", "f_0001.png", "._f_0001.png"):
        Image.new("RGB", (8, 6), (90, 90, 90)).save(tmp_path / name)
    (tmp_path / "._f_0002.png").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    for name in ("my%20dog.png", "100%.png", "f_*.png", "f_%04d.png"):
        assert len(open_video(tmp_path / name)) == 1
    assert len(open_video(tmp_path / "*.png")) == len(open_video(Path(tmp_path))) == 3


def test_masks_of_transparent_pictures_are_black_where_transparent(tmp_path):
    Image.fromarray(seen_through(), "RGBA").save(tmp_path / "m.png")
    assert resize_to_fill(read_video(tmp_path / "m.png").frames, 16, 16)[0, 0, 0].tolist() == [0, 0, 0]
