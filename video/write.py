"""Write videos and pictures, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image
from torch import Tensor

from .read import Sound

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside the wanted one; it takes its place at the end, or goes on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_output(path: str | Path, frames: int) -> None:
    """Raise ValueError, before any work, for a file name that cannot take these frames."""
    suffix = Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES or (suffix in PICTURE_SUFFIXES and frames == 1):
        return
    kinds = VIDEO_SUFFIXES + (PICTURE_SUFFIXES if frames == 1 else ())
    raise ValueError(f"cannot write {frames} frames to {Path(path).name!r}: use one of {', '.join(kinds)}")


def write_video(path: str | Path, frames: Tensor, fps: Fraction, sound: Sound | None = None, crf: int = 14) -> Path:
    """Write uint8 frames (frames, height, width, 3) as H.264 with AAC sound.

    A picture's suffix takes a single frame. Odd sizes are padded by a pixel, for the codec
    needs even ones. Raises ValueError for an unknown suffix and OSError where the disk fails.
    """
    path = Path(path)
    check_output(path, len(frames))
    pixels = frames.cpu().numpy()
    with whole_file(path) as partial:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            Image.fromarray(pixels[0]).save(partial)
            return path
        try:
            _encode(partial, pixels, fps, sound, crf)
        except FFmpegError as error:
            raise OSError(f"could not write {path}: {error}") from error
    return path


def _encode(path: Path, pixels: np.ndarray, fps: Fraction, sound: Sound | None, crf: int) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "medium"})
        odd = ((0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0))
        video.height, video.width = pixels.shape[1] + odd[0][1], pixels.shape[2] + odd[1][1]
        video.pix_fmt = "yuv420p"
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=sound.rate)
            audio.layout = "mono" if len(sound.samples) == 1 else "stereo"
        for picture in pixels:
            even = np.ascontiguousarray(np.pad(picture, odd, "edge"))
            container.mux(video.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            for frame in _sound_frames(sound, audio.codec_context.frame_size or 1024):
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def _sound_frames(sound: Sound, size: int) -> Iterator[av.AudioFrame]:
    layout = "mono" if len(sound.samples) == 1 else "stereo"
    for at in range(0, sound.samples.shape[1], size):
        block = np.ascontiguousarray(sound.samples[:, at : at + size], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.rate, frame.pts, frame.time_base = sound.rate, at, Fraction(1, sound.rate)
        yield frame


def write_picture(path: str | Path, picture: Image.Image) -> Path:
    """Save a PIL picture."""
    path = Path(path)
    with whole_file(path) as partial:
        picture.save(partial)
    return path
