"""Spatio-temporal self-attention: the frames whose keys and values a frame attends to (FateZero Eq. 8)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from einops import rearrange

from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor

ANCHORS = ("first", "middle", "last")
NAMES = ("self", *ANCHORS, "previous")
ALL = "all"


def as_one(x: Tensor) -> Tensor:
    """All frames as one long frame, (f h t d) -> (1 h (f t) d); a view of a transformer's projections."""
    return rearrange(x, "f h t d -> 1 h (f t) d")


@dataclass(frozen=True)
class Chunk:
    """The frames of a clip in one UNet call.

    frame_indices: in the call's order. weights: of the frames' results; each frame's weights sum to 1 over all chunks,
    and key frames added for attention have 0. owned: the frames whose attention is recorded from this chunk; each frame
    is owned by one chunk. clip: the clip's number of frames.
    """

    frame_indices: tuple[int, ...]
    weights: tuple[float, ...]
    owned: tuple[int, ...]
    clip: int

    @classmethod
    def of(cls, frames: Sequence[int], clip: int) -> Chunk:
        """A chunk of frames that no other chunk has."""
        return cls(tuple(frames), (1.0,) * len(frames), tuple(frames), clip)

    @classmethod
    def whole(cls, clip: int) -> Chunk:
        """The whole clip in one chunk."""
        return cls.of(range(clip), clip)

    @property
    def is_whole(self) -> bool:
        return self.frame_indices == tuple(range(self.clip))

    def rows(self, part: Chunk) -> list[int]:
        """The rows of a part's frames in this chunk."""
        return [self.frame_indices.index(frame) for frame in part.frame_indices]

    def cut(self, x: Tensor) -> Tensor:
        """The rows of the chunk's frames, of those of the clip."""
        return x[list(self.frame_indices)]

    def zeros(self, part: Tensor) -> Tensor:
        """Zeros for the clip, like a result for the chunk."""
        return torch.zeros(self.clip, *part.shape[1:], dtype=part.dtype, device=part.device)

    def add(self, part: Tensor, whole: Tensor) -> None:
        """Add the weighted result for the chunk to that of the clip."""
        weights = torch.tensor(self.weights, dtype=part.dtype).to(part.device)
        whole[list(self.frame_indices)] += weights.view(-1, *[1] * (part.ndim - 1)) * part


def ramp(frames: int) -> list[float]:
    """Weights of a window's frames that fall towards its ends."""
    return [float(min(i + 1, frames - i)) for i in range(frames)]


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of a clip whose frames depend on each other: `frames` frames in one call of the model.

    overlap: the number of frames that neighbouring windows share; None for a quarter. A model that codes several frames
    in a latent counts latents. group: a window starts at a multiple of so many. Raises ValueError for windows that do
    not advance.
    """

    frames: int
    overlap: int | None = None
    group: int = 1

    def __post_init__(self) -> None:
        if self.overlap is not None and not 0 <= self.overlap < self.frames:
            raise ValueError(
                f"windows of {self.frames} frames cannot overlap by {self.overlap}: the overlap must be at least 0 and "
                "less than the window"
            )

    @classmethod
    def of(cls, windows: Windows | int | None) -> Windows | None:
        """From a number of frames."""
        return cls(windows) if isinstance(windows, int) else windows

    @classmethod
    def of_video(cls, frames: int, overlap: int | None, frames_per_latent: int) -> Windows:
        """The windows of at most so many frames of the video, on a model that codes several frames in a latent.

        overlap: frames of the video, in whole latents; None for half a window, which leaves fewer seams than a quarter.
        """
        latents = (frames - 1) // frames_per_latent + 1
        return cls(latents, latents // 2 if overlap is None else min(-(-overlap // frames_per_latent), latents - 1))

    def in_groups(self, group: int) -> Windows:
        """The same in whole groups of frames, at least one."""
        frames = max(1, self.frames // group) * group
        return Windows(frames, min(round((self.frames - self.advance) / group) * group, frames - group), group)

    @property
    def advance(self) -> int:
        """Frames from the start of a window to the start of the next."""
        return self.frames - (max(1, self.frames // 4) if self.overlap is None else self.overlap)

    def starts(self, clip: int) -> list[int]:
        """The first frame of each window; the last window ends with the clip, and is shorter where groups do not fit.

        Raises ValueError for windows of one.
        """
        if self.frames < 2:
            raise ValueError("window_frames is one frame, or one latent; windows that overlap need at least 2")
        return [*range(0, clip - self.frames, self.advance), -((self.frames - clip) // self.group) * self.group]


@dataclass(frozen=True)
class KeyFrames:
    """The key frames of every frame of a clip.

    entries: "self", "first", "middle", "last", "previous", or int offsets from the frame, clamped to the clip. The
    middle is frame (frames - 1) // 2. Paper Eq. 8 is ("self", "middle"); the authors' style configurations are
    ("middle",), their Tune-A-Video ones ("previous", "first"). ("all",), on its own, is every frame of a call, as in
    video transformers. least_channels: layers with fewer channels attend to their own frame only (the authors'
    `least_sc_channel`).

    Raises ValueError for no entry or an unknown one.
    """

    entries: tuple[str | int, ...]
    least_channels: int = 0

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError('key_frames is empty: give at least one, e.g. ("self", "middle")')
        for entry in () if self.everyone else self.entries:
            known = (isinstance(entry, int) and not isinstance(entry, bool)) or entry in NAMES
            if not known:
                raise ValueError(
                    f"key_frames: unknown entry {entry!r}; use {', '.join(NAMES)}, an offset (-1) or all (on its own)"
                )

    @classmethod
    def of(cls, entries: KeyFrames | Iterable[str | int] | str | int) -> KeyFrames:
        """From a tuple, a list or a single entry."""
        if isinstance(entries, KeyFrames):
            return entries
        return cls((entries,) if isinstance(entries, (str, int)) else tuple(entries))

    @classmethod
    def parse(cls, text: str) -> KeyFrames:
        """From comma-separated entries: "self, middle, -1"."""
        words = [word.strip() for word in text.split(",") if word.strip()]
        return cls(tuple(int(word) if word.lstrip("+-").isdigit() else word for word in words))

    @property
    def everyone(self) -> bool:
        """Whether each frame attends to all frames of its call."""
        return self.entries == (ALL,)

    def at(self, channels: int) -> KeyFrames:
        """The key frames of a layer with this many channels."""
        return self if channels >= self.least_channels else KeyFrames(("self",))

    def of_frame(self, frame: int, frames: int) -> tuple[int, ...]:
        """The clip's frames that `frame` attends to, one per entry."""
        if self.everyone:
            return tuple(range(frames))

        def resolve(entry: str | int) -> int:
            named = {"self": frame, "first": 0, "middle": (frames - 1) // 2, "last": frames - 1, "previous": frame - 1}
            at = named[entry] if isinstance(entry, str) else frame + entry
            return min(max(at, 0), frames - 1)

        return tuple(resolve(entry) for entry in self.entries)

    @property
    def anchored(self) -> bool:
        """Whether frames attend only to themselves and fixed frames, which makes chunks exact."""
        return not self.everyone and all(entry in ("self", 0, *ANCHORS) for entry in self.entries)

    def anchors(self, clip: int) -> set[int]:
        """The fixed frames that every frame attends to."""
        return {self.of_frame(0, clip)[i] for i, entry in enumerate(self.entries) if entry in ANCHORS}

    def used(self, frames: Iterable[int], clip: int) -> tuple[int, ...]:
        """The clip's frames whose keys some frames of one call attend to, in order."""
        if self.everyone:
            return tuple(sorted(frames))
        return tuple(sorted({key for f in frames for key in self.of_frame(f, clip)}))

    def chunks(self, clip: int, windows: Windows | int | None = None, clip_norm: bool = False) -> list[Chunk]:
        """Split a clip into chunks of up to as many frames as a window has.

        Each chunk includes the fixed key frames; if frames attend to nothing else (`anchored`), chunks do not overlap,
        and give exactly the whole clip's result. With neighbours among the key frames, or with clip norm, the result is
        approximate: windows overlap, and their results are blended with weights that decrease towards a window's ends.

        Raises ValueError for chunks that are too short.
        """
        windows = Windows.of(windows)
        if windows is None or windows.frames >= clip:
            return [Chunk.whole(clip)]
        chunk, exact = windows.frames, self.anchored and not clip_norm
        if chunk < 1 or not (exact or windows.advance):
            least = "1" if exact else "2, with neighbours among the key frames or clip norm"
            raise ValueError(f"chunk_frames is {chunk}; it must be at least {least}")
        if exact:
            return self.around([(range(clip)[at : at + chunk], [1.0] * chunk) for at in range(0, clip, chunk)], clip)
        parts = [range(at, min(at + chunk, clip)) for at in windows.starts(clip)]
        return self.around([(part, ramp(len(part))) for part in parts], clip)

    def around(self, windows: Iterable[tuple[Sequence[int], Sequence[float]]], clip: int) -> list[Chunk]:
        """Chunks for windows of frames, with a weight for each frame's result; the windows must cover the clip.

        A frame of weight 0 is there only for attention. A window that wraps around the clip's end keeps its order.
        """
        shares = [dict(zip(frames, weights, strict=False)) for frames, weights in windows]
        total = [sum(share.get(f, 0.0) for share in shares) for f in range(clip)]
        chunks, owned_before = [], set[int]()
        for share in shares:
            added = self.anchors(clip) - {*share}
            frames = tuple(sorted({*share, *added}) if [*share] == sorted(share) else [*share, *sorted(added)])
            weights = tuple(share.get(f, 0.0) / total[f] for f in frames)
            owned = tuple(f for f in frames if share.get(f) and f not in owned_before)
            owned_before |= set(owned)
            chunks.append(Chunk(frames, weights, owned, clip))
        return chunks

    def gather(self, k: Tensor, given: Sequence[int], frames: Sequence[int], clip: int) -> Tensor:
        """Keys or values of the key frames of each of `frames`.

        k: (f h t d) of the clip's frames `given`; the nearest of these replaces a missing key frame. Returns
        (frames, h, (n t), d), or one row to broadcast if all frames have the same key frames.
        """
        if self.everyone:
            return as_one(k)
        rows = _rows(self, tuple(given), tuple(frames), clip)
        parts = []
        for row in rows:
            if row == tuple(range(len(given))):
                parts.append(k)
            elif len(set(row)) == 1:
                parts.append(k[row[0] : row[0] + 1].expand(len(row), -1, -1, -1))
            else:
                parts.append(k[_index(row, k.device)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@dataclass(frozen=True)
class ClipCalls:
    """How model calls split a clip, and how its frames depend on each other.

    clip_norm: whether normalization statistics are those of the whole clip. windows: of the calls; None for the host's,
    else the whole clip.
    """

    key_frames: KeyFrames
    clip_norm: bool = False
    windows: Windows | None = None


@lru_cache(maxsize=256)
def _rows(keys: KeyFrames, given: tuple[int, ...], frames: tuple[int, ...], clip: int) -> tuple[tuple[int, ...], ...]:
    """For each entry, the row of `given` that each frame attends to; for a single frame if it is the same for all."""

    def nearest(key_frame: int) -> int:
        return min(range(len(given)), key=lambda i: abs(given[i] - key_frame))

    table = [tuple(nearest(key_frame) for key_frame in keys.of_frame(frame, clip)) for frame in frames]
    return tuple(zip(*(table[:1] if len(set(table)) == 1 else table), strict=True))


@lru_cache(maxsize=256)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """An index on a device, copied there once instead of at every layer."""
    with torch.inference_mode(False):  # inference tensors would block gradients later
        return torch.tensor(rows, device=device)
