"""Temporal layers, and the queries tuned with them, in one safetensors file under diffusers' names."""

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
"""The file's name in the folder of a tuning."""


def training_metadata(key_frames: Iterable[str | int], clip_norm: bool) -> dict[str, str]:
    """Metadata that records how frames attended to each other in training."""
    return {"key_frames": ", ".join(map(str, key_frames)), "clip_norm": str(clip_norm).lower()}


def write_temporal_layers(
    path: str | Path, weights: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write weights and their metadata atomically."""
    from safetensors.torch import save_file

    with whole_file(Path(path)) as partial:
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial, dict(about or {}))


def temporal_file(path: str | Path) -> Path:
    """The file of temporal layers, given it, the folder of a tuning, or "demo"."""
    if str(path) == "demo":
        return DEMO_LAYERS
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def load_temporal_layers(path: str | Path) -> dict[str, Tensor]:
    """The weights of a file or a tuning's folder, for `with_temporal_layers`; "demo" loads the bundled ones.

    Raises FileNotFoundError, or ValueError for an invalid safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def about_temporal_layers(path: str | Path) -> dict[str, str]:
    """The metadata of a file of temporal layers; errors as `load_temporal_layers`."""
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
            raise ValueError(f"{file} is a Git LFS pointer: run `git lfs pull` to fetch the layers") from error
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
