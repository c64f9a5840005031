"""The bundled image checkpoint as objects of ComfyUI: a MODEL, a CLIP and a VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
from torch import Tensor

from ...files.bundled import DEMO
from .single_file import single_file

LATENT_RGB = [[0.147, -0.049, 0.007], [-0.046, 0.128, 0.209], [-0.288, -0.336, -0.218], [0.033, -0.103, 0.124]]
LATENT_RGB_BIAS = [0.137, 0.112, -0.007]
"""Linear map from latents to RGB for previews, fitted to rendered scenes."""


def load_demo(folder: Path = DEMO) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of the demo checkpoint, a narrower SD 1.x."""
    tensors = single_file(folder)
    return _model(_part(tensors, "model.diffusion_model.")), _clip(folder, tensors), load_vae(folder, tensors)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _model(unet: dict[str, Tensor]) -> Any:
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(unet, ""))
    config.unet_config |= config.unet_extra_config  # SD 1.x's eight heads, which cannot be detected from weights
    patcher = patcher_of(config, unet)
    patcher.model.latent_format.latent_rgb_factors = LATENT_RGB
    patcher.model.latent_format.latent_rgb_factors_bias = LATENT_RGB_BIAS
    return patcher


def patcher_of(config: Any, weights: dict[str, Tensor]) -> Any:
    """A MODEL of a host's configuration, in the precision that the host chooses."""
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    count = sum(t.numel() for t in weights.values())
    dtype = comfy.model_management.unet_dtype(model_params=count, supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device))
    model = config.get_model({}, "", device=offload)
    model.load_model_weights({f"diffusion_model.{k}": v for k, v in weights.items()}, "diffusion_model.")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _clip(folder: Path, tensors: dict[str, Tensor]) -> Any:
    about = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    config = {name: about[name] for name in names} | {"eos_token_id": about["eos_token_id"]}

    def tokenizer(embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> Any:
        return comfy.sd1_clip.SDTokenizer(
            str(folder / "tokenizer"),
            embedding_directory=embedding_directory,
            embedding_size=about["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )

    start, end = about["bos_token_id"], about["eos_token_id"]

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                return_projected_pooled=False,
                special_tokens={"start": start, "end": end, "pad": end},
                model_options=model_options or {},
            )
            # The host ignores the configuration's vocabulary size.
            words = self.operations.Embedding(about["vocab_size"], about["hidden_size"], dtype=dtype, device=device)
            self.transformer.set_input_embeddings(words)

    clip = comfy.sd.CLIP(
        comfy.supported_models.SD15({}).clip_target(),
        tokenizer_data={"clip_l_tokenizer_class": tokenizer},
        model_options={"clip_l_model_config": config, "clip_l_class": Encoder},
    )
    text = _part(tensors, "cond_stage_model.")
    missing, _ = clip.load_sd({f"clip_l.{name}": tensor for name, tensor in text.items()}, full_model=True)
    assert not [name for name in missing if "embeddings" in name or "layers" in name], missing
    return clip


def load_vae(folder: Path, tensors: dict[str, Tensor]) -> Any:
    """The VAE of a diffusers folder, given tensors under original names."""
    about = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    widths = about["block_out_channels"]
    network = {
        "double_z": True,
        "z_channels": about["latent_channels"],
        "resolution": about["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": about["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    config = {"params": {"ddconfig": network, "embed_dim": about["latent_channels"]}}
    vae = comfy.sd.VAE(sd=_part(tensors, "first_stage_model."), config=config)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(widths) - 1)
    return vae
