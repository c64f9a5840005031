"""The bundled models and clip, so that a workflow runs with nothing downloaded."""

from __future__ import annotations

from comfy_api.latest import InputImpl, io

from ..files.bundled import CLIP
from ..hosts.comfyui.demo import load_demo
from ..hosts.comfyui.demo_video import load_demo_video
from .sockets import schema


class FateZeroDemoModel(io.ComfyNode):
    """The tiny model of coloured shapes, and a clip of its world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroDemoModel",
            display_name="Demo Model (FateZero)",
            description="A tiny model that ships with the pack and draws coloured shapes, 64 pixels square. For trying "
            "the nodes without a download; it edits no real video.",
            search_aliases=["test model", "example checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="SD 1.x in all but width."),
                io.Clip.Output("clip", display_name="clip", tooltip="Knows the words of its small world."),
                io.Vae.Output("vae", display_name="vae", tooltip="Four pixels to a latent."),
                io.Video.Output("video", display_name="video", tooltip="A red square on water, eight frames."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo(), InputImpl.VideoFromFile(str(CLIP)))


class FateZeroDemoVideoModel(io.ComfyNode):
    """The tiny video transformer of moving shapes, and a clip of its world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroDemoVideoModel",
            display_name="Demo Video Model (FateZero)",
            description="A tiny video transformer that ships with the pack and generates moving shapes, 64 pixels "
            "square. For trying the nodes without a download; it cannot edit real videos.",
            search_aliases=["test model", "example checkpoint", "video transformer"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="A video transformer of 0.1 million weights."),
                io.Clip.Output("clip", display_name="clip", tooltip="UMT5; knows the words of its small world."),
                io.Vae.Output("vae", display_name="vae", tooltip="Four pixels and one frame to a latent."),
                io.Video.Output("video", display_name="video", tooltip="A red square on water, eight frames."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_video(), InputImpl.VideoFromFile(str(CLIP)))
