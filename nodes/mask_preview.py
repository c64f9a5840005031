"""The Mask Preview node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange

from ..attention.masks import threshold_mask
from ..attention.prompt import PromptEdit
from ..hosts.comfyui.editing import heat_of_words
from ..hosts.comfyui.inversion import HostStore
from ..video.sheet import heat_map
from .inversion import CHUNK_FRAMES
from .sockets import AttentionStoreSocket, PromptEditSocket, schema


class FateZeroMaskPreview(io.ComfyNode):
    """Heat maps of the source's words, and the blend mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroMaskPreview",
            display_name="Mask Preview (FateZero)",
            description="Heat maps of the source's cross-attention for each word, and the blend mask over the frames.",
            search_aliases=["attention map", "heat map", "daam", "cross attention"],
            inputs=[
                AttentionStoreSocket.Input("store", tooltip="The inversion (Invert Video)."),
                PromptEditSocket.Input("prompt_edit", tooltip="The prompt pair of the edit."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the source, separated by commas. Empty: the blend words of the edit.",
                ),
                io.Float.Input(
                    "from_share", default=0.2, min=0.0, max=1.0, step=0.01, tooltip="First step, as a share of all."
                ),
                io.Float.Input(
                    "to_share", default=0.8, min=0.0, max=1.0, step=0.01, tooltip="Last step, as a share of all."
                ),
                io.Float.Input(
                    "threshold",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of a frame's strongest attention that counts as the object.",
                ),
                io.Int.Input(
                    "width", default=512, min=8, max=16384, step=8, tooltip="Size of the pictures, in pixels."
                ),
                io.Int.Input(
                    "height", default=512, min=8, max=16384, step=8, tooltip="Size of the pictures, in pixels."
                ),
                io.Model.Input("model", optional=True, tooltip="Needed for a store that was loaded from a file."),
                CHUNK_FRAMES,
            ],
            outputs=[
                io.Image.Output("heat", display_name="heat maps", tooltip="Frames with the words side by side."),
                io.Mask.Output("mask", display_name="mask", tooltip="The blend mask of each frame."),
            ],
        )

    @classmethod
    def execute(
        cls,
        store: HostStore,
        prompt_edit: PromptEdit,
        words: str,
        from_share: float,
        to_share: float,
        threshold: float,
        width: int,
        height: int,
        model: Any = None,
        chunk_frames: int = 0,
    ) -> io.NodeOutput:
        model = model if store.patcher is None else store.patcher
        if model is None:
            raise ValueError("model: this store was loaded from a file, so connect the model of the inversion")
        chosen = [w.strip() for w in words.split(",") if w.strip()] or list((prompt_edit.blend_words or ([], []))[0])
        if not chosen:
            raise ValueError("words: none given, and the edit has no blend words")
        steps = _spread(store.steps, from_share, to_share)
        store = store.with_model(model)
        heats = heat_of_words(model, store, prompt_edit, chosen, steps, chunk_frames or None)
        pictures = [heat_map(heat, (height, width), word) for word, heat in heats.items()]
        image = rearrange(torch.stack(pictures), "w f y x c -> f y (w x) c").float() / 255
        return io.NodeOutput(image, threshold_mask(sum(heats.values(), torch.zeros(())), (height, width), threshold))


def _spread(steps: int, start: float, end: float, at_most: int = 8) -> Sequence[int]:
    """At most eight steps, evenly spaced between two shares of all steps."""
    if start > end:
        raise ValueError(f"from_share: {start} is above to_share {end}")
    first, last = (min(steps - 1, round(share * (steps - 1))) for share in (start, end))
    count = min(at_most, last - first + 1)
    return [round(first + (last - first) * i / max(1, count - 1)) for i in range(count)]
