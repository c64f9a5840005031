import random
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clips import flashes
from fatezero.video.read import Sound, VideoError, open_video, read_video
from fatezero.video.write import output_files, write_video


def moving_bars(frames=10, height=32, width=48):
    """Grey bars that identify their frame: frame i has brightness 20 i."""
    return torch.stack([torch.full((height, width, 3), 20 * i, dtype=torch.uint8) for i in range(frames)])


def tone(seconds, rate=44100, channels=2):
    """A tone that rises in steps of 100 ms, so that its pitch identifies a span."""
    t = np.arange(int(seconds * rate)) / rate
    frequency = 400 + 100 * np.floor(t / 0.1)
    wave = 0.5 * np.sin(2 * np.pi * np.cumsum(frequency) / rate)
    return Sound(np.stack([wave] * channels).astype(np.float32), rate)


def pitch(sound):
    spectrum = np.abs(np.fft.rfft(sound.samples[0]))
    return np.fft.rfftfreq(sound.samples.shape[1], 1 / sound.rate)[spectrum.argmax()]


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", moving_bars(), Fraction(10), tone(1.0))


def brightness(video):
    return [round(float(frame.float().mean()) / 20) for frame in video.frames]


def test_frames_rate_and_sound_survive(clip):
    video = read_video(clip)
    assert brightness(video) == list(range(10))
    assert video.fps == 10
    assert video.size == (48, 32)
    assert video.sound is not None
    assert video.sound.rate == 44100
    assert video.sound.samples.shape == (2, 44100)


def test_fractional_rates_survive(tmp_path):
    path = write_video(tmp_path / "ntsc.mp4", moving_bars(), Fraction(30000, 1001))
    assert read_video(path).fps == Fraction(30000, 1001)


def test_start_stride_and_count_select_frames_and_their_sound(clip):
    video = read_video(clip, start=3, stride=2, count=2)
    assert brightness(video) == [3, 5]
    assert video.fps == 5
    assert video.sound.samples.shape[1] == pytest.approx(0.4 * 44100, abs=1)
    one = read_video(clip, start=6, count=1)
    assert pitch(one.sound) == pytest.approx(1000, abs=25), "the sound from 0.6 s to 0.7 s"


def test_at_most_reads_fewer_frames_if_the_clip_is_short(clip):
    assert len(read_video(clip, at_most=8).frames) == 8
    assert len(read_video(clip, start=5, at_most=8).frames) == 5


def test_a_second_round_trip_keeps_the_sound_in_place(clip, tmp_path):
    video = read_video(clip)
    again = read_video(write_video(tmp_path / "again.mp4", video.frames, video.fps, video.sound), start=6, count=1)
    assert pitch(again.sound) == pytest.approx(1000, abs=25)


def test_mono_sound(tmp_path):
    path = write_video(tmp_path / "mono.mp4", moving_bars(), Fraction(10), tone(1.0, channels=1))
    assert read_video(path).sound.samples.shape[0] == 1


def test_more_frames_than_the_clip_has(clip):
    with pytest.raises(VideoError, match="has 7 frames from 3 .*, but 8 are needed"):
        read_video(clip, start=3, count=8)
    with pytest.raises(VideoError, match="no frame from 10"):
        read_video(clip, start=10)


def test_files_that_are_not_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video at"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is empty"):
        read_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    with pytest.raises(VideoError, match="not a readable video"):
        read_video(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(tone(0.1).samples[:, :1024], format="fltp", layout="stereo")
        frame.rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_a_truncated_file_gives_its_remaining_frames(clip):
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    found = open_video(clip)
    assert 0 < len(found) < 10
    assert any("truncated" in note for note in found.notes)
    with pytest.raises(VideoError, match=f"has {len(found)} frames from 0"):
        open_video(clip, count=10)
    assert brightness(read_video(clip, count=len(found) - 1)) == list(range(len(found) - 1))


@pytest.mark.parametrize("wrong", [{"start": -1}, {"stride": 0}, {"count": 0}])
def test_numbers_out_of_range(clip, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        read_video(clip, **wrong)


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    Image.new("RGB", (30, 20), (200, 100, 0)).save(tmp_path / "p.png")
    video = read_video(tmp_path / "p.png")
    assert video.frames.shape == (1, 20, 30, 3)
    written = write_video(tmp_path / "q.png", video.frames, video.fps)
    assert np.asarray(Image.open(written))[0, 0].tolist() == [200, 100, 0]


def test_a_folder_of_pictures_in_the_order_of_names(tmp_path):
    for i, frame in enumerate(moving_bars(4)):
        Image.fromarray(frame.numpy()).save(tmp_path / f"{i:04d}.png")
    assert brightness(read_video(tmp_path, start=1, stride=2)) == [1, 3]
    Image.new("RGB", (5, 5)).save(tmp_path / "0009.png")
    with pytest.raises(VideoError, match="differ in size"):
        read_video(tmp_path)


def test_odd_sizes_are_padded_for_the_codec(tmp_path):
    path = write_video(tmp_path / "odd.mp4", moving_bars(3, 31, 47), Fraction(10))
    assert read_video(path).size == (48, 32)


def test_output_names_are_checked_before_any_work(tmp_path):
    for name, frames in (("a.mp4", 8), ("a.webm", 8), ("a.gif", 8), ("a.png", 1), ("new/", 8), ("f_%04d.jpg", 8)):
        assert len(output_files(f"{tmp_path}/{name}", frames)) in (1, frames)
    for name, frames in (("a.wmv", 8), ("a.png", 8), ("a", 1)):
        with pytest.raises(ValueError, match="cannot write"):
            output_files(tmp_path / name, frames)
    with pytest.raises(ValueError, match="several numbers"):
        output_files("f_%04d_%04d.png", 2)
    names = {
        "my%20dog.png": "my%20dog.png", "f_%d.png": "f_0.png", "100%_%03d.png": "100%_000.png", "%04d.webp": "0000.webp"
    }  # fmt: skip
    for name, first in names.items():
        assert output_files(name, 1)[0].name == first


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        from fatezero.video.write import whole_file

        with whole_file(path) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "vp9.webm"])
def test_damaged_files_give_frames_or_are_refused_in_one_line(tmp_path, name):
    video, audio = ("libvpx-vp9", "libopus") if name.endswith("webm") else ("libx264", "aac")
    whole = flashes(tmp_path / name, video, audio).read_bytes()
    draw = random.Random(name)
    for _ in range(10):
        damaged = bytearray(whole)
        at = draw.randrange(len(whole))
        if draw.random() < 0.5:
            damaged[at : at + 40] = draw.randbytes(draw.randrange(40))
        else:
            del damaged[at : at + draw.randrange(3000)]
        (tmp_path / name).write_bytes(damaged)
        with suppress(VideoError):
            assert read_video(tmp_path / name).frames.shape[1:] == (48, 64, 3)
