"""FateZero: edit a video with a prompt through the attention of an image diffusion model.

The method is Qi et al., ICCV 2023 (arXiv 2303.09535). Names are loaded when first used, so
that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention.prompt import PromptEdit
    from .diffusion.edit import Edit, edit, edit_many
    from .diffusion.generate import generate
    from .diffusion.invert import Inversion, invert
    from .methods.fatezero import FusionSettings
    from .methods.flow_edit import FlowEditSettings, draw
    from .methods.flow_smoothing import FlowSmoothing
    from .methods.layout import Path, Shift
    from .methods.layout_guidance import LayoutGuidance
    from .methods.move_objects import Moved, MoveObjects
    from .methods.plug_and_play import PnPSettings
    from .methods.tokenflow import TokenFlowSettings
    from .methods.tune_a_video import LayerSettings, TuneSettings, tune
    from .store.budget import StoreSettings
    from .store.store import AttentionStore, Condition, StoreError

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"
"""Where ComfyUI finds the help pages."""

_HOMES = {
    "invert": ".diffusion.invert",
    "Inversion": ".diffusion.invert",
    "draw": ".methods.flow_edit",
    "edit": ".diffusion.edit",
    "edit_many": ".diffusion.edit",
    "Edit": ".diffusion.edit",
    "generate": ".diffusion.generate",
    "PromptEdit": ".attention.prompt",
    "FusionSettings": ".methods.fatezero",
    "StoreSettings": ".store.budget",
    "FlowEditSettings": ".methods.flow_edit",
    "FlowSmoothing": ".methods.flow_smoothing",
    "LayoutGuidance": ".methods.layout_guidance",
    "Moved": ".methods.move_objects",
    "MoveObjects": ".methods.move_objects",
    "Path": ".methods.layout",
    "Shift": ".methods.layout",
    "PnPSettings": ".methods.plug_and_play",
    "LayerSettings": ".methods.tune_a_video",
    "TokenFlowSettings": ".methods.tokenflow",
    "TuneSettings": ".methods.tune_a_video",
    "tune": ".methods.tune_a_video",
    "AttentionStore": ".store.store",
    "Condition": ".attention.condition",
    "StoreError": ".store.store",
}

__all__ = [
    "AttentionStore",
    "Condition",
    "Edit",
    "FlowEditSettings",
    "FlowSmoothing",
    "FusionSettings",
    "Inversion",
    "LayerSettings",
    "LayoutGuidance",
    "MoveObjects",
    "Moved",
    "Path",
    "PnPSettings",
    "PromptEdit",
    "Shift",
    "StoreError",
    "StoreSettings",
    "TokenFlowSettings",
    "TuneSettings",
    "draw",
    "edit",
    "edit_many",
    "generate",
    "invert",
    "tune",
]


async def comfy_entrypoint() -> Any:
    """ComfyUI's way in: the pack's nodes."""
    from .nodes import FateZeroExtension
    from .nodes.caching import watch_prompts

    watch_prompts()
    return FateZeroExtension()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
