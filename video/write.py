"""Write videos and pictures frame by frame, atomically."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..files.whole import remove_folder, temporary_folder, whole_file
from ..imports import Image, av, np, torch
from .pictures import numbered, with_number
from .read import Sound, SoundTrack

if TYPE_CHECKING:
    from torch import Tensor


class FrameDigest:
    """SHA-256 of a stream of frames: pixels, sizes and order."""

    def __init__(self) -> None:
        self._sum = sha256()

    def passing(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        for frame in frames:
            self._sum.update(str(tuple(frame.shape)).encode())
            self._sum.update(frame.cpu().contiguous().numpy().data)
            yield frame

    def __str__(self) -> str:
        return self._sum.hexdigest()


@dataclass(frozen=True)
class _Codecs:
    """Codecs of a file format. rates: supported sample rates of its audio."""

    video: str
    audio: str
    rates: tuple[int, ...]


_AAC = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_H264 = _Codecs("libx264", "aac", _AAC)
_CODECS = {
    ".mp4": _H264,
    ".mov": _H264,
    ".mkv": _H264,
    ".webm": _Codecs("libvpx-vp9", "libopus", (48000, 24000, 16000, 12000, 8000)),
}
VIDEO_SUFFIXES = (*_CODECS, ".gif")
METADATA_SUFFIXES = tuple(_CODECS)
"""Formats with text metadata."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_CLOCK = 90000
"""Ticks per second for frames that are not evenly spaced."""


def is_sequence(path: str | Path) -> bool:
    """Whether an output is many pictures: a folder ("frames/") or a pattern ("f_%04d.png")."""
    return str(path).endswith(("/", "\\")) or (numbered(Path(path)) and _suffix(path) in PICTURE_SUFFIXES)


def has_sound(path: str | Path) -> bool:
    """Whether an output format can have sound."""
    return not is_sequence(path) and _suffix(path) in _CODECS


def shortcomings(
    path: str | Path, fps: Fraction, count: int, sound: bool, times: Sequence[Fraction] | None = None
) -> list[str]:
    """Warnings about what an output format will lose. sound: whether there is any."""
    found = []
    if sound and not has_sound(path):
        found.append(f"{path} will have no sound: the format has none")
    if not is_sequence(path) and _suffix(path) == ".gif":
        written = len(_gif_frames(fps, count, times))
        if written < count:
            found.append(f"{path} will have {written} of the {count} frames: browsers play GIFs at up to 50 frames/s")
    return found


def output_files(path: str | Path, frames: int) -> list[Path]:
    """The files that frames are written to; ValueError for an unsuitable name."""
    if is_sequence(path):
        return [with_number(_pattern(path), i) for i in range(frames)]
    path = Path(path)
    suffix = _suffix(path)
    if suffix in PICTURE_SUFFIXES and frames > 1:
        raise ValueError(
            f"cannot write {frames} frames to a single picture {path.name}: use a folder ({path.stem}/), a pattern "
            f"({path.stem}_%04d{suffix}) or a video ({', '.join(VIDEO_SUFFIXES)})"
        )
    if suffix not in VIDEO_SUFFIXES + PICTURE_SUFFIXES:
        kinds = VIDEO_SUFFIXES + (PICTURE_SUFFIXES if frames == 1 else ())
        count = "1 frame" if frames == 1 else f"{frames} frames"
        raise ValueError(f"cannot write {count} to {path.name!r}: use one of {', '.join(kinds)}")
    return [path]


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: Fraction,
    sound: Sound | SoundTrack | None = None,
    crf: int = 14,
    times: Sequence[Fraction] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write uint8 frames (height, width, 3), one at a time: H.264 with AAC, .webm VP9 with Opus, or a GIF.

    A picture's suffix is for a single frame; a folder or a pattern gets a picture per frame (`is_sequence`). Pictures
    and GIFs have no sound. times: of each frame, in seconds; None if evenly spaced. metadata: texts by name, for
    `METADATA_SUFFIXES`. Odd sizes are padded by a pixel, since the codecs need even ones; sound is resampled to a
    rate that the codec supports.

    Raises ValueError for an unknown suffix or no frame, and OSError if the disk fails.
    """
    pictures = (frame.cpu().numpy() for frame in frames)
    if is_sequence(path):
        return _write_sequence(_pattern(path), pictures)
    path = Path(path)
    with whole_file(path) as partial:
        try:
            if _suffix(path) in PICTURE_SUFFIXES:
                (picture,) = pictures
                Image.fromarray(picture).save(partial, quality=95)
            elif _suffix(path) == ".gif":
                _write_gif(partial, pictures, fps, times)
            elif _suffix(path) in _CODECS:
                _encode(partial, _CODECS[_suffix(path)], pictures, fps, sound, crf, times, metadata or {})
            else:
                raise ValueError(f"cannot write {path.name!r}: use one of {', '.join(VIDEO_SUFFIXES)}")
        except av.error.FFmpegError as error:
            raise OSError(f"could not write {path}: {error}") from error
    return path


def write_picture(path: str | Path, picture: Image.Image) -> Path:
    """Save a PIL picture."""
    path = Path(path)
    with whole_file(path) as partial:
        picture.save(partial)
    return path


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


# --- videos -------------------------------------------------------------------------------


def _encode(
    path: Path,
    codecs: _Codecs,
    pictures: Iterable[np.ndarray],
    fps: Fraction,
    sound: Sound | SoundTrack | None,
    crf: int,
    times: Sequence[Fraction] | None,
    metadata: Mapping[str, str],
) -> None:
    settings = {"fflags": "+bitexact"}  # the same bytes for the same frames
    if path.suffix in (".mp4", ".mov"):
        settings["movflags"] = "+faststart+use_metadata_tags"
    from .colour import tag, to_yuv

    with av.open(f"file:{path}", "w", options=settings) as file:
        file.metadata.update(metadata)
        options = {"crf": str(2 * crf), "b": "0", "row-mt": "1"}
        if codecs is _H264:
            options = {"crf": str(crf), "preset": "medium", **_steady_x264()}
        video = cast(av.VideoStream, file.add_stream(codecs.video, rate=fps, options=options))
        clock = 1 / fps if times is None else Fraction(1, _CLOCK)
        track = None
        for i, picture in enumerate(pictures):
            if i == 0:
                height, width = (side + side % 2 for side in picture.shape[:2])
                video.height, video.width, video.pix_fmt = height, width, "yuv420p"
                video.codec_context.time_base = clock
                tag(video.codec_context, height)
                track = sound and _Track(file, codecs, sound)
            odd = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
            frame = to_yuv(np.pad(picture, odd, "edge"), "yuv420p")
            at = i / fps if times is None else times[i]
            frame.pts, frame.time_base = round(at / clock), clock
            file.mux(video.encode(frame))
            if track:
                track.write(until=at)
        file.mux(video.encode(None))
        if track:
            track.write(until=None)


def _steady_x264() -> dict[str, str]:
    """Options that disable AVX-512 in x264, whose output may vary from run to run with it.

    x264 does not check that the CPU supports `asm`; a CPU with AVX-512 supports AVX2.
    """
    return {"x264-params": "asm=AVX2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


class _Track:
    """Encodes sound into a file, interleaved with the frames."""

    def __init__(self, file: av.container.OutputContainer, codecs: _Codecs, sound: Sound | SoundTrack) -> None:
        rate = sound.rate if sound.rate in codecs.rates else 48000
        self.file = file
        self.stream = cast(av.AudioStream, file.add_stream(codecs.audio, rate=rate))
        self.layout = "mono" if sound.channels == 1 else "stereo"
        self.stream.layout = self.layout
        self.rate = sound.rate
        self.resampler = av.AudioResampler(format=self.stream.codec_context.format.name, layout=self.layout, rate=rate)
        self.blocks: Iterator[np.ndarray] = sound.blocks()
        self.done = 0

    def write(self, until: Fraction | None) -> None:
        """Encode the sound up to a time in seconds; None for the rest."""
        while until is None or self.done < until * self.rate:
            block = next(self.blocks, None)
            if block is None:
                if until is None:
                    for frame in self.resampler.resample(None):
                        self.file.mux(self.stream.encode(frame))
                    self.file.mux(self.stream.encode(None))
                return
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(block, np.float32), format="fltp", layout=self.layout
            )
            frame.rate, frame.pts, frame.time_base = self.rate, self.done, Fraction(1, self.rate)
            self.done += block.shape[1]
            for resampled in self.resampler.resample(frame):
                self.file.mux(self.stream.encode(resampled))


def _write_gif(path: Path, pictures: Iterator[np.ndarray], fps: Fraction, times: Sequence[Fraction] | None) -> None:
    """Write a looping GIF with a palette per frame; its durations are in hundredths of a second."""
    shown = [Image.fromarray(picture).quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    chosen = _gif_frames(fps, len(shown), times)
    first, *more = (shown[i] for i, _ in chosen)
    durations = [10 * hundredths for _, hundredths in chosen]
    first.save(path, save_all=True, append_images=more, duration=durations, loop=0, optimize=False)


def _gif_frames(fps: Fraction, count: int, times: Sequence[Fraction] | None) -> list[tuple[int, int]]:
    """The frames of a GIF, each with its duration in hundredths of a second.

    Browsers play durations below two hundredths as a tenth of a second, so frames that come faster are dropped.
    """
    at = [i / fps for i in range(count + 1)] if times is None else [*times, times[-1] + 1 / fps]
    ticks = [round(100 * t) for t in at]
    kept = [0]
    for i in range(1, count):
        if ticks[i] - ticks[kept[-1]] >= _LEAST_DELAY and ticks[count] - ticks[i] >= min(_LEAST_DELAY, ticks[count]):
            kept.append(i)
    ends = [ticks[i] for i in kept[1:]] + [ticks[count]]
    return [(i, max(_LEAST_DELAY, end - ticks[i])) for i, end in zip(kept, ends, strict=True)]


_LEAST_DELAY = 2
"""Hundredths of a second."""


# --- many pictures ------------------------------------------------------------------------


def _pattern(path: str | Path) -> Path:
    """The pattern of a sequence's names; 00000.png, 00001.png, ... in a folder."""
    return Path(path) if numbered(Path(path)) else Path(path) / "%05d.png"


def _write_sequence(pattern: Path, pictures: Iterator[np.ndarray]) -> Path:
    """Write all the pictures or none, named by their numbers."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_folder(pattern.parent)
    try:
        names = []
        for i, picture in enumerate(pictures):
            names.append(with_number(folder / pattern.name, i))
            Image.fromarray(picture).save(names[-1], quality=95)
        for name in names:
            name.replace(pattern.parent / name.name)
    finally:
        remove_folder(folder)
    return pattern
