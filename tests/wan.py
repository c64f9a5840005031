"""Small random Wan transformers, and a pipeline folder with them."""

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from fatezero.demo.video_model import build_tokenizer
from tests.small import TEXT

CHANNELS = 4
"""Channels of the small transformers' latents."""


def small_wan(seed: int = 0, **options) -> WanTransformer3DModel:
    """A random Wan transformer of four blocks in float64; its own code takes norms in float32."""
    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 32, "num_layers": 4, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**{**settings, **options}).double().eval().requires_grad_(False)


SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2,
    "rope_max_seq_len": 32,
}  # fmt: skip
"""Options of the transformers written to folders."""


def wan_parts() -> dict[str, object]:
    """The parts of a small random Wan pipeline besides its transformer."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 512
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(text),
        "vae": AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    }


def write_wan(folder, pair=False, seed=0):
    """A random Wan pipeline of a few thousand weights, with the causal autoencoder in its own layout."""
    torch.manual_seed(seed)
    parts = wan_parts()
    transformers = [WanTransformer3DModel(**{**SMALL, "num_layers": 4}) for _ in range(1 + pair)]
    WanPipeline(
        **parts,
        transformer=transformers[0],
        transformer_2=transformers[1] if pair else None,
        boundary_ratio=0.875 if pair else None,
    ).save_pretrained(folder)
    return folder


def write_wan_i2v(folder, kind="2.1", seed=0):
    """A random Wan image-to-video pipeline. kind: 2.1 and flf2v have CLIP's embeddings, 2.2 has two transformers, and
    5B takes the picture as the first latent."""
    torch.manual_seed(seed)
    parts, more = wan_parts(), {}
    if kind in ("2.1", "flf2v"):
        vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                                  image_size=8, patch_size=4)  # fmt: skip
        size = {"height": 8, "width": 8}
        parts |= {
            "image_encoder": CLIPVisionModel(vision),
            "image_processor": CLIPImageProcessor(size=size, crop_size=size, do_convert_rgb=True),
        }
        more = {"image_dim": 8, "added_kv_proj_dim": 24, "pos_embed_seq_len": 2 * 5 if kind == "flf2v" else None}
    channels = {} if kind == "5B" else {"in_channels": 36}

    def transformer():
        return WanTransformer3DModel(**SMALL, **channels, **more)

    if kind == "2.2":
        parts |= {"transformer_2": transformer(), "boundary_ratio": 0.9}
    WanImageToVideoPipeline(**parts, transformer=transformer(), expand_timesteps=kind == "5B").save_pretrained(folder)
    return folder


def write_wan_vace(folder, seed=0):
    """A random Wan VACE pipeline."""
    torch.manual_seed(seed)
    transformer = WanVACETransformer3DModel(**SMALL, vace_layers=[0, 1])
    WanVACEPipeline(**wan_parts(), transformer=transformer).save_pretrained(folder)
    return folder
