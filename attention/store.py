"""What an inversion leaves behind, in one of three memories with the same results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .control import AttentionSite
from .key_frames import KeyFrames
from .records import Record, SourceStep, record_from

if TYPE_CHECKING:
    from typing_extensions import Self

Memory = Literal["recompute", "queries_keys", "maps"]
MEMORIES: tuple[Memory, ...] = get_args(Memory)
FORMAT = "fatezero-store-1"


class StoreError(ValueError):
    """A store that cannot be used: damaged, or made by another model, schedule or prompt."""


@dataclass(frozen=True)
class Condition:
    """What a prompt tells the UNet.

    embeddings: (1, tokens, dim). extras: further named inputs, (1, ...) each, such as SDXL's
    `text_embeds` and `time_ids`.
    """

    embeddings: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Tensor | Condition, name: str) -> Condition:
        """Wrap bare embeddings; ValueError naming the argument for another shape."""
        condition = value if isinstance(value, Condition) else cls(value)
        if condition.embeddings.ndim != 3 or len(condition.embeddings) != 1:
            raise ValueError(f"{name} has shape {tuple(condition.embeddings.shape)}; it must be (1, tokens, dim)")
        return condition

    @property
    def columns(self) -> int:
        return self.embeddings.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.embeddings, *self.extras.values()))

    def to(self, like: Tensor) -> Condition:
        """On the device and in the dtype of a tensor."""
        return replace(
            self, embeddings=self.embeddings.to(like), extras={k: v.to(like) for k, v in self.extras.items()}
        )


@dataclass(frozen=True)
class ModelIdentity:
    """Enough of a model to tell it from another.

    layout: its class, width and attention layers. samples: some of its weights. dtype: the
    one it ran in; across dtypes samples are compared to rounding.
    """

    layout: str
    samples: tuple[float, ...]
    dtype: str

    def matches(self, other: ModelIdentity) -> bool:
        if self.layout != other.layout or len(self.samples) != len(other.samples):
            return False
        a, b = torch.tensor(self.samples), torch.tensor(other.samples)
        return bool(torch.equal(a, b) if self.dtype == other.dtype else torch.allclose(a, b, rtol=1e-2, atol=1e-4))


@dataclass
class AttentionStore:
    """An inversion: its latents, and the attention of its steps unless it is recomputed.

    memory: "recompute" keeps latents only and runs the source branch again beside the
    edit; "queries_keys" keeps queries and keys; "maps" keeps the paper's attention maps.
    latents: (steps + 1, frames, 4, h, w), clean to noisy. timesteps: noisy to clean.
    records: one dict for each edit step, noisy to clean; empty for "recompute" and for a
    store on disk, which is read a step at a time.
    """

    memory: Memory
    latents: Tensor
    source: Condition
    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    key_frames: KeyFrames
    clip_norm: bool
    model: ModelIdentity
    prompt: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Record]] = field(default_factory=list)
    path: Path | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def frames(self) -> int:
        return self.latents.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held, on disk or in memory."""
        held = self.latents.nbytes + self.source.nbytes
        if self.path is not None:
            with safe_open(self.path, framework="pt") as file:
                return held + sum(_slice_bytes(file, key) for key in _names(file) if key.startswith("step."))
        return held + sum(t.nbytes for step in self.records for r in step.values() for t in r.tensors.values())

    def to(self, device: torch.device | str) -> Self:
        """The same store with its latents on a device, where a run then brings what it reads.

        Attention stays where it is until a step asks for it.
        """
        return replace(self, latents=self.latents.to(device), source=self.source.to(self.latents.to(device)[:0]))

    def source_step(self, step: int, wanted: set[str]) -> SourceStep:
        """The records of an edit step (0 the noisiest) for some layers, on the latents' device.

        Raises StoreError for a layer that was not recorded.
        """
        if self.path is None:
            device = self.latents.device
            records = {name: r.to(device) for name, r in self.records[step].items() if name in wanted}
        else:
            records = self._read(step, wanted)
        missing = sorted(wanted - set(records))
        if missing:
            raise StoreError(
                f"the store holds no attention of {missing[0]} ({len(missing)} layers missing): "
                "invert with a larger max_tokens, or lower max_tokens of the edit"
            )
        return SourceStep(records, self.key_frames, self.frames)

    # --- on disk ----------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all.

        Raises OSError, saying the bytes, where the disk has no room.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if self.nbytes > free:
            raise OSError(f"the store takes {self.nbytes} bytes but {path.parent} has {free} free")
        tensors = {"latents": self.latents, "source.embeddings": self.source.embeddings}
        tensors |= {f"source.extras.{name}": t for name, t in self.source.extras.items()}
        for step in range(len(self.records) if self.path is None else self.steps if self.memory != "recompute" else 0):
            records = self.records[step] if self.path is None else self._read(step, None)
            for name, record in records.items():
                tensors |= {f"step.{step:04d}.{name}.{part}": t for part, t in record.tensors.items()}
        about = {
            "format": FORMAT,
            "memory": self.memory,
            "timesteps": self.timesteps,
            "alphas": self.alphas,
            "key_frames": {"entries": self.key_frames.entries, "least_channels": self.key_frames.least_channels},
            "clip_norm": self.clip_norm,
            "model": vars(self.model),
            "prompt": self.prompt,
            "extra": self.extra,
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            on_cpu = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
            save_file(on_cpu, partial, metadata={"fatezero": json.dumps(about)})
            partial.replace(path)
        except SafetensorError as error:
            raise OSError(f"the store of {self.nbytes} bytes could not be written to {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> AttentionStore:
        """Read a store; attention stays on disk until a step asks for it.

        Raises FileNotFoundError, or StoreError for a file that is damaged or not a store.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no store at {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {}).get("fatezero", "{}"))
                if about.get("format") != FORMAT:
                    raise StoreError(f"{path} is a safetensors file, but not a store of this version of fatezero")
                extras = {k[14:]: file.get_tensor(k) for k in _names(file) if k.startswith("source.extras.")}
                return cls(
                    memory=about["memory"],
                    latents=file.get_tensor("latents"),
                    source=Condition(file.get_tensor("source.embeddings"), extras),
                    timesteps=tuple(about["timesteps"]),
                    alphas=tuple(about["alphas"]),
                    key_frames=KeyFrames(tuple(about["key_frames"]["entries"]), about["key_frames"]["least_channels"]),
                    clip_norm=about["clip_norm"],
                    model=ModelIdentity(
                        about["model"]["layout"], tuple(about["model"]["samples"]), about["model"]["dtype"]
                    ),
                    prompt=about["prompt"],
                    extra=about["extra"],
                    path=None if about["memory"] == "recompute" else path,
                )
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise StoreError(f"{path} is not a whole store (truncated or damaged): {error}") from error

    def _read(self, step: int, wanted: set[str] | None) -> dict[str, Record]:
        assert self.path is not None
        prefix = f"step.{step:04d}."
        found: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.path, framework="pt", device=str(self.latents.device)) as file:
            for key in _names(file):
                if key.startswith(prefix):
                    name, _, part = key[len(prefix) :].rpartition(".")
                    if wanted is None or name in wanted:
                        found.setdefault(name, {})[part] = file.get_tensor(key)
        return {name: record_from(tensors) for name, tensors in found.items()}


def _names(file: Any) -> list[str]:
    """The tensors of an open safetensors file, which is no dict."""
    return list(file.keys())


def _slice_bytes(file: Any, key: str) -> int:
    part = file.get_slice(key)
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[part.get_dtype()]
    return int(torch.Size(part.get_shape()).numel()) * size


def store_bytes(
    memory: Memory,
    sites: Iterable[AttentionSite],
    latents_shape: tuple[int, ...],
    steps: int,
    source: Condition,
    key_frames: KeyFrames,
    latent_size: int,
    record_size: int,
) -> int:
    """Bytes an `AttentionStore` will take, before anything is run.

    latents_shape: (frames, 4, h, w). sites: the layers that will be recorded. latent_size,
    record_size: bytes of a number of the latents and of the UNet's attention.
    """
    frames = latents_shape[0]
    total = (steps + 1) * torch.Size(latents_shape).numel() * latent_size + source.nbytes
    if memory == "recompute":
        return total
    for site in sites:
        keys_of = key_frames.at(site.channels)
        seen, used = len(keys_of.entries), len(keys_of.used(frames))
        columns = source.columns if site.kind == "cross" else seen * site.tokens
        if memory == "maps":
            numbers = frames * site.tokens * columns
        else:
            keys = source.columns if site.kind == "cross" else used * site.tokens
            numbers = (frames * site.tokens + keys) * site.head_dim
        total += steps * site.heads * numbers * record_size
    return total


def check_memory(memory: str) -> Memory:
    """The memory of a name; ValueError listing the three."""
    for known in MEMORIES:
        if memory == known:
            return known
    raise ValueError(f"memory is {memory!r}; it must be one of {', '.join(MEMORIES)}")


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a device's memory; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def format_bytes(count: int) -> str:
    """A number of bytes as people read it: 12.10 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
