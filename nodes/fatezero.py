"""FateZero's settings, for an edit that takes none of the presets."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..methods.fatezero import FusionSettings
from .settings import made, widgets
from .sockets import InjectionSocket, schema


class FateZeroFusion(io.ComfyNode):
    """What FateZero takes of the source."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroFusion",
            display_name="FateZero Settings",
            description="How much of the source's attention an edit takes: for preset custom of Edit Video.",
            search_aliases=["attention fusion", "cross replace steps", "self replace steps", "blend mask"],
            inputs=widgets(FusionSettings, advanced=("max_tokens", "mask_tokens")),
            outputs=[InjectionSocket.Output("settings", display_name="settings", tooltip="For Edit Video.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(made(FusionSettings, values))
