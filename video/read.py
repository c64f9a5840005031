"""Read frames and sound from files as streams, with their times."""

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
    """The errors of PyAV on damaged files; IndexError comes from streams that the header does not list."""
    return av.error.FFmpegError, IndexError


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
            stream = _sound_of(container)
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

        assert self.index is not None
        done = 0
        try:
            for frame in self.index.decoded(self.path, self.indices):
                shown = Orientation.of(frame)
                if (frame.width, frame.height) != self.index.stored:
                    was = "x".join(map(str, self.index.stored))
                    raise VideoError(
                        f"{self.path}: frame {self.indices[done]} is {frame.width}x{frame.height}, unlike the {was} "
                        "frames before it"
                    )
                stored = self.size[1] if shown.on_its_side else self.size[0]
                yield shown.applied(to_rgb(frame, stored, self.background))
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


# --- where the frames of a file are -----------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a file; FileNotFoundError, or VideoError with the fault."""
    check_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty")
    try:
        # Files only: a playlist disguised as a video must not use the network.
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{path}", metadata_errors="replace", options=options)
    except damage() as error:
        raise VideoError(f"{path} is not a readable video: {error}") from error
    with container:
        yield container


@dataclass(frozen=True)
class Clock:
    """The clock of a file that consists of several concatenated parts and restarts with each.

    moves: seconds to add to the times of each part, so that it follows the previous one; (0,) for a single part.
    leaps: whether a leap forward starts a part too, as in broadcasts.
    """

    moves: tuple[Fraction, ...] = (Fraction(0),)
    leaps: bool = False

    @property
    def restarts(self) -> bool:
        return len(self.moves) > 1

    def restarts_at(self, before: Fraction, now: Fraction) -> bool:
        """Whether a part starts between two successive times of the file."""
        return before - now > Fraction(1, 4) or (self.leaps and now - before > 10)

    def reader(self) -> Callable[[Fraction], Fraction]:
        """A function that corrects the times of one stream, in file order."""
        part, before = 0, None

        def moved(time: Fraction) -> Fraction:
            nonlocal part, before
            if before is not None and part + 1 < len(self.moves) and self.restarts_at(before, time):
                part += 1
            before = time
            return time + self.moves[part]

        return moved


@dataclass(frozen=True)
class _Packet:
    """A coded frame; its times in ticks. left_out: by an edit list."""

    pts: int | None
    dts: int | None
    key: bool
    left_out: bool


@dataclass(frozen=True)
class FrameIndex:
    """An index of a file's frames, read from its packets without decoding.

    times: in display order, corrected by `clock`. keys: frames at which decoding can start. tick: the file's time
    unit. ordered: whether decoded frames carry their times; not in AVI and raw streams. declared_fps: the container's
    rate. stored: frame size before rotation and scaling to square pixels. sound: its rate and channels. decoder: for
    alpha in separate packets.
    """

    times: tuple[Fraction, ...]
    keys: tuple[int, ...]
    tick: Fraction
    ordered: bool
    declared_fps: Fraction
    size: tuple[int, int]
    stored: tuple[int, int]
    sound: tuple[int, int] | None
    notes: tuple[str, ...] = field(default=())
    clock: Clock = Clock()
    decoder: str | None = None

    @classmethod
    def of(cls, path: Path, last: int | None = None) -> FrameIndex:
        """Scan a file, up to frame number `last`."""
        first = _probe(path)
        with opened(path) as container:
            stream = _video_of(container)
            assert stream is not None  # `_probe` has checked
            declared = stream.guessed_rate or stream.average_rate or Fraction(25)
            tick, kind, promised = stream.time_base or Fraction(1, 1000), container.format.name, _promised(stream)
            packets, broken = _packets(container, stream, first, last)
            audio = _sound_of(container)
            rate = getattr(audio, "rate", 0)  # unknown codecs have none
            sound = (rate, min(2, audio.channels)) if audio and rate else None
        found = [packet for packet in packets if not packet.left_out]
        ordered = kind != "avi" and kind not in _BARE and all(packet.pts is not None for packet in found)
        if kind in _BARE or all(packet.dts is None for packet in found):  # in file order
            found, tick = [replace(one, dts=i) for i, one in enumerate(found)], 1 / declared
        at = {True: lambda packet: packet.pts, False: lambda packet: packet.dts}[ordered]
        found = [packet for packet in found if at(packet) is not None]
        parts = _parts(found, tick, Clock(leaps=kind in _BROADCAST)) if ordered and found else [found]
        parts[0] = _readable(parts[0], first, ordered)
        readable = sum(map(len, parts))
        if not parts[0]:
            raise VideoError(f"{path} is not a readable video: it has no frame {broken}".rstrip())
        placed, moves, end = list[tuple[Fraction, bool]](), list[Fraction](), Fraction(0)
        for part in parts:
            times = [at(packet) * tick for packet in part]
            moves.append(end - min(times) if moves else Fraction(0))
            placed += [(time + moves[-1], packet.key) for time, packet in zip(times, part, strict=True)]
            end = max(times) + moves[-1] + 1 / declared
        placed.sort(key=lambda frame: frame[0])
        notes = first.notes
        if missing := len(found) - readable:
            notes += (f"{path.name} starts between I-frames: the first {missing} frames cannot be decoded",)
        if len(parts) > 1:
            notes += (f"{path.name} has {len(parts)} parts with separate clocks: they are joined",)
        if broken or (last is None and promised > len(packets)):
            notes += (f"{path.name} is truncated: {readable} of its frames can be read",)
        return cls(
            tuple(time for time, _ in placed), tuple(i for i, (_, key) in enumerate(placed) if key), tick, ordered,
            declared, first.size, first.stored, sound, notes, Clock(tuple(moves), kind in _BROADCAST), first.decoder,
        )  # fmt: skip

    @cached_property
    def fps(self) -> Fraction:
        """Frames per second: the declared rate if the times agree with it, else their mean."""
        if len(self.times) < 2 or self._even_at(self.declared_fps):
            return self.declared_fps
        span = max(self.tick, self.times[-1] - self.times[0])
        return (Fraction(len(self.times) - 1) / span).limit_denominator(1001)

    @cached_property
    def even(self) -> bool:
        """Whether the frames are evenly spaced, to the file's time unit."""
        return self._even_at(self.fps)

    def _even_at(self, fps: Fraction) -> bool:
        return are_even([t - self.times[0] for t in self.times], fps, self.tick)

    def decoded(self, path: Path, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Some frames, in order; those in between are decoded, or skipped up to an I-frame.

        A frame that the decoder drops is replaced by the next one.
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
                    if coming is None or coming[0] > index:  # seeking failed: start over
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
        """The decoded frames from here on, with their numbers."""
        moved = self.clock.reader()
        for i, frame in enumerate(_decoded(container, stream, self.decoder)):
            if self.ordered and frame.pts is not None:
                yield bisect_right(self.times, moved(frame.pts * self.tick) + self.tick / 2) - 1, frame
            else:
                yield i, frame


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, first: _FirstFrame, last: int | None
) -> tuple[list[_Packet], str]:
    """A file's packets in order, at least up to frame `last`, and the error that ended reading, if any."""
    packets, frames = list[_Packet](), 0
    try:
        for packet in container.demux(stream):
            if packet.size:
                packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
                early = packet.pts is not None and first.pts is not None and packet.pts < first.pts
                frames += not (packet.is_discard or early)
            if last is not None and frames > last + _REORDERED:
                break
    except damage() as error:
        return packets, str(error)
    return packets, ""


def _readable(packets: Sequence[_Packet], first: _FirstFrame, ordered: bool) -> list[_Packet]:
    """The packets from the first decodable frame on, for files that start between I-frames."""
    if ordered and first.pts is not None:
        begin = next((i for i, packet in enumerate(packets) if packet.pts == first.pts), 0)
        return [packet for packet in packets[begin:] if packet.pts is not None and packet.pts >= first.pts]
    begin = next((i for i, packet in enumerate(packets) if packet.key), 0) if first.key else 0
    return list(packets[begin:])


def _parts(packets: Sequence[_Packet], tick: Fraction, clock: Clock) -> list[list[_Packet]]:
    """Packets by the parts of a file, each with a restarted clock."""
    parts = [[packets[0]]]
    for before, packet in pairwise(packets):
        if packet.key and before.dts is not None and packet.dts is not None:
            begins = clock.restarts_at(before.dts * tick, packet.dts * tick)
            parts += [[]] if begins else []
        parts[-1].append(packet)
    return parts


def _video_of(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video stream, cover pictures excluded."""
    return next((s for s in container.streams.video if not _is(s, "attached_pic")), None)


def _sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """The track that players choose: the default, else the first."""
    tracks = container.streams.audio
    return next((track for track in tracks if _is(track, "default")), tracks[0] if tracks else None)


def _is(stream: av.stream.Stream, disposition: str) -> bool:
    return bool(stream.disposition & av.stream.Disposition[disposition])


def _promised(stream: av.VideoStream) -> int:
    """The number of frames that a file declares, or that its index has after an edit list."""
    entries = len(getattr(stream, "index_entries", ()))
    return min(stream.frames, entries) if entries else stream.frames


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, decoder: str | None
) -> Iterator[av.VideoFrame]:
    """The decoded frames of a stream from here on. decoder: replaces FFmpeg's default."""
    if decoder is None:
        yield from container.decode(stream)
        return
    context = cast(av.VideoCodecContext, av.CodecContext.create(decoder, "r"))
    context.extradata = stream.codec_context.extradata
    for packet in container.demux(stream):
        yield from context.decode(packet if packet.size else None)


def _decoder_of(stream: av.VideoStream) -> str | None:
    """The decoder for WebM's alpha, which FFmpeg's own decoders ignore."""
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if decoder is None or stream.metadata.get("alpha_mode") != "1":
        return None
    return decoder if decoder in av.codecs_available else None


def are_even(times: Sequence[Fraction], fps: Fraction, tick: Fraction) -> bool:
    """Whether times are evenly spaced at a rate, up to the clock's tick."""
    slack = max(tick * Fraction(3, 2), Fraction(1, 500))
    return all(abs(t - i / fps) <= slack for i, t in enumerate(times))


_BARE = ("h264", "hevc", "vvc", "mpegvideo", "m4v", "cavsvideo", "dirac", "vc1", "obu", "mjpeg", "h261", "h263")
"""Raw streams without a container, whose frames have no times."""
_BROADCAST = ("mpegts", "mpeg")
"""Formats whose clock may leap."""
_REORDERED = 64
"""Maximal reordering: packets after one that may belong to frames shown before it."""
_WORTH_SEEKING = 16
"""Frames up to which decoding is faster than seeking."""
_THREADS = 4
"""Decoder threads; each buffers frames."""


@dataclass(frozen=True)
class _FirstFrame:
    """Facts from the first frame. size: upright. pts, key: of the frame. stored, decoder: see `FrameIndex`."""

    size: tuple[int, int]
    stored: tuple[int, int]
    notes: tuple[str, ...]
    pts: int | None
    key: bool
    decoder: str | None


def _probe(path: Path) -> _FirstFrame:
    """Decode the first frame for the size, the notes and the decoder."""
    from .colour import has_alpha, hdr_kind

    with opened(path) as container:
        stream = _video_of(container)
        if stream is None:
            raise VideoError(f"{path} has no video stream")
        decoder = _decoder_of(stream)
        try:
            frame = next(_decoded(container, stream, decoder), None)
        except damage() as error:
            raise VideoError(f"{path} is not a readable video: {error}") from error
        if frame is None:
            raise VideoError(f"{path} is not a readable video: no frame can be decoded")
        aspect = stream.sample_aspect_ratio or Fraction(1)
        aspect = aspect if Fraction(1, 8) <= aspect <= 8 else Fraction(1)
        size = (max(1, round(frame.width * aspect)), frame.height)
        notes = []
        if frame.interlaced_frame:
            notes.append(f"{path.name} is interlaced: deinterlace it first, or combing becomes part of the edit")
        if kind := hdr_kind(frame):
            notes.append(f"{path.name} is HDR ({kind}) and is tone-mapped to SDR")
        size = size[::-1] if Orientation.of(frame).on_its_side else size
        if has_alpha(frame):
            notes.append(f"{path.name} has transparency and is composited over the background")
        return _FirstFrame(size, (frame.width, frame.height), tuple(notes), frame.pts, bool(frame.key_frame), decoder)
