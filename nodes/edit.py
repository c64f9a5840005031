"""The edit, and a look at what it will blend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from comfy_api.latest import io, ui
from einops import rearrange
from torch import Tensor

from ..attention.masks import GivenMask, threshold_mask
from ..attention.prompt import PromptEdit
from ..diffusion.edit import Edit, Injection, Propagation, Smoothing, first_step, unet_calls
from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.editing import check_masking, edit_clip, heat_of_words, only_inside
from ..hosts.comfyui.families import count_layers, facts_of
from ..hosts.comfyui.inversion import NOISE_MASK, HostStore
from ..hosts.comfyui.noise import noise_of
from ..methods.fatezero import PRESETS, FusionSettings, preset_fusion
from ..methods.layout import Layout
from ..methods.move_objects import MoveObjects, moves_of
from ..methods.plug_and_play import OF_UNETS, PnPSettings
from ..video.sheet import heat_map
from .inversion import CHUNK_FRAMES
from .prompt import check_words
from .settings import widget
from .sockets import (
    TEXT_KEY,
    AttentionStoreSocket,
    InjectionSocket,
    LayoutSocket,
    PromptEditSocket,
    PropagationSocket,
    SmoothingSocket,
    schema,
    show_on_node,
)

INJECTIONS: dict[str, Injection | None] = {
    **{name: preset_fusion(name) for name in PRESETS},
    "pnp": PnPSettings(),
    "none": None,
}
"""What an edit takes of the source, by the name of its preset."""
CUSTOM = "custom"

INPUTS = [
    io.Model.Input("model", tooltip="The model of the inversion; LoRA may be added for the edit alone."),
    io.Conditioning.Input("positive", tooltip="The target prompt; ControlNets on it count."),
    io.Conditioning.Input("negative", tooltip="What to keep away from; an empty prompt will do."),
    AttentionStoreSocket.Input("store", tooltip="The inversion (Invert Video), or drawn noise (FlowEdit)."),
    PromptEditSocket.Input(
        "prompt_edit",
        optional=True,
        tooltip="How source and target words meet (Prompt Edit); only FateZero needs it.",
    ),
    InjectionSocket.Input(
        "settings",
        optional=True,
        tooltip="For preset custom: what to take of the source (FateZero Settings, Plug-and-Play Settings).",
    ),
    PropagationSocket.Input(
        "propagation", optional=True, tooltip="How frames agree beyond their key frames (TokenFlow)."
    ),
    SmoothingSocket.Input(
        "smoothing", optional=True, tooltip="Less flicker along the video's own motion (Flow Smoothing)."
    ),
    widget(Edit, "guidance_scale", "guidance"),
    io.Combo.Input(
        "preset",
        options=[*INJECTIONS, CUSTOM],
        default="style+",
        tooltip="What to take of the source. style, attribute and shape: FateZero's attention as the paper sets it, or "
        "with a plus as edited and kept better in our benchmark. pnp: Plug-and-Play, of UNets. none: nothing but the "
        "noise, inverted or drawn (FlowEdit). custom: what is connected to settings.",
    ),
    io.Mask.Input("mask", optional=True, tooltip="A blend mask of your own: one, or one for each frame."),
    io.Combo.Input(
        "mask_mode",
        options=["replace", "union", "intersection"],
        default="replace",
        optional=True,
        tooltip="Whether the mask replaces the edit's own, adds to it, or limits it.",
    ),
    CHUNK_FRAMES,
    widget(Edit, "strength", advanced=True, optional=True),
    LayoutSocket.Input("layout", optional=True, tooltip="Objects of the clip, moved to where they shall be (Layout)."),
]
"""What an edit is asked for."""


class FateZeroSampler(io.ComfyNode):
    """Denoise with the target prompt, fused with the inversion's attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSampler",
            display_name="Edit Video (FateZero)",
            description="The FateZero edit of an inverted clip. Motion and layout come from the inversion's attention.",
            search_aliases=["ksampler", "video edit", "prompt edit", "style transfer", "vid2vid"],
            inputs=INPUTS,
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", is_output_list=True, tooltip="The edited clip, for VAE Decode."
                ),
                io.String.Output(
                    "report", display_name="report", is_output_list=True, tooltip="What was hooked, fused and spent."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, **lists: list[Any]) -> io.NodeOutput:
        """Every input is a list, of one entry unless a node before gives several prompts."""
        latents, reports = [], []
        for alike in _groups([Asked(**row) for row in _rows(lists)]):
            first, edits = alike[0], [one.edit(f".{i}" if i else "") for i, one in enumerate(alike)]
            store = first.store.with_model(first.model)
            samples, hooked = edit_clip(first.model, store, edits, first.chunk_frames or None)
            latents += [{"samples": edited} for edited in samples]
            reports += [report_of(first.model, hooked, store, edit) for edit in edits]
        text = "\n\n".join(reports)
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(latents, reports, ui=ui.PreviewText(text))


def _rows(lists: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The inputs of each edit; a shorter list repeats its last entry, as the host has it."""
    count = max(len(values) for values in lists.values())
    return [{name: values[min(i, len(values) - 1)] for name, values in lists.items()} for i in range(count)]


@dataclass(frozen=True)
class Asked:
    """What the sockets hold for one edit."""

    model: Any
    positive: Any
    negative: Any
    store: HostStore
    guidance: float
    preset: str
    prompt_edit: PromptEdit | None = None
    settings: Injection | None = None
    propagation: Propagation | None = None
    smoothing: Smoothing | None = None
    layout: Layout | None = None
    mask: Tensor | None = None
    mask_mode: Literal["replace", "union", "intersection"] = "replace"
    chunk_frames: int = 0
    strength: float = 1.0

    @property
    def injection(self) -> Injection | None:
        """What to take of the source; ValueError for settings that the preset would ignore, or that are missing."""
        if (self.preset == CUSTOM) != (self.settings is not None):
            raise ValueError(
                f"settings: are connected, but preset {self.preset!r} would ignore them; set it to custom"
                if self.settings is not None
                else "settings: preset custom needs them (FateZero Settings, Plug-and-Play Settings)"
            )
        return self.settings if self.preset == CUSTOM else INJECTIONS[self.preset]

    def edit(self, suffix: str = "") -> Edit:
        """The edit asked for; suffix: tells its prompts from those of other edits of the pass."""
        mask = None if self.mask is None else GivenMask(self.mask.reshape(-1, *self.mask.shape[-2:]), self.mask_mode)
        positive = HostCondition.of_socket(self.positive, f"positive{suffix}", "positive")
        negative = None
        if self.guidance != 1:
            negative = HostCondition.of_socket(self.negative, f"negative{suffix}", "negative")
        injection = self.injection
        fuses = isinstance(injection, FusionSettings)
        if fuses and self.prompt_edit is None:
            raise ValueError("prompt_edit: FateZero needs it (Prompt Edit); presets pnp and none do without")
        if self.preset == "pnp" and not facts_of(self.model).decoder_features:
            raise ValueError(f"preset: {OF_UNETS}")
        edit = Edit(
            positive, negative, self.guidance, self.prompt_edit if fuses else None, injection, mask, self.propagation,
            self.smoothing, self._moves(positive), self.strength,
        )  # fmt: skip
        clips_mask = self.store.attachments.get(NOISE_MASK)
        check_masking(self.model, clips_mask)
        if mask is None and clips_mask is not None:
            edit = only_inside(edit, noise_of(self.model).mask_from_host(clips_mask))
        _check(edit, self.positive, self.preset, self.store.steps)
        return edit

    def _moves(self, positive: HostCondition) -> MoveObjects | None:
        """The layout's objects, moved from where the source prompt's words, or a mask, tell they are."""
        if self.layout is None:
            return None
        check_words(self.positive, self.layout.prompt, "the layout's prompt")
        source = self.prompt_edit.source if self.prompt_edit is not None else self.store.prompt or ""
        return moves_of(self.layout, source, self.store.source.text_tokens, positive.text_tokens)


def _groups(asked: list[Asked]) -> list[list[Asked]]:
    """The edits that one pass can serve: neighbours that share store and model."""
    key = lambda one: (id(one.store), id(one.model), one.chunk_frames)  # noqa: E731
    return [list(group) for _, group in groupby(asked, key)]


def _check(edit: Edit, positive: Any, preset: str, steps: int) -> None:
    """Say what would otherwise do nothing, or fail far from its socket."""
    prompt, fusion, mask = edit.prompt, edit.fusion, edit.mask
    first_step(edit.strength, steps)
    if prompt is None or not isinstance(fusion, FusionSettings):
        return
    check_words(positive, prompt.target, "prompt_edit's target")
    if edit.layout is not None:
        return
    if mask is not None and not fusion.blends:
        raise ValueError(
            f"mask: preset {preset!r} blends nothing, so a mask would do nothing; take preset shape, or custom with "
            "blend_self_attention or blend_latents"
        )
    needs_words = fusion.masks_by_step and (mask is None or not mask.replaces)
    if needs_words and not (prompt.blend_words or ([], []))[0]:
        raise ValueError("prompt_edit: blending needs words, and none of the source changes; fill in blend_source")


def report_of(model: Any, hooked: int | None, store: HostStore, edit: Edit) -> str:
    """What an edit fuses and spends; hooked: the attention layers that were reached, None before it ran."""
    calls = unet_calls(
        store.steps, edit.guidance_scale, store.kept_steps, edit.injection, edit.mask, edit.propagation, store.frames,
        edit.strength, facts_of(model).spans_clip, 0 if store.drawn is None else store.drawn.draws,
    )  # fmt: skip
    kind = "model" if facts_of(model).spans_clip else "UNet"
    lines = [] if hooked is None else [f"hooked {hooked} of {count_layers(model)} attention layers"]
    lines.append("took nothing of the source" if edit.injection is None else edit.injection.summary(store.steps))
    if edit.propagation is not None:
        lines.append(edit.propagation.summary(store.frames))
    if edit.smoothing is not None:
        lines.append(edit.smoothing.summary())
    if edit.layout is not None:
        lines.append(edit.layout.summary(store.steps))
    lines.append(
        f"{calls.edit:g} {kind} evaluations of {store.frames} frames, {calls.source:g} more for the source; "
        + (f"store of memory {store.memory}" if store.drawn is None else "noise drawn (FlowEdit)")
    )
    if edit.prompt is not None and not _is_text_of_pair(edit.target_embeddings):
        lines.append(OTHER_TEXT)
    return "\n".join(lines)


OTHER_TEXT = "positive is not Prompt Edit's target as it was encoded: words are matched as if it were"


def _is_text_of_pair(positive: Any) -> bool:
    embeddings, options = positive.conditioning[0]
    encoded = options.get(TEXT_KEY)
    return encoded is embeddings or (encoded is not None and torch.equal(encoded, embeddings))


class FateZeroMaskPreview(io.ComfyNode):
    """Where the source's words are, and the blend mask that follows."""

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
                    "words", default="", tooltip="Words of the source, with commas. Empty: the blend words of the edit."
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
                    tooltip="How much of a frame's strongest attention counts as the object.",
                ),
                io.Int.Input("width", default=512, min=8, max=16384, step=8, tooltip="Pixels of the pictures."),
                io.Int.Input("height", default=512, min=8, max=16384, step=8, tooltip="Pixels of the pictures."),
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
    """Up to eight steps, evenly from one share of all to another."""
    if start > end:
        raise ValueError(f"from_share: {start} lies behind to_share {end}")
    first, last = (min(steps - 1, round(share * (steps - 1))) for share in (start, end))
    count = min(at_most, last - first + 1)
    return [round(first + (last - first) * i / max(1, count - 1)) for i in range(count)]
