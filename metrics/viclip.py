"""ViCLIP (Wang et al., ICLR 2024, arXiv 2307.06942): similarity of a clip and a prompt, CLIP's ViT over all frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .clip import ClipScorer

TOKENS = 32
"""Most tokens of a prompt, with those of its start and end."""
_HEAD = 64
_BLOCK = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj")


@dataclass(frozen=True)
class _Part:
    """The weights whose names begin with a prefix."""

    weights: Mapping[str, Tensor]
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[f"{self.prefix}.{name}"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    @property
    def blocks(self) -> list[_Part]:
        start = f"{self.prefix}.transformer.resblocks."
        numbers = {int(name[len(start) :].split(".")[0]) for name in self.weights if name.startswith(start)}
        return [replace(self, prefix=f"{start}{number}") for number in sorted(numbers)]

    def run(self, x: Tensor, causal: bool = False) -> Tensor:
        """CLIP's residual blocks on tokens (n, c)."""
        for block in self.blocks:
            qkv = F.linear(block.norm("ln_1", x), block["attn.in_proj_weight"], block["attn.in_proj_bias"])
            q, k, v = (part.unflatten(-1, (-1, _HEAD)).transpose(0, 1) for part in qkv.chunk(3, -1))
            attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
            x = x + block.linear("attn.out_proj", attended.transpose(0, 1).flatten(1))
            hidden = block.linear("mlp.c_fc", block.norm("ln_2", x))
            x = x + block.linear("mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
        return x


@dataclass(frozen=True)
class ViClip:
    """ViCLIP's weights; V2VBench uses ViClip-InternVid-10M-FLT."""

    weights: Mapping[str, Tensor]

    @torch.no_grad()
    def similarity(self, frames: Tensor, prompt: str, clip: ClipScorer) -> float:
        """Cosine similarity of frames (f, 3, h, w) in 0..1, evenly chosen, and a prompt of at most 32 tokens.

        clip: a CLIP model with the same vocabulary and size of pictures, as openai/clip-vit-large-patch14.
        """
        count = self.weights["vision_encoder.temporal_positional_embedding"].shape[1]
        chosen = frames[[i * len(frames) // count for i in range(count)]]
        tokens = clip.processor.tokenizer(prompt, truncation=True, max_length=TOKENS, return_tensors="pt")["input_ids"]
        video, text = self._video(clip.pixels(chosen)), self._text(tokens[0])
        return F.cosine_similarity(video, text, dim=0).item()

    def _video(self, pixels: Tensor) -> Tensor:
        """The embedding (d,) of pictures (f, 3, h, w): a class token, and all patches of all frames."""
        part = _Part(self.weights, "vision_encoder")
        kernel, where = part["conv1.weight"][:, :, 0], part["positional_embedding"]
        patches = F.conv2d(pixels.to(kernel), kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        if patches.shape[1] != len(where) - 1:
            side = round((len(where) - 1) ** 0.5) * kernel.shape[-1]
            raise ValueError(f"ViCLIP needs pictures of {side}x{side}, but CLIP's are of {tuple(pixels.shape[-2:])}")
        patches = patches + where[1:] + part["temporal_positional_embedding"].transpose(0, 1)
        x = torch.cat([(part["class_embedding"] + where[0])[None], patches.flatten(0, 1)])
        return part.norm("ln_post", part.run(part.norm("ln_pre", x))[0]) @ part["proj"]

    def _text(self, tokens: Tensor) -> Tensor:
        """The embedding (d,) of a prompt's tokens (n,), at its end."""
        part = _Part(self.weights, "text_encoder")
        table = part["token_embedding.weight"]
        x = table[tokens.to(table.device)] + part["positional_embedding"][: len(tokens)]
        return part.norm("ln_final", part.run(x, causal=True)[-1]) @ part["text_projection"]


def load_viclip(path: str | Path, device: torch.device | str = "cpu") -> ViClip:
    """ViCLIP from its weights as .safetensors, by the authors' names. Raises ValueError for a file of other weights.

    Write them once with `safetensors.torch.save_file(torch.load("ViClip-InternVid-10M-FLT.pth")["model"], FILE)`.
    """
    try:
        weights = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    missing = [name for name in _names(weights) if name not in weights]
    if missing:
        raise ValueError(f"{path} does not contain ViCLIP: {missing[0]} is missing")
    return ViClip({name: weight.float() for name, weight in weights.items()})


def _names(weights: Mapping[str, Tensor]) -> list[str]:
    """The names that must be there, of each tower and of each of its blocks."""
    vision = [
        *("conv1.weight", "class_embedding", "positional_embedding", "temporal_positional_embedding", "proj"),
        *(f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
    ]
    text = ["token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection"]
    found = []
    for tower, names in (("vision_encoder", vision), ("text_encoder", text)):
        found += [f"{tower}.{name}" for name in names]
        for block in _Part(weights, tower).blocks or [_Part(weights, f"{tower}.transformer.resblocks.0")]:
            found += [f"{block.prefix}.{name}.{kind}" for name in _BLOCK for kind in ("weight", "bias")]
            found += [f"{block.prefix}.attn.in_proj_{kind}" for kind in ("weight", "bias")]
    return found
