"""Temporal layers in one safetensors file, by diffusers' names, with the queries that were tuned beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundled import DEMO_LAYERS
from .safetensors import is_pointer
from .whole import whole_file

if TYPE_CHECKING:
    from torch import Tensor

FILE = "temporal.safetensors"
"""What a folder of a tuning calls them."""


def seen_with(key_frames: Iterable[str | int], clip_norm: bool) -> dict[str, str]:
    """The texts that say how a clip was seen in training, for a file to keep."""
    return {"key_frames": ", ".join(map(str, key_frames)), "clip_norm": str(clip_norm).lower()}


def write_temporal_layers(
    path: str | Path, weights: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write weights, and texts to keep with them, whole or not at all."""
    from safetensors.torch import save_file

    with whole_file(Path(path)) as partial:
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial, dict(about or {}))


def temporal_file(path: str | Path) -> Path:
    """The file of temporal layers by what names it: itself, the folder of a tuning, or "demo"."""
    if str(path) == "demo":
        return DEMO_LAYERS
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def load_temporal_layers(path: str | Path) -> dict[str, Tensor]:
    """The weights of a file, or of a tuning's folder, for `with_temporal_layers`; "demo" for the bundled ones.

    FileNotFoundError, or ValueError for no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


def about_temporal_layers(path: str | Path) -> dict[str, str]:
    """The texts that were kept with the weights of a file; errors as `load_temporal_layers`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    file = temporal_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"no temporal layers at {path}")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        if is_pointer(file):
            raise ValueError(f"{file} is a Git LFS pointer and not the layers: run `git lfs pull`") from error
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
