"""The size and place of a store, decided before anything runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from ..attention.control import AttentionSite
from ..attention.key_frames import KeyFrames
from ..files.memory import free_bytes
from ..files.safetensors import Layout, format_bytes, layout_bytes
from ..files.whole import disk_folder, existing, is_in_memory
from ..imports import torch
from ..settings import check, setting, steps_of_share
from .records import MEMORIES, Memory, float8, kept_as_map, map_precision

Place = Literal["device", "ram", "disk"]
PLACES: tuple[Place, ...] = get_args(Place)
PRECISIONS = {"float16": "float16", "bfloat16": "bfloat16", "float8": "float8_e4m3fn"}
"""torch's names of the number types for stored queries and keys."""
GROUP = "The store"
USABLE = 0.8
"""The share of free memory that a store may take; the model needs the rest."""


def max_tokens() -> Any:
    """The setting shared by the store and the fusion."""
    return setting(
        None,
        "Record and fuse attention layers of up to this many tokens a frame; the authors' code takes 1024.",
        least=1, shown="all", group=GROUP,
    )  # fmt: skip


@dataclass(frozen=True)
class StoreSettings:
    """What an inversion stores of the source's attention, and where.

    fastest: the memory that auto takes if it fits: the one that the edits to come read. path: a safetensors file to
    write and keep. folder: the folder of a temporary store on disk; None for the system's.

    Raises ValueError for a value outside its range.
    """

    memory: Literal["auto", Memory] = setting(
        "recompute",
        "What to store. recompute stores only latents and runs the source again with the edit; queries_keys is "
        "faster and larger; maps stores the paper's attention maps, for study; keys_values stores what KV-Edit reads "
        "on Wan; auto takes queries_keys if it fits (keys_values for KV-Edit on Wan in the command, if it fits in "
        "memory), else recompute.",
        group=GROUP,
    )
    place: Literal["auto", Place] = setting(
        "auto",
        "Where to put the store; auto takes the fastest place with enough room. With a GPU, RAM is pinned.",
        group=GROUP,
    )
    budget_gb: float | None = setting(
        None,
        "Maximal size of the store, in any place, latents included.",
        least=0,
        unit="GB, 1e9 bytes",
        shown="what is free",
        step=0.1,
        group=GROUP,
    )
    precision: Literal["model", "float16", "bfloat16", "float8"] = setting(
        "model",
        "Precision of the stored queries and keys; model is the model's own. float8 (e4m3, one scale per head) halves "
        "the size again, with hardly visible error.",
        group=GROUP,
    )
    keep_steps: float = setting(
        1.0,
        "Share of steps, from the noisy end, whose attention is stored: 0.8 suffices for the paper's settings. Other "
        "steps are computed again when an edit needs them.",
        least=0,
        most=1,
        group=GROUP,
    )
    max_tokens: int | None = max_tokens()
    fastest: Memory = "queries_keys"
    path: Path | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.memory == "maps" and self.precision != "model":
            raise ValueError(f"maps need the model's precision, not {self.precision}: set precision to model")

    @classmethod
    def of(cls, value: str | StoreSettings) -> StoreSettings:
        """The settings themselves, or those with just a memory's name."""
        return value if isinstance(value, StoreSettings) else cls(value)  # type: ignore[arg-type]

    def kept_steps(self, steps: int) -> int:
        """Number of steps whose attention is stored: as many as a fusion of this share reads."""
        return steps_of_share(self.keep_steps, steps)

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The stored precision of queries and keys that were computed in `dtype`."""
        return dtype if self.precision == "model" else getattr(torch, PRECISIONS[self.precision])

    def keeps(self, site: AttentionSite, memory: Memory) -> bool:
        """Whether a memory stores a layer's attention."""
        fits = self.max_tokens is None or site.tokens <= self.max_tokens
        return fits and (memory != "keys_values" or site.kind == "self")


@dataclass(frozen=True)
class Demand:
    """What the size of a store depends on.

    latents_shape: (frames, c, h, w). latent_size: bytes per number. dtype: the model's. text_tokens, text_bytes: of
    the source prompt. in_parts: whether frames that attend to each other run in several chunks, which gives each frame
    several attentions where a store has room for one.
    """

    sites: Sequence[AttentionSite]
    latents_shape: tuple[int, ...]
    latent_size: int
    steps: int
    key_frames: KeyFrames
    dtype: torch.dtype
    text_tokens: int
    text_bytes: int
    in_parts: bool = False

    def layout(self, memory: Memory, settings: StoreSettings) -> Layout:
        """The tensors of one step's attention."""
        if memory == "recompute":
            return {}
        stored = settings.stored(self.dtype)
        found: Layout = {}
        for site in self.sites:
            if settings.keeps(site, memory):
                found |= {f"{site.name}.{part}": t for part, t in self._record(memory, site, stored).items()}
        return found

    def _record(self, memory: Memory, site: AttentionSite, stored: torch.dtype) -> Layout:
        keys_of = self.key_frames.at(site.channels)
        key_tokens = (
            self.text_tokens if site.kind == "cross" else len(keys_of.of_frame(0, self.latents_shape[0])) * site.tokens
        )
        as_map = kept_as_map(memory, site, key_tokens, stored)
        form = "map" if as_map else memory
        shapes = record_shapes(site, self.latents_shape[0], self.key_frames, self.text_tokens, form)
        parts: Layout = {part: (map_precision(stored) if as_map else stored, shape) for part, shape in shapes.items()}
        if stored == float8() and not as_map:
            parts |= {f"{part}_scale": (torch.float32, (1, site.heads, 1, 1)) for part in shapes}
        return parts

    @property
    def latents_bytes(self) -> int:
        """Bytes of the latents of every level, which every store contains."""
        return (self.steps + 1) * prod(self.latents_shape) * self.latent_size

    def nbytes(self, memory: Memory, settings: StoreSettings) -> int:
        """Bytes of the whole store: latents of every level, text, and the stored attention."""
        return (
            self.latents_bytes
            + self.text_bytes
            + settings.kept_steps(self.steps) * layout_bytes(self.layout(memory, settings))
        )


def record_shapes(
    site: AttentionSite, frames: int, key_frames: KeyFrames, text_tokens: int, form: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's record of one step, without scales. text_tokens: of the source prompt. form: a memory, or
    "map" for a layer that is stored as its map.
    """
    cross, keys_of = site.kind == "cross", key_frames.at(site.channels)
    if form == "map":
        keys_seen = text_tokens if cross else len(keys_of.of_frame(0, frames)) * site.tokens
        return {"map": (frames, site.heads, site.tokens, keys_seen)}
    keys = (1, text_tokens) if cross else (len(keys_of.used(range(frames), frames)), site.tokens)
    of_keys = (keys[0], site.heads, keys[1], site.head_dim)
    if form == "keys_values":
        return {"k": of_keys, "v": of_keys}
    return {"q": (frames, site.heads, site.tokens, site.head_dim), "k": of_keys}


@dataclass(frozen=True)
class StorePlan:
    """The chosen memory, its place and bytes, and the reason. folder: of a store on disk."""

    memory: Memory
    place: Place
    nbytes: int
    why: str
    folder: Path | None = None

    def __str__(self) -> str:
        where = f" in {self.folder}" if self.folder else ""
        return f"{self.memory} {_IN[self.place]}{where}, {format_bytes(self.nbytes)}: {self.why}"


_IN = {"device": "on the device", "ram": "in RAM", "disk": "on disk"}


NOT_IN_PARTS = (
    'memory "{memory}" stores one attention per frame, but frames attend to each other in several chunks or context '
    "windows: use memory recompute, or run the whole clip at once"
)


def plan_store(settings: StoreSettings, demand: Demand, device: torch.device) -> StorePlan:
    """Choose the fastest memory and place that fit the budget and the free space.

    From fast to slow: attention (`fastest`) on the device, in RAM, on disk, then recomputing; keys and values are not
    chosen on disk, since reading them takes longer. Raises MemoryError, with the
    bytes of each memory, if nothing fits, and ValueError for attention that cannot be stored.
    """
    if settings.precision == "float8" and device.type == "mps":
        raise ValueError("MPS devices have no float8: set precision to float16")
    fastest: tuple[Memory, ...] = (settings.fastest, "recompute") if demand.sites else ("recompute",)
    memories = fastest if settings.memory == "auto" else (settings.memory,)
    if any(site.kind == "joint" for site in demand.sites):
        if settings.memory not in ("auto", "recompute"):
            raise ValueError(f'memory is {settings.memory}; this model\'s joint layers need "recompute"')
        memories = ("recompute",)
    folder = _disk(settings)
    refused = []
    if demand.in_parts and "recompute" not in memories:
        raise ValueError(NOT_IN_PARTS.format(memory=settings.memory))
    if demand.in_parts and len(memories) > 1:
        memories = ("recompute",)
        refused.append("frames attend to each other in several chunks")
    for memory in (m for m in MEMORIES[::-1] if m in memories):
        needed = demand.nbytes(memory, settings)
        if settings.budget_gb is not None and needed > settings.budget_gb * 1e9:
            refused.append(f"{memory} takes {format_bytes(needed)} of budget_gb {settings.budget_gb:g}")
            continue
        for place in _places(settings, device):
            if (place, memory, settings.memory, settings.place) == ("disk", "keys_values", "auto", "auto"):
                refused.append("keys_values on disk is slower than recompute")
                continue
            if place == "disk" and folder is None:
                refused.append(f"no disk for {memory}: the temporary folders are in memory")
                continue
            room = _free_bytes(place, folder, device)
            if room is None or needed <= (room if place == "disk" else USABLE * room):
                why = "; ".join(refused) or _chosen(settings, room)
                return StorePlan(memory, place, needed, why, folder if place == "disk" else None)
            refused.append(f"{memory} takes {format_bytes(needed)} of {format_bytes(room)} free {_IN[place]}")
    sizes = ", ".join(f"{m} {format_bytes(demand.nbytes(m, settings))}" for m in MEMORIES)
    raise MemoryError(f'memory "{settings.memory}" does not fit: {"; ".join(refused)}. Sizes: {sizes}')


def _chosen(settings: StoreSettings, room: int | None) -> str:
    why = "the fastest" if "auto" in (settings.memory, settings.place) and settings.path is None else "as set"
    return why if room is None else f"{why}, {format_bytes(room)} free"


def _places(settings: StoreSettings, device: torch.device) -> tuple[Place, ...]:
    """Possible places of the store, fastest first; a CPU's own memory is the RAM."""
    if settings.path is not None:
        return ("disk",)
    places: tuple[Place, ...] = ("ram", "disk") if device.type == "cpu" else PLACES
    return tuple(p for p in places if p == settings.place) or places[:1] if settings.place != "auto" else places


def _disk(settings: StoreSettings) -> Path | None:
    """The folder of a store on disk; None if every temporary folder is in memory."""
    if settings.path is not None:
        return settings.path.parent
    folders = [folder for folder in (settings.folder, disk_folder()) if folder is not None]
    return next((folder for folder in folders if not is_in_memory(folder)), None)


def _free_bytes(place: Place, folder: Path | None, device: torch.device) -> int | None:
    if place == "disk" and folder is not None:
        return shutil.disk_usage(existing(folder)).free
    return available_bytes(device if place == "device" else torch.device("cpu"))


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a device's memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() if device.type == "cpu" else None
