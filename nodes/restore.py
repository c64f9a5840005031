"""The source's own pixels around an edit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..video.restore import REACH, reach_of, restored_frames
from .sockets import schema, show_on_node

FEATHER = io.Int.Input(
    "feather",
    default=REACH,
    min=0,
    max=512,
    tooltip="Width of the feather around the mask, in pixels of the edit. Not used with a vae.",
)
MATCH_COLOURS = io.Boolean.Input(
    "match_colours", default=True, tooltip="Undo a shift of colours, measured just outside the feather."
)
VAE = io.Vae.Input(
    "vae",
    optional=True,
    tooltip="Measures the feather: as far as a change of this VAE's latents spreads in pixels.",
)
LAID_OVER = io.Image.Output("images", display_name="images", tooltip="The edit on the source's frames.")


class FateZeroRestoreUnchanged(io.ComfyNode):
    """Lay an edit over its source, whose pixels stay where nothing changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroRestoreUnchanged",
            display_name="Restore Unchanged (FateZero)",
            description="Lays an edit over the frames of its source, at their full size. Outside the mask and its "
            "feather every pixel is the source's; inside it is the edit, scaled to fit. The feather hides the seam; "
            "shifts of colour by the VAE are undone.",
            search_aliases=["composite", "preserve background", "keep pixels", "paste back", "image composite masked"],
            inputs=[
                io.Image.Input("source", tooltip="The frames before the edit, of any size. An alpha channel stays."),
                io.Image.Input("edited", tooltip="The edited frames: as many, of any size."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the edit may have changed the clip (mask of Edit Video, or your own): one, or one "
                    "per frame.",
                ),
                FEATHER,
                MATCH_COLOURS,
                VAE,
            ],
            outputs=[LAID_OVER],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, source: Tensor, edited: Tensor, mask: Tensor, feather: int, match_colours: bool, vae: Any = None
    ) -> io.NodeOutput:
        frames, mask = len(source), mask.reshape(-1, *mask.shape[-2:])
        for name, given in (("edited", edited), ("mask", mask)):
            if len(given) < frames and not (name == "mask" and len(given) == 1):
                raise ValueError(f"{name}: has {len(given)} frames, but source has {frames}: the numbers must agree")
        reach = reach_in(vae, edited, feather)
        masks = mask.expand(frames, -1, -1) if len(mask) == 1 else mask[:frames]
        laid = restored_frames(*colours(source, edited), masks.cpu(), reach, match_colours)
        result = collected(laid, source)
        show_on_node(cls.hidden.unique_id, f"feather of {reach} pixels")
        return io.NodeOutput(result)


def colours(source: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
    """The colours of a source's frames, and of as many edited ones, in RAM."""
    return source[..., :3].cpu(), edited[: len(source), ..., :3].cpu()


def collected(frames: Iterable[Tensor], source: Tensor) -> Tensor:
    """Frames of the size and number of a source's, with progress, as one IMAGE with the source's alpha, if any."""
    result, bar = torch.empty(source.shape), comfy.utils.ProgressBar(len(source))
    result[..., 3:] = source[..., 3:]
    for target, frame in zip(result, frames, strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        target[..., :3] = frame
        bar.update(1)
    return result


def reach_in(vae: Any, images: Tensor, feather: int) -> int:
    """The reach of a VAE, measured on the first of some frames (f, h, w, c); `feather` without one."""
    if vae is None:
        return feather
    latents = vae.encode(images[:1, ..., :3])
    of_video = latents.ndim == 5

    def decode(z: Tensor) -> Tensor:
        pictures: Tensor = vae.decode(z[:, :, None] if of_video else z)
        return pictures.reshape(-1, *pictures.shape[-3:])[:1].movedim(-1, 1)

    return reach_of(decode, latents[:, :, 0] if of_video else latents)
