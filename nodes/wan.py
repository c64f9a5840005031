"""Wan 2.2, whose work two models share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hosts.comfyui.wan import paired
from .sockets import schema


class FateZeroWanPair(io.ComfyNode):
    """Both models of Wan 2.2 14B as one MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroWanPair",
            display_name="Wan 2.2 Pair (FateZero)",
            description="The model for much noise and the one for little as one MODEL, for Invert Video, FlowEdit and "
            "Edit Video and their guiders. Under other samplers it is the first alone.",
            search_aliases=["wan 2.2", "high noise", "low noise", "14b", "moe"],
            inputs=[
                io.Model.Input("model", tooltip="Wan 2.2's model for high noise, with its LoRA and shift."),
                io.Model.Input("low_noise", tooltip="The one for low noise, with its own LoRA and the same shift."),
                io.Float.Input(
                    "boundary",
                    default=0.875,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="The sigma below which the second takes over; Wan 2.2 14B for text to video: 0.875.",
                ),
            ],
            outputs=[io.Model.Output("both", display_name="model", tooltip="For inversion and edit alike.")],
        )

    @classmethod
    def execute(cls, model: Any, low_noise: Any, boundary: float) -> io.NodeOutput:
        return io.NodeOutput(paired(model, low_noise, boundary))
