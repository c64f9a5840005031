"""Read frames and sound from files as streams, with their times."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING

from ..imports import av, np, torch
from .index import Clock, FrameIndex, are_even, damage, opened, sound_of
from .orientation import Orientation
from .pictures import VideoError, picture_files
from .stills import Animation, pictures_of, pictures_size, stored_pictures
from .which import Moment, seconds_of

if TYPE_CHECKING:
    from torch import Tensor


FOLDER_FPS = Fraction(8)
"""The default frame rate of a folder of pictures."""


# --- sound ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """samples: float32 (channels, n) in -1..1. rate: samples per second."""

    samples: np.ndarray
    rate: int

    @property
    def channels(self) -> int:
        return len(self.samples)

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples in blocks (channels, n)."""
        yield from np.array_split(self.samples, max(1, self.samples.shape[1] // self.rate), axis=1)


@dataclass(frozen=True)
class SoundTrack:
    """The sound of a time span of a file, read on demand. start, seconds: on the file's clock."""

    path: Path
    start: Fraction
    seconds: Fraction
    rate: int
    channels: int
    clock: Clock

    @property
    def length(self) -> int:
        """The number of samples; gaps in the file are silence."""
        return round(self.seconds * self.rate)

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples in float32 blocks (channels, n), `length` in total."""
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
        """Blocks of samples with the position of each from the span's start."""
        with opened(self.path) as container:
            stream = sound_of(container)
            if stream is None:  # a damaged file may list the stream late
                return
            if self.start > 5 and stream.time_base and not self.clock.restarts:
                container.seek(floor((self.start - 1) / stream.time_base), stream=stream)
            resampler = self._resampler()
            at: int | None = None
            moved = self.clock.reader()
            for frame in _sound_frames(container, stream):
                position = at or 0
                if frame.pts is not None and frame.time_base is not None:
                    position = round((moved(frame.pts * frame.time_base) - self.start) * self.rate)
                if at is None or abs(position - at) > self.rate // 100:  # some files round times to milliseconds
                    at = position
                try:
                    blocks = resampler.resample(frame)
                except ValueError:  # broadcasts may change rate and channels
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
    """The frames of a file's sound, without damaged packets, which players skip too."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except damage():
                continue
    except damage():  # the file ends here
        return


# --- frames ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """frames: uint8 (frames, height, width, 3). fps: average rate of these frames. sound: of their time span.

    times: of each frame, in seconds from the first; None if evenly spaced.
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
    """The chosen frames of a video, a picture or a sequence of pictures, not decoded yet.

    indices: frame numbers in order, with repeats if the video is resampled to a rate. times: of each frame, in seconds
    from the first. begin: time of the first, in seconds from the file's first. fps: average rate. even: whether the
    times are evenly spaced. size: width and height, upright. notes: warnings about the file. pictures: of a sequence,
    or the one with an animation. background: colour behind transparent pixels.
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
    background: tuple[int, int, int] = (0, 0, 0)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def seconds(self) -> Fraction:
        """Duration of the frames."""
        return self.times[-1] + 1 / self.fps

    def frames(self) -> Iterator[Tensor]:
        """One uint8 frame (height, width, 3) at a time.

        Raises VideoError if the file cannot be decoded up to the last frame.
        """
        decoded = pictures_of(self.pictures, self.indices, self.background) if self.pictures else self._decoded()
        for done, frame in enumerate(decoded):
            if frame.shape[1::-1] != self.size:
                raise VideoError(
                    f"{self.path}: frame {self.indices[done]} is {frame.shape[1]}x{frame.shape[0]}, unlike the "
                    f"{self.size[0]}x{self.size[1]} frames before it"
                )
            yield torch.from_numpy(frame)

    def _decoded(self) -> Iterator[np.ndarray]:
        from .colour import to_rgb

        for frame in self.stored():
            shown = Orientation.of(frame)
            stored = self.size[1] if shown.on_its_side else self.size[0]
            yield shown.applied(to_rgb(frame, stored, self.background))

    def stored(self) -> Iterator[av.VideoFrame]:
        """The frames of a file as it stores them: not turned, not scaled to square pixels, of any format.

        Pictures are upright, in planes of red, green and blue. Raises VideoError as `frames`.
        """
        if self.index is None:
            yield from stored_pictures(self.pictures, self.indices)
            return
        done = 0
        try:
            for frame in self.index.decoded(self.path, self.indices):
                if (frame.width, frame.height) != self.index.stored:
                    was = "x".join(map(str, self.index.stored))
                    raise VideoError(
                        f"{self.path}: frame {self.indices[done]} is {frame.width}x{frame.height}, unlike the {was} "
                        "frames before it"
                    )
                yield frame
                done += 1
        except damage() as error:
            raise VideoError(f"{self.path}: decoding failed after {done} of {len(self)} frames: {error}") from error
        if done < len(self):
            raise VideoError(f"{self.path} is truncated: it has {done} of the {len(self)} chosen frames")

    def sound(self) -> SoundTrack | None:
        """The sound of the frames' time span, if any."""
        if self.index is None or self.index.sound is None:
            return None
        rate, channels = self.index.sound
        return SoundTrack(
            self.path, self.index.times[0] + self.begin, self.seconds, rate, channels, self.index.clock
        )  # fmt: skip

    def read(self) -> Video:
        """The whole video at once."""
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
    background: tuple[int, int, int] = (0, 0, 0),
) -> VideoSource:
    """Find frames start, start + stride, ... of a video, a picture, a folder or a pattern of pictures.

    count: number of frames; None for all that follow, before `end` if given and at most `at_most`. start, end: frame
    numbers, or times ("2.5s"). fps: resample a video to this rate, taking the frame shown at each time; for pictures,
    their rate. A pattern has a number ("f_%04d.png") or "*" in its name. background: colour behind transparent pixels,
    red, green and blue.

    Raises FileNotFoundError; VideoError for an empty file, one that is not a video, and one with too few frames;
    ValueError for numbers out of range.
    """
    path = Path(path)
    if stride < 1 or (count is not None and count < 1):
        raise ValueError(f"stride={stride}, count={count}: both must be at least 1")
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f"fps is {fps}; it must be above 0, and at most 1000")
    for name, moment in (("start", start), ("end", end)):
        if isinstance(moment, int) and moment < 0:
            raise ValueError(f"{name} is {moment}; frames are counted from 0")
    pictures = picture_files(path)
    times, even, tick, notes = list[Fraction](), True, Fraction(0), tuple[str, ...]()
    index = None
    if animated := (Animation.of(pictures[0]) if len(pictures) == 1 and path.is_file() else None):
        size, times = animated.size, list(animated.times)
        rate, tick = animated.fps, Fraction(1, 1000)
        even = are_even(times, rate, tick)
    elif pictures:
        rate = fps or FOLDER_FPS
        times = [i / rate for i in range(len(pictures))]
        size = pictures_size(path, pictures)
    else:
        last = None if end is not None or fps is not None else _needed(start, stride, count or at_most)
        index = FrameIndex.of(path, last)
        times, size = [t - index.times[0] for t in index.times], index.size
        rate, even, tick, notes = index.fps, index.even, index.tick, index.notes
    shown = list(range(len(times)))
    if (index is not None or animated) and fps is not None:
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
            f"{path} has {len(chosen)} frames from {start}{until} with stride {stride}, but {count} are needed"
        )
    else:
        chosen = chosen[:count]
    if not len(chosen):
        raise VideoError(f"{path} has no frame from {start} on" + ("" if end is None else f" and before {end}"))
    own = tuple(times[i] - times[first] for i in chosen)
    mean = rate / stride
    if not even and len(own) > 1:
        mean = (Fraction(len(own) - 1) / own[-1]).limit_denominator(1001)
    even = are_even(own, mean, tick)
    indices = tuple(shown[i] for i in chosen)
    return VideoSource(path, indices, own, times[first], mean, even, size, notes, pictures, index, background)


def read_video(
    path: str | Path, start: Moment = 0, stride: int = 1, count: int | None = None, at_most: int | None = None
) -> Video:
    """Decode the frames of `open_video` at once; the same errors."""
    return open_video(path, start, stride, count, at_most).read()


def read_metadata(path: Path) -> dict[str, str]:
    """A video's text metadata, by lower-case name; errors as `opened`."""
    with opened(path) as video:
        return {name.lower(): text for name, text in video.metadata.items()}


def _needed(start: Moment, stride: int, count: int | None) -> int | None:
    """The number of the last frame needed, if it does not depend on the file."""
    return None if count is None or not isinstance(start, int) else start + stride * (count - 1)


def _frame_at(moment: Moment, times: Sequence[Fraction]) -> int:
    """The first frame at or after a time."""
    return moment if isinstance(moment, int) else bisect_left(times, seconds_of(moment))
