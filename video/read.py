"""Read frames and sound from files, one at a time, each at its own time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import ceil, floor
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageOps
from torch import Tensor

from ..files.whole import check_name
from .colour import hdr_kind, to_rgb
from .pictures import VideoError, picture_files
from .which import Moment, seconds_of

_DAMAGE = (FFmpegError, IndexError)
"""What a damaged file makes PyAV raise; the second where streams come up that its head does not name."""


FOLDER_FPS = Fraction(8)
"""The frame rate of a folder of pictures, which tells none."""


# --- sound ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """samples: float32 (channels, n) in -1..1. rate: samples a second."""

    samples: np.ndarray
    rate: int

    @property
    def channels(self) -> int:
        return len(self.samples)

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples, some at a time: (channels, n) each."""
        yield from np.array_split(self.samples, max(1, self.samples.shape[1] // self.rate), axis=1)


@dataclass(frozen=True)
class SoundTrack:
    """The sound of a span of a file's time, read as it is asked for. start, seconds: on the file's own clock."""

    path: Path
    start: Fraction
    seconds: Fraction
    rate: int
    channels: int

    @property
    def length(self) -> int:
        """How many samples there are: silence stands where the file has none."""
        return round(self.seconds * self.rate)

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples, some at a time: float32 (channels, n) each, `length` in all."""
        done = 0
        for at, samples in self._decoded():
            skip = done - at
            if skip >= samples.shape[1]:
                continue
            if skip < 0:  # sound that begins after the picture, or a gap in it
                gap = min(-skip, self.length - done)
                yield np.zeros((self.channels, gap), np.float32)
                done += gap
            part = samples[:, max(skip, 0) :][:, : self.length - done]
            yield part
            done += part.shape[1]
            if done >= self.length:
                return
        if done < self.length:
            yield np.zeros((self.channels, self.length - done), np.float32)

    def read(self) -> Sound:
        return Sound(np.concatenate(list(self.blocks()), axis=1), self.rate)

    def _decoded(self) -> Iterator[tuple[int, np.ndarray]]:
        """Samples, and where they begin, counted from the span's start."""
        with opened(self.path) as container:
            if not container.streams.audio:  # a damaged file may show it late
                return
            stream = container.streams.audio[0]
            if self.start > 5 and stream.time_base:
                container.seek(floor((self.start - 1) / stream.time_base), stream=stream)
            resampler = self._resampler()
            at: int | None = None
            for frame in _sound_frames(container, stream):
                told = at or 0
                if frame.pts is not None and frame.time_base is not None:
                    told = round((frame.pts * frame.time_base - self.start) * self.rate)
                if at is None or abs(told - at) > self.rate // 100:  # some files tell times to a millisecond
                    at = told
                try:
                    blocks = resampler.resample(frame)
                except ValueError:  # broadcasts change their rate and channels on the way
                    resampler = self._resampler()
                    blocks = resampler.resample(frame)
                for block in blocks:
                    yield at, block.to_ndarray()
                    at += block.samples
                if at > self.length:
                    return

    def _resampler(self) -> av.AudioResampler:
        layout = "mono" if self.channels == 1 else "stereo"
        return av.AudioResampler(format="fltp", layout=layout, rate=self.rate)


def _sound_frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """What can be decoded of a file's sound: a damaged packet is passed over, as players do."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except _DAMAGE:
                continue
    except _DAMAGE:  # the file ends here
        return


# --- frames ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """frames: uint8 (frames, height, width, 3). fps: of these frames, on average. sound: of their time.

    times: when each is shown, in seconds from the first; None where they are evenly spaced.
    """

    frames: Tensor
    fps: Fraction
    sound: Sound | None = None
    times: tuple[Fraction, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames.shape[2], self.frames.shape[1]


@dataclass(frozen=True)
class VideoSource:
    """The chosen part of a video, a picture or a sequence of pictures, found but not decoded.

    indices: which frames, in order; one may come again where a rate was asked for. times: when each is shown, in
    seconds from the first. begin: when the first is, in seconds from the file's first. fps: on average. even: whether
    the times are evenly spaced. size: width and height as they are to be seen. notes: what a user should know of the
    file.
    """

    path: Path
    indices: tuple[int, ...]
    times: tuple[Fraction, ...]
    begin: Fraction
    fps: Fraction
    even: bool
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    pictures: tuple[Path, ...] = ()
    index: FrameIndex | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def seconds(self) -> Fraction:
        """How long the frames take."""
        return self.times[-1] + 1 / self.fps

    def frames(self) -> Iterator[Tensor]:
        """The frames one after another: uint8 (height, width, 3).

        Raises VideoError where the file cannot be decoded to the last of them.
        """
        decoded = (read_picture(self.pictures[i]) for i in self.indices) if self.pictures else self._decoded()
        for done, frame in enumerate(decoded):
            if frame.shape[1::-1] != self.size:
                raise VideoError(
                    f"{self.path}: frame {self.indices[done]} is {frame.shape[1]}x{frame.shape[0]}, and not "
                    f"{self.size[0]}x{self.size[1]} as those before it"
                )
            yield torch.from_numpy(frame)

    def _decoded(self) -> Iterator[np.ndarray]:
        assert self.index is not None
        done = 0
        try:
            for frame in self.index.decoded(self.path, self.indices):
                turns, stored = _turns(frame), self.size[0]
                if turns % 2:
                    stored = self.size[1]
                yield np.rot90(to_rgb(frame, stored), turns).copy()
                done += 1
        except _DAMAGE as error:
            raise VideoError(
                f"{self.path} cannot be decoded past {done} of the {len(self)} frames asked for: {error}"
            ) from error
        if done < len(self):
            raise VideoError(f"{self.path} gives {done} of the {len(self)} frames asked for; its end is missing")

    def sound(self) -> SoundTrack | None:
        """The sound of the frames' time; None where there is none."""
        if self.index is None or self.index.sound is None:
            return None
        rate, channels = self.index.sound
        return SoundTrack(self.path, self.index.times[0] + self.begin, self.seconds, rate, channels)

    def read(self) -> Video:
        """All of it at once."""
        sound = self.sound()
        frames = torch.stack(list(self.frames()))
        return Video(frames, self.fps, sound.read() if sound else None, None if self.even else self.times)


def open_video(
    path: str | Path,
    start: Moment = 0,
    stride: int = 1,
    count: int | None = None,
    at_most: int | None = None,
    *,
    end: Moment | None = None,
    fps: Fraction | None = None,
) -> VideoSource:
    """Find frames start, start + stride, ... of a video, a picture, a folder or a pattern of pictures.

    count: how many frames, None for all that follow (before `end`, if it is given), or the first `at_most` of
    them. start, end: frame numbers, or times ("2.5s"). fps: of a video, show it at this rate, each frame the one
    seen at that time; of pictures, their rate. A pattern has a number ("f_%04d.png") or "*" in its name.

    Raises FileNotFoundError; VideoError for an empty file, one that is no video, and one
    with fewer frames than asked for; ValueError for numbers out of range.
    """
    path = Path(path)
    if stride < 1 or (count is not None and count < 1):
        raise ValueError(f"stride={stride}, count={count}: they go from 1")
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f"fps is {fps}; it must be above 0, and at most 1000")
    for name, moment in (("start", start), ("end", end)):
        if isinstance(moment, int) and moment < 0:
            raise ValueError(f"{name} is {moment}; frames are counted from 0")
    pictures = picture_files(path)
    if pictures:
        rate = fps or FOLDER_FPS
        times = [i / rate for i in range(len(pictures))]
        index, size = None, _picture_size(path, pictures)
    else:
        last = None if end is not None or fps is not None else _needed(start, stride, count or at_most)
        index = FrameIndex.of(path, last)
        times, size = [t - index.times[0] for t in index.times], index.size
        rate = index.fps
    shown = list(range(len(times)))
    even = index is None or index.even
    if index is not None and fps is not None:
        ticks = ceil((times[-1] + 1 / rate) * fps)
        shown = [max(0, bisect_right(times, i / fps) - 1) for i in range(ticks)]
        times, rate, even = [i / fps for i in range(ticks)], fps, True
    first = _frame_at(start, times)
    chosen = range(first, len(times) if end is None else min(_frame_at(end, times), len(times)), stride)
    if count is None:
        chosen = chosen[:at_most]
    elif len(chosen) < count:
        until = "" if end is None else f" to {end}"
        raise VideoError(
            f"{path} gives {len(chosen)} frames from {start}{until} in steps of {stride}, but {count} are needed"
        )
    else:
        chosen = chosen[:count]
    if not len(chosen):
        raise VideoError(f"{path} has no frame from number {start} on" + ("" if end is None else f" and before {end}"))
    own = tuple(times[i] - times[first] for i in chosen)
    mean = rate / stride
    if not even and len(own) > 1:
        mean = (Fraction(len(own) - 1) / own[-1]).limit_denominator(1001)
    even = index is None or are_even(own, mean, index.tick)
    notes = () if index is None else index.notes
    indices = tuple(shown[i] for i in chosen)
    return VideoSource(path, indices, own, times[first], mean, even, size, notes, pictures, index)


def read_video(
    path: str | Path, start: Moment = 0, stride: int = 1, count: int | None = None, at_most: int | None = None
) -> Video:
    """What `open_video` finds, decoded at once; its errors are the same."""
    return open_video(path, start, stride, count, at_most).read()


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a video holds beside its streams, by name in small letters; errors are those of `opened`."""
    with opened(path) as video:
        return {name.lower(): text for name, text in video.metadata.items()}


def _needed(start: Moment, stride: int, count: int | None) -> int | None:
    """The number of the last frame that is needed, where that can be told before the file is looked at."""
    return None if count is None or not isinstance(start, int) else start + stride * (count - 1)


def _frame_at(moment: Moment, times: Sequence[Fraction]) -> int:
    """The first frame that is not before a moment."""
    return moment if isinstance(moment, int) else bisect_left(times, seconds_of(moment))


# --- where the frames of a file are -----------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """A file opened; FileNotFoundError, or VideoError saying what is wrong with it."""
    check_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty")
    try:
        # Of files alone: a playlist that calls itself a video shall not reach the network.
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{path}", metadata_errors="replace", options=options)
    except _DAMAGE as error:
        raise VideoError(f"{path} is not a readable video: {error}") from error
    with container:
        yield container


@dataclass(frozen=True)
class FrameIndex:
    """Where a file's frames are, read from its packets without decoding them.

    times: on the file's own clock, in the order they are shown. keys: the frames at which decoding can begin.
    tick: how finely the file tells time. ordered: whether decoded frames tell their own times; AVI's do not.
    sound: its rate and channels.
    """

    times: tuple[Fraction, ...]
    keys: tuple[int, ...]
    tick: Fraction
    ordered: bool
    told_fps: Fraction
    size: tuple[int, int]
    sound: tuple[int, int] | None
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, path: Path, last: int | None = None) -> FrameIndex:
        """Look through a file, no further than to frame number `last`."""
        with opened(path) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video")
            stream = container.streams.video[0]
            tick = stream.time_base or Fraction(1, 1000)
            told = stream.guessed_rate or stream.average_rate or Fraction(25)
            found: list[tuple[int, bool]] = []
            ordered = container.format.name != "avi"
            broken = ""
            try:
                for packet in container.demux(stream):
                    at = packet.pts if ordered and packet.pts is not None else packet.dts
                    if packet.size and not packet.is_discard and at is not None:
                        ordered = ordered and packet.pts is not None
                        found.append((at, packet.is_keyframe))
                    if last is not None and len(found) > last + _REORDERED:
                        break
            except _DAMAGE as error:
                broken = str(error)
            found.sort(key=lambda frame: frame[0])
            audio = container.streams.audio
            rate = getattr(audio[0], "rate", 0) if audio else 0  # none, of a codec that nobody knows
            sound = (rate, min(2, audio[0].channels)) if rate else None
            promised = stream.frames
        if not found:
            raise VideoError(f"{path} is not a readable video: no frame in it {broken}".rstrip())
        size, notes = _first_look(path)
        if broken or (last is None and promised > len(found)):
            notes += (f"{path.name} ends early: {len(found)} of its frames can be read",)
        keys = tuple(i for i, (_, key) in enumerate(found) if key)
        return cls(tuple(at * tick for at, _ in found), keys, tick, ordered, told, size, sound, notes)

    @cached_property
    def fps(self) -> Fraction:
        """Frames a second: what the file tells where its times agree with that, else their mean."""
        if len(self.times) < 2 or self._even_at(self.told_fps):
            return self.told_fps
        span = max(self.tick, self.times[-1] - self.times[0])
        return (Fraction(len(self.times) - 1) / span).limit_denominator(1001)

    @cached_property
    def even(self) -> bool:
        """Whether the frames are evenly spaced, as finely as the file tells."""
        return self._even_at(self.fps)

    def _even_at(self, fps: Fraction) -> bool:
        return are_even([t - self.times[0] for t in self.times], fps, self.tick)

    def decoded(self, path: Path, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Some frames, in order; what lies between them is decoded, or skipped to the next key frame.

        For a frame that the decoder does not give stands the one after it.
        """
        with opened(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = _THREADS
            frames, number = self._numbered(container, stream), -1
            for index in indices:
                before = bisect_right(self.keys, index)
                key = self.keys[before - 1] if before else 0
                if self.ordered and key > number + _WORTH_SEEKING:
                    container.seek(int(self.times[key] / self.tick), stream=stream)
                    frames, number = self._numbered(container, stream), -1
                    coming = next(frames, None)
                    if coming is None or coming[0] > index:  # it cannot be sought: from the beginning, then
                        container.seek(0)
                        frames = self._numbered(container, stream)
                    else:
                        number, frame = coming
                while number < index:
                    coming = next(frames, None)
                    if coming is None:
                        return
                    number, frame = coming
                yield frame

    def _numbered(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """What the decoder gives from here on, with the number of each frame."""
        for i, frame in enumerate(container.decode(stream)):
            if self.ordered and frame.pts is not None:
                yield bisect_right(self.times, frame.pts * self.tick + self.tick / 2) - 1, frame
            else:
                yield i, frame


def are_even(times: Sequence[Fraction], fps: Fraction, tick: Fraction) -> bool:
    """Whether frames come at a rate, as finely as a clock of such ticks tells."""
    slack = max(tick * Fraction(3, 2), Fraction(1, 500))
    return all(abs(t - i / fps) <= slack for i, t in enumerate(times))


_REORDERED = 64
"""Packets after one in which frames shown before it may still come."""
_WORTH_SEEKING = 16
"""Frames that are sooner decoded than skipped."""
_THREADS = 4
"""Of the decoder: each holds frames of its own."""


def _first_look(path: Path) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The size a file's frames are seen at, and what should be known of them, from the first one."""
    with opened(path) as container:
        stream = container.streams.video[0]
        try:
            frame = next(container.decode(stream), None)
        except _DAMAGE as error:
            raise VideoError(f"{path} is not a readable video: {error}") from error
        if frame is None:
            raise VideoError(f"{path} is not a readable video: no frame of it can be decoded")
        aspect = stream.sample_aspect_ratio or Fraction(1)
        aspect = aspect if Fraction(1, 8) <= aspect <= 8 else Fraction(1)
        size = (max(1, round(frame.width * aspect)), frame.height)
        notes = []
        if frame.interlaced_frame:
            notes.append(f"{path.name} is interlaced: its combs are edited along; deinterlace it first")
        if kind := hdr_kind(frame):
            notes.append(f"{path.name} is HDR ({kind}): it is tone-mapped to SDR")
        return (size[::-1] if _turns(frame) % 2 else size), tuple(notes)


def _turns(frame: av.VideoFrame) -> int:
    """Quarter turns to the left by which a frame is to be seen."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


# --- pictures -------------------------------------------------------------------------------


def _picture_size(path: Path, pictures: Sequence[Path]) -> tuple[int, int]:
    sizes = set()
    for picture in pictures:
        with _opened_picture(picture) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            sizes.add(image.size[::-1] if turned else image.size)
    if len(sizes) > 1:
        raise VideoError(f"the pictures in {path} differ in size")
    return sizes.pop()


_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""


@contextmanager
def _opened_picture(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is not a readable picture: {error}") from error


def read_picture(path: Path) -> np.ndarray:
    """uint8 RGB (height, width, 3) of a picture as it is to be seen, turned as its EXIF says."""
    with _opened_picture(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey
            grey = np.clip(np.asarray(upright).astype(np.float32) / 257, 0, 255)
            return np.repeat((grey + 0.5).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(upright.convert("RGB"))
