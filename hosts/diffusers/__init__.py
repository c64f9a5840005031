"""diffusers as a host: loads, hooks and calls its models. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .h3 import JointDenoiser
    from .temporal import save_temporal_layers, with_temporal_layers
    from .unet import DiffusersDenoiser
    from .unet3d import DiffusersVideoDenoiser
    from .wan import VideoTransformer, VideoTransformerDenoiser

_HOMES = {
    "DiffusersDenoiser": ".unet",
    "DiffusersVideoDenoiser": ".unet3d",
    "JointDenoiser": ".h3",
    "VideoTransformer": ".wan",
    "VideoTransformerDenoiser": ".wan",
    "save_temporal_layers": ".temporal",
    "with_temporal_layers": ".temporal",
}
__all__ = [
    "DiffusersDenoiser",
    "DiffusersVideoDenoiser",
    "JointDenoiser",
    "VideoTransformer",
    "VideoTransformerDenoiser",
    "save_temporal_layers",
    "with_temporal_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
