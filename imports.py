"""Heavy packages, imported on first use, so that the command parses, prints help and rejects bad input without them.

In annotations, import `Tensor` and the like from torch itself, under `TYPE_CHECKING`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Late:
    """A module that is imported when an attribute is first read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:
            self._module = import_module(self._name)
        return getattr(self._module, attribute)


if TYPE_CHECKING:
    import av as av
    import numpy as np
    import torch as torch
    import torch.nn.functional as F
    from PIL import Image as Image
    from PIL import ImageOps as ImageOps
    from torch import nn as nn
else:
    av, np, torch, nn = Late("av"), Late("numpy"), Late("torch"), Late("torch.nn")
    F, Image, ImageOps = Late("torch.nn.functional"), Late("PIL.Image"), Late("PIL.ImageOps")

__all__ = ["F", "Image", "ImageOps", "av", "nn", "no_grad", "np", "torch"]


def no_grad(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.no_grad()` as a decorator that does not import torch before the function is called."""

    @wraps(function)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradients
