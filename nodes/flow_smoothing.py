"""Flow smoothing: averages along the source's motion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..methods.flow_smoothing import FlowSmoothing
from ..video.flow import flow_estimator
from ..video.motion import Motion, smooth_along
from .settings import widget
from .sockets import SmoothingSocket, schema, show_on_node

CELL, PICTURE_CELL = 4, 2
"""Cell size of the motion in pixels: for latents, whose grid is at least as coarse, and for pictures."""

FLOW = io.Combo.Input(
    "flow",
    options=["auto", "dis", "raft"],
    default="auto",
    tooltip="Optical flow: OpenCV's DIS, or torchvision's RAFT, which downloads its weights. auto uses RAFT if its "
    "weights are present.",
)


def motion_of(images: Tensor, flow: Any, cell: int, node: str | None) -> Motion:
    """The motion of a clip's frames, with a text on the node; ValueError for a single frame."""
    if len(images) < 2:
        raise ValueError("images: a single frame has no motion; connect at least two")
    name, estimate = flow_estimator(flow, comfy.model_management.get_torch_device())
    bar = comfy.utils.ProgressBar(len(images))

    def frames() -> Iterator[Tensor]:
        for frame in images[..., :3].movedim(-1, 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield frame.float()
            bar.update(1)

    motion = Motion.of(frames(), estimate, cell)
    show_on_node(node, f"motion of {motion.frames} frames by {name}")
    return motion


class FateZeroFlowSmoothing(io.ComfyNode):
    """Smooth an edit along the source's motion while it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroFlowSmoothing",
            display_name="Flow Smoothing (FateZero)",
            description="Less flicker: each step averages the edit's changes along the source's motion, without "
            "additional UNet calls. Lowers the warp error, but may lose parts of the edit, most of all changes of "
            "shape. For Edit Video with any preset, with or without TokenFlow.",
            search_aliases=["deflicker", "temporal consistency", "optical flow", "flicker", "stabilize"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of the source clip."),
                widget(FlowSmoothing, "amount"),
                FLOW,
            ],
            outputs=[SmoothingSocket.Output("smoothing", display_name="smoothing", tooltip="For Edit Video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, amount: float, flow: Any) -> io.NodeOutput:
        return io.NodeOutput(FlowSmoothing(amount, motion_of(images, flow, CELL, cls.hidden.unique_id)))


class FateZeroSteady(io.ComfyNode):
    """Smooth a finished edit along the source's motion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSteady",
            display_name="Steady Video (FateZero)",
            description="Less flicker in a finished edit from any node or program: averages its difference to the "
            "source along the source's motion, so that the source stays sharp.",
            search_aliases=["deflicker", "temporal consistency", "optical flow", "flicker", "stabilize"],
            inputs=[
                io.Image.Input("images", tooltip="The frames before the edit."),
                io.Image.Input("edited", tooltip="The edited frames: same number and size."),
                widget(FlowSmoothing, "amount"),
                FLOW,
            ],
            outputs=[io.Image.Output("steady", display_name="images", tooltip="The smoothed edit.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, edited: Tensor, amount: float, flow: Any) -> io.NodeOutput:
        source, edit = images[..., :3].movedim(-1, 1), edited[..., :3].movedim(-1, 1)
        if source.shape != edit.shape:
            raise ValueError(
                f"edited: {len(edit)} frames of {edit.shape[-1]}x{edit.shape[-2]}, but images has {len(source)} of "
                f"{source.shape[-1]}x{source.shape[-2]}"
            )
        motion = motion_of(images, flow, PICTURE_CELL, cls.hidden.unique_id)
        return io.NodeOutput(smooth_along(source, edit, motion, amount).clamp(0, 1).movedim(1, -1))
