"""Records of the source branch's attention, in one of two forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from ..attention.capture import Captured
from ..attention.condition import Condition
from ..attention.control import (
    Attend,
    AttentionSite,
    Control,
    attend_as_one,
    attention,
    attention_map,
    over_windows,
)
from ..attention.key_frames import Chunk, KeyFrames
from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

Memory = Literal["recompute", "queries_keys", "maps", "keys_values"]
MEMORIES: tuple[Memory, ...] = get_args(Memory)
KEPT_WINDOWS = (
    "memory: a node on the model splits the clip into context windows (AnimateDiff-Evolved), in which a frame's "
    "attention differs: set memory to recompute"
)
OTHER_WINDOWS = (
    "model: the source's context windows differ from the edit's (AnimateDiff-Evolved): invert with the same context "
    "options"
)


def float8() -> torch.dtype:
    return torch.float8_e4m3fn


class Projections:
    """Two of the queries, keys and values of a layer, as a dataclass's fields; with the scales of float8.

    Queries are (f h t d), keys and values those of the key frames, (used h t d). In float8, scales (1 h 1 1) bring each
    head's largest value to the format's largest.
    """

    k: Tensor
    k_scale: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if part is not None}

    def stored(self, dtype: torch.dtype) -> Self:
        """In a stored precision."""
        if dtype != float8():
            return type(self)(**{name: part.to(dtype) for name, part in self.tensors.items()})
        found: dict[str, Tensor] = {}
        for name, part in self.tensors.items():
            found[name], found[f"{name}_scale"] = _to_float8(part)
        return type(self)(**found)

    def keys(self, dtype: torch.dtype) -> Tensor:
        """In the precision they are used in."""
        return _from_float8(self.k, self.k_scale, dtype)


@dataclass(frozen=True)
class QueriesKeys(Projections):
    """The queries and keys of a layer. Cross-attention keys are the text's, the same for every frame: (1 h s d)."""

    q: Tensor
    k: Tensor
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None

    def queries(self, dtype: torch.dtype) -> Tensor:
        """In the precision they are used in."""
        return _from_float8(self.q, self.q_scale, dtype)


@dataclass(frozen=True)
class KeysValues(Projections):
    """The keys and values of a self-attention layer."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """In the precision they are used in."""
        return _from_float8(self.v, self.v_scale, dtype)


@dataclass(frozen=True)
class Map:
    """The attention map itself: (f h t (n t)) for self-, (f h t s) for cross-attention."""

    probabilities: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"map": self.probabilities}

    def stored(self, dtype: torch.dtype) -> Map:
        """In a stored precision; float8 is too coarse for probabilities, so float16 replaces it."""
        return Map(self.probabilities.to(map_precision(dtype)))


def map_precision(dtype: torch.dtype) -> torch.dtype:
    """The precision of maps in a store whose queries and keys have `dtype`."""
    return torch.float16 if dtype == float8() else dtype


def kept_as_map(memory: Memory, site: AttentionSite, key_tokens: int, dtype: torch.dtype) -> bool:
    """Whether a layer is stored as its map: with "queries_keys", a cross map smaller than the queries."""
    of_map, of_queries = site.heads * key_tokens * map_precision(dtype).itemsize, site.channels * dtype.itemsize
    return memory == "maps" or (memory == "queries_keys" and site.kind == "cross" and of_map < of_queries)


Record = QueriesKeys | KeysValues | Map


def record_from(tensors: dict[str, Tensor]) -> Record:
    """The inverse of `Record.tensors`."""
    if "map" in tensors:
        return Map(tensors["map"])
    return QueriesKeys(**tensors) if "q" in tensors else KeysValues(**tensors)


def _to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor (f h t d) in float8, and the scale of each head."""
    largest = x.abs().amax((0, 2, 3), keepdim=True).float().clamp(min=1e-12)
    limit = torch.finfo(float8()).max
    scale = largest / limit
    return (x / scale.to(x)).clamp(-limit, limit).to(float8()), scale


def _from_float8(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)


@dataclass
class PairedBranch:
    """A branch that a host evaluates within the call of another, each layer just before the other's: what it records
    there is gone after the layer.

    latents: (frames, c, h, w), as in `predict_noise`. The host leaves its result in `control.captured.prediction`.
    """

    latents: Tensor
    condition: Condition
    control: Recorder


@dataclass(frozen=True)
class SourceStep:
    """The source branch at one step, for one chunk of a clip.

    Queries and maps have a row for each frame of the chunk. So have keys, or with `stored` a row for each of its key
    frames, as in a store. paired: the branch, if it runs only within the edit's call, layer by layer; `captured` fills
    up meanwhile.
    """

    captured: Captured
    key_frames: KeyFrames
    chunk: Chunk
    stored: bool = False
    paired: PairedBranch | None = None
    windows: dict[tuple[int, ...], SourceStep] = field(default_factory=dict)
    """The source in context windows, by their frames, where another node on the model splits the clip."""

    @property
    def records(self) -> dict[str, Record]:
        """Of attention layers, by name."""
        return self.captured.records

    def window(self, frames: tuple[int, ...]) -> SourceStep:
        """The source in a context window of the edit; ValueError if it ran in other windows or comes from a store."""
        if frames == self.chunk.frame_indices or frames in self.windows:
            return self.windows.get(frames, self)
        if self.windows:
            raise ValueError(OTHER_WINDOWS)
        if self.stored:
            raise ValueError(KEPT_WINDOWS)
        part = Chunk.of(frames, self.chunk.clip)
        rows = self.chunk.rows(part)
        features = {name: x[rows] for name, x in (self.captured.features or {}).items()}
        return replace(self, chunk=part, captured=Captured(_of_rows(self.records, rows), features=features))

    def record(self, name: str) -> Record | None:
        """A layer's record, if any; ValueError if the source ran in context windows."""
        if self.windows:
            raise ValueError(OTHER_WINDOWS)
        try:
            return self.records[name]
        except KeyError:
            return None

    def feature(self, name: str) -> Tensor:
        """The feature of a ResNet block; ValueError if the source ran in context windows."""
        if self.windows:
            raise ValueError(OTHER_WINDOWS)
        assert self.captured.features is not None
        return self.captured.features[name]

    def of_queries(self, site: AttentionSite) -> QueriesKeys | Map:
        """A layer's queries and keys, or map; KeyError for a layer that was not recorded."""
        found = self.record(site.name)
        if found is None or isinstance(found, KeysValues):
            raise KeyError(site.name)
        return found

    def apply_self(self, site: AttentionSite, v: Tensor, attend: Attend = attention) -> Tensor:
        """A_src @ v, v of each frame's key frames: (f h (n t) d) -> (f h t d)."""
        record = self.of_queries(site)
        if isinstance(record, Map):
            return record.probabilities.to(v) @ v
        keys, frames, clip = self.key_frames.at(site.channels), self.chunk.frame_indices, self.chunk.clip
        k = keys.gather(record.keys(v.dtype), keys.used(frames, clip) if self.stored else frames, frames, clip)
        q = record.queries(v.dtype)
        return attend_as_one(attend, q, k, v) if keys.everyone else attend(q, k, v)

    def apply_cross(self, site: AttentionSite, v: Tensor, attend: Attend = attention) -> Tensor:
        """A_src @ v, v of the source tokens: (f or 1, h s d) -> (f h t d)."""
        record = self.of_queries(site)
        if isinstance(record, Map):
            return record.probabilities.to(v) @ v
        return attend(record.queries(v.dtype), record.keys(v.dtype), v)

    def cross_map(self, site: AttentionSite, dtype: torch.dtype) -> Tensor:
        """(f h t s)."""
        if self.windows:
            maps = {frames: step.cross_map(site, dtype) for frames, step in self.windows.items()}
            return over_windows(maps, self.chunk.frame_indices)
        record = self.of_queries(site)
        if isinstance(record, Map):
            return record.probabilities.to(dtype)
        return attention_map(record.queries(dtype), record.keys(dtype))

    def maps(self, sites: Sequence[AttentionSite], dtype: torch.dtype) -> list[tuple[AttentionSite, Tensor]]:
        """Cross-attention maps of some layers of one grid, for `attention.masks.token_heat`."""
        return [(site, self.cross_map(site, dtype)) for site in sites]


class Recorder(Control):
    """Runs the source branch and records the chosen layers' attention in a memory's form.

    dtype: the precision of the store; None for the model's. values: whether to record keys and values.
    """

    def __init__(
        self,
        key_frames: KeyFrames,
        chunk: Chunk,
        layers: set[str],
        memory: Memory = "recompute",
        dtype: torch.dtype | None = None,
        values: bool = False,
    ) -> None:
        super().__init__(key_frames, chunk)
        self.layers = layers
        self.memory = memory
        self.dtype = dtype
        self.values = values or memory == "keys_values"

    @property
    def step(self) -> SourceStep:
        """What it has recorded, for the same chunk."""
        windows = {frames: recorder.step for frames, recorder in self.windows.items()}
        return SourceStep(self.captured, self.key_frames, self.chunk, windows=windows)

    @property
    def records(self) -> dict[str, Record]:
        """Of attention layers, by name."""
        return self.captured.records

    def on(self, chunk: Chunk) -> Self:
        if self.memory != "recompute" and self.layers:
            raise ValueError(KEPT_WINDOWS)
        return super().on(chunk)

    def forget(self, layer: str) -> None:
        self.records.pop(layer, None)

    def feature(self, x: Tensor, name: str) -> Tensor:
        if self.captured.features is not None:
            self.captured.features[name] = x
        return x

    @property
    def wants_tokens(self) -> bool:
        return self.captured.inputs is not None or super().wants_tokens

    def input_tokens(self, x: Tensor, site: AttentionSite) -> None:
        if self.captured.inputs is not None:
            self.captured.inputs[site.name] = x

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if site.name in self.layers:
            as_map = kept_as_map(self.memory, site, k.shape[2], self.dtype or k.dtype)
            pair = KeysValues(k, v) if self.values else QueriesKeys(q, k)
            self.records[site.name] = Map(attention_map(q, self.of_key_frames(k, site))) if as_map else pair
        return super().self_attention(q, k, v, site)

    def joint_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        """Records the video's queries and keys, or keys and values, of one clip: (1 h n d)."""
        if site.name in self.layers:
            q_video, k_video, v_video = (x[:, :, site.rows("video")] for x in (q, k, v))
            pair = KeysValues(k_video, v_video) if self.values else QueriesKeys(q_video, k_video)
            self.records[site.name] = pair
        return super().joint_attention(q, k, v, site)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if site.name in self.layers and not self.values:
            as_map = kept_as_map(self.memory, site, k.shape[2], self.dtype or k.dtype)
            self.records[site.name] = Map(attention_map(q, k[:1])) if as_map else QueriesKeys(q, k[:1])
        return super().cross_attention(q, k, v, site)


def whole_clip(recorders: Sequence[Recorder], sites: Sequence[AttentionSite]) -> dict[str, Record]:
    """A step's records in a store's form: every frame once, keys of key frames only."""
    return {site.name: _whole(recorders, site) for site in sites if site.name in recorders[0].records}


def _whole(recorders: Sequence[Recorder], site: AttentionSite) -> Record:
    everyone = tuple(range(recorders[0].chunk.clip))
    used = recorders[0].key_frames.at(site.channels).used(everyone, len(everyone))

    def of_clip(part: str, first: Tensor) -> Tensor:
        if part == "k" and site.kind == "cross":
            return first
        parts = [recorder.records[site.name].tensors[part] for recorder in recorders]
        return _rows_of(recorders, parts, used if part in ("k", "v") else everyone)

    return record_from({part: of_clip(part, x) for part, x in recorders[0].records[site.name].tensors.items()})


def _rows_of(recorders: Sequence[Recorder], parts: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
    """Rows of some frames, each from the chunk that owns it, in the clip's order."""
    if len(parts) == 1:
        return pick(parts[0], frames)
    found: dict[int, Tensor] = {}
    for recorder, part in zip(recorders, parts, strict=True):
        found |= {f: part[recorder.chunk.frame_indices.index(f)] for f in recorder.chunk.owned if f in frames}
    return torch.stack([found[f] for f in frames])


def _of_rows(records: dict[str, Record], rows: Sequence[int]) -> dict[str, Record]:
    """Records of some frames, from a call that recorded all its frames' queries and keys."""
    return {
        name: record_from(
            {part: x if part == "k" and name.endswith(".cross") else x[rows] for part, x in record.tensors.items()}
        )
        for name, record in records.items()
    }


def pick(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor; a view if they are consecutive."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]
    return x[list(rows)]
