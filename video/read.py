"""Read frames and sound from a file with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image
from torch import Tensor


class VideoError(ValueError):
    """A file that gives no frames, or fewer than asked for."""


@dataclass(frozen=True)
class Sound:
    """samples: float32 (channels, n) in -1..1. rate: samples a second."""

    samples: np.ndarray
    rate: int


@dataclass(frozen=True)
class Video:
    """frames: uint8 (frames, height, width, 3). fps: of these frames. sound: of their time."""

    frames: Tensor
    fps: Fraction
    sound: Sound | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames.shape[2], self.frames.shape[1]


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FOLDER_FPS = Fraction(8)
"""The frame rate of a folder of pictures, which tells none."""


def read_video(
    path: str | Path, start: int = 0, stride: int = 1, count: int | None = None, at_most: int | None = None
) -> Video:
    """Decode frames start, start + stride, ... of a video, a picture or a folder of pictures.

    count: how many frames, None for all that follow, or the first `at_most` of them. The
    rate is divided by the stride, so the time the frames take is kept, and the sound is cut
    to that time.

    Raises FileNotFoundError; VideoError for an empty file, one that is no video, and one
    with fewer frames than asked for; ValueError for numbers out of range.
    """
    path = Path(path)
    if start < 0 or stride < 1 or (count is not None and count < 1):
        raise ValueError(f"start={start}, stride={stride}, count={count}: start from 0; stride and count from 1")
    taken = at_most if count is None else count
    if path.is_dir():
        return _read_folder(path, start, stride, count, taken)
    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video")
            rate = container.streams.video[0].average_rate or Fraction(1)
            last = None if taken is None else start + stride * (taken - 1)
            frames = [frame for i, frame in _numbered(container, last) if i >= start and (i - start) % stride == 0]
    except FFmpegError as error:
        raise VideoError(f"{path} is not a readable video: {error}") from error
    _check_count(path, len(frames), start, stride, count)
    fps = Fraction(rate) / stride
    sound = _read_sound(path, float(start / Fraction(rate)), float(len(frames) / fps))
    return Video(torch.from_numpy(np.stack(frames)), fps, sound)


def _check_count(path: Path, found: int, start: int, stride: int, count: int | None) -> None:
    if not found:
        raise VideoError(f"{path} has no frame from number {start} on")
    if count is not None and found < count:
        raise VideoError(f"{path} gives {found} frames from {start} in steps of {stride}, but {count} are needed")


def _read_folder(path: Path, start: int, stride: int, count: int | None, taken: int | None) -> Video:
    names = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)[start::stride][:taken]
    _check_count(path, len(names), start, stride, count)
    frames = [np.asarray(Image.open(name).convert("RGB")) for name in names]
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"the pictures in {path} differ in size")
    return Video(torch.from_numpy(np.stack(frames)), FOLDER_FPS / stride)


def _numbered(container: av.container.InputContainer, last: int | None) -> Iterator[tuple[int, np.ndarray]]:
    for i, frame in enumerate(container.decode(video=0)):
        turned = round(getattr(frame, "rotation", 0) / 90) % 4
        yield i, np.rot90(frame.to_ndarray(format="rgb24"), turned).copy()
        if last is not None and i >= last:
            return


def _read_sound(path: Path, start: float, seconds: float) -> Sound | None:
    """The sound of a span of time; None where there is none."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        rate, layout = stream.rate, "mono" if stream.channels == 1 else "stereo"
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        blocks: list[np.ndarray] = []
        offset: float | None = None
        for frame in container.decode(audio=0):
            at = float(frame.time or 0.0)
            if at + frame.samples / frame.sample_rate <= start:
                continue
            if at >= start + seconds:
                break
            offset = at if offset is None else offset
            blocks += [block.to_ndarray() for block in resampler.resample(frame)]
        blocks += [block.to_ndarray() for block in resampler.resample(None)]
    if not blocks or offset is None:
        return None
    samples = np.concatenate(blocks, axis=1)
    skip = round((start - offset) * rate)
    if skip < 0:  # sound that begins after the picture
        samples = np.pad(samples, ((0, 0), (-skip, 0)))
    return Sound(samples[:, max(skip, 0) : max(skip, 0) + round(seconds * rate)], rate)
