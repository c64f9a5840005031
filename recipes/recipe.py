"""The description of an edit: its parts, prompts and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..attention.masks import GivenMask
from ..attention.prompt import MIXED, Mode, PromptEdit, changed_words
from ..diffusion.denoiser import refuse_clip_norm
from ..diffusion.parts import Edit, Injection, Layouts, Propagation, Start, check_parts
from ..diffusion.start import INVERTED
from ..methods.fatezero import FusionSettings
from ..methods.flow_edit import DrawnNoise, FlowEditSettings
from ..methods.flow_smoothing import FlowSmoothing
from ..settings import settings_of, shown
from .cost import Calls, calls_of
from .presets import BY_NAME, preset_values

if TYPE_CHECKING:
    from ..attention.condition import Condition

    Text = Condition | Any

NO_WORDS = ("none",)
"""As blend words of the target: latents are blended by the mask of the source's words."""


@dataclass(frozen=True)
class Recipe:
    """An edit: its parts, prompts and settings.

    injection: what it takes from the source. propagation, smoothing: how frames agree. noise: FlowEdit's settings if it
    starts from sampled noise; None for an inversion. layout: where objects should be. mask: the edit mask.
    blend_source, blend_target: the words of the blend mask; empty for the words that change. key_frames, clip_norm: of
    the inversion; None for its defaults.
    """

    source: str = ""
    target: str = ""
    negative: str = ""
    guidance_scale: float = 7.5
    guidance_until: float = 1.0
    strength: float = 1.0
    sdedit_seed: int | None = None
    injection: Injection | None = None
    propagation: Propagation | None = None
    smoothing: FlowSmoothing | None = None
    noise: FlowEditSettings | None = None
    layout: Layouts | None = None
    mask: GivenMask | None = None
    mode: Mode = "refine"
    blend_source: tuple[str, ...] = ()
    blend_target: tuple[str, ...] = ()
    reweight: Mapping[str, float] = field(default_factory=dict)
    key_frames: tuple[str | int, ...] | None = None
    clip_norm: bool | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], **more: Any) -> Recipe:
        """The recipe of a configuration or preset: parts by name, settings of methods in their sections.

        more: fields of the recipe, which override these.
        """
        own = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        injection, propagation = values.get("injection", "fatezero"), values.get("propagation", "none")
        start, amount = "flow_edit" if values.get("noise") == "drawn" else "none", values.get("smoothing", 0)
        own |= {
            "injection": _part(injection, values),
            "propagation": _part(propagation, values),
            "noise": _part(start, values),
            "smoothing": FlowSmoothing(amount) if amount else None,
        }
        return cls(**own | more)

    @classmethod
    def of_preset(cls, preset: str, source: str = "", target: str = "", **more: Any) -> Recipe:
        """The recipe of a preset, with its guidance and key frames (`preset_values`). more: other settings, by name."""
        return cls.of({**preset_values(preset, source, target), **more}, source=source, target=target)

    @property
    def start(self) -> Start:
        return INVERTED if self.noise is None else DrawnNoise(self.noise)

    @property
    def limited(self) -> bool:
        """Whether a mask limits what the edit changes, up to its last step."""
        given = self.mask is not None and self.mask.how != "union"
        moves = self.layout is not None and self.layout.keeps_rest
        return given or moves or (self.injection is not None and self.injection.limits)

    def pair(self, tokenizer: Any, in_area: bool = False) -> PromptEdit | None:
        """The prompt pair if the injection aligns words, else None. in_area: a layout limits the edit to an area.

        Raises ValueError if blending has no words.
        """
        fusion = self.injection
        if not isinstance(fusion, FusionSettings):
            return None
        fusion.check_words(self.target)
        blend, pair = None, PromptEdit(self.source, self.target, tokenizer)
        if not pair.columns.words:
            self.refuse_words(in_area)
        if fusion.blends and not in_area and not (self.mask is not None and self.mask.replaces):
            blend = blend_words(pair, self.blend_source, self.blend_target)
            if fusion.masks_by_prompts:
                blend = blend if any(blend) else None
            elif not blend[0]:
                raise ValueError(
                    "blending needs words: no word of the source changes, so set blend_source "
                    f"({shown(self.source)} / {shown(self.target)})"
                )
        return PromptEdit(self.source, self.target, tokenizer, self.mode, blend, dict(self.reweight))

    def refuse_words(self, in_area: bool = False) -> None:
        """Raise ValueError for settings of single words, for a model whose text columns do not stand for words."""
        fusion = self.injection
        if not isinstance(fusion, FusionSettings):
            return
        by_words = fusion.masks_by_step and not in_area and not (self.mask is not None and self.mask.replaces)
        given = {
            "blend_source": self.blend_source,
            "blend_target": self.blend_target,
            "reweight": self.reweight,
            "cross_replace_words": fusion.cross_replace_words,
        }
        if by_words or any(given.values()):
            name = next((name for name, words in given.items() if words), "mask_from attention")
            raise ValueError(f"{name}: {MIXED}: use an edit mask (--edit-mask), or mask_from prompts")

    def edit(self, target: Text, negative: Text | None, prompt: PromptEdit | None) -> Edit:
        """The arguments of `edit_many`, for encoded prompts."""
        return Edit(
            target, negative, self.guidance_scale, prompt, self.injection, self.mask, self.propagation, self.smoothing,
            self.layout, self.strength, self.sdedit_seed, guidance_until=self.guidance_until,
        )  # fmt: skip

    def check(self, spans_clip: bool, prompt: PromptEdit | None) -> None:
        """Raise ValueError if the parts do not fit each other or the model. Called before an inversion.

        spans_clip: see `Denoiser`.
        """
        if spans_clip:
            refuse_clip_norm(bool(self.clip_norm))
        check_parts(self.edit(None, None, prompt), spans_clip, self.start)

    def calls(self, steps: int, kept_steps: int = 0, frames: int = 1, spans_clip: bool = False, **more: Any) -> Calls:
        """The number of model calls, see `calls_of`."""
        return calls_of(self.edit(None, None, None), steps, kept_steps, frames, spans_clip, self.start, **more)


def _part(name: str, values: Mapping[str, Any]) -> Any:
    """The part of a method: its section of the values, or for FateZero, which has none, its single settings."""
    if name == "none":
        return None
    method, given = BY_NAME[name], values.get(name)
    if isinstance(given, Mapping):  # of a preset
        return method.settings(**given)
    if given is not None:
        return given
    return method.settings(**{one.name: values[one.name] for one in settings_of(method.settings) if one.name in values})


def blend_words(
    pair: PromptEdit, blend_source: tuple[str, ...] = (), blend_target: tuple[str, ...] = ()
) -> tuple[list[str], list[str]]:
    """The words of the blend mask: those given, else the words that change between the prompts if they have columns."""
    changed = changed_words(pair.source, pair.target) if pair.columns.words else ([], [])
    of_target = () if blend_target == NO_WORDS else blend_target or changed[1]
    return list(blend_source or changed[0]), list(of_target)
