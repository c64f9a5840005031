"""The bundled models and clip, for workflows without downloads."""

from __future__ import annotations

from comfy_api.latest import InputImpl, io

from ..files.bundled import CLIP, FEW_STEPS
from ..hosts.comfyui.demo import load_demo
from ..hosts.comfyui.demo_video import load_demo_video
from .sockets import schema


class FateZeroDemoModel(io.ComfyNode):
    """The demo model of coloured shapes, and its clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroDemoModel",
            display_name="Demo Model (FateZero)",
            description="A tiny bundled model that generates coloured shapes, 64x64 pixels. For trying the nodes "
            "without a download; it cannot edit real videos.",
            search_aliases=["test model", "example checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="SD 1.x's architecture, but narrower."),
                io.Clip.Output("clip", display_name="clip", tooltip="CLIP with the words of the demo scenes."),
                io.Vae.Output("vae", display_name="vae", tooltip="4x4 pixels per latent."),
                io.Video.Output("video", display_name="video", tooltip="A red square on water, 8 frames."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo(), InputImpl.VideoFromFile(str(CLIP)))


class FateZeroDemoVideoModel(io.ComfyNode):
    """The demo video transformer of moving shapes, and its clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroDemoVideoModel",
            display_name="Demo Video Model (FateZero)",
            description="A tiny bundled video transformer that generates moving shapes, 64x64 pixels. For trying the "
            "nodes without a download; it cannot edit real videos.",
            search_aliases=["test model", "example checkpoint", "video transformer"],
            inputs=[
                io.Boolean.Input(
                    "few_steps",
                    default=False,
                    optional=True,
                    tooltip="Add the bundled LoRA for 4 to 8 steps at guidance 1 (preset few_steps).",
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="A video transformer of 0.1 million weights."),
                io.Clip.Output("clip", display_name="clip", tooltip="UMT5 with the words of the demo scenes."),
                io.Vae.Output("vae", display_name="vae", tooltip="4x4 pixels of one frame per latent."),
                io.Video.Output("video", display_name="video", tooltip="A red square on water, 8 frames."),
            ],
        )

    @classmethod
    def execute(cls, few_steps: bool = False) -> io.NodeOutput:
        return io.NodeOutput(
            *load_demo_video(lora=FEW_STEPS if few_steps else None), InputImpl.VideoFromFile(str(CLIP))
        )
