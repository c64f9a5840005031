"""What an inversion leaves behind, in one of three memories with the same results."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .budget import Demand, Layout, StorePlan, StoreSettings
from .files import SafetensorsWriter
from .key_frames import KeyFrames, Piece
from .records import Memory, SourceStep
from .shelves import FileShelf, MemoryShelf, Put, Records, Shelf, fetch, tensor_name, written_behind

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "fatezero-store-2"


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
    kept_steps: how many edit steps, from the noisiest, have their attention on the shelf.
    shelf: where attention is; None for "recompute". plan: what was chosen and why; None for a
    store from a file.
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
    kept_steps: int = 0
    shelf: Shelf | None = None
    plan: StorePlan | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def frames(self) -> int:
        return self.latents.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held, on disk or in memory."""
        return self.latents.nbytes + self.source.nbytes + (self.shelf.nbytes if self.shelf else 0)

    def to(self, device: torch.device | str) -> Self:
        """The same store with its latents on a device; attention stays on its shelf."""
        return replace(self, latents=self.latents.to(device), source=self.source.to(self.latents.to(device)[:0]))

    def keeps(self, step: int) -> bool:
        """Whether an edit step's attention (0 the noisiest) is on the shelf."""
        return self.shelf is not None and step < self.kept_steps

    def fetch(self, step: int, wanted: set[str], piece: Piece, device: torch.device) -> Records:
        """The records of an edit step for some layers and a piece of the clip, on a device.

        Raises StoreError for a layer that was not kept.
        """
        assert self.shelf is not None
        records = fetch(self.shelf, step, wanted, self.key_frames, piece, device)
        missing = sorted(wanted - set(records))
        if missing:
            raise StoreError(
                f"the store holds no attention of {missing[0]} ({len(missing)} layers missing): "
                "invert with a larger max_tokens, or lower max_tokens of the edit"
            )
        return records

    def source_step(self, step: int, wanted: set[str], piece: Piece | None = None) -> SourceStep:
        """What `fetch` gives, for the whole clip or a piece of it, on the latents' device."""
        piece = piece or Piece.whole(self.frames)
        return SourceStep(self.fetch(step, wanted, piece, self.latents.device), self.key_frames, piece, stored=True)

    # --- on disk ----------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, a step at a time.

        Raises OSError, saying the bytes, where the disk has no room.
        """
        path = Path(path)
        steps = range(self.kept_steps) if self.shelf else range(0)
        layout = self._layout()
        for step in steps:
            for layer, parts in self._tensors(step).items():
                layout |= {tensor_name(step, f"{layer}.{p}"): (t.dtype, tuple(t.shape)) for p, t in parts.items()}
        with SafetensorsWriter(path, layout, self._about()) as file:
            for step in steps:
                _put_step(file, step, self._tensors(step))
            self._put_latents(file)
        return path

    def _tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        assert self.shelf is not None
        return self.shelf.tensors(step)

    def _own(self) -> dict[str, Tensor]:
        """All but the shelf."""
        extras = {f"source.extras.{name}": t for name, t in self.source.extras.items()}
        return {"latents": self.latents, "source.embeddings": self.source.embeddings, **extras}

    def _layout(self) -> Layout:
        return {name: (t.dtype, tuple(t.shape)) for name, t in self._own().items()}

    def _put_latents(self, file: SafetensorsWriter) -> None:
        for name, tensor in self._own().items():
            file.put(name, tensor)

    def _about(self) -> dict[str, str]:
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
            "kept_steps": self.kept_steps,
        }
        return {"fatezero": json.dumps(about)}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
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
                extras = {k[14:]: file.get_tensor(k) for k in file.keys() if k.startswith("source.extras.")}  # noqa: SIM118
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
                    kept_steps=about["kept_steps"],
                    shelf=None if about["memory"] == "recompute" else FileShelf(path),
                )
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise StoreError(f"{path} is not a whole store (truncated or damaged): {error}") from error

    # --- as an inversion fills it -----------------------------------------------------------

    @contextmanager
    def filling(self, plan: StorePlan, settings: StoreSettings, demand: Demand, device: torch.device) -> Iterator[Put]:
        """Lay the shelf out as planned; gives `put(step, records)`, which works beside the caller.

        After the block the store is whole; where the block fails nothing of it is left. The
        latents must be in place when the block ends, for they are written last.
        """
        layout = demand.layout(plan.memory, settings)
        self.plan = plan
        self.kept_steps = settings.kept_steps(self.steps) if layout else 0
        precision = settings.stored(demand.dtype)

        def stored(put: Put) -> Put:
            return lambda step, records: put(step, {name: r.stored(precision) for name, r in records.items()})

        if plan.place != "disk":
            in_ram = plan.place == "ram"
            shelf = MemoryShelf(torch.device("cpu") if in_ram else device, pinned=in_ram and device.type == "cuda")
            with written_behind(device, False, shelf.put) as put:
                yield stored(put)
            self.shelf = shelf if layout else None
            return

        temporary = settings.path is None
        if settings.folder is not None:
            settings.folder.mkdir(parents=True, exist_ok=True)
        path = settings.path or Path(tempfile.mkdtemp(prefix="fatezero-", dir=settings.folder)) / "store.safetensors"
        whole = self._layout()
        for step in range(self.kept_steps):
            whole |= {tensor_name(step, name): t for name, t in layout.items()}
        try:
            with SafetensorsWriter(path, whole, self._about()) as file:

                def write(step: int, records: Records) -> None:
                    _put_step(file, step, {name: record.tensors for name, record in records.items()})

                with written_behind(device, True, write) as put:
                    yield stored(put)
                self._put_latents(file)
        except BaseException:
            if temporary:
                shutil.rmtree(path.parent, ignore_errors=True)
            raise
        self.shelf = FileShelf(path, temporary) if layout else None


def _put_step(file: SafetensorsWriter, step: int, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write a step's tensors, by layer and part."""
    for layer, parts in tensors.items():
        for part, tensor in parts.items():
            file.put(tensor_name(step, f"{layer}.{part}"), tensor)
