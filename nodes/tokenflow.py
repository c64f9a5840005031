"""TokenFlow's settings."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..methods.tokenflow import TokenFlowSettings
from .settings import made, widgets
from .sockets import PropagationSocket, schema


class FateZeroTokenFlow(io.ComfyNode):
    """How frames take over what key frames did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroTokenFlow",
            display_name="TokenFlow (FateZero)",
            description="Frames agree because the source's do (arXiv 2307.10373): key frames are edited together, and "
            "all frames take their self-attention from these, token by token. For Edit Video, with any preset.",
            search_aliases=["tokenflow", "temporal consistency", "propagation", "flicker"],
            inputs=widgets(TokenFlowSettings, advanced=("seed",)),
            outputs=[PropagationSocket.Output("propagation", display_name="propagation", tooltip="For Edit Video.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(made(TokenFlowSettings, values))
