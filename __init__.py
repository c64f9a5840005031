"""FateZero: edit a video with a prompt through the attention of a diffusion model.

The method is Qi et al., ICCV 2023 (arXiv 2303.09535). Importing the package does not import torch: modules load it when
they first use it.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

from .attention.condition import Condition as Condition
from .attention.key_frames import Windows as Windows
from .attention.masks import changed_latents as changed_latents
from .attention.prompt import PromptEdit as PromptEdit
from .diffusion.edit_maps import EditMaps as EditMaps
from .diffusion.generate import generate as generate
from .diffusion.invert import Inversion as Inversion
from .diffusion.invert import invert as invert
from .diffusion.parts import Edit as Edit
from .diffusion.word_attention import WordAttention as WordAttention
from .methods.fatezero import FusionSettings as FusionSettings
from .methods.flow_edit import FlowEditSettings as FlowEditSettings
from .methods.flow_edit import draw as draw
from .methods.flow_smoothing import FlowSmoothing as FlowSmoothing
from .methods.layout import Path as Path
from .methods.layout import Shift as Shift
from .methods.layout_guidance import LayoutGuidance as LayoutGuidance
from .methods.move_objects import Moved as Moved
from .methods.move_objects import MoveObjects as MoveObjects
from .methods.plug_and_play import PnPSettings as PnPSettings
from .methods.tokenflow import TokenFlowSettings as TokenFlowSettings
from .methods.tune_a_video import ClassPictures as ClassPictures
from .methods.tune_a_video import LayerSettings as LayerSettings
from .methods.tune_a_video import TuneSettings as TuneSettings
from .methods.tune_a_video import Validation as Validation
from .methods.tune_a_video import ValidationSettings as ValidationSettings
from .methods.tune_a_video import tune as tune
from .recipes.api import edit as edit
from .recipes.api import edit_many as edit_many
from .recipes.presets import PRESETS as PRESETS
from .recipes.recipe import Recipe as Recipe
from .store.budget import StoreSettings as StoreSettings
from .store.store import AttentionStore as AttentionStore
from .store.store import StoreError as StoreError
from .video.maps import write_maps as write_maps
from .video.restore import restore_unchanged as restore_unchanged
from .video.slice import xt_slice as xt_slice

WEB_DIRECTORY = "./web"
"""Where ComfyUI finds the help pages."""


async def comfy_entrypoint() -> Any:
    """ComfyUI's way in: the pack's nodes."""
    from .nodes import FateZeroExtension
    from .nodes.caching import watch_prompts

    watch_prompts()
    return FateZeroExtension()
