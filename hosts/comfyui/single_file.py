"""A small diffusers folder in Stable Diffusion's original layout of single files."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_names(names: list[str], layers: int = 1) -> dict[str, str]:
    """Map diffusers' UNet names to the original ones, for `layers` ResNet blocks per level."""

    def block(name: str) -> str:
        if found := re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
        ):
            way, level, part, at, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if way == "down":
                number = 1 + level * (layers + 1) + (layers if part == "downsamplers" else at)
                inner = rest.replace("conv.", "op.") if part == "downsamplers" else rest
                return f"input_blocks.{number}.{int(part == 'attentions')}.{inner}"
            number = level * (layers + 1) + (layers if part == "upsamplers" else at)
            # The upsampler comes last in its block, after any attention.
            with_attention = any(f"up_blocks.{level}.attentions" in other for other in names)
            place = {"resnets": 0, "attentions": 1, "upsamplers": 1 + with_attention}[part]
            return f"output_blocks.{number}.{place}.{rest}"
        for ours, theirs in _UNET.items():
            if name.startswith(f"{ours}."):
                return theirs + name[len(ours) :]
        raise KeyError(name)

    def renamed(name: str) -> str:
        out = block(name)
        if "resnets" in name:
            for ours, theirs in _RESNET.items():
                out = re.sub(rf"\.{ours}\.", f".{theirs}.", out)
        return f"model.diffusion_model.{out}"

    return {name: renamed(name) for name in names}


def vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    name = name.replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return f"first_stage_model.{name}"


def single_file(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder with one ResNet block per level, under original names."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    levels = len({name.split(".")[2] for name in vae if name.startswith("encoder.down_blocks")})
    tensors: dict[str, Tensor] = {theirs: unet[ours] for ours, theirs in unet_names(list(unet)).items()}
    for name, tensor in vae.items():
        projection = "attentions" in name and tensor.ndim == 2
        tensors[vae_name(name, levels)] = tensor[..., None, None] if projection else tensor
    for name, tensor in text.items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
