"""Wan 2.1 and 2.2 for text to video: a transformer over a clip's tokens, UMT5 text and a causal video autoencoder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.bundled import DEMO
from .family import Family

if TYPE_CHECKING:
    from torch import Tensor

WAN = Family(
    title="Wan",
    network="video transformer",
    formulation="flow",
    spans_clip=True,
    half="bfloat16",
    demo="demo-wan",
    demo_folder=DEMO.parent / "wan",
    subset_patch=2,
    trained_frames=21,
)
WAN_I2V = replace(WAN, title="Wan image-to-video", demo="", demo_folder=Path())
WAN_VACE = replace(WAN_I2V, title="Wan VACE")
WAN_CONDITIONED = replace(WAN_I2V, title="Wan with pictures or control")
"""In ComfyUI, where all of these models are called alike, on whole clips."""
TEXT_TOKENS = 512
"""Number of text columns of a prompt, padding included. Longer prompts have more."""
NATIVE_SIZE = 480
"""Short side, in pixels, of Wan 2.1's training videos."""

_ORIGINAL = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"attn1\.(to_)?", "self_attn."), (r"attn2\.(to_)?", "cross_attn."), (r"attn\.out\.0\b", "attn.o"),
        (r"\badd_([kv])_proj\b", r"\1_img"), (r"\bffn\.net\.0\.proj\b", "ffn.0"), (r"\bffn\.net\.2\b", "ffn.2"),
        (r"\.norm2\b", ".norm3"), (r"^blocks\.(\d+)\.scale_shift_table$", r"blocks.\1.modulation"),
        (r"^scale_shift_table$", "head.modulation"), (r"^proj_out\b", "head.head"),
        (r"^condition_embedder\.(text|time)_embedder\.linear_1\b", r"\1_embedding.0"),
        (r"^condition_embedder\.(text|time)_embedder\.linear_2\b", r"\1_embedding.2"),
        (r"^condition_embedder\.time_proj\b", "time_projection.1"),
    )
)  # fmt: skip


def begins_with_reference(control: Tensor) -> bool:
    """Whether a control of VACE, (b, n, 96, frames, h, w), begins with a reference: its frame has no mask, and zeros
    where others have the part to change.
    """
    return bool((control[:, :, 16:, 0].abs().amax((0, 2, 3, 4)) < 0.01).any())


def original_name(name: str) -> str:
    """The name in Wan's own code of a layer or weight of diffusers' transformer."""
    for pattern, theirs in _ORIGINAL:
        name = pattern.sub(theirs, name)
    return name
