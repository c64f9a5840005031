"""Clips of flashes and beeps, in any container, with any clock."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BRIGHT, DARK = 235, 20


def lit(t: float) -> bool:
    """Whether it flashes and beeps: in the first tenth of every second."""
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
    """Write frames at their times, grey but for the flashes, and the beeps. late: seconds by which both begin after 0.

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
