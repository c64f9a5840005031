"""Read frames and sound from files, one at a time, each at its own time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..files.whole import check_name
from ..imports import av, np, torch
from .orientation import Orientation
from .pictures import VideoError, picture_files
from .stills import Animation, pictures_of, pictures_size
from .which import Moment, seconds_of

if TYPE_CHECKING:
    from torch import Tensor


def damage() -> tuple[type[Exception], ...]:
    """What a damaged file makes PyAV raise; the second where streams come up that its head does not name."""
    return av.error.FFmpegError, IndexError


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
    """The sound of a span of a file's time, read as it is asked for. start, seconds: on the file's clock."""

    path: Path
    start: Fraction
    seconds: Fraction
    rate: int
    channels: int
    clock: Clock

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
            stream = _sound_of(container)
            if stream is None:  # a damaged file may show it late
                return
            if self.start > 5 and stream.time_base and not self.clock.restarts:
                container.seek(floor((self.start - 1) / stream.time_base), stream=stream)
            resampler = self._resampler()
            at: int | None = None
            moved = self.clock.reader()
            for frame in _sound_frames(container, stream):
                told = at or 0
                if frame.pts is not None and frame.time_base is not None:
                    told = round((moved(frame.pts * frame.time_base) - self.start) * self.rate)
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
            except damage():
                continue
    except damage():  # the file ends here
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
    file. pictures: those of a sequence, or the one that holds several. background: the colour behind what is
    transparent.
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
        """How long the frames take."""
        return self.times[-1] + 1 / self.fps

    def frames(self) -> Iterator[Tensor]:
        """The frames one after another: uint8 (height, width, 3).

        Raises VideoError where the file cannot be decoded to the last of them.
        """
        decoded = pictures_of(self.pictures, self.indices, self.background) if self.pictures else self._decoded()
        for done, frame in enumerate(decoded):
            if frame.shape[1::-1] != self.size:
                raise VideoError(
                    f"{self.path}: frame {self.indices[done]} is {frame.shape[1]}x{frame.shape[0]}, and not "
                    f"{self.size[0]}x{self.size[1]} as those before it"
                )
            yield torch.from_numpy(frame)

    def _decoded(self) -> Iterator[np.ndarray]:
        from .colour import to_rgb

        assert self.index is not None
        done = 0
        try:
            for frame in self.index.decoded(self.path, self.indices):
                shown = Orientation.of(frame)
                if (frame.width, frame.height) != self.index.stored:
                    was = "x".join(map(str, self.index.stored))
                    raise VideoError(
                        f"{self.path}: frame {self.indices[done]} is {frame.width}x{frame.height}, and not {was} as "
                        "those before it"
                    )
                stored = self.size[1] if shown.on_its_side else self.size[0]
                yield shown.applied(to_rgb(frame, stored, self.background))
                done += 1
        except damage() as error:
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
        return SoundTrack(
            self.path, self.index.times[0] + self.begin, self.seconds, rate, channels, self.index.clock
        )  # fmt: skip

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
    background: tuple[int, int, int] = (0, 0, 0),
) -> VideoSource:
    """Find frames start, start + stride, ... of a video, a picture, a folder or a pattern of pictures.

    count: how many frames, None for all that follow (before `end`, if it is given), or the first `at_most` of
    them. start, end: frame numbers, or times ("2.5s"). fps: of a video, show it at this rate, each frame the one
    seen at that time; of pictures, their rate. A pattern has a number ("f_%04d.png") or "*" in its name.
    background: the colour behind what is transparent, red, green and blue.

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
    even = are_even(own, mean, tick)
    indices = tuple(shown[i] for i in chosen)
    return VideoSource(path, indices, own, times[first], mean, even, size, notes, pictures, index, background)


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
    except damage() as error:
        raise VideoError(f"{path} is not a readable video: {error}") from error
    with container:
        yield container


@dataclass(frozen=True)
class Clock:
    """The clock of a file of several parts, written one behind the other, which begins again with each.

    moves: by how many seconds each part is moved, so that it follows the one before; (0,) for a file of one. leaps:
    whether a leap forward begins a part too, as in broadcasts.
    """

    moves: tuple[Fraction, ...] = (Fraction(0),)
    leaps: bool = False

    @property
    def restarts(self) -> bool:
        return len(self.moves) > 1

    def begins_again(self, before: Fraction, now: Fraction) -> bool:
        """Whether a part begins between two times that follow each other in the file."""
        return before - now > Fraction(1, 4) or (self.leaps and now - before > 10)

    def reader(self) -> Callable[[Fraction], Fraction]:
        """Moves the times of one stream, given in the order of the file."""
        part, before = 0, None

        def moved(time: Fraction) -> Fraction:
            nonlocal part, before
            if before is not None and part + 1 < len(self.moves) and self.begins_again(before, time):
                part += 1
            before = time
            return time + self.moves[part]

        return moved


@dataclass(frozen=True)
class _Packet:
    """A frame of a file, not decoded; its times in ticks. left_out: by an edit list."""

    pts: int | None
    dts: int | None
    key: bool
    left_out: bool


@dataclass(frozen=True)
class FrameIndex:
    """Where a file's frames are, read from its packets without decoding them.

    times: on the file's clock as `clock` has it, in the order they are shown. keys: the frames at which decoding can
    begin. tick: how finely the file tells time. ordered: whether decoded frames tell their own times; AVI's and those
    of bare streams do not. stored: the size of frames before they are turned and their pixels made square. sound: its
    rate and channels. decoder: of transparency that has packets of its own.
    """

    times: tuple[Fraction, ...]
    keys: tuple[int, ...]
    tick: Fraction
    ordered: bool
    told_fps: Fraction
    size: tuple[int, int]
    stored: tuple[int, int]
    sound: tuple[int, int] | None
    notes: tuple[str, ...] = field(default=())
    clock: Clock = Clock()
    decoder: str | None = None

    @classmethod
    def of(cls, path: Path, last: int | None = None) -> FrameIndex:
        """Look through a file, no further than to frame number `last`."""
        first = _first_look(path)
        with opened(path) as container:
            stream = _video_of(container)
            assert stream is not None  # for the first look saw it
            told = stream.guessed_rate or stream.average_rate or Fraction(25)
            tick, kind, promised = stream.time_base or Fraction(1, 1000), container.format.name, _promised(stream)
            packets, broken = _packets(container, stream, first, last)
            audio = _sound_of(container)
            rate = getattr(audio, "rate", 0)  # none, of a codec that nobody knows
            sound = (rate, min(2, audio.channels)) if audio and rate else None
        found = [packet for packet in packets if not packet.left_out]
        ordered = kind != "avi" and kind not in _BARE and all(packet.pts is not None for packet in found)
        if kind in _BARE or all(packet.dts is None for packet in found):  # in the order in which they come
            found, tick = [replace(one, dts=i) for i, one in enumerate(found)], 1 / told
        at = {True: lambda packet: packet.pts, False: lambda packet: packet.dts}[ordered]
        found = [packet for packet in found if at(packet) is not None]
        parts = _parts(found, tick, Clock(leaps=kind in _BROADCAST)) if ordered and found else [found]
        parts[0] = _readable(parts[0], first, ordered)
        readable = sum(map(len, parts))
        if not parts[0]:
            raise VideoError(f"{path} is not a readable video: no frame in it {broken}".rstrip())
        placed, moves, end = list[tuple[Fraction, bool]](), list[Fraction](), Fraction(0)
        for part in parts:
            times = [at(packet) * tick for packet in part]
            moves.append(end - min(times) if moves else Fraction(0))
            placed += [(time + moves[-1], packet.key) for time, packet in zip(times, part, strict=True)]
            end = max(times) + moves[-1] + 1 / told
        placed.sort(key=lambda frame: frame[0])
        notes = first.notes
        if missing := len(found) - readable:
            notes += (f"{path.name} begins between key frames: {missing} frames before the first cannot be read",)
        if len(parts) > 1:
            notes += (f"{path.name} is of {len(parts)} parts whose clocks begin again: they follow each other",)
        if broken or (last is None and promised > len(packets)):
            notes += (f"{path.name} ends early: {readable} of its frames can be read",)
        return cls(
            tuple(time for time, _ in placed), tuple(i for i, (_, key) in enumerate(placed) if key), tick, ordered,
            told, first.size, first.stored, sound, notes, Clock(tuple(moves), kind in _BROADCAST), first.decoder,
        )  # fmt: skip

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
            stream = _video_of(container)
            assert stream is not None
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = _THREADS
            frames, number = self._numbered(container, stream), -1
            for index in indices:
                before = bisect_right(self.keys, index)
                key = self.keys[before - 1] if before else 0
                if self.ordered and not self.clock.restarts and key > number + _WORTH_SEEKING:
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
        moved = self.clock.reader()
        for i, frame in enumerate(_decoded(container, stream, self.decoder)):
            if self.ordered and frame.pts is not None:
                yield bisect_right(self.times, moved(frame.pts * self.tick) + self.tick / 2) - 1, frame
            else:
                yield i, frame


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, first: _Look, last: int | None
) -> tuple[list[_Packet], str]:
    """What a file has, in its order, and why no more can be read; up to frame `last` and those that come with it."""
    packets, wanted = list[_Packet](), 0
    try:
        for packet in container.demux(stream):
            if packet.size:
                packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
                early = packet.pts is not None and first.pts is not None and packet.pts < first.pts
                wanted += not (packet.is_discard or early)
            if last is not None and wanted > last + _REORDERED:
                break
    except damage() as error:
        return packets, str(error)
    return packets, ""


def _readable(packets: Sequence[_Packet], first: _Look, ordered: bool) -> list[_Packet]:
    """Without those before the first that the decoder gives, of a file that begins between key frames."""
    if ordered and first.pts is not None:
        begin = next((i for i, packet in enumerate(packets) if packet.pts == first.pts), 0)
        return [packet for packet in packets[begin:] if packet.pts is not None and packet.pts >= first.pts]
    begin = next((i for i, packet in enumerate(packets) if packet.key), 0) if first.key else 0
    return list(packets[begin:])


def _parts(packets: Sequence[_Packet], tick: Fraction, clock: Clock) -> list[list[_Packet]]:
    """Packets by the parts of a file whose clock begins again with each."""
    parts = [[packets[0]]]
    for before, packet in pairwise(packets):
        if packet.key and before.dts is not None and packet.dts is not None:
            begins = clock.begins_again(before.dts * tick, packet.dts * tick)
            parts += [[]] if begins else []
        parts[-1].append(packet)
    return parts


def _video_of(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first stream of pictures that move; a cover is none."""
    return next((s for s in container.streams.video if not _is(s, "attached_pic")), None)


def _sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """The track that players take: the default, else the first."""
    tracks = container.streams.audio
    return next((track for track in tracks if _is(track, "default")), tracks[0] if tracks else None)


def _is(stream: av.stream.Stream, disposition: str) -> bool:
    return bool(stream.disposition & av.stream.Disposition[disposition])


def _promised(stream: av.VideoStream) -> int:
    """How many frames a file says that it has: all of them, or those of its index, which an edit list cuts."""
    entries = len(getattr(stream, "index_entries", ()))
    return min(stream.frames, entries) if entries else stream.frames


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, decoder: str | None
) -> Iterator[av.VideoFrame]:
    """The frames of a stream from here on. decoder: another than FFmpeg takes."""
    if decoder is None:
        yield from container.decode(stream)
        return
    context = cast(av.VideoCodecContext, av.CodecContext.create(decoder, "r"))
    context.extradata = stream.codec_context.extradata
    for packet in container.demux(stream):
        yield from context.decode(packet if packet.size else None)


def _decoder_of(stream: av.VideoStream) -> str | None:
    """Of WebM's transparency, which FFmpeg's own decoders pass over."""
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if decoder is None or stream.metadata.get("alpha_mode") != "1":
        return None
    return decoder if decoder in av.codecs_available else None


def are_even(times: Sequence[Fraction], fps: Fraction, tick: Fraction) -> bool:
    """Whether frames come at a rate, as finely as a clock of such ticks tells."""
    slack = max(tick * Fraction(3, 2), Fraction(1, 500))
    return all(abs(t - i / fps) <= slack for i, t in enumerate(times))


_BARE = ("h264", "hevc", "vvc", "mpegvideo", "m4v", "cavsvideo", "dirac", "vc1", "obu", "mjpeg", "h261", "h263")
"""Formats that are a stream without a container, whose frames have no times."""
_BROADCAST = ("mpegts", "mpeg")
"""Formats in which a clock may leap."""
_REORDERED = 64
"""Packets after one in which frames shown before it may still come."""
_WORTH_SEEKING = 16
"""Frames that are sooner decoded than skipped."""
_THREADS = 4
"""Of the decoder: each holds frames of its own."""


@dataclass(frozen=True)
class _Look:
    """What the first frame shows. size: as it is to be seen. pts, key: its own. stored, decoder: see `FrameIndex`."""

    size: tuple[int, int]
    stored: tuple[int, int]
    notes: tuple[str, ...]
    pts: int | None
    key: bool
    decoder: str | None


def _first_look(path: Path) -> _Look:
    """The size a file's frames are seen at, and what should be known of them, from the first one."""
    from .colour import has_alpha, hdr_kind

    with opened(path) as container:
        stream = _video_of(container)
        if stream is None:
            raise VideoError(f"{path} holds no video")
        decoder = _decoder_of(stream)
        try:
            frame = next(_decoded(container, stream, decoder), None)
        except damage() as error:
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
        size = size[::-1] if Orientation.of(frame).on_its_side else size
        if has_alpha(frame):
            notes.append(f"{path.name} has transparency: it is shown over the background")
        return _Look(size, (frame.width, frame.height), tuple(notes), frame.pts, bool(frame.key_frame), decoder)
