"""A window around a mask, edited on its own: Crop to Mask and Stitch Back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..video.region import AROUND, Region, region_of
from ..video.size import resize_to_fill
from .restore import FEATHER, LAID_OVER, MATCH_COLOURS, VAE, collected, colours, reach_in
from .sockets import RegionSocket, schema, show_on_node


class FateZeroCropToMask(io.ComfyNode):
    """Cut out a window that follows a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroCropToMask",
            display_name="Crop to Mask (FateZero)",
            description="Cuts a window around the mask out of every frame and enlarges it. The window "
            "follows the mask smoothly, by whole pixels. Edit it like any clip, then connect Stitch Back.",
            search_aliases=["inpaint crop", "crop and stitch", "zoom", "region", "bounding box"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of a clip."),
                io.Mask.Input(
                    "mask",
                    tooltip="What the window follows: one mask, or one per frame. For example the mask of an Edit "
                    "Video with preset flow_mask on the whole frames, SAM's, or your own.",
                ),
                io.Int.Input("width", default=512, min=8, max=16384, step=8, tooltip="Width to edit at, in pixels."),
                io.Int.Input("height", default=512, min=8, max=16384, step=8, tooltip="Height to edit at, in pixels."),
                io.Float.Input(
                    "surroundings",
                    default=AROUND,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Surroundings in the window, as a share of the mask's longer side.",
                ),
            ],
            outputs=[
                io.Image.Output("window", display_name="images", tooltip="The window in each frame, enlarged."),
                io.Mask.Output("window_mask", display_name="mask", tooltip="The mask in the window."),
                RegionSocket.Output("region", display_name="region", tooltip="The window's places, for Stitch Back."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, mask: Tensor, width: int, height: int, surroundings: float) -> io.NodeOutput:
        masks = _of_frames(mask, images)
        region, size = region_of(masks, width / height, surroundings), (width, height)
        window = torch.empty(len(images), height, width, 3)
        inside = torch.empty(len(images), height, width)
        for i, frame in enumerate(region.fitted(_bytes(images), size)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            torch.div(frame, 255, out=window[i])
        grey = (frame[..., None].expand(-1, -1, 3).mul(255).round().to(torch.uint8) for frame in region.cut(masks))
        for i, frame in enumerate(grey):
            torch.div(resize_to_fill(frame[None], *size)[0, ..., 0], 255, out=inside[i])
        show_on_node(cls.hidden.unique_id, f"window of {region.size[0]}x{region.size[1]} pixels")
        return io.NodeOutput(window, inside, region)


class FateZeroStitchBack(io.ComfyNode):
    """Lay edited windows over the frames that they were cut from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroStitchBack",
            display_name="Stitch Back (FateZero)",
            description="Lays an edited window of Crop to Mask over the whole frames. Outside the mask and its feather "
            "every pixel is the source's.",
            search_aliases=["inpaint stitch", "crop and stitch", "uncrop", "paste back"],
            inputs=[
                io.Image.Input("source", tooltip="The frames given to Crop to Mask."),
                io.Image.Input("edited", tooltip="The edited window, of any size."),
                RegionSocket.Input("region", tooltip="The window's places (Crop to Mask)."),
                FEATHER,
                MATCH_COLOURS,
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edit changed the window (mask of Edit Video). Without it, the whole window is "
                    "laid over, feathered at its sides.",
                ),
                VAE,
            ],
            outputs=[LAID_OVER],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        source: Tensor,
        edited: Tensor,
        region: Region,
        feather: int,
        match_colours: bool,
        mask: Tensor | None = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        frames = len(source)
        if len(region) != frames or len(edited) < frames:
            raise ValueError(
                f"region: has {len(region)} frames and edited {len(edited)}, but source has {frames}: the numbers must "
                "agree"
            )
        masks = repeat(torch.ones(1, 1), frames) if mask is None else _of_frames(mask, source)
        reach = reach_in(vae, edited, feather)
        result = collected(region.stitched(*colours(source, edited), masks, reach, match_colours), source)
        show_on_node(cls.hidden.unique_id, f"feather of {reach} pixels")
        return io.NodeOutput(result)


def _of_frames(mask: Tensor, images: Tensor) -> Tensor:
    """The mask of each frame at the frames' size: (frames, height, width). Raises ValueError for too few."""
    mask, frames = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu(), len(images)
    if len(mask) < frames and len(mask) != 1:
        raise ValueError(f"mask: has {len(mask)} frames, but the clip has {frames}: give one, or one per frame")
    mask = mask.expand(frames, -1, -1, -1) if len(mask) == 1 else mask[:frames]
    return torch.nn.functional.interpolate(mask, size=images.shape[1:3], mode="nearest-exact")[:, 0]


def _bytes(images: Tensor) -> Iterator[Tensor]:
    for image in images:
        yield (image[..., :3] * 255).round().clamp(0, 255).to(torch.uint8).cpu()
