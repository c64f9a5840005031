"""Clips of flashes and beeps, in any container, with any clock."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BRIGHT, DARK = 235, 20


def bars(i: int) -> np.ndarray:
    """A picture of 64x64 with its number as six bars and a mark in its upper left corner."""
    picture = np.full((64, 64, 3), 40, np.uint8)
    for bit in range(6):
        picture[10:, 4 + 10 * bit : 12 + 10 * bit] = 220 if i >> bit & 1 else 90
    picture[:8, :8] = (30, 220, 30)
    return picture


def number(picture) -> int:
    """The number shown by a picture of `bars`."""
    picture = np.asarray(picture)
    return sum(1 << bit for bit in range(6) if picture[20:54, 6 + 10 * bit : 10 + 10 * bit].mean() > 150)


def counted(
    path: Path, codec: str = "libx264", frames: int = 24, rate: int = 10, format: str | None = None, skip: int = 0,
    late: int = 0, sound: bool = False,
) -> Path:  # fmt: skip
    """Numbered frames, a key frame every twelve, with B-frames where there are any. skip: packets dropped at the
    start. late: frames by which they start after 0. sound: tones that encode the frame at their time.
    """
    options = {"libx264": {"crf": "4", "g": "12", "bf": "2", "sc_threshold": "0"}}.get(codec, {"g": "12", "bf": "2"})
    options |= {"x265-params": "log-level=none:keyint=12"} if codec == "libx265" else {}
    with av.open(str(path), "w", format=format) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        track = file.add_stream("aac", rate=48000) if sound else None
        if track:
            track.layout = "mono"
        packets = []
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(bars(i), format="rgb24")
            frame.pts, frame.time_base = i + late, Fraction(1, rate)
            packets += stream.encode(frame)
        for packet in (packets + stream.encode(None))[skip:]:
            file.mux(packet)
        if track:
            t = np.arange(48000 * frames // rate)
            wave = 0.3 * np.sin(np.cumsum(2 * np.pi * (400 + 200 * (t * rate // 48000)) / 48000))
            part = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
            part.rate, part.pts = 48000, 48000 * late // rate
            file.mux(track.encode(part))
            file.mux(track.encode(None))
    return path


def heard_at(sound, second: float, rate: int = 10) -> int:
    """The frame whose tone (of `counted`) is heard at a time."""
    part = sound.samples[0][int(second * sound.rate) + 600 : int((second + 1 / rate) * sound.rate) - 600]
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 1 << 16))
    return round((spectrum.argmax() * sound.rate / (1 << 16) - 400) / 200)


def lit(t: float) -> bool:
    """Whether the clip flashes and beeps at a time: in the first tenth of every second."""
    return t % 1.0 < 0.1 - 1e-9


def flashes(
    path: Path,
    video: str = "libx264",
    audio: str | None = "aac",
    times: Sequence[Fraction] = tuple(Fraction(i, 25) for i in range(75)),
    *,
    late: float = 0,
    rate: int = 48000,
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    clock: Fraction | None = None,
    **context: object,
) -> Path:
    """Write frames at given times, grey except for flashes, and beeps. late: seconds by which both start after 0.

    clock: the time base; context: attributes of the video's codec context.
    """
    fps = Fraction(len(times) - 1) / (times[-1] - times[0])
    with av.open(str(path), "w") as file:
        stream = file.add_stream(video, rate=fps.limit_denominator(1001), options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = clock = clock or 1 / fps
        sound = file.add_stream(audio, rate=rate) if audio else None
        if sound:
            sound.layout = "stereo"
        for t in times:
            grey = np.full((size[1], size[0], 3), BRIGHT if lit(float(t)) else DARK, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round((t + Fraction(late)) / clock), clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            _beeps(file, sound, float(times[-1] - times[0] + 1 / fps), rate, late)
    return path


def _beeps(file, sound, seconds: float, rate: int, late: float) -> None:
    t = np.arange(int(seconds * rate)) / rate
    wave = (0.5 * np.sin(2 * np.pi * 880 * t) * (t % 1.0 < 0.1)).astype(np.float32)
    resampler = av.AudioResampler(format=sound.codec_context.format.name, layout="stereo", rate=rate)
    size = sound.codec_context.frame_size or 1024
    for at in range(0, len(wave), size):
        block = np.ascontiguousarray(np.stack([wave[at : at + size]] * 2))
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.rate, frame.pts, frame.time_base = rate, at + round(late * rate), Fraction(1, rate)
        for resampled in resampler.resample(frame):
            file.mux(sound.encode(resampled))
    file.mux(sound.encode(None))


def flash_times(video) -> list[float]:
    """When the frames of a `Video` become bright."""
    bright = video.frames.float().mean((1, 2, 3)) > (BRIGHT + DARK) / 2
    times = video.times or [i / video.fps for i in range(len(bright))]
    return [float(t) for i, t in enumerate(times) if bright[i] and (i == 0 or not bright[i - 1])]


def beep_times(sound) -> list[float]:
    """When a `Sound` becomes loud."""
    loud = np.flatnonzero(np.abs(sound.samples[0]) > 0.1)
    begins = loud[np.insert(np.diff(loud) > sound.rate // 10, 0, True)]
    return [float(at) / sound.rate for at in begins]
