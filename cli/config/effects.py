"""Settings that have no effect with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...methods.fatezero import FusionSettings
from ...settings import settings_of
from .settings import AUTO, INJECTIONS, OBJECTS, PROPAGATIONS, SECTIONS, STARTS, ConfigError, EditConfig

_FUSION = tuple(one.name for one in settings_of(FusionSettings) if one.name != "max_tokens")


def of_methods() -> list[str]:
    """The settings that only edits have."""
    return [
        *_FUSION,
        *OBJECTS,
        "object_mask",
        "injection",
        "propagation",
        "smoothing",
        "flow",
        "noise",
        "edit_mask",
        "first_frame",
        "guide_frame",
        "mask_mode",
        "keep",
        "region",
        "lossless",
    ]


OF_AN_INVERSION = (
    "sdedit_seed", "order", "reuse_midpoint", "inversion_steps", "memory", "place", "budget_gb", "precision",
    "keep_steps",
)  # fmt: skip
"""Settings without effect on sampled noise."""
NOTHING_PLACED = "no object is named (box, ellipse, mask)"
_NOTHING_BLENDED = "nothing is blended (blend_self_attention, blend_latents)"
Rule = tuple[tuple[str, ...], Callable[[EditConfig], bool], str]
"""Settings, when they have no effect, and why."""


def _of_method(part: str, name: str) -> Rule:
    """The section of a method that an edit does not use."""
    return (name,), lambda config: getattr(config, part) != name, f"{part} is not {name}"


_NO_EFFECT: tuple[Rule, ...] = (
    (
        (*_FUSION, "mode", "blend_source", "blend_target", "reweight"),
        lambda c: c.injection != "fatezero",
        "injection is not fatezero",
    ),
    *(_of_method("injection", method.name) for method in INJECTIONS if method.name in SECTIONS),
    *(_of_method("propagation", method.name) for method in PROPAGATIONS),
    *(((method.name,), lambda c: c.noise != "drawn", "noise is not drawn") for method in STARTS),
    (
        OF_AN_INVERSION,
        lambda c: c.noise == "drawn",
        "noise is drawn, not inverted",
    ),
    (("layout", "object_mask"), lambda c: not c.places_objects, "no object is named (box, ellipse, mask, shift)"),
    (("flow",), lambda c: c.smoothing == 0, "smoothing is 0"),
    (("precision", "keep_steps"), lambda c: c.memory == "recompute", "memory recompute keeps no attention"),
    (
        ("blend_source", "blend_target", "blend_threshold", "mask_from", "mask_tokens"),
        lambda c: not c.fusion.blends,
        _NOTHING_BLENDED,
    ),
    (
        ("blend_source", "blend_target", "blend_threshold", "mask_from", "mask_tokens", "separate_words"),
        lambda c: c.places_objects,
        "the mask is that of the objects' layout",
    ),
    (
        ("blend_source", "blend_target", "blend_threshold", "mask_from", "mask_tokens", "separate_words"),
        lambda c: c.masked,
        "the mask is edit_mask",
    ),
    (("caption_model",), lambda c: c.source != AUTO, "source is not auto"),
    (("mask_mode",), lambda c: not c.edit_mask, "no edit_mask is given"),
    (("blend_latents_until",), lambda c: not c.blend_latents, "blend_latents is off"),
    (("mask_tokens",), lambda c: c.fusion.masks_by_prompts, "the mask is that of both prompts"),
    (
        ("reweight",),
        lambda c: c.cross_replace_steps == 0 and not c.cross_replace_words,
        "cross_replace_steps is 0",
    ),
    (("negative", "guidance_until"), lambda c: c.guidance_scale == 1, "guidance_scale is 1"),
    (
        ("controlnet_strength", "control_start", "control_end"),
        lambda c: not c.controlnet and not c.control,
        "no controlnet is given",
    ),
)


def check_effect(config: EditConfig, given: Sequence[str]) -> None:
    """Raise ConfigError for a given setting that has no effect with the others. given: names of settings."""
    for names, idle, why in _NO_EFFECT:
        for name in names:
            if name in given and idle(config):
                raise ConfigError(f"{name} has no effect here: {why}")


def check_masking(config: EditConfig) -> None:
    """Raise ConfigError for a mask that has no effect on the edit."""
    if not config.edit_mask:
        return
    fuses = config.injection == "fatezero"
    if fuses and not config.fusion.blends and not config.places_objects:
        raise ConfigError(
            f"edit_mask has no effect here: {_NOTHING_BLENDED}; give a preset that blends, such as shape or attribute+"
        )
    if not fuses and config.mask_mode != "replace":
        raise ConfigError(f"mask_mode is {config.mask_mode}; without FateZero's own mask it must be replace")
