"""Small random models of a benchmark's figures, in transformers' layout, on pictures of 32 pixels."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from fatezero.files.bundled import DEMO

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
PICTURES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def write_clip(folder: Path) -> Path:
    """CLIP with the demo's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    text = {**TOWER, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**PICTURES), tokenizer).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    Dinov2Model(Dinov2Config(**VISION)).save_pretrained(folder)
    BitImageProcessor(**PICTURES).save_pretrained(folder)
    return folder


def write_aesthetic(folder: Path, layers: bool = True) -> Path:
    """An aesthetic predictor, with the names of weights of the package simple-aesthetics-predictor."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=16))
    model.save_pretrained(folder)
    if layers:
        sides = zip(("0", "2", "4", "6", "7"), (16, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True)
        own = {f"layers.{n}.{kind}": w for n, a, b in sides for kind, w in nn.Linear(a, b).state_dict().items()}
        save_file(model.state_dict() | own, folder / "model.safetensors", {"format": "pt"})
    CLIPImageProcessor(**PICTURES).save_pretrained(folder)
    return folder


def wave(seed: int, *shape: int, scale: float = 0.2) -> torch.Tensor:
    """Weights computed by a formula."""
    values = torch.sin(seed + 0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64))
    return (scale * values).view(shape).float()


def viclip_weights(words: int, width: int = 128, text_width: int = 64, side: int = 32, frames: int = 4):
    """Weights of ViCLIP with two blocks for pictures and two for text, by the authors' names."""

    def blocks(width: int, count: int) -> dict[str, tuple[int, ...]]:
        of_one = {
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        of_one |= {f"ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        return {f"transformer.resblocks.{n}.{name}": shape for n in range(count) for name, shape in of_one.items()}

    towers = {
        "vision_encoder": blocks(width, 2)
        | {f"{norm}.{kind}": (width,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
        | {"conv1.weight": (width, 3, 1, 8, 8), "class_embedding": (width,), "proj": (width, 24)}
        | {"positional_embedding": ((side // 8) ** 2 + 1, width), "temporal_positional_embedding": (1, frames, width)},
        "text_encoder": blocks(text_width, 2)
        | {"token_embedding.weight": (words, text_width), "positional_embedding": (32, text_width)}
        | {"ln_final.weight": (text_width,), "ln_final.bias": (text_width,), "text_projection": (text_width, 24)},
    }
    return {
        f"{tower}.{name}": wave(i, *shape) + ("ln_" in name and name.endswith("weight"))
        for tower, shapes in towers.items()
        for i, (name, shape) in enumerate(sorted(shapes.items()), 1)
    }
