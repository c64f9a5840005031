"""Flow smoothing, along the source's motion."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..methods.flow_smoothing import FlowSmoothing
from ..video.flow import flow_estimator
from ..video.motion import Motion
from .settings import widget
from .sockets import SmoothingSocket, schema, show_on_node

CELL = 4
"""Pixels of a cell's side that motion is kept on; the latents' grid is coarser, or as coarse."""


class FateZeroFlowSmoothing(io.ComfyNode):
    """What an edit changes moves as the source does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroFlowSmoothing",
            display_name="Flow Smoothing (FateZero)",
            description="Less flicker: in each step, what the edit changes is averaged along the video's own motion. "
            "Adds no UNet evaluation. For Edit Video, with any preset, with TokenFlow or without.",
            search_aliases=["deflicker", "temporal consistency", "optical flow", "flicker", "stabilize"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of the clip that is edited."),
                widget(FlowSmoothing, "amount"),
                io.Combo.Input(
                    "flow",
                    options=["auto", "dis", "raft"],
                    default="auto",
                    tooltip="How motion is found: OpenCV's DIS, or torchvision's RAFT, which fetches its weights. auto "
                    "takes RAFT where they are here already.",
                ),
            ],
            outputs=[SmoothingSocket.Output("smoothing", display_name="smoothing", tooltip="For Edit Video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, amount: float, flow: Any) -> io.NodeOutput:
        if len(images) < 2:
            raise ValueError("images: one frame, which has no motion; flow smoothing needs two at least")
        name, estimate = flow_estimator(flow, comfy.model_management.get_torch_device())
        bar = comfy.utils.ProgressBar(len(images))

        def frames() -> Any:
            for frame in images[..., :3].movedim(-1, 1):
                comfy.model_management.throw_exception_if_processing_interrupted()
                yield frame.float()
                bar.update(1)

        motion = Motion.of(frames(), estimate, CELL)
        show_on_node(cls.hidden.unique_id, f"motion of {motion.frames} frames by {name}")
        return io.NodeOutput(FlowSmoothing(amount, motion))
