"""Detection of a file's model family from the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FAMILIES = (
    ("AnimateDiff motion", r"motion_modules"),
    ("Control-LoRA", r"^lora_controlnet$|^control_model_|controlnet_cond_embedding|^input_hint_block|^zero_convs_"),
    ("Stable Video Diffusion", r"time_stack|temporal_transformer_blocks"),
    ("Qwen-Image", r"(^|_)transformer_blocks_\d+_(img|txt)_mlp"),
    ("Flux or HunyuanVideo", r"(^|_)(single|double)_(transformer_)?blocks_\d"),
    ("Stable Diffusion 3", r"joint_(transformer_)?blocks_\d|(^|_)attn_add_[kqv]_proj|context_block"),
    ("SDXL", r"^lora_te2_|^text_encoder_2_|^conditioner_embedders_1_|\d_transformer_blocks_[1-9]"),
    ("Stable Diffusion", r"(^|_)(down|up|input|output)_blocks_\d|(^|_)mid(dle)?_block_|^lora_te_|^cond_stage_model_"),
    ("Wan image-to-video", r"(^|_)blocks_\d+_cross_attn_k_img|(^|_)img_emb_"),
    ("Wan", r"(^|_)blocks_\d+_(self_attn|cross_attn|attn1_|attn2_|ffn)"),
    ("another transformer (LTX-Video, PixArt, ...)", r"(^|_)transformer_blocks_\d|(^|_)(layers|blocks)_\d+_att"),
    ("textual inversion", r"^emb_params$|^string_to_param|^clip_[lg]$|^<.*>$"),
)  # fmt: skip
"""Patterns of names with underscores for dots; the first pattern that matches any name decides."""


def family_of(names: Iterable[str]) -> str | None:
    """The family of tensors with these names, or that they are for; None if unknown."""
    plain = [name.replace(".", "_") for name in names]
    return next((family for family, pattern in _FAMILIES if any(re.search(pattern, name) for name in plain)), None)
