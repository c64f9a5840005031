"""Presets: named groups of settings, the same in the command, the nodes and Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..attention.prompt import words_of
from ..methods import METHODS
from ..methods.method import Method
from ..settings import shown

PRESETS: dict[str, Mapping[str, Any]] = {name: values for method in METHODS for name, values in method.presets.items()}
"""The settings of each preset, including guidance and key frames. All others keep their defaults."""
BY_NAME: dict[str, Method] = {method.name: method for method in METHODS}


def methods_of(part: str) -> tuple[Method, ...]:
    """The methods that are a part of this kind, such as an injection."""
    return tuple(method for method in METHODS if method.part == part)


def preset_values(preset: str, source: str = "", target: str = "") -> dict[str, Any]:
    """The settings of a preset for two prompts. Shape edits map word to word if both prompts have equally many words.

    Raises ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {shown(preset)} is unknown: use one of {', '.join(PRESETS)}")
    mapped = preset.startswith("shape") and len(words_of(source)) == len(words_of(target))
    return {**PRESETS[preset], "mode": "replace" if mapped else "refine"}
