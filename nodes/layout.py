"""Where objects shall be: a layout, its picture, and a guider that follows it."""

from __future__ import annotations

from typing import Any, get_args

import torch
from comfy_api.latest import io
from torch import Tensor

from ..attention.prompt import PromptEdit
from ..diffusion.edit import Edit
from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.families import tokenizer_of
from ..hosts.comfyui.layout import LayoutGuider
from ..methods.layout import Form, Layout, Shift, Wanted, named_path
from ..methods.layout_guidance import LayoutGuidance
from ..methods.move_objects import MoveSettings
from ..video.sheet import outlined
from .prompt import check_clip, check_words, encoded, unweighted
from .settings import made, widget, widgets
from .sockets import LayoutSocket, schema, show_on_node

SHIFT = "shift"
FINE = 8
"""Points of a target for each latent, by side: a pixel of most models."""
_BLANK = 256
"""Pixels of a side of a picture that is drawn over nothing."""


class FateZeroLayout(io.ComfyNode):
    """Objects of a prompt, and where they shall be."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroLayout",
            display_name="Layout (FateZero)",
            description="Say where objects shall be, frame by frame: boxes or ellipses on paths with key frames, or "
            "masks. For Layout Guider, and Edit Video.",
            search_aliases=["box", "bounding box", "trajectory", "path", "regional", "object motion", "gligen"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model: CLIP of SD 1.x, SD 2.x or SDXL."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the clip shall show, with the objects' words in it.",
                ),
                io.String.Input(
                    "objects",
                    multiline=True,
                    default="",
                    tooltip='A line for each: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3", at frames the centre and size '
                    "(or width and height) as shares of the picture. Words alone take the mask.",
                ),
                io.Combo.Input(
                    "form",
                    options=[*get_args(Form), SHIFT],
                    default="box",
                    tooltip="Of what is on a path. shift, for edits alone, moves an object from where it is: "
                    '"jeep: 0:0.2,0; 7:0.3,-0.1,1.5", at frames how far right and down, and the growth.',
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Of words without a path: one mask, or one for each frame."
                ),
                io.Mask.Input(
                    "object_mask",
                    optional=True,
                    tooltip="Of edits: where the object is in the clip. Else the attention to its words tells.",
                ),
                LayoutSocket.Input(
                    "more", optional=True, tooltip="Another layout of the same prompt, whose objects come along."
                ),
                io.Image.Input("image", optional=True, tooltip="Frames to draw the picture over."),
                io.Int.Input(
                    "frames", default=16, min=1, max=1000, tooltip="Of the picture, where no image is connected."
                ),
                *widgets(MoveSettings, advanced=("weight", "amount", "enough", "most_change")),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="positive", tooltip="The prompt, encoded."),
                LayoutSocket.Output("layout", display_name="layout", tooltip="For Layout Guider, or Edit Video."),
                io.Image.Output("picture", display_name="picture", tooltip="The layout over the frames."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, prompt: str, objects: str, form: Any, frames: int, mask: Tensor | None = None,
        object_mask: Tensor | None = None, more: Layout | None = None, image: Tensor | None = None, **values: Any,
    ) -> io.NodeOutput:  # fmt: skip
        check_clip(clip)
        words, tokenizer, settings = unweighted(prompt), tokenizer_of(clip), made(MoveSettings, values)
        if not words:
            raise ValueError("prompt: is empty; describe the clip")
        found = _wanted(objects, form, _masks(mask), _masks(object_mask))
        if more is not None:
            if more.prompt != words:
                raise ValueError(f"more: is of the prompt {more.prompt!r}, not {words!r}")
            found += more.objects
        layout = Layout(words, tokenizer, found, settings)
        over = torch.full((frames, _BLANK, _BLANK, 3), 0.2) if image is None else image[..., :3]
        masks = [(one.words, one.mask(*over.shape[:3])) for one in found if not isinstance(one.where, Shift)]
        positive = encoded(clip, prompt, PromptEdit(words, words, tokenizer), "prompt")
        return io.NodeOutput(positive, layout, outlined(over, masks))


def _masks(mask: Tensor | None) -> Tensor | None:
    """A MASK as (frames, height, width)."""
    return None if mask is None else mask.reshape(-1, *mask.shape[-2:])


def _wanted(objects: str, form: Any, mask: Tensor | None, source: Tensor | None) -> tuple[Wanted, ...]:
    """The objects of the lines of a text. mask: of those without a path; source: where the object is."""
    lines = [line.strip() for line in objects.splitlines() if line.strip()]
    if not lines:
        raise ValueError('objects: is empty; a line for each, such as "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3"')
    bare = [line for line in lines if ":" not in line]
    if bare and mask is None:
        raise ValueError(f'objects: {bare[0]!r} has no path ("{bare[0]}: 0:0.5,0.5,0.3"), and no mask is connected')
    if mask is not None and not bare:
        raise ValueError("mask: is connected, but every object has a path; write its words alone on a line")
    if source is not None and len(lines) > 1:
        raise ValueError("object_mask: is of one object, but there are several; join two layouts by `more`")
    return tuple(
        Wanted(line, mask, source) if line in bare else Wanted(*named_path(line, form), source)  # type: ignore[arg-type]
        for line in lines
    )


def guidance_on(layout: Layout, positive: Any, shape: tuple[int, int, int], text_tokens: int) -> LayoutGuidance:
    """A layout for so many frames, with latents of a height and width.

    Raises ValueError for a CONDITIONING of another prompt, and for masks of another clip.
    """
    check_words(positive, layout.prompt, "the layout's prompt")
    frames, height, width = shape
    return layout.guidance(frames, FINE * height, FINE * width, text_tokens)


class FateZeroLayoutGuider(io.ComfyNode):
    """Classifier-free guidance, and objects where a layout has them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroLayoutGuider",
            display_name="Layout Guider (FateZero)",
            description="Draw objects where a layout has them (cross-attention guidance, arXiv 2404.05519), for "
            "SamplerCustomAdvanced and any sampler. With temporal layers a batch is a clip; without, single pictures.",
            search_aliases=["box guidance", "layout control", "backward guidance", "guider", "custom sampler"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x or SDXL model; LoRA and temporal layers count."),
                io.Conditioning.Input(
                    "positive", tooltip="The layout's prompt, of Layout or another encoder; ControlNets on it count."
                ),
                io.Conditioning.Input("negative", tooltip="What to keep away from."),
                LayoutSocket.Input("layout", tooltip="Where objects shall be (Layout)."),
                widget(Edit, "guidance_scale", "guidance"),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, layout: Layout, guidance: float) -> io.NodeOutput:
        node = cls.hidden.unique_id
        wanted = HostCondition.of_socket(positive, "positive", "positive")
        away = HostCondition.of_socket(negative, "negative", "negative")

        def asked(shape: tuple[int, int, int]) -> LayoutGuidance:
            return guidance_on(layout, positive, shape, wanted.text_tokens)

        return io.NodeOutput(LayoutGuider(model, wanted, away, guidance, asked, lambda text: show_on_node(node, text)))
