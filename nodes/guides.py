"""Guides and clean frames of an edit that differ from its source's."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hosts.comfyui.inversion import HostStore, guided_by
from .sockets import AttentionStoreSocket, schema


class FateZeroEditGuides(io.ComfyNode):
    """A store whose edits have other guide pictures than the inversion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroEditGuides",
            display_name="Edit Guides (FateZero)",
            description="Gives edits on LTX-2 their own guide pictures, such as an edited first frame. Without it they "
            "have those of the inverted latent, since a prompt holds only the places of its guides.",
            search_aliases=["edited first frame", "keyframes", "ltxv add guide", "ic-lora", "image to video"],
            inputs=[
                AttentionStoreSocket.Input("store", tooltip="The inversion (Invert Video), or FlowEdit."),
                io.Latent.Input(
                    "latent",
                    tooltip="The latent of the node that added the edit's guides to the same clip (LTXV Add Guide, "
                    "LTXV Img To Video Inplace), with or without sound.",
                ),
            ],
            outputs=[
                AttentionStoreSocket.Output(
                    "guided", display_name="attention store", tooltip="For Edit Video or Edit Guider."
                )
            ],
        )

    @classmethod
    def execute(cls, store: HostStore, latent: dict[str, Any]) -> io.NodeOutput:
        return io.NodeOutput(guided_by(store, latent))
