"""The bundled video transformer, a small Wan 2.1, as objects of ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
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
from .demo import LATENT_RGB, LATENT_RGB_BIAS, load_vae, patcher_of
from .single_file import single_file


def load_demo_video(
    folder: Path = WAN.demo_folder, autoencoder: Path = DEMO, lora: Path | None = None
) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of the demo's video transformer, with a LoRA."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    about = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["shift"]
    vae = load_vae(autoencoder, single_file(autoencoder))
    model = wan_model(tensors, about, shift)
    if lora is not None:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(lora), 1.0, 0.0)
    return model, wan_clip(folder), _of_videos(vae)


def wan_model(tensors: dict[str, Tensor], about: dict[str, Any], shift: float) -> Any:
    """A MODEL of a diffusers transformer's weights and configuration."""
    weights = {original_name(name): tensor for name, tensor in tensors.items()}
    known = comfy.model_detection.detect_unet_config(weights, "")
    known |= {"num_heads": about["num_attention_heads"]} | {name: about[name] for name in ("text_dim", "freq_dim")}
    config = comfy.supported_models.WAN21_T2V(known)
    config.sampling_settings = {"shift": shift}
    if about["in_channels"] == 4:  # latents of the demo's autoencoder, not Wan's
        config.latent_format = _DemoLatents()
    return patcher_of(config, weights)


class _DemoLatents(comfy.latent_formats.LatentFormat):
    """Stable Diffusion's latent format with a frame dimension."""

    latent_channels = 4
    latent_dimensions = 3
    scale_factor = 0.18215
    latent_rgb_factors = LATENT_RGB
    latent_rgb_factors_bias = LATENT_RGB_BIAS


def wan_clip(folder: Path) -> Any:
    """A CLIP of a UMT5 encoder of any width, with its tokenizer as a sentencepiece model."""
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
    """The picture autoencoder as a video autoencoder with one latent per frame."""
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
    """A picture autoencoder that processes (b, c, f, y, x) as b f pictures."""

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
