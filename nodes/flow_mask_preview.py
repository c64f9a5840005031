"""The Flow Mask Preview node."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange

from ..attention.masks import GivenMask
from ..hosts.comfyui.editing import prepared_injection
from ..hosts.comfyui.inversion import HostStore
from ..methods.flow_mask import FlowMask, FlowMaskSettings
from ..video.sheet import heat_map
from .edit import CUSTOM, EditInputs
from .settings import made, widgets
from .sockets import AttentionStoreSocket, schema


class FateZeroFlowMaskPreview(io.ComfyNode):
    """Where the predictions for both prompts disagree, and the mask of preset flow_mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroFlowMaskPreview",
            display_name="Flow Mask Preview (FateZero)",
            description="Where the predictions for both prompts disagree, and the mask of preset flow_mask, on the "
            "clip's latents: one picture for each latent frame. The mask may be corrected and given to Edit Video.",
            search_aliases=["automatic mask", "diffedit", "otsu", "mask preview"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the edit."),
                io.Conditioning.Input("positive", tooltip="The target prompt."),
                AttentionStoreSocket.Input("store", tooltip="Sampled noise (FlowEdit), or an inversion."),
                *widgets(FlowMaskSettings),
                io.Int.Input(
                    "width", default=512, min=8, max=16384, step=8, tooltip="Size of the pictures, in pixels."
                ),
                io.Int.Input(
                    "height", default=512, min=8, max=16384, step=8, tooltip="Size of the pictures, in pixels."
                ),
            ],
            outputs=[
                io.Image.Output("pictures", display_name="pictures", tooltip="Difference and mask, side by side."),
                io.Mask.Output("mask", display_name="mask", tooltip="The mask of each latent frame."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, store: HostStore, width: int, height: int, **values: Any
    ) -> io.NodeOutput:
        settings, store = made(FlowMaskSettings, values), store.with_model(model)
        inputs = EditInputs(model, positive, None, store, 1.0, CUSTOM, settings=settings, strength=1.0)
        own = prepared_injection(model, store, inputs.edit())
        assert isinstance(own, FlowMask)
        if own.difference is None or own.mask is None:
            raise ValueError("store: the mask of its clip replaces the flow mask: remove one of them")
        mask = own.mask.float().cpu()
        named = {"difference": own.difference.float().cpu(), "mask": mask}
        pictures = [heat_map(heat, (height, width), name) for name, heat in named.items()]
        image = rearrange(torch.stack(pictures), "n f y x c -> f y (n x) c").float() / 255
        return io.NodeOutput(image, GivenMask(mask).at((height, width), len(mask)))
