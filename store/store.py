"""The result of an inversion, in one of several memories that give the same edits."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..attention.condition import Condition
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames, Windows
from ..files.safetensors import DamagedFileError, Layout, SafetensorsReader, SafetensorsWriter, format_bytes
from ..files.whole import remove_folder, temporary_folder
from ..imports import torch
from .backends import (
    Backend,
    DrawnLevels,
    FileBackend,
    FileLevels,
    Levels,
    MemoryBackend,
    Records,
    RecordsOnDemand,
    fetch,
    level_name,
    read,
    tensor_name,
    written_behind,
)
from .budget import Demand, StorePlan, StoreSettings
from .identity import ModelIdentity
from .records import MEMORIES, Memory

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

FORMAT = "fatezero-store-3"
LARGE = 1e9
"""Bytes above which a temporary store on disk is announced."""

log = logging.getLogger("fatezero")


class StoreError(ValueError):
    """An unusable store: damaged, or made with another model, schedule or prompt."""


@dataclass
class AttentionStore:
    """An inversion: its latents, and the attention of its steps unless it is recomputed.

    memory: "recompute" stores only latents and runs the source branch again with the edit; "queries_keys" stores
    queries and keys; "keys_values" keys and values; "maps" the paper's attention maps. levels: latents of every level,
    clean to noisy: (steps + 1, frames, c, h, w), in memory or in a file. timesteps: noisy to clean. alphas: of every
    level, clean to noisy: DDIM's cumulative ones, or a flow's 1 - sigma, as `formulation` says. order, reuse_midpoint:
    of the inversion's solver. inversion_steps: of the inversion, if it took more steps than its edits take. windows: of
    the inversion, which its edits take too; None for the host's, or the whole clip. kept_steps:
    number of edit steps, from the noisiest, with stored attention. backend: the stored attention; None for
    "recompute". plan: the chosen memory and place; None for a store from a file. start: where edits start
    (`diffusion.parts.Start`); None: at the noisiest latents. extra, attachments: the caller's own
    data, as JSON and as tensors.
    """

    memory: Memory
    levels: Levels
    source: Condition
    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    key_frames: KeyFrames
    clip_norm: bool
    model: ModelIdentity
    prompt: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    attachments: dict[str, Tensor] = field(default_factory=dict)
    kept_steps: int = 0
    formulation: Literal["ddim", "flow"] = "ddim"
    order: int = 1
    reuse_midpoint: bool = False
    inversion_steps: int | None = None
    windows: Windows | None = None
    backend: Backend | None = None
    plan: StorePlan | None = None
    start: Any = None

    @property
    def latents(self) -> Tensor:
        """The latents of every level in one tensor, read from disk if need be."""
        levels = self.levels
        return levels if isinstance(levels, torch.Tensor) else torch.stack([levels[i] for i in range(len(levels))])

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def frames(self) -> int:
        return self.levels.shape[1]

    def calls(self, chunk_frames: int | None = None) -> ClipCalls:
        """The calls of an edit, in chunks of so many frames, else in the windows of the inversion."""
        return ClipCalls(self.key_frames, self.clip_norm, Windows.of(chunk_frames) or self.windows)

    @property
    def on_disk(self) -> bool:
        return isinstance(self.levels, FileLevels) or isinstance(self.backend, FileBackend)

    @property
    def drawn(self) -> DrawnLevels | None:
        """The levels of sampled noise, for FlowEdit; None for an inversion."""
        return self.levels if isinstance(self.levels, DrawnLevels) else None

    @property
    def calls_own_level(self) -> bool:
        """Whether an edit's step reads the source's latents of its own level, not those one level cleaner."""
        return self.order == 2 or self.drawn is not None or self.inversion_steps is not None

    def source_level(self, step: int) -> int:
        """The level of the source's latents that an edit's step reads."""
        return self.steps - step - (0 if self.calls_own_level else 1)

    def step_at(self, level: int) -> int:
        """The edit's step that reads a level; the clean level belongs to the last step."""
        return self.steps - max(level, 1) if self.calls_own_level else self.steps - 1 - level

    @property
    def nbytes(self) -> int:
        """Bytes of the whole store, on disk or in memory."""
        return self.levels.nbytes + self.source.nbytes + (self.backend.nbytes if self.backend else 0)

    def to(self, device: torch.device | str) -> Self:
        """The same store with its latents on a device; attention, and what is on disk, is not moved."""
        levels = self.levels if isinstance(self.levels, FileLevels) else self.levels.to(device)
        return replace(self, levels=levels, source=self.source.to(levels[0].to(device)[:0]))

    def keeps(self, step: int, values: bool = False) -> bool:
        """Whether an edit step's attention is stored; step 0 is the noisiest. values: keys and values."""
        return self.backend is not None and step < self.kept_steps and values == (self.memory == "keys_values")

    def fetch(self, step: int, layers: set[str], chunk: Chunk, device: torch.device) -> Records:
        """An edit step's records of some layers and a chunk of the clip, on a device.

        Raises StoreError for a layer that was not stored or is damaged.
        """
        assert self.backend is not None
        with as_store_error():
            records = fetch(self.backend, step, layers, self.key_frames, chunk, device)
        missing = sorted(layers - set(records))
        if missing:
            raise StoreError(
                f"the store has no attention of {missing[0]} ({len(missing)} layers missing): "
                "invert with a larger max_tokens, or lower max_tokens of the edit"
            )
        return records

    def on_demand(self, step: int, chunk: Chunk, device: torch.device) -> RecordsOnDemand:
        """An edit step's records of a chunk of the clip, fetched layer by layer."""
        return RecordsOnDemand(lambda layer: self.fetch(step, {layer}, chunk, device)[layer])

    def level(self, level: int) -> Tensor:
        """The latents of a level, 0 the clean one: (frames, c, h, w); StoreError if they are damaged."""
        with as_store_error():
            return self.levels[level]

    # --- on disk ----------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file atomically, one step at a time.

        Raises OSError, with the bytes needed, if the disk is too small, and ValueError for a store of random noise.
        """
        if self.drawn is not None:
            raise ValueError("a store of random noise cannot be saved: it has only a clip and a seed; make it again")
        path = Path(path)
        layout = self._layout()
        for step in range(self.kept_steps):
            for name, tensor in self._tensors(step).items():
                layout[name] = (tensor.dtype, tuple(tensor.shape))
        with SafetensorsWriter(path, layout, self._about()) as file:
            for level in range(self.steps + 1):
                file.put(level_name(level), self.level(level))
            for step in range(self.kept_steps):
                for name, tensor in self._tensors(step).items():
                    file.put(name, read(tensor))
            self._put_own(file)
        return path

    def _tensors(self, step: int) -> dict[str, Any]:
        """A step's tensors, by their names in a file."""
        assert self.backend is not None
        parts = self.backend.tensors(step)
        return {tensor_name(step, f"{layer}.{part}"): t for layer, of in parts.items() for part, t in of.items()}

    def _own(self) -> dict[str, Tensor]:
        """All tensors but levels and attention, by their names in a file."""
        extras = {f"source.extras.{name}": t for name, t in self.source.extras.items()}
        attached = {f"attached.{name}": t for name, t in self.attachments.items()}
        return {"source.embeddings": self.source.embeddings, **extras, **attached}

    def _layout(self) -> Layout:
        """The layout of all tensors but attention."""
        own: Layout = {name: (t.dtype, tuple(t.shape)) for name, t in self._own().items()}
        level = (self.levels.dtype, tuple(self.levels.shape[1:]))
        return own | {level_name(i): level for i in range(self.steps + 1)}

    def _put_own(self, file: SafetensorsWriter) -> None:
        for name, tensor in self._own().items():
            file.put(name, tensor)

    def _about(self) -> dict[str, str]:
        about = {
            "format": FORMAT,
            "memory": self.memory,
            "timesteps": self.timesteps,
            "alphas": self.alphas,
            "world": self.formulation,
            "order": self.order,
            **({"reuse_midpoint": True} if self.reuse_midpoint else {}),
            **({} if self.inversion_steps is None else {"inversion_steps": self.inversion_steps}),
            **({} if self.windows is None else {"windows": asdict(self.windows)}),
            "key_frames": {"entries": self.key_frames.entries, "least_channels": self.key_frames.least_channels},
            "clip_norm": self.clip_norm,
            "model": asdict(self.model),
            "prompt": self.prompt,
            "extra": self.extra,
            "kept_steps": self.kept_steps,
        }
        return {"fatezero": json.dumps(about)}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Open a store; latents and attention are read from disk on demand.

        Raises FileNotFoundError, or StoreError for a file that is damaged, inconsistent or not a store.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no store at {path}")
        with as_store_error(f"{path} is damaged: "):
            file = SafetensorsReader(path)
            return cls._from(file, _about_of(file), torch.device(device))

    @classmethod
    def _from(cls, file: SafetensorsReader, about: dict[str, Any], device: torch.device) -> Self:
        backend = FileBackend(file)
        keys = KeyFrames(tuple(about["key_frames"]["entries"]), about["key_frames"]["least_channels"])
        store = cls(
            memory=about["memory"],
            levels=_levels_of(file, len(about["timesteps"])),
            source=Condition(
                file.read("source.embeddings").to(device),
                {name: t.to(device) for name, t in _read_all(file, "source.extras.").items()},
            ),
            timesteps=tuple(about["timesteps"]),
            alphas=tuple(about["alphas"]),
            key_frames=keys,
            clip_norm=about["clip_norm"],
            model=ModelIdentity.read(about["model"]),
            prompt=about["prompt"],
            extra=about["extra"],
            attachments=_read_all(file, "attached."),
            kept_steps=about["kept_steps"],
            formulation=about.get("world", "ddim"),
            order=about.get("order", 1),
            reuse_midpoint=about.get("reuse_midpoint", False),
            inversion_steps=about.get("inversion_steps"),
            windows=Windows(**about["windows"]) if "windows" in about else None,
            backend=None if about["memory"] == "recompute" else backend,
        )
        _check_claims(store, backend)
        return store

    # --- filled by an inversion -------------------------------------------------------------

    @contextmanager
    def filling(
        self, plan: StorePlan, settings: StoreSettings, demand: Demand, device: torch.device
    ) -> Iterator[Callable[[int, Tensor, Records], None]]:
        """Lay out the store as planned; yields `put(level, latents, records)`, which works in the background.

        The records are of the edit step that starts at the level. The store is complete after the block; nothing
        is left of it if the block fails.
        """
        layout = demand.layout(plan.memory, settings)
        self.plan = plan
        self.kept_steps = settings.kept_steps(self.steps) if layout else 0
        precision = settings.stored(demand.dtype)

        def stored(records: Records) -> Records:
            return {name: record.stored(precision) for name, record in records.items()}

        if plan.place == "disk":
            with self._filling_file(plan, settings, layout, device, stored) as put:
                yield put
            return
        home = torch.device("cpu") if plan.place == "ram" else device
        pinned = plan.place == "ram" and device.type == "cuda"
        levels = torch.empty(tuple(self.levels.shape), dtype=self.levels.dtype, device=home, pin_memory=pinned)
        backend = MemoryBackend(home, pinned)
        with written_behind(device, on_disk=False) as start:

            def keep(level: int, latents: Tensor, records: Records) -> None:
                levels[level].copy_(latents, non_blocking=True)
                if records:
                    backend.put(self.steps - level, stored(records))

            yield lambda *given: start(lambda: keep(*given))
        self.levels, self.backend = levels, backend if layout else None

    @contextmanager
    def _filling_file(
        self,
        plan: StorePlan,
        settings: StoreSettings,
        layout: Layout,
        device: torch.device,
        stored: Callable[[Records], Records],
    ) -> Iterator[Callable[[int, Tensor, Records], None]]:
        temporary = settings.path is None
        if temporary and "auto" in (settings.memory, settings.place) and plan.nbytes > LARGE:
            log.warning("writing a store of %s to %s", format_bytes(plan.nbytes), plan.folder)
        path = settings.path or temporary_folder(plan.folder) / "store.safetensors"
        whole = self._layout()
        for step in range(self.kept_steps):
            whole |= {tensor_name(step, name): t for name, t in layout.items()}
        try:
            with (
                SafetensorsWriter(path, whole, self._about()) as file,
                written_behind(device, on_disk=True) as start,
            ):

                def write(level: int, latents: Tensor, records: Records) -> None:
                    file.put(level_name(level), latents)
                    for layer, record in stored(records).items():
                        for part, tensor in record.tensors.items():
                            file.put(tensor_name(self.steps - level, f"{layer}.{part}"), tensor)

                yield lambda *given: start(lambda: write(*given))
                start(lambda: self._put_own(file))
            reader = SafetensorsReader(path, temporary)
        except BaseException:
            if temporary:
                remove_folder(path.parent)
            raise
        self.levels = _levels_of(reader, self.steps)
        self.backend = FileBackend(reader) if layout else None


@contextmanager
def as_store_error(before: str = "") -> Iterator[None]:
    """Turn the errors of a damaged file into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (DamagedFileError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise StoreError(f"{before}{error}") from error


def _about_of(file: SafetensorsReader) -> dict[str, Any]:
    """A file's metadata; StoreError if it is not a store."""
    about = json.loads(file.metadata.get("fatezero", "{}"))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise StoreError(f"{file.path} is a safetensors file, but not a store of this version of fatezero")
    if not file.checked:
        raise StoreError(f"{file.path} has no checksums: it is damaged, or rewritten by another program")
    return about


def _levels_of(file: SafetensorsReader, steps: int) -> FileLevels:
    return FileLevels([file.tensors[level_name(level)] for level in range(steps + 1)])


def _read_all(file: SafetensorsReader, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of their names."""
    return {name[len(prefix) :]: file.read(name) for name in file.tensors if name.startswith(prefix)}


def _check_claims(store: AttentionStore, backend: FileBackend) -> None:
    """Raise StoreError if a store's metadata and tensors contradict each other."""
    steps, levels, text = store.steps, store.levels, store.source.embeddings
    kept = list(range(store.kept_steps)) if store.memory != "recompute" else []
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    claims = {
        "memory": store.memory in MEMORIES,
        "timesteps": steps > 0 and all(isinstance(t, (int, float)) and 0 <= t < math.inf for t in store.timesteps)
        and list(store.timesteps) == sorted(set(store.timesteps), reverse=True),
        "world": store.formulation in ("ddim", "flow"),
        "order": store.order in (1, 2),
        "reuse_midpoint": isinstance(store.reuse_midpoint, bool)
        and not (store.reuse_midpoint and (store.order == 1 or store.kept_steps)),
        "inversion_steps": store.inversion_steps is None
        or (type(store.inversion_steps) is int and store.inversion_steps > steps and not store.kept_steps),
        "alphas": len(store.alphas) == steps + 1 and all(0 <= a <= 1 for a in store.alphas)
        and (store.formulation == "flow" or 0 not in store.alphas),
        "latents": len(levels.shape) == 5 and levels.dtype in floats
        and all(levels[i].shape == levels.shape[1:] for i in (0, steps)),
        "kept_steps": isinstance(store.kept_steps, int) and 0 <= store.kept_steps <= steps and backend.steps == kept,
        "clip_norm": isinstance(store.clip_norm, bool),
        "prompt": store.prompt is None or isinstance(store.prompt, str),
        "source": text.ndim == 3 and len(text) == 1 and text.dtype in floats,
        "extra": isinstance(store.extra, dict),
    }  # fmt: skip
    wrong = [name for name, right in claims.items() if not right]
    if wrong:
        raise StoreError(f"metadata and tensors disagree on {', '.join(wrong)}")
