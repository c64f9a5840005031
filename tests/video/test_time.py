"""Timestamps of frames, and sound in sync with them."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from clips import beep_times, flash_times, flashes
from fatezero.video.fitted import FittedVideo
from fatezero.video.read import Sound, VideoError, open_video, read_video, seconds_of
from fatezero.video.write import write_video

VARYING = (
    *(Fraction(i, 25) for i in range(26)),
    *(1 + Fraction(i, 10) for i in range(1, 11)),
    *(2 + Fraction(i, 30) for i in range(1, 31)),
)
SECONDS = [0.0, 1.0, 2.0]
FORMATS = {
    "a.mp4": ("libx264", "aac"),
    "a.mov": ("libx264", "aac"),
    "prores.mov": ("prores_ks", "pcm_s16le"),
    "hevc.mp4": ("libx265", "aac"),
    "a.mkv": ("libx264", "aac"),
    "flac.mkv": ("libx264", "flac"),
    "vp8.webm": ("libvpx", "libopus"),
    "vp9.webm": ("libvpx-vp9", "libopus"),
    "h264.avi": ("libx264", "mp2"),
    "mpeg4.avi": ("mpeg4", "mp2"),
    "a.ts": ("libx264", "aac"),
    "a.mpg": ("mpeg2video", "mp2"),
}


def written(path, video: str, audio: str, **how):
    pixels = "yuv422p10le" if video == "prores_ks" else "yuv420p"
    return flashes(path, video, audio, pixels=pixels, **how)


def in_step(video, at=SECONDS, within=1 / 25) -> None:
    assert flash_times(video) == pytest.approx(at, abs=0.003)
    assert beep_times(video.sound) == pytest.approx(at, abs=within)


@pytest.mark.parametrize("name", FORMATS)
def test_frames_and_sound_are_in_sync_in_every_container(tmp_path, name):
    video = read_video(written(tmp_path / name, *FORMATS[name]))
    assert (len(video.frames), video.fps, video.times) == (75, 25, None)
    in_step(video)
    assert abs(video.sound.samples.shape[1] - 3 * video.sound.rate) <= 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_has_the_sound_of_its_time_span(tmp_path, name):
    video = read_video(written(tmp_path / name, *FORMATS[name]), start=20, count=40)
    in_step(video, [0.2, 1.2])
    strided = read_video(tmp_path / name, start=20, stride=5, count=8)
    assert strided.fps == 5
    in_step(strided, [0.2, 1.2])


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "vp9.webm"])
@pytest.mark.parametrize("late", [1.0, 7.48])
def test_clips_with_a_late_start(tmp_path, name, late):
    path = written(tmp_path / name, *FORMATS[name], late=late)
    in_step(read_video(path))
    in_step(read_video(path, start=20, count=40), [0.2, 1.2])
    assert read_video(path, count=8).sound is not None


@pytest.mark.parametrize(
    ("name", "out"), [("a.mp4", "o.mkv"), ("a.mkv", "o.mp4"), ("vp9.webm", "o.mov"), ("a.mkv", "o.webm")]
)
def test_varying_frame_times_are_kept_from_file_to_file(tmp_path, name, out):
    path = written(tmp_path / name, *FORMATS[name], times=VARYING, clock=Fraction(1, 90000))
    found = open_video(path)
    assert not found.even
    write_video(tmp_path / out, found.frames(), found.fps, found.sound(), times=found.times)
    again = read_video(tmp_path / out)
    assert [float(t) for t in again.times] == pytest.approx([float(t) for t in VARYING], abs=0.002)
    in_step(again, [0.0, 1.0, 2.0, 3.0])


def test_varying_frame_times_at_a_given_rate(tmp_path):
    path = written(tmp_path / "a.mp4", *FORMATS["a.mp4"], times=VARYING, clock=Fraction(1, 90000))
    found = open_video(path, fps=Fraction(20))
    assert found.even and found.fps == 20 and len(found) == pytest.approx(61, abs=1)
    assert flash_times(found.read()) == pytest.approx([0, 1, 2, 3], abs=0.05)
    part = open_video(path, 15, fps=Fraction(20)).read()
    assert flash_times(part) == pytest.approx([0.25, 1.25, 2.25], abs=0.05)
    assert beep_times(part.sound) == pytest.approx([0.25, 1.25, 2.25], abs=0.005)


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), Fraction(60)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_rates_survive(tmp_path, fps, suffix):
    times = tuple(i / fps for i in range(40))
    kind = FORMATS["vp9.webm" if suffix == ".webm" else "a.mp4"]
    path = written(tmp_path / f"a{suffix}", *kind, times=times)
    assert (read_video(path).fps, read_video(path).times) == (fps, None)
    write_video(tmp_path / f"b{suffix}", open_video(path).frames(), fps)
    assert open_video(tmp_path / f"b{suffix}").fps == fps


@pytest.mark.parametrize("clock", [1, 2])
def test_h264_in_avi_has_its_own_rate(tmp_path, clock):
    """If every other tick of AVI's clock is empty, the file's rate is twice the true one."""
    path = flashes(tmp_path / "a.avi", audio="mp2", clock=Fraction(1, 25 * clock))
    assert open_video(path).fps == 25
    in_step(read_video(path))


@pytest.mark.parametrize("rate", [6000, 11025, 96000, 192000])
@pytest.mark.parametrize("out", ["o.mp4", "o.webm"])
def test_any_sample_rate_is_written(tmp_path, rate, out):
    t = np.arange(3 * rate) / rate
    wave = (0.5 * np.sin(2 * np.pi * 880 * t) * (t % 1.0 < 0.1)).astype(np.float32)
    dark = torch.full((75, 48, 64, 3), 20, dtype=torch.uint8)
    dark[[i for i in range(75) if i % 25 < 2]] = 235
    in_step(read_video(write_video(tmp_path / out, dark, Fraction(25), Sound(wave[None], rate))))


def test_sound_that_starts_later_or_ends_earlier_than_the_picture(tmp_path):
    sound = Sound(np.full((1, 24000), 0.5, np.float32), 48000)
    path = write_video(tmp_path / "a.mp4", torch.zeros(25, 32, 32, 3, dtype=torch.uint8), Fraction(25), sound)
    read = read_video(path).sound.samples
    assert read.shape == (1, 48000) and abs(read[0, 12000] - 0.5) < 0.05 and np.abs(read[0, 30000:]).max() < 1e-3


# --- which frames ----------------------------------------------------------------------------


def numbers(video) -> list[int]:
    return [round(float(frame.float().mean()) / 3) for frame in video.frames]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """80 frames at 10 a second, frame i of brightness 3 i, a key frame every twelve."""
    frames = torch.stack([torch.full((32, 48, 3), 3 * i, dtype=torch.uint8) for i in range(80)])
    folder = tmp_path_factory.mktemp("counted")
    import av

    with av.open(str(folder / "c.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"g": "12", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        file.mux(stream.encode(None))
    return folder / "c.mp4"


@pytest.mark.parametrize(("start", "stride", "count"), [(0, 1, 80), (70, 1, 10), (50, 3, 8), (1, 26, 4), (79, 1, 1)])
def test_frames_are_found_by_number_from_any_start_of_decoding(counted, start, stride, count):
    video = read_video(counted, start, stride, count)
    assert numbers(video) == list(range(start, start + stride * count, stride))


def test_a_late_start_is_found_by_seeking(counted, monkeypatch):
    import fatezero.video.read as reading

    decoded = []
    plain = reading.FrameIndex._numbered

    def counting(self, *given):
        for number, frame in plain(self, *given):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(reading.FrameIndex, "_numbered", counting)
    assert numbers(read_video(counted, start=75, count=2)) == [75, 76]
    keys = open_video(counted).index.keys
    assert min(decoded) == max(key for key in keys if key <= 75)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (3, 6, [3, 4, 5]),
        ("0.3s", "0.6s", [3, 4, 5]),
        ("0:07.8", None, [78, 79]),
        (78, 500, [78, 79]),
        ("0.25s", 4, [3]),
    ],
)
def test_start_and_end_in_frames_and_seconds(counted, start, end, expected):
    assert numbers(open_video(counted, start, end=end).read()) == expected


@pytest.mark.parametrize("wrong", ["", "s", "-1s", "1.5", "1:2:3:4", "nans", "infs", "two"])
def test_invalid_times(wrong):
    with pytest.raises(ValueError, match="invalid time"):
        seconds_of(wrong)


def test_an_end_before_the_start_and_too_few_frames(counted):
    with pytest.raises(VideoError, match="no frame from 5 on and before 5"):
        open_video(counted, 5, end=5)
    with pytest.raises(VideoError, match="has 3 frames from 2 to 5 .*, but 4 are needed"):
        open_video(counted, 2, 1, 4, end=5)
    for wrong in (0, -1, 1e9, float("nan")):
        with pytest.raises(ValueError, match="fps is"):
            open_video(counted, fps=wrong)


def test_a_source_is_opened_without_decoding_and_decoded_once(counted, monkeypatch):
    from fatezero.video import colour

    calls = []
    plain = colour.to_rgb
    monkeypatch.setattr(colour, "to_rgb", lambda *given: calls.append(1) or plain(*given))
    fitted = FittedVideo.of(open_video(counted, 10, 1, 20), (0, 0, 0, 0), (24, 16))
    assert calls == []
    assert sum(1 for _ in fitted.frames()) == len(fitted) == 20
    assert len(calls) == 20
