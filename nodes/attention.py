"""Spatio-temporal attention for any sampler."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.key_frames import KeyFrames
from ..diffusion.invert import InversionSettings
from ..hosts.comfyui.unet import share_key_frames
from .settings import widgets
from .sockets import schema


class FateZeroSpatioTemporalAttention(io.ComfyNode):
    """Make the pictures of a batch attend to key frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSpatioTemporalAttention",
            display_name="Spatio-Temporal Attention (FateZero)",
            description="Makes every frame of a batch attend to key frames of the clip (FateZero, Eq. 8), so that a "
            "plain KSampler generates consistent frames. Invert and Edit do this on their own.",
            search_aliases=["temporal consistency", "sparse causal attention", "cross-frame attention"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x or SDXL model."),
                *widgets(InversionSettings, "key_frames", "clip_norm"),
            ],
            outputs=[io.Model.Output("patched", display_name="model", tooltip="For any sampler of a batch.")],
        )

    @classmethod
    def execute(cls, model: Any, key_frames: str, clip_norm: bool) -> io.NodeOutput:
        return io.NodeOutput(share_key_frames(model, KeyFrames.parse(key_frames), clip_norm))
