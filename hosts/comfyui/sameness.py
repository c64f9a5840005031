"""Comparison of MODELs: whether two of them compute the same.

MODELs of one checkpoint share its module, whose weights and parts the host exchanges. Everything that a MODEL carries
is compared, except what is listed here as harmless.
"""

from __future__ import annotations

from types import MethodType
from typing import Any
from uuid import UUID

import torch
from comfy.patcher_extension import WrappersMP

ROOM = "memory_required"
"""The host's method that estimates a call's memory, which FateZero replaces."""
OWN_OPTION = "fatezero"
"""The prefix of FateZero's own options of a MODEL."""
WINDOWS = "context_handler"
"""The host's option of a MODEL with its Context Windows."""
OF_GUIDANCE = {
    "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function",
    "disable_cfg1_optimization", "denoise_mask_function",
}  # fmt: skip
"""Options that act on finished predictions."""
OF_RUNS = {WrappersMP.PREPARE_SAMPLING, WrappersMP.PREDICT_NOISE}
"""Wrappers around the calls of a model: memory and guidance."""
PLAIN = (bool, int, float, str, bytes, UUID, torch.dtype, torch.device)
"""Types compared by value; others are compared by identity."""
HARMLESS = {*OF_GUIDANCE, WINDOWS}
"""Options that do not change a call of the model: of guidance, and of the call's frames."""


def same_in_place(one: Any, other: Any) -> bool:
    """Whether two MODELs make the same changes to their shared module: weights, parts and injections."""
    return bool(one.is_clone(other)) and equal(_in_place(one), _in_place(other))


def same_forward(one: Any, other: Any) -> bool:
    """Whether two MODELs return the same for the same call."""
    return same_in_place(one, other) and equal(_of_calls(one), _of_calls(other))


def _in_place(patcher: Any) -> dict[str, Any]:
    return {
        "weights": patcher.patches_uuid,
        "parts": {name: part for name, part in patcher.object_patches.items() if name != ROOM},
        "casts": [getattr(patcher, "force_cast_weights", False), getattr(patcher, "weight_wrapper_patches", {})],
        "injections": patcher.injections,
        "models": [[part.model, part.patches_uuid, part.injections] for part in patcher.get_nested_additional_models()],
    }


def _of_calls(patcher: Any) -> dict[str, Any]:
    wrappers = {kind: value for kind, value in patcher.wrappers.items() if kind not in OF_RUNS}
    return {
        "options": {
            name: value
            for name, value in patcher.model_options.items()
            if name not in HARMLESS and not name.startswith(OWN_OPTION)
        },
        "wrappers": wrappers,
        "callbacks": patcher.callbacks,
        "attachments": patcher.attachments,
    }


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same objects or equal plain values, also inside dicts and lists; empty equals None."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = ({name: value for name, value in of.items() if not empty(value)} for of in (one, other))
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__func__ is other.__func__ and one.__self__ is other.__self__
    return type(one) is type(other) and isinstance(one, PLAIN) and bool(one == other)


def empty(value: Any) -> bool:
    """Whether a value is None, or an empty list or dict."""
    return value is None or (isinstance(value, (dict, list)) and not value)
