"""The bundled checkpoints as true objects of ComfyUI: a MODEL, a CLIP and a VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.t5
import comfy.text_encoders.wan
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from ...files.bundled import DEMO
from ...files.sentencepiece import sentencepiece_model
from ...models.wan import WAN, original_name
from .single_file import single_file

LATENT_RGB = [[0.147, -0.049, 0.007], [-0.046, 0.128, 0.209], [-0.288, -0.336, -0.218], [0.033, -0.103, 0.124]]
LATENT_RGB_BIAS = [0.137, 0.112, -0.007]
"""Pictures from latents, for previews: the least squares fit over rendered scenes."""


def load_demo(folder: Path = DEMO) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of the demo checkpoint, SD 1.x in all but width."""
    tensors = single_file(folder)
    return _model(_part(tensors, "model.diffusion_model.")), _clip(folder, tensors), _vae(folder, tensors)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _model(unet: dict[str, Tensor]) -> Any:
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(unet, ""))
    config.unet_config |= config.unet_extra_config  # SD 1.x's eight heads, which weights do not tell
    patcher = _patcher(config, unet)
    patcher.model.latent_format.latent_rgb_factors = LATENT_RGB
    patcher.model.latent_format.latent_rgb_factors_bias = LATENT_RGB_BIAS
    return patcher


def _patcher(config: Any, weights: dict[str, Tensor]) -> Any:
    """A MODEL of a host's configuration, at the precision that the host chooses."""
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
            # The host builds CLIP's own vocabulary, whatever the configuration says.
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


def _vae(folder: Path, tensors: dict[str, Tensor]) -> Any:
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


# --- the video transformer ------------------------------------------------------------------


def load_demo_wan(folder: Path = WAN.demo_folder, autoencoder: Path = DEMO) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of the demo world's video transformer: Wan 2.1 in all but its sizes."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    about = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["shift"]
    vae = _vae(autoencoder, single_file(autoencoder))
    return wan_model(tensors, about, shift), wan_clip(folder), _of_videos(vae)


def wan_model(tensors: dict[str, Tensor], about: dict[str, Any], shift: float) -> Any:
    """A MODEL of a diffusers transformer's weights and configuration."""
    weights = {original_name(name): tensor for name, tensor in tensors.items()}
    known = comfy.model_detection.detect_unet_config(weights, "")
    known |= {"num_heads": about["num_attention_heads"]} | {name: about[name] for name in ("text_dim", "freq_dim")}
    config = comfy.supported_models.WAN21_T2V(known)
    config.sampling_settings = {"shift": shift}
    if about["in_channels"] == 4:  # latents of the demo's own autoencoder, not of Wan's
        config.latent_format = _DemoLatents()
    return _patcher(config, weights)


class _DemoLatents(comfy.latent_formats.LatentFormat):
    """Stable Diffusion's, over frames."""

    latent_channels = 4
    latent_dimensions = 3
    scale_factor = 0.18215
    latent_rgb_factors = LATENT_RGB
    latent_rgb_factors_bias = LATENT_RGB_BIAS


def wan_clip(folder: Path) -> Any:
    """A CLIP of a UMT5 encoder of any width, with its tokenizer as sentencepiece has it."""
    about = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    length = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = ("d_ff", "d_kv", "d_model", "num_layers", "num_heads", "vocab_size")
    config = {name: about[name] for name in names} | {
        "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5",
    }  # fmt: skip
    pieces = sentencepiece_model([(piece, score) for piece, score in vocabulary])

    class Tokenizer(comfy.text_encoders.wan.WanT5Tokenizer):
        def __init__(
            self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None
        ) -> None:
            data = {**(tokenizer_data or {}), "spiece_model": torch.frombuffer(bytearray(pieces), dtype=torch.uint8)}
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=data)
            self.clip_umt5xxl.min_length = length["model_max_length"]
            self.clip_umt5xxl.embedding_size = about["d_model"]

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(
                device=device, layer="last", textmodel_json_config=config, dtype=dtype,
                special_tokens={"end": 1, "pad": 0}, model_class=comfy.text_encoders.t5.T5,
                enable_attention_masks=True, zero_out_masked=True, model_options=model_options or {},
            )  # fmt: skip

    class Text(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(
                device=device, dtype=dtype, model_options=model_options or {}, name="umt5xxl", clip_model=Encoder
            )

    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(Tokenizer, Text))
    text = load_file(folder / "text_encoder" / "model.safetensors")
    missing, _ = clip.load_sd({f"umt5xxl.transformer.{name}": t for name, t in text.items()}, full_model=True)
    assert not [name for name in missing if "encoder" in name or "shared" in name], missing
    return clip


def _of_videos(vae: Any) -> Any:
    """The picture autoencoder as a video's that has a latent for each frame."""
    vae.first_stage_model = _FrameByFrame(vae.first_stage_model)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=vae.patcher.offload_device
    )
    vae.latent_dim, ratio = 3, vae.upscale_ratio
    vae.upscale_ratio = (lambda frames: frames, ratio, ratio)
    vae.downscale_ratio = (lambda frames: frames, ratio, ratio)
    vae.upscale_index_formula = vae.downscale_index_formula = (1, ratio, ratio)
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: encode((shape[0] * shape[2], shape[1], *shape[3:]), dtype)
    vae.memory_used_decode = lambda shape, dtype: decode((shape[0] * shape[2], shape[1], *shape[3:]), dtype)
    return vae


class _FrameByFrame(nn.Module):
    """A picture autoencoder that sees (b, c, f, y, x) as b f pictures."""

    def __init__(self, of_pictures: nn.Module) -> None:
        super().__init__()
        self.of_pictures: Any = of_pictures

    def encode(self, clips: Tensor, **more: Any) -> Tensor:
        return self._framed(self.of_pictures.encode, clips, more)

    def decode(self, latents: Tensor, **more: Any) -> Tensor:
        return self._framed(self.of_pictures.decode, latents, more)

    @staticmethod
    def _framed(code: Any, x: Tensor, more: dict[str, Any]) -> Tensor:
        done = code(rearrange(x, "b c f y x -> (b f) c y x"), **more)
        return rearrange(done, "(b f) c y x -> b c f y x", f=x.shape[2])
