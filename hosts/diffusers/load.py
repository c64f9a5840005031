"""Models of every family, opened by path or name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...models import DEMOS
from ...models.unet import UNET
from .checkpoint import Checkpoint
from .flux import Flux
from .ltx2 import Ltx2
from .model import Model
from .model_files import CheckpointError, kind_of
from .qwen_image import QwenImage
from .wan import SmallWan, WanCheckpoint
from .wan_conditioned import WanImageToVideo, WanVace

FAMILIES: tuple[type[Model], ...] = (WanCheckpoint, WanImageToVideo, WanVace, Ltx2, QwenImage, Flux, Checkpoint)
"""Each family's loader; the last one takes all other models."""


def loader_of(name: str) -> type[Model]:
    """The loader of a model's family, from the class of its pipeline. Raises CheckpointError for a name that is not a
    model.
    """
    if name in DEMOS:
        return next(one for one in FAMILIES if name == one.family.demo)
    pipeline = kind_of(name)
    return next(one for one in FAMILIES if pipeline in one.pipelines or not one.pipelines)


def open_model(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, **options: Any
) -> Model:
    """Load a model of any family, with `LoadOptions`. dtype: None for float32 on a CPU and the family's half precision
    elsewhere.

    Raises CheckpointError for a model that cannot be loaded, and for options that have no effect on it.
    """
    if options.get("config") is not None and not Path(name).is_file():
        raise CheckpointError(f"model_config has no effect: {name!r} is not a single file")
    loader, device = loader_of(name), torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, loader.family.half)
    return loader.load(name, device, dtype, **options)


def demo_video_model(folder: Path, device: torch.device) -> Model:
    """The demo's video model from the folder of a training."""
    return SmallWan.of_folder(folder, device)


__all__ = ["FAMILIES", "UNET", "CheckpointError", "demo_video_model", "loader_of", "open_model"]
