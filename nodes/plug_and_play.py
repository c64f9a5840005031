"""Plug-and-Play's settings."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..methods.plug_and_play import PnPSettings
from .settings import made, widgets
from .sockets import InjectionSocket, schema


class FateZeroPnP(io.ComfyNode):
    """What Plug-and-Play takes of the source."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroPnP",
            display_name="Plug-and-Play Settings (FateZero)",
            description="The source's queries, keys and one feature (arXiv 2211.12572), for how many steps: for preset "
            "custom of Edit Video. Needs no words in common between the prompts.",
            search_aliases=["pnp", "plug and play", "feature injection"],
            inputs=widgets(PnPSettings),
            outputs=[InjectionSocket.Output("settings", display_name="settings", tooltip="For Edit Video.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(made(PnPSettings, values))
