"""A pair of models, for high and for low noise."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hosts.comfyui.pair import paired
from .sockets import schema


class FateZeroWanPair(io.ComfyNode):
    """Both models of Wan 2.2 14B as one MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroWanPair",
            display_name="Wan 2.2 Pair (FateZero)",
            description="Joins the high-noise and the low-noise model to one MODEL, for Invert Video, FlowEdit, Edit "
            "Video and their guiders. Other samplers use the first model only.",
            search_aliases=["wan 2.2", "high noise", "low noise", "14b", "moe"],
            inputs=[
                io.Model.Input("model", tooltip="Wan 2.2's high-noise model, with its LoRA and shift."),
                io.Model.Input("low_noise", tooltip="The low-noise model, with its own LoRA and the same shift."),
                io.Float.Input(
                    "boundary",
                    default=0.875,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="Sigma below which the low-noise model is used; 0.875 for Wan 2.2 14B, text to video, and 0.9 for "
                    "image to video.",
                ),
            ],
            outputs=[io.Model.Output("both", display_name="model", tooltip="For inversion and edit alike.")],
        )

    @classmethod
    def execute(cls, model: Any, low_noise: Any, boundary: float) -> io.NodeOutput:
        return io.NodeOutput(paired(model, low_noise, boundary))
