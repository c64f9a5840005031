"""LoRA files, with the settings that PEFT saves next to them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...files.lora import PICKLED, LoraFile
from ...files.safetensors import is_pointer
from .model_files import CheckpointError

UNREADABLE = (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError)


class LoraError(CheckpointError):
    """A LoRA that cannot be read or does not fit the model."""


def cut(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:117]}..."


@dataclass(frozen=True)
class Adapter:
    """PEFT's adapter settings: alphas and ranks of layers, by network; "" for all networks."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scale(self, network: str, layer: str, rank: int | None) -> float | None:
        """A layer's scale; None if not given."""
        about = self.settings.get(network, self.settings.get("", {}))
        alpha = about.get("lora_alpha", about.get("alpha"))
        if alpha is None or (rank is None and about.get("r") is None):
            return None
        alpha = _by_pattern(about.get("alpha_pattern"), layer, alpha)
        rank = rank or int(_by_pattern(about.get("rank_pattern"), layer, about["r"]))
        return float(alpha) / (rank**0.5 if about.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, usual: Any) -> Any:
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, usual)


def read(lora: LoraFile) -> tuple[dict[str, Tensor], Adapter]:
    """The tensors of a file, and its adapter settings."""
    try:
        path = lora.file()
    except ValueError as error:
        raise LoraError(str(error)) from error
    try:
        if path.suffix in PICKLED:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            tensors = (
                {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
            )
            return tensors, _adapter_of(path, {})
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return tensors, _adapter_of(path, file.metadata() or {})
    except UNREADABLE as error:
        raise LoraError(f"{path}: {why_unreadable(path, error)}") from error


def reference_downscale(loras: Sequence[LoraFile]) -> int:
    """How much smaller than the clip an IC-LoRA's reference video is, by the metadata of its file; else 1.

    Raises LoraError for several that differ.
    """
    found = {factor for lora in loras if (factor := _downscale_of(lora)) > 1}
    if len(found) > 1:
        raise LoraError(f"lora: the IC-LoRAs' reference videos are {sorted(found)} times smaller: use one IC-LoRA")
    return next(iter(found), 1)


def _downscale_of(lora: LoraFile) -> int:
    path = lora.file()
    if path.suffix in PICKLED:
        return 1
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except UNREADABLE as error:
        raise LoraError(f"{path}: {why_unreadable(path, error)}") from error
    given = next((value for name, value in metadata.items() if name.endswith("reference_downscale_factor")), "1")
    try:
        return max(1, round(float(given)))
    except (ValueError, OverflowError) as error:
        raise LoraError(f"{path}: invalid reference_downscale_factor in its metadata: {given!r}") from error


def why_unreadable(path: Path, error: Exception) -> str:
    """The reason why a file of weights could not be read, in one line."""
    if is_pointer(path):
        return "is a Git LFS pointer: run `git lfs pull` to fetch the file"
    if isinstance(error, UnpicklingError):
        return "is damaged, or a pickle of more than weights, which is not supported"
    first = next(iter(str(error).splitlines()), "")
    return f"is damaged, or not a file of weights: {first}"


def _adapter_of(path: Path, metadata: Mapping[str, str]) -> Adapter:
    """The settings in PEFT's `adapter_config.json` next to a file, or in the file's metadata from diffusers."""
    try:
        if "lora_adapter_metadata" in metadata:
            found: dict[str, dict[str, Any]] = {}
            for name, value in json.loads(metadata["lora_adapter_metadata"]).items():
                network, _, setting = name.partition(".")
                found.setdefault(network, {})[setting] = value
            return Adapter(found)
        config = path.parent / "adapter_config.json"
        if path.stem == "adapter_model" and config.is_file():
            return Adapter({"": json.loads(config.read_text(encoding="utf-8"))})
    except (ValueError, AttributeError) as error:
        raise LoraError(f"{path}: its adapter settings are damaged: {error}") from error
    return Adapter()
