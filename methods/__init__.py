"""One file a method: its settings, its part of an edit, and what it declares about itself (`METHOD`)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .method import Method

_MODULES = [import_module(f".{module.name}", __name__) for module in iter_modules(__path__)]

METHODS: tuple[Method, ...] = tuple(
    sorted(
        (module.METHOD for module in _MODULES if hasattr(module, "METHOD")),
        key=lambda method: (method.name != "fatezero", method.name),
    )
)
"""Every method that a module of this folder declares; the default, FateZero, is first."""
