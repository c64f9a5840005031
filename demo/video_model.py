"""The demo's video model, hundreds of times smaller than the models of its family.

Stock classes: the family's transformer and a UMT5 encoder, with its text layout (no start token, one end token, zeros
as padding). It uses the demo checkpoint's autoencoder of single pictures: one latent per frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ..files.sentencepiece import MARKS
from ..hosts.diffusers import VideoTransformer
from .scenes import VOCABULARY

TEXT_TOKENS = 32
"""Tokens of every prompt, padding included."""
SHIFT = 2.0
"""Shift of the schedule's sigmas."""


def build_transformer(patch: int = 2, heads: int = 6, layers: int = 6, ffn: int = 768) -> VideoTransformer:
    """A flow-predicting transformer of latents (4, frames, height, width), with heads of width 32."""
    transformer = VideoTransformer(
        patch_size=(1, patch, patch),
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=256,
        ffn_dim=ffn,
        num_layers=layers,
        rope_max_seq_len=128,
    )
    nn.init.zeros_(transformer.proj_out.weight)  # the first prediction is zero
    return transformer


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder of width 64."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    )


def shifted(u: Tensor, shift: Tensor | float = SHIFT) -> Tensor:
    """The sigmas of even ones in 0..1."""
    return shift * u / (1 + (shift - 1) * u)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def vocabulary(of: Iterable[str] = VOCABULARY) -> list[tuple[str, float]]:
    """The vocabulary with its scores: each word of the captions is one token, other text is split into letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -2.0) for word in of]
    others = [(token, -10.0) for token in ("\N{LOWER ONE EIGHTH BLOCK}", *letters)]
    return [*((mark, 0.0) for mark in MARKS), *words, *others]


def build_tokenizer(words: Iterable[str] = VOCABULARY, length: int = TEXT_TOKENS) -> T5Tokenizer:
    return T5Tokenizer(vocab=vocabulary(words), extra_ids=0, model_max_length=length)


def token_ids(tokenizer: T5Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (captions, tokens) each, padded to the tokenizer's length."""
    found = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask


def encode_ids(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (captions, tokens, 64), zero at padding."""
    states: Tensor = encoder(ids, attention_mask=mask).last_hidden_state
    return states * mask[..., None]


class VideoPainter(nn.Module):
    """The two networks trained together."""

    def __init__(self, tokenizer: T5Tokenizer, transformer: VideoTransformer | None = None) -> None:
        super().__init__()
        self.transformer = transformer or build_transformer()
        self.text = build_text_encoder(tokenizer)

    def forward(self, latents: Tensor, sigmas: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The velocity, noise - clip, of latents (clips, 4, frames, 16, 16) at sigmas (clips,)."""
        text = encode_ids(self.text, ids, mask)
        velocity: Tensor = self.transformer(latents, 1000 * sigmas, text, return_dict=False)[0]
        return velocity


def save_video_model(folder: Path, painter: VideoPainter, tokenizer: T5Tokenizer) -> None:
    """Write diffusers' folder layout in fp16, without an autoencoder."""
    for module, name in ((painter.transformer, "transformer"), (painter.text, "text_encoder")):
        module.to(torch.float16).save_pretrained(folder / name, safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    build_scheduler().save_pretrained(folder / "scheduler")
