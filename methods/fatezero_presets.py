"""FateZero's presets."""

from __future__ import annotations

from typing import Any

_MASKED = {"blend_latents": True, "blend_latents_until": 1.0, "mask_from": "prompts", "separate_words": 0.7}
_SHAPE_PLUS = {
    "guidance_scale": 5.0,
    "cross_replace_steps": 0.4,
    "self_replace_steps": 0.3,
    "blend_self_attention": True,
    "blend_threshold": 0.15,
    **_MASKED,
}
PRESETS: dict[str, dict[str, Any]] = {
    "style": {"cross_replace_steps": 0.7, "self_replace_steps": 0.8},
    "attribute": {"cross_replace_steps": 0.7, "self_replace_steps": 0.8},
    "shape": {
        "cross_replace_steps": 0.5,
        "self_replace_steps": 0.5,
        "blend_self_attention": True,
        "blend_threshold": 0.3,
    },
    "style+": {"guidance_scale": 5.0, "cross_replace_steps": 0.9, "self_replace_steps": 0.9},
    "attribute+": {
        "guidance_scale": 5.0,
        "cross_replace_steps": 0.9,
        "self_replace_steps": 0.8,
        "blend_threshold": 0.2,
        **_MASKED,
    },
    "shape+": _SHAPE_PLUS,
    "remove": _SHAPE_PLUS,
    "enhance": {"guidance_scale": 5.0, "cross_replace_steps": 0.9, "self_replace_steps": 0.9},
}
"""style, attribute and shape are the paper's settings: t_c = 0.3T, t_s = 0.2T, tau = 1 (so no blending) for
style and attribute; t_c = t_s = 0.5T, tau = 0.3 for shape. Those with a plus are what the benchmark found better
(`benchmarks/QUALITY.md`): less guidance, latents kept up to the last step outside a mask of both prompts, less
attention inside it to words that belong elsewhere, and other shares of steps. remove and enhance are supplement B's:
an object's words left out of the target, words of quality added to it; with the values of shape+ and style+."""
