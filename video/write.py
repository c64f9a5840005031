"""Write videos and pictures frame by frame, atomically."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from ..files.whole import remove_folder, temporary_folder, whole_file
from ..imports import Image, av, np, torch
from .orientation import SQUARE, Display
from .pictures import numbered, with_number
from .read import Sound, SoundTrack
from .stills import TRANSPARENT, pixels_of, save_frame

if TYPE_CHECKING:
    from torch import Tensor


Frame: TypeAlias = "Tensor | av.VideoFrame"
"""A frame to write: uint8 RGB (height, width, 3), or planes of any format."""


class FrameDigest:
    """SHA-256 of a stream of frames: pixels, sizes and order."""

    def __init__(self) -> None:
        self._sum = sha256()

    def passing(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        for frame in frames:
            for about, values in _contents(frame):
                self._sum.update(about.encode())
                self._sum.update(values.data)
            yield frame

    def __str__(self) -> str:
        return self._sum.hexdigest()


def _contents(frame: Frame) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(frame, torch.Tensor):
        yield str(tuple(frame.shape)), frame.cpu().contiguous().numpy()
        return
    from .planes import planes_of

    for plane in planes_of(frame):
        yield f"{frame.format.name} {plane.shape}", plane


@dataclass(frozen=True)
class _Audio:
    """The audio of a file format. rates: supported sample rates."""

    codec: str
    rates: tuple[int, ...]


_AAC = _Audio(
    "aac", (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
)  # fmt: skip
_AUDIO = {".mp4": _AAC, ".mov": _AAC, ".mkv": _AAC, ".webm": _Audio("libopus", (48000, 24000, 16000, 12000, 8000))}
VIDEO_SUFFIXES = (*_AUDIO, ".gif")
METADATA_SUFFIXES = tuple(_AUDIO)
"""Formats with text metadata."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LOSSY = (".gif", ".jpg", ".jpeg", ".webp")
_CLOCK = 90000
"""Ticks per second for frames that are not evenly spaced."""


def is_sequence(path: str | Path) -> bool:
    """Whether an output is many pictures: a folder ("frames/") or a pattern ("f_%04d.png")."""
    return str(path).endswith(("/", "\\")) or (numbered(Path(path)) and _suffix(path) in PICTURE_SUFFIXES)


def is_transparent(path: str | Path) -> bool:
    """Whether an output format can be transparent."""
    from .encoders import ALPHA

    suffix = _suffix(_pattern(path)) if is_sequence(path) else _suffix(path)
    return suffix in ALPHA or suffix in TRANSPARENT


def has_sound(path: str | Path) -> bool:
    """Whether an output format can have sound."""
    return not is_sequence(path) and _suffix(path) in _AUDIO


def check_lossless(path: str | Path) -> None:
    """Raise ValueError for an output format that loses detail."""
    if _suffix(path) in _LOSSY:
        raise ValueError(f"lossless: {_suffix(path)} loses detail: write .mkv, .mp4, .mov, .webm or .png")


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


CRF = 14
"""The default quality of H.264."""


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Frame],
    fps: Fraction,
    sound: Sound | SoundTrack | None = None,
    crf: int | None = CRF,
    times: Sequence[Fraction] | None = None,
    metadata: Mapping[str, str] | None = None,
    display: Display = SQUARE,
) -> Path:
    """Write frames, one at a time: H.264 with AAC, .webm VP9 with Opus, or a GIF.

    frames: uint8 (height, width, 3), or for `METADATA_SUFFIXES` frames as `VideoSource.stored` has them, whose format
    is kept where the codec has it, to be shown by `display`. A picture's suffix is for a single frame; a folder or a
    pattern gets a picture per frame (`is_sequence`). Pictures and GIFs have no sound. crf: of H.264, None for lossless
    video, in .mkv by FFV1. times: of each frame, in seconds; None if evenly spaced. metadata: texts by name, for
    `METADATA_SUFFIXES`. Odd sizes are padded by a pixel where the codec needs even ones; sound is resampled to a rate
    that the codec supports.

    Raises ValueError for an unknown suffix or no frame, and OSError if the disk fails.
    """
    if is_sequence(path):
        return _write_sequence(_pattern(path), frames)
    path = Path(path)
    with whole_file(path) as partial:
        try:
            if _suffix(path) in PICTURE_SUFFIXES:
                (frame,) = frames
                save_frame(frame, partial)
            elif _suffix(path) == ".gif":
                _write_gif(partial, map(pixels_of, frames), fps, times)
            elif _suffix(path) in _AUDIO:
                _encode(partial, frames, _Stream(fps, sound, crf, times, metadata or {}, display))
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


@dataclass(frozen=True)
class _Stream:
    """How frames are encoded, see `write_video`."""

    fps: Fraction
    sound: Sound | SoundTrack | None
    crf: int | None
    times: Sequence[Fraction] | None
    metadata: Mapping[str, str]
    display: Display


def _encode(path: Path, frames: Iterable[Frame], how: _Stream) -> None:
    settings = {"fflags": "+bitexact"}  # the same bytes for the same frames
    if path.suffix in (".mp4", ".mov"):
        settings["movflags"] = "+faststart+use_metadata_tags"
    from .encoders import encodable, encoder_for, options, tag

    coming = iter(frames)
    begin = list(islice(coming, 3))
    if not begin:
        raise ValueError(f"cannot write {path.name!r}: there is no frame")
    name = encoder_for(path.suffix.lower(), begin[0], how.crf is None)
    chosen = options(name, how.crf, how.display.mastering, len(begin))
    with av.open(f"file:{path}", "w", options=settings) as file:
        file.metadata.update(how.metadata)
        video = cast(av.VideoStream, file.add_stream(name, rate=how.fps, options=chosen))
        clock = 1 / how.fps if how.times is None else Fraction(1, _CLOCK)
        track = None
        for i, given in enumerate(chain(begin, coming)):
            frame = encodable(given, name)
            if i == 0:
                video.height, video.width, video.pix_fmt = frame.height, frame.width, frame.format.name
                video.codec_context.time_base = clock
                if name == "libx265" and path.suffix.lower() != ".mkv":
                    video.codec_context.codec_tag = "hvc1"  # as Apple's players need it
                if how.display.aspect != 1:
                    video.codec_context.sample_aspect_ratio = how.display.aspect
                if how.display.matrix is not None:
                    video.set_display_matrix(how.display.matrix)
                tag(video.codec_context, frame)
                track = how.sound and _Track(file, _AUDIO[path.suffix.lower()], how.sound)
            at = i / how.fps if how.times is None else how.times[i]
            frame.pts, frame.time_base = round(at / clock), clock
            file.mux(video.encode(frame))
            if track:
                track.write(until=at)
        file.mux(video.encode(None))
        if track:
            track.write(until=None)


class _Track:
    """Encodes sound into a file, interleaved with the frames."""

    def __init__(self, file: av.container.OutputContainer, audio: _Audio, sound: Sound | SoundTrack) -> None:
        rate = sound.rate if sound.rate in audio.rates else 48000
        self.file = file
        self.stream = cast(av.AudioStream, file.add_stream(audio.codec, rate=rate))
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


def _write_sequence(pattern: Path, frames: Iterable[Frame]) -> Path:
    """Write all the pictures or none, named by their numbers."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_folder(pattern.parent)
    try:
        names = []
        for i, frame in enumerate(frames):
            names.append(with_number(folder / pattern.name, i))
            save_frame(frame, names[-1])
        for name in names:
            name.replace(pattern.parent / name.name)
    finally:
        remove_folder(folder)
    return pattern
