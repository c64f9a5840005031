"""The Edit Video node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, get_args

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..attention.masks import MaskMode
from ..attention.prompt import MIXED, PromptEdit
from ..diffusion.parts import Edit, Injection, Propagation, check_parts, first_step
from ..diffusion.schedule import reused_steps
from ..diffusion.start import start_of
from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.editing import changed_mask, check_masking, edit_clip, given_mask, limits_video, only_inside
from ..hosts.comfyui.families import check_attention, count_layers, facts_of, takes_of
from ..hosts.comfyui.inversion import NOISE_MASK, HostStore, schedule_of_store, source_of
from ..hosts.comfyui.noise import is_flow
from ..methods.fatezero import FusionSettings, check_joint
from ..methods.flow_edit import DrawnNoise
from ..methods.flow_smoothing import FlowSmoothing
from ..methods.layout import Layout
from ..methods.move_objects import MoveObjects, moves_of
from ..recipes.cost import beside_plain, calls_of
from ..recipes.presets import PRESETS
from ..recipes.recipe import Recipe
from ..settings import setting_of
from ..store.streams import video_shape
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

NONE, CUSTOM = "none", "custom"

INPUTS = [
    io.Model.Input("model", tooltip="The model of the inversion; you may add LoRA for the edit."),
    io.Conditioning.Input("positive", tooltip="The target prompt; its ControlNets apply."),
    io.Conditioning.Input("negative", tooltip="The negative prompt; may be empty."),
    AttentionStoreSocket.Input("store", tooltip="The inversion (Invert Video), or sampled noise (FlowEdit)."),
    PromptEditSocket.Input(
        "prompt_edit",
        optional=True,
        tooltip="How source and target words match (Prompt Edit); only FateZero needs it.",
    ),
    InjectionSocket.Input(
        "settings",
        optional=True,
        tooltip="For preset custom: what to take from the source (FateZero Settings, Plug-and-Play Settings).",
    ),
    PropagationSocket.Input(
        "propagation", optional=True, tooltip="Propagation from edited key frames to all frames (TokenFlow)."
    ),
    SmoothingSocket.Input(
        "smoothing", optional=True, tooltip="Less flicker along the video's motion (Flow Smoothing)."
    ),
    widget(
        Edit,
        "guidance_scale",
        "guidance",
        default=0.0,
        min=0.0,
        tooltip="Classifier-free guidance. 0 uses the preset's: 7.5 as in the paper, 5 with a plus.",
    ),
    io.Combo.Input(
        "preset",
        options=[*PRESETS, NONE, CUSTOM],
        default="style+",
        tooltip="What the edit takes from the source, with its guidance, as in `fatezero edit --preset`. style, "
        "attribute, shape: FateZero as in the paper; with a plus, tuned on our benchmark. remove: without an object "
        "whose words the target leaves out. enhance: for added words such as 'high quality, 8K'. pnp, tokenflow: for "
        "UNets; invert with key_frames self. flow_edit, wan_edit: for the store of FlowEdit; few_steps: the same "
        "at guidance 1, for models in 4 to 8 steps. none: only the inverted "
        "noise. custom: the connected settings.",
    ),
    io.Mask.Input("mask", optional=True, tooltip="Edit mask, white where the video may change: one, or one per frame."),
    io.Combo.Input(
        "mask_mode",
        options=list(get_args(MaskMode)),
        default="replace",
        optional=True,
        tooltip="Whether the mask replaces the edit's blend mask, adds to it, or limits it.",
    ),
    CHUNK_FRAMES,
    widget(
        Edit,
        "strength",
        advanced=True,
        optional=True,
        default=0.0,
        tooltip=f"{setting_of(Edit, 'strength').meta.text} 0 uses the preset's.",
    ),
    widget(Edit, "sdedit_seed", advanced=True, optional=True),
    LayoutSocket.Input("layout", optional=True, tooltip="New positions of objects in the clip (Layout)."),
    widget(Edit, "guidance_until", advanced=True, optional=True),
]
"""The inputs of an edit."""


class FateZeroSampler(io.ComfyNode):
    """Denoise with the target prompt and the inversion's attention."""

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
                    "report",
                    display_name="report",
                    is_output_list=True,
                    tooltip="The hooked layers, the fused steps and the cost.",
                ),
                io.Mask.Output(
                    "changed",
                    display_name="mask",
                    is_output_list=True,
                    tooltip="Where the edit changed the clip, for Restore Unchanged; white everywhere without a mask.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, **lists: list[Any]) -> io.NodeOutput:
        """Every input is a list, of one entry unless an earlier node outputs several prompts."""
        latents, reports, masks = [], [], []
        for group in _groups([EditInputs(**row) for row in _rows(lists)]):
            first, edits = group[0], [one.edit(f".{i}" if i else "") for i, one in enumerate(group)]
            store = first.store.with_model(first.model)
            samples, hooked = edit_clip(first.model, store, edits, first.chunk_frames or None)
            latents += [{"samples": edited} for edited in samples]
            masks += [changed_mask(first.model, store, edited) for edited in samples]
            reports += [
                report_of(first.model, hooked, store, edit, one.notes) for one, edit in zip(group, edits, strict=True)
            ]
        text = "\n\n".join(reports)
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(latents, reports, masks, ui=ui.PreviewText(text))


def _rows(lists: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The inputs of each edit; a shorter list repeats its last entry, as in the host."""
    count = max(len(values) for values in lists.values())
    return [{name: values[min(i, len(values) - 1)] for name, values in lists.items()} for i in range(count)]


@dataclass(frozen=True)
class EditInputs:
    """The sockets and widgets of one edit."""

    model: Any
    positive: Any
    negative: Any
    store: HostStore
    guidance: float
    preset: str
    prompt_edit: PromptEdit | None = None
    settings: Injection | None = None
    propagation: Propagation | None = None
    smoothing: FlowSmoothing | None = None
    layout: Layout | None = None
    mask: Tensor | None = None
    mask_mode: MaskMode = "replace"
    chunk_frames: int = 0
    strength: float = 0.0
    sdedit_seed: int = 0
    guidance_until: float = 1.0

    @property
    def recipe(self) -> Recipe:
        """The preset or the connected settings, with the other connected inputs.

        Raises ValueError for settings that the preset would ignore, or that are missing.
        """
        if (self.preset == CUSTOM) != (self.settings is not None):
            raise ValueError(
                f"settings: are connected, but preset {self.preset!r} ignores them: set preset to custom"
                if self.settings is not None
                else "settings: preset custom needs them: connect FateZero Settings or Plug-and-Play Settings"
            )
        if 0 < self.guidance < 1:
            raise ValueError(f"guidance: is {self.guidance:g}; it must be at least 1, or 0 for the preset's")
        recipe = Recipe(injection=self.settings) if self.preset in (NONE, CUSTOM) else Recipe.of_preset(self.preset)
        mask = None if self.mask is None else given_mask(self.model, self.store, self.mask, self.mask_mode)
        return replace(
            recipe,
            guidance_scale=self.guidance or recipe.guidance_scale,
            strength=self.strength or recipe.strength,
            sdedit_seed=self.sdedit_seed or None,
            guidance_until=self.guidance_until,
            propagation=self.propagation or recipe.propagation,
            smoothing=self.smoothing,
            mask=mask,
        )

    @property
    def fuses(self) -> bool:
        """Whether the edit needs control of the attention."""
        injection = self.recipe.injection
        return injection is not None and injection.needs_attention

    def edit(self, suffix: str = "") -> Edit:
        """The edit. suffix: distinguishes its prompts from those of other edits of the pass."""
        recipe, start = self.recipe, start_of(self.store)
        attends = not is_flow(self.model) or self.fuses
        if self.fuses:
            check_attention(self.model, f"preset: {self.preset}")
            source_of(self.store).check_attention("source", takes_of(self.model))
        takes = takes_of(self.model)
        positive = HostCondition.of_socket(self.positive, f"positive{suffix}", "positive", attends, takes)
        negative = None
        if recipe.guidance_scale != 1:
            negative = HostCondition.of_socket(self.negative, f"negative{suffix}", "negative")
        matches = isinstance(recipe.injection, FusionSettings)
        if matches and self.prompt_edit is None:
            raise ValueError("prompt_edit: FateZero needs it: connect Prompt Edit, or use preset pnp or none")
        if recipe.noise is not None and not start.draws:
            raise ValueError(f"store: preset {self.preset} needs the store of FlowEdit, not of an inversion")
        recipe = replace(recipe, layout=self._moves(positive))
        edit = recipe.edit(positive, negative, self.prompt_edit if matches else None)
        clips_mask = self.store.attachments.get(NOISE_MASK)
        check_masking(self.model, clips_mask)
        if edit.mask is None and clips_mask is not None and (not self.fuses or limits_video(self.store, clips_mask)):
            edit = only_inside(self.model, self.store, edit, clips_mask)
        start.check_steps(self.store.steps - first_step(edit.strength, self.store.steps))
        _check_words(edit, self.positive, self.preset)
        facts = facts_of(self.model)
        check_parts(edit, facts.spans_clip, start)
        if facts.joint and isinstance(edit.fusion, FusionSettings) and edit.prompt is not None:
            check_joint(edit.fusion, edit.prompt)
        return edit

    @property
    def notes(self) -> list[str]:
        """Settings of the preset that only the inversion can set, if they differ."""
        recipe, start, found = self.recipe, start_of(self.store), list[tuple[Any, ...]]()
        if recipe.noise is not None and isinstance(start, DrawnNoise):
            own, preset = start.settings, recipe.noise
            found.append(("variant", "FlowEdit", preset.variant, own.variant))
            if preset.gain != 1:
                found.append(("gain", "FlowEdit", preset.gain, own.gain))
        if recipe.key_frames is not None and not facts_of(self.model).spans_clip:
            entries = recipe.key_frames, self.store.key_frames.entries
            found.append(("key_frames", "Invert Video", *(", ".join(map(str, one)) for one in entries)))
        return [
            f"preset {self.preset} is made for {name} {preset} of {node}; this store has {own}"
            for name, node, preset, own in found
            if own != preset
        ]

    def _moves(self, positive: HostCondition) -> MoveObjects | None:
        """The layout's objects, with their source positions from the source prompt's words or a mask."""
        if self.layout is None:
            return None
        check_words(self.positive, self.layout.prompt, "the layout's prompt")
        source = self.prompt_edit.source if self.prompt_edit is not None else self.store.prompt or ""
        return moves_of(self.layout, source, self.store.source.text_tokens, positive.text_tokens)


def _groups(edits: list[EditInputs]) -> list[list[EditInputs]]:
    """Edits grouped by pass: neighbours that share store and model."""
    key = lambda one: (id(one.store), id(one.model), one.chunk_frames)  # noqa: E731
    return [list(group) for _, group in groupby(edits, key)]


def _check_words(edit: Edit, positive: Any, preset: str) -> None:
    """Raise ValueError, naming the socket, for words and masks that do not fit the preset."""
    prompt, fusion, mask = edit.prompt, edit.fusion, edit.mask
    if prompt is None or not isinstance(fusion, FusionSettings):
        return
    check_words(positive, prompt.target, "prompt_edit's target")
    if edit.layout is not None:
        return
    if mask is not None and not fusion.blends:
        raise ValueError(
            f"mask: preset {preset!r} does not blend, so a mask has no effect: use preset shape, or custom with "
            "blend_self_attention or blend_latents"
        )
    needs_words = fusion.masks_by_step and (mask is None or not mask.replaces)
    if needs_words and not prompt.columns.words:
        raise ValueError(f"preset: {preset} needs words, but {MIXED}: connect a mask, or use a preset with a plus")
    if needs_words and not (prompt.blend_words or ([], []))[0]:
        raise ValueError("prompt_edit: blending needs words, but no word of the source changes: fill in blend_source")


def report_of(model: Any, hooked: int | None, store: HostStore, edit: Edit, notes: Sequence[str] = ()) -> str:
    """The report of an edit. hooked: the number of controlled attention layers; None before the run."""
    facts, start = facts_of(model), start_of(store)
    if facts.joint and isinstance(edit.fusion, FusionSettings):  # which has no cross-attention to fuse
        edit = replace(edit, fusion=replace(edit.fusion, cross_replace_steps=0.0, cross_replace_from=0.0))
    spans_clip, grid = facts.spans_clip, facts.subset_grid(*store.levels.shape[-2:])
    reused = reused_steps(schedule_of_store(model, store), store.order) if store.reuse_midpoint else set()
    calls = calls_of(edit, store.steps, store.kept_steps, store.frames, spans_clip, start, store.memory, grid, reused)
    plain = store.steps * (1 if edit.guidance_scale == 1 else 2)
    kind = "model" if spans_clip else "UNet"
    layers = count_layers(model)
    lines = [] if not hooked or not layers else [f"hooked {hooked} of {layers} attention layers"]
    lines.append("injected nothing from the source" if edit.fusion is None else edit.fusion.summary(store.steps))
    if edit.propagation is not None:
        lines.append(edit.propagation.summary(store.frames))
    if edit.smoothing is not None:
        lines.append(edit.smoothing.summary())
    if edit.layout is not None:
        lines.append(edit.layout.summary(store.steps))
    lines.append(
        f"{calls.edit + calls.prepare:g} {kind} evaluations of {video_shape(store)[0]} frames, {calls.source:g} more "
        "for the source; " + (f"store of memory {store.memory}" if not start.draws else "sampled noise (FlowEdit)")
    )
    lines.append(beside_plain(calls.parts, plain))
    if store.guides is not None:
        own = store.edit_guides is not store.guides
        lines.append("guides of its own" if own else "guides of the inverted latent; for other pictures: Edit Guides")
    if edit.prompt is not None and not _is_text_of_pair(edit.target_embeddings):
        lines.append(OTHER_TEXT)
    lines += notes
    return "\n".join(lines)


OTHER_TEXT = "positive was not encoded from Prompt Edit's target; words are matched as if it was"


def _is_text_of_pair(positive: Any) -> bool:
    embeddings, options = positive.conditioning[0]
    encoded = options.get(TEXT_KEY)
    return encoded is embeddings or (encoded is not None and torch.equal(encoded, embeddings))
