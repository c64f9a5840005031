"""Layouts: where objects should be, a preview, and a guider that follows them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from comfy_api.latest import io
from torch import Tensor

from ..attention.prompt import PromptEdit
from ..diffusion.parts import Edit
from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.families import tokenizer_of
from ..hosts.comfyui.layout import LayoutGuider
from ..methods.layout import Form, Layout, LayoutObject, Shift, Swap, named_path
from ..methods.layout_guidance import LayoutGuidance
from ..methods.move_objects import MoveSettings
from ..methods.own_attention import OwnLayout
from ..settings import settings_of
from ..video.sheet import outlined
from .prompt import check_clip, check_words, encoded, unweighted
from .settings import made, widget, widgets
from .sockets import LayoutSocket, schema, show_on_node

RELATIVE = ("shift", "swap")
"""Forms relative to an object's own place."""
FINE = 8
"""Points of a target per latent and side: one pixel for most models."""
LATER = ("guided_steps", "appearance")
OLDER = tuple(one.name for one in settings_of(MoveSettings) if one.name not in LATER)
"""The settings of a layout; those of `LATER` come last on the node, where older workflows have no values."""
_BLANK = 256
"""Size of the preview without an image, in pixels."""


class FateZeroLayout(io.ComfyNode):
    """Objects of a prompt, and where they should be."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroLayout",
            display_name="Layout (FateZero)",
            description="Sets where objects should be in each frame: boxes or ellipses on paths with stops, or masks. "
            "For Layout Guider and Edit Video.",
            search_aliases=["box", "bounding box", "trajectory", "path", "regional", "object motion", "gligen"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model: CLIP of SD 1.x, SD 2.x or SDXL."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the clip should show, including the objects' words.",
                ),
                io.String.Input(
                    "objects",
                    multiline=True,
                    default="",
                    tooltip='One object per line: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3" gives frame:x,y,size (or '
                    "width,height) as shares of the frame. Words without a path use the mask.",
                ),
                io.Combo.Input(
                    "form",
                    options=[*get_args(Form), *RELATIVE],
                    default="box",
                    tooltip="Form of objects on paths. shift moves an object from its place in the clip, or in a new "
                    'clip from where the model puts it: "jeep: 0:0.2,0; 7:0.3,-0.1,1.5" gives '
                    'frame:right,down,growth. swap (new clips only): "jeep: tree" takes the place of the tree.',
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Layout mask of words without a path: one, or one per frame."
                ),
                io.Mask.Input(
                    "object_mask",
                    optional=True,
                    tooltip="In edits: the object's place in the clip. Without it, attention to its words is used.",
                ),
                LayoutSocket.Input(
                    "more", optional=True, tooltip="Another layout of the same prompt, whose objects are added."
                ),
                io.Image.Input("image", optional=True, tooltip="Frames to show in the preview."),
                io.Int.Input(
                    "frames", default=16, min=1, max=1000, tooltip="Frames of the preview if no image is connected."
                ),
                *widgets(MoveSettings, *OLDER, advanced=("weight", "amount", "enough", "most_change")),
                *(widget(MoveSettings, name, optional=True, advanced=True) for name in LATER),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="positive", tooltip="The encoded prompt."),
                LayoutSocket.Output("layout", display_name="layout", tooltip="For Layout Guider or Edit Video."),
                io.Image.Output("picture", display_name="picture", tooltip="A preview of the layout on the frames."),
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
            raise ValueError("prompt: is empty: describe the clip")
        found = _objects_of(objects, form, _masks(mask), _masks(object_mask))
        if more is not None:
            if more.prompt != words:
                raise ValueError(f"more: has the prompt {more.prompt!r}, not {words!r}")
            found += more.objects
        layout = Layout(words, tokenizer, found, settings)
        over = torch.full((frames, _BLANK, _BLANK, 3), 0.2) if image is None else image[..., :3]
        masks = [(one.words, one.mask(*over.shape[:3])) for one in found if not isinstance(one.where, (Shift, Swap))]
        positive = encoded(clip, prompt, PromptEdit(words, words, tokenizer), "prompt")
        return io.NodeOutput(positive, layout, outlined(over, masks))


def _masks(mask: Tensor | None) -> Tensor | None:
    """A MASK as (frames, height, width)."""
    return None if mask is None else mask.reshape(-1, *mask.shape[-2:])


def _objects_of(objects: str, form: Any, mask: Tensor | None, source: Tensor | None) -> tuple[LayoutObject, ...]:
    """The objects of a text, one per line. mask: for those without a path; source: the object's place in the clip."""
    lines = [line.strip() for line in objects.splitlines() if line.strip()]
    if not lines:
        raise ValueError('objects: is empty: add lines such as "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3"')
    bare = [line for line in lines if ":" not in line]
    if bare and mask is None:
        raise ValueError(f'objects: {bare[0]!r} has no path: add one ("{bare[0]}: 0:0.5,0.5,0.3"), or connect a mask')
    if mask is not None and not bare:
        raise ValueError("mask: every object has a path: write the masked object's words on a line without a path")
    if source is not None and len(lines) > 1:
        raise ValueError(
            "object_mask: is for one object, but there are several: use one layout per object, joined by `more`"
        )
    return tuple(
        LayoutObject(line, mask, source) if line in bare else LayoutObject(*named_path(line, form), source)  # type: ignore[arg-type]
        for line in lines
    )


def guidance_on(
    layout: Layout, positive: Any, shape: tuple[int, int, int], text_tokens: int
) -> LayoutGuidance | OwnLayout:
    """The guidance for latents of a shape (frames, height, width).

    Raises ValueError for a CONDITIONING of another prompt, and for masks with another number of frames.
    """
    check_words(positive, layout.prompt, "the layout's prompt")
    frames, height, width = shape
    return layout.guidance(frames, FINE * height, FINE * width, text_tokens)


class FateZeroLayoutGuider(io.ComfyNode):
    """Classifier-free guidance with layout guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroLayoutGuider",
            display_name="Layout Guider (FateZero)",
            description="Generates objects at the places of a layout (cross-attention guidance, arXiv 2404.05519), "
            "with SamplerCustomAdvanced and any sampler. With temporal layers a batch is a clip, otherwise single "
            "pictures.",
            search_aliases=["box guidance", "layout control", "backward guidance", "guider", "custom sampler"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x or SDXL model, with any LoRA and temporal layers."),
                io.Conditioning.Input(
                    "positive", tooltip="The layout's prompt, from Layout or another encoder, with any ControlNets."
                ),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                LayoutSocket.Input("layout", tooltip="Where objects should be (Layout)."),
                widget(Edit, "guidance_scale", "guidance"),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, layout: Layout, guidance: float) -> io.NodeOutput:
        node = cls.hidden.unique_id
        condition = HostCondition.of_socket(positive, "positive", "positive")
        unwanted = HostCondition.of_socket(negative, "negative", "negative")

        def on_shape(shape: tuple[int, int, int]) -> LayoutGuidance | OwnLayout:
            return guidance_on(layout, positive, shape, condition.text_tokens)

        return io.NodeOutput(
            LayoutGuider(model, condition, unwanted, guidance, on_shape, lambda text: show_on_node(node, text))
        )
