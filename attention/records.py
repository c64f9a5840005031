"""What the source branch did at one layer of one step, kept in one of two forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .control import Attend, AttentionSite, Control, attention, attention_map
from .key_frames import KeyFrames


@dataclass(frozen=True)
class QueriesKeys:
    """Queries of every frame (f h t d) and keys of the frames that are seen (used h t d).

    Cross-attention keys are the text's, the same for every frame: (1 h s d).
    """

    q: Tensor
    k: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k}

    def to(self, device: torch.device | str) -> QueriesKeys:
        return QueriesKeys(self.q.to(device), self.k.to(device))


@dataclass(frozen=True)
class Map:
    """The attention map itself: (f h t (n t)) for self-, (f h t s) for cross-attention."""

    probabilities: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"map": self.probabilities}

    def to(self, device: torch.device | str) -> Map:
        return Map(self.probabilities.to(device))


Record = QueriesKeys | Map


def record_from(tensors: dict[str, Tensor]) -> Record:
    """The inverse of `Record.tensors`."""
    return Map(tensors["map"]) if "map" in tensors else QueriesKeys(tensors["q"], tensors["k"])


@dataclass(frozen=True)
class SourceStep:
    """Everything recorded at one step, read by site and by the clip's frames."""

    records: dict[str, Record]
    key_frames: KeyFrames
    clip_length: int

    def __contains__(self, site: AttentionSite) -> bool:
        return site.name in self.records

    def apply_self(self, site: AttentionSite, v: Tensor, frames: list[int], attend: Attend = attention) -> Tensor:
        """A_src @ v for the given frames, v being what they see: (f h (n t) d) -> (f h t d)."""
        record = self.records[site.name]
        if isinstance(record, Map):
            return record.probabilities[frames].to(v) @ v
        keys = self.key_frames.at(site.channels)
        k = keys.gather(record.k.to(v), keys.used(self.clip_length), frames, self.clip_length)
        return attend(record.q[frames].to(v), k, v)

    def cross_map(self, site: AttentionSite, frames: list[int]) -> Tensor:
        """(f h t s)."""
        record = self.records[site.name]
        return record.probabilities[frames] if isinstance(record, Map) else attention_map(record.q[frames], record.k)


class Recorder(Control):
    """Runs the source branch and keeps the wanted layers' queries and keys, or maps."""

    def __init__(self, key_frames: KeyFrames, frames: int, wanted: set[str], maps: bool = False) -> None:
        super().__init__(key_frames, frames)
        self.wanted = wanted
        self.maps = maps
        self._pieces: dict[str, list[Record]] = {}

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if site.name in self.wanted:
            rows = [list(self.frames).index(f) for f in self.kept]
            key_frames = self.key_frames.at(site.channels)
            if self.maps:
                seen = key_frames.gather(k, self.frames, self.kept, self.clip_length)
                record: Record = Map(attention_map(q[rows], seen))
            else:
                used = key_frames.used(self.clip_length)
                keys = [row for f, row in zip(self.kept, rows, strict=True) if f in used]
                record = QueriesKeys(q[rows], k[keys])
            self._pieces.setdefault(site.name, []).append(record)
        return super().self_attention(q, k, v, site)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if site.name in self.wanted:
            rows = [list(self.frames).index(f) for f in self.kept]
            record = Map(attention_map(q[rows], k[:1])) if self.maps else QueriesKeys(q[rows], k[:1])
            self._pieces.setdefault(site.name, []).append(record)
        return super().cross_attention(q, k, v, site)

    @property
    def records(self) -> dict[str, Record]:
        """Whole-clip records of every wanted site, the pieces of chunks joined."""
        return {name: _joined(pieces, name.endswith("cross")) for name, pieces in self._pieces.items()}


def _joined(pieces: list[Record], cross: bool) -> Record:
    if len(pieces) == 1:
        # Rows were picked by index, so these are copies and hold no larger tensor alive.
        return pieces[0]
    first = pieces[0]
    if isinstance(first, Map):
        return Map(torch.cat([p.probabilities for p in pieces if isinstance(p, Map)]))
    parts = [p for p in pieces if isinstance(p, QueriesKeys)]
    return QueriesKeys(torch.cat([p.q for p in parts]), first.k if cross else torch.cat([p.k for p in parts]))
