"""The Edit Maps and X-T Slice nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..attention.condition import Condition
from ..attention.masks import GivenMask
from ..attention.prompt import MIXED
from ..diffusion.edit_maps import EditMaps
from ..hosts.comfyui.editing import edit_clip
from ..hosts.comfyui.families import facts_of
from ..hosts.comfyui.inversion import HostStore
from ..hosts.comfyui.noise import is_flow
from ..video.sheet import heat_map
from ..video.size import to_bytes
from ..video.slice import moving_row, slices
from .attention_maps import PIXELS, heat_images, steps_image
from .edit import INPUTS, EditInputs, report_of
from .sockets import schema, show_on_node


class FateZeroEditMaps(io.ComfyNode):
    """Edit a clip, and show what the edit attends to and where its masks are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroEditMaps",
            display_name="Edit Maps (FateZero)",
            description="The edit of Edit Video, with heat maps of both prompts' words and the masks that it used. "
            "The edited clip is the same. Takes eight more model calls.",
            search_aliases=["heat map", "daam", "cross attention", "blend mask", "attention map"],
            inputs=INPUTS,
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The edited clip, for VAE Decode."),
                io.Image.Output(
                    "source_heat",
                    display_name="source heat maps",
                    tooltip="Frames with the words of the source side by side, averaged over steps of the inversion.",
                ),
                io.Image.Output(
                    "target_heat",
                    display_name="target heat maps",
                    tooltip="Frames with the words of the target side by side, averaged over the edit's steps.",
                ),
                io.Image.Output(
                    "steps", display_name="steps", tooltip="The target's words in the middle frame over the steps."
                ),
                io.Mask.Output(
                    "attention_mask",
                    display_name="attention mask",
                    tooltip="Where self-attention is the edit's, averaged over the steps that mask it; else 1.",
                ),
                io.Mask.Output(
                    "latent_mask",
                    display_name="latent mask",
                    tooltip="Where latents are the edit's, averaged over the steps that mask them; else 1.",
                ),
                io.String.Output("report", display_name="report", tooltip="As of Edit Video, and what is left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        one = EditInputs(**inputs)
        maps, store = EditMaps({}, {}), one.store.with_model(one.model)
        edit, lines = one.edit(), list(one.notes)
        if not facts_of(one.model).attention:
            lines.append("no heat maps: FateZero does not control the attention of this model")
        elif one.prompt_edit is None and is_flow(one.model) and not one.fuses:
            lines.append("no heat maps: connect Prompt Edit for their words")
        elif one.prompt_edit is None:
            raise ValueError("prompt_edit: heat maps need its words: connect Prompt Edit")
        else:
            target = Condition.of(edit.target_embeddings, "positive")
            maps = EditMaps.of(one.prompt_edit, store.source.text_tokens, target.text_tokens)
            lines += [] if one.prompt_edit.columns.words else [f"no heat maps: {MIXED}"]
        edit = replace(edit, maps=maps)
        (edited,), hooked = edit_clip(one.model, store, [edit], one.chunk_frames or None)
        height, width = (store.shapes[0] if store.shapes else store.levels.shape)[-2:]
        size = PIXELS * height, PIXELS * width
        masks, heats = maps.masks(), maps.heats()
        if not masks:
            lines.append("no masks: this edit uses none (preset shape does)")
        report = report_of(one.model, hooked, store, edit, lines)
        show_on_node(cls.hidden.unique_id, report)
        pictures = [_heat(heats[name], size) for name in ("source", "target")]
        both = [_mean(masks, name, store, size) for name in ("attention", "latents")]
        steps = steps_image(heats["target"], size) if heats["target"] else pictures[1]
        return io.NodeOutput({"samples": edited}, *pictures, steps, *both, report, ui=ui.PreviewText(report))


def _heat(heats: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The words side by side; a black picture without any."""
    return heat_images(heats, size) if heats else heat_map(torch.zeros(1, 1, 1), size, "no heat maps").float() / 255


def _mean(masks: Mapping[str, Tensor], name: str, store: HostStore, size: tuple[int, int]) -> Tensor:
    """The mean of a mask over the steps, (frames, height, width); 1 where the edit uses none."""
    mask = masks[name].mean(0) if name in masks else torch.ones(store.frames, 1, 1)
    return GivenMask(mask).at(size, len(mask))


class FateZeroSlice(io.ComfyNode):
    """A row of a clip's pixels over time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSlice",
            display_name="X-T Slice (FateZero)",
            description="One row of a clip's pixels over time, downwards, of one clip or of two for comparison. Motion "
            "is a smooth line, flicker a ragged one.",
            search_aliases=["flicker", "temporal consistency", "time slice", "slit scan", "compare"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of a clip, e.g. the source."),
                io.Image.Input("edited", optional=True, tooltip="The frames of another: same number and size."),
                io.Int.Input(
                    "row",
                    default=-1,
                    min=-1,
                    max=16384,
                    tooltip="Row, from 0 at the top. -1: where most changes.",
                ),
                io.Int.Input(
                    "stretch",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Pixels of each frame. 0: a slice half as high as wide, and small clips enlarged.",
                ),
            ],
            outputs=[
                io.Image.Output("slice", display_name="slice", tooltip="One picture, with the clips below each other.")
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, row: int, stretch: int, edited: Tensor | None = None) -> io.NodeOutput:
        clips = [to_bytes(clip[..., :3].movedim(-1, 1)).cpu() for clip in (images, edited) if clip is not None]
        shown = slices(clips, moving_row(*clips) if row < 0 else row, stretch)
        return io.NodeOutput(shown[None].float() / 255)
