"""Where the frames of a video file are: its packets, their times, and what can be decoded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..files.whole import check_name
from ..imports import av
from .orientation import Orientation
from .pictures import VideoError

if TYPE_CHECKING:
    pass


def damage() -> tuple[type[Exception], ...]:
    """The errors of PyAV on damaged files; IndexError comes from streams that the header does not list."""
    return av.error.FFmpegError, IndexError


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
    alpha in separate packets. aspect: width of a stored pixel by its height.
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
    aspect: Fraction = Fraction(1)

    @classmethod
    def of(cls, path: Path, last: int | None = None) -> FrameIndex:
        """Scan a file, up to frame number `last`."""
        first = _probe(path)
        with opened(path) as container:
            stream = video_of(container)
            assert stream is not None  # `_probe` has checked
            declared = stream.guessed_rate or stream.average_rate or Fraction(25)
            tick, kind, declared_frames = (
                stream.time_base or Fraction(1, 1000),
                container.format.name,
                _declared_frames(stream),
            )
            packets, broken = _packets(container, stream, first, last)
            audio = sound_of(container)
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
        if broken or (last is None and declared_frames > len(packets)):
            notes += (f"{path.name} is truncated: {readable} of its frames can be read",)
        return cls(
            tuple(time for time, _ in placed), tuple(i for i, (_, key) in enumerate(placed) if key), tick, ordered,
            declared, first.size, first.stored, sound, notes, Clock(tuple(moves), kind in _BROADCAST), first.decoder,
            first.aspect,
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
            stream = video_of(container)
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


def video_of(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video stream, cover pictures excluded."""
    return next((s for s in container.streams.video if not _is(s, "attached_pic")), None)


def sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """The track that players choose: the default, else the first."""
    tracks = container.streams.audio
    return next((track for track in tracks if _is(track, "default")), tracks[0] if tracks else None)


def _is(stream: av.stream.Stream, disposition: str) -> bool:
    return bool(stream.disposition & av.stream.Disposition[disposition])


def _declared_frames(stream: av.VideoStream) -> int:
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
    """Facts from the first frame. size: upright. pts, key: of the frame. The others: see `FrameIndex`."""

    size: tuple[int, int]
    stored: tuple[int, int]
    notes: tuple[str, ...]
    pts: int | None
    key: bool
    decoder: str | None
    aspect: Fraction


def _probe(path: Path) -> _FirstFrame:
    """Decode the first frame for the size, the notes and the decoder."""
    from .colour import hdr_kind, shows_through

    with opened(path) as container:
        stream = video_of(container)
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
            notes.append(f"{path.name} is HDR ({kind}): the model gets it tone-mapped to SDR")
        size = size[::-1] if Orientation.of(frame).on_its_side else size
        if shows_through(frame):
            notes.append(f"{path.name} has transparency: the model gets it over the background")
        stored, key = (frame.width, frame.height), bool(frame.key_frame)
        return _FirstFrame(size, stored, tuple(notes), frame.pts, key, decoder, aspect)
