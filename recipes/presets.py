"""Presets: settings that go together, the same for every door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods import METHODS
from ..methods.method import Method

PRESETS: dict[str, Mapping[str, Any]] = {name: values for method in METHODS for name, values in method.presets.items()}
"""The settings of each preset, by name: guidance and key frames included. Others keep their defaults."""
BY_NAME: dict[str, Method] = {method.name: method for method in METHODS}


def methods_of(part: str) -> tuple[Method, ...]:
    """The methods that are one part of an edit."""
    return tuple(method for method in METHODS if method.part == part)
