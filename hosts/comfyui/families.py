"""The model families that FateZero edits in ComfyUI. A new one is a file in this folder and an entry here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...attention.control import Kind
from ...models.family import Family
from . import flow, h3, ltx, unet, wan
from .hook import ALL_KINDS, Hook, HostFamily

FAMILIES: tuple[HostFamily, ...] = (unet.FAMILY, wan.FAMILY, wan.CONDITIONED, ltx.FAMILY, h3.FAMILY, flow.FAMILY)
"""The first that matches a MODEL is its family."""
MODELS = ", or ".join(family.models for family in FAMILIES)
TEXT_ENCODERS = ", or ".join(family.text_encoder for family in FAMILIES if family.text_encoder)
ATTENTION_MODELS = ", or ".join(family.models for family in FAMILIES if family.hook.family.attention)


def family_of(model: Any) -> HostFamily:
    """The family of a MODEL; ValueError for one that FateZero does not support."""
    for family in FAMILIES:
        if family.matches(model):
            return family
    name, network = type(model.model).__name__, type(model.model.diffusion_model).__name__
    raise ValueError(f"model: {name} with a {network} is not supported. FateZero works with {MODELS}")


def hooked(model: Any, kinds: Sequence[Kind] = ALL_KINDS, attends: bool = True) -> Hook:
    """A hooked clone of a MODEL. kinds: of attention layers. attends: whether a run controls attention, without which
    any conditioning will do. Raises ValueError for a MODEL that cannot be edited.
    """
    own = family_of(model).hook(model, kinds)
    return own if attends or not own.family.attention else flow.PlainFlow(model, kinds, own)


def check_known(model: Any) -> None:
    """Raise ValueError for a MODEL that cannot be edited."""
    family_of(model).check(model)


def check_attention(model: Any, part: str) -> None:
    """Raise ValueError for a part of an edit that needs attention, on a MODEL without control of it."""
    if not facts_of(model).attention:
        raise ValueError(
            f"{part} needs control of the attention, which works with {ATTENTION_MODELS}, not with "
            f"{type(model.model).__name__}: use the FlowEdit node with preset flow_edit, and a mask for what may change"
        )


def count_layers(model: Any) -> int:
    """The number of attention layers of a MODEL."""
    return family_of(model).count_layers(model)


def facts_of(model: Any) -> Family:
    """The facts of a MODEL's family."""
    return family_of(model).hook.family


def takes_of(model: Any) -> frozenset[str]:
    """The options of a CONDITIONING in `REFUSED` that a MODEL takes."""
    return family_of(model).takes(model)


def hooks_always(model: Any) -> bool:
    """Whether a MODEL is hooked in runs that control no attention."""
    return family_of(model).hook.always


def text_tokens_of(embeddings: Tensor, options: dict[str, Any]) -> int:
    """The number of text columns that a model makes of a prompt."""
    found = (family.text_tokens(embeddings, options) for family in FAMILIES)
    return next((count for count in found if count is not None), int(embeddings.shape[1]))


def tokenizer_of(clip: Any) -> Any:
    """The tokenizer in a CLIP, for `PromptEdit`; ValueError for an unknown text encoder."""
    found = next((own for own in (family.tokenizer(clip) for family in FAMILIES) if own is not None), None)
    if found is None:
        raise ValueError(f"clip: {type(clip.tokenizer).__name__} is not supported: use {TEXT_ENCODERS}")
    return found
