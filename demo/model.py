"""The demo checkpoint's architecture: Stable Diffusion's parts, a thousand times smaller.

Every part is a stock class of diffusers or transformers in its usual folder layout, and has what hosts assume of
SD 1.x: 32 groups in every GroupNorm, 8 heads per level, a latent scale of 0.18215, quick_gelu text with 77 positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, STYLES, TEXTURES, VOCABULARY, Scene

LATENT_SCALE = 0.18215
LATENT_SIZE = SIZE // 4


def build_vae() -> AutoencoderKL:
    """An autoencoder of factor 4: (3, 64, 64) in -1..1 to (4, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(64, 64, 64),  # with 32, groups of one channel would normalize colour away
        layers_per_block=1,
        norm_num_groups=32,
        sample_size=SIZE,
        scaling_factor=LATENT_SCALE,
    )


def build_unet() -> UNet2DConditionModel:
    """An epsilon-predicting UNet with attention on 16x16 and 8x8 tokens."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder of width 64.

    Token embeddings start with a standard deviation of 0.5: with CLIP's 0.02 all captions look alike for thousands of
    steps, and colour words bind late.
    """
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embeddings = encoder.get_submodule("embeddings" if hasattr(encoder, "embeddings") else "text_model.embeddings")
    nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    return encoder


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer(folder: Path, words: Iterable[str] = VOCABULARY) -> CLIPTokenizer:
    """Write a CLIP byte-pair vocabulary in which each word of the captions is one token.

    Any other text has one token per byte, as in CLIP.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        chunks = [*word[:-1], f"{word[-1]}</w>"]
        while len(chunks) > 1:
            # Merges of earlier words rank first, so apply them where possible.
            ranked = [m for m in merges if m in pairwise(chunks)]
            pair = ranked[0] if ranked else (chunks[0], chunks[1])
            if not ranked:
                merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
            at = next(i for i in range(len(chunks)) if (chunks[i], chunks[i + 1]) == pair)
            chunks[at : at + 2] = ["".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False, indent=0)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(captions, 77) token ids, padded with the end token."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


class SceneClassifier(nn.Module):
    """Reads a scene of one thing from its pixels: the judge of generated and edited frames.

    Trained on rendered scenes only, never on the diffusion model's pictures.
    """

    HEADS: dict[str, tuple[str, ...]] = {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "texture": TEXTURES,
        "background": tuple(BACKGROUNDS),
        "style": tuple(STYLES),
    }

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1),
                    nn.GroupNorm(8, b),
                    nn.SiLU(),
                    nn.Conv2d(b, b, 3, padding=1),
                    nn.GroupNorm(8, b),
                    nn.SiLU(),
                )
                for a, b in pairwise(widths)
            ),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        features = widths[-1] * (SIZE // 16) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(words)) for name, words in self.HEADS.items()})

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Frames (batch, 3, 64, 64) in 0..1 to logits of every head."""
        features = self.body(2 * frames - 1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, frames: Tensor) -> list[dict[str, str]]:
        """The words read in each frame."""
        choices = {name: logits.argmax(-1).tolist() for name, logits in self(frames).items()}
        return [{name: self.HEADS[name][choice[i]] for name, choice in choices.items()} for i in range(len(frames))]


def labels(scene: Scene) -> dict[str, str]:
    """The correct result of `SceneClassifier.read` for a scene of one thing."""
    thing = scene.things[0]
    return {
        "colour": thing.colour,
        "shape": thing.shape,
        "texture": thing.texture,
        "background": scene.background,
        "style": scene.style,
    }
