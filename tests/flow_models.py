"""Small random pipelines of transformers of pictures and of video with sound, in folders."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fatezero.demo.model import build_tokenizer as build_clip
from fatezero.demo.video_model import build_tokenizer


DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
"""A schedule that is shifted by the tokens of a picture."""


def write_flux(folder, distilled=True, seed=0):
    """A random Flux pipeline: dev, or schnell if not distilled to take guidance as an input."""
    torch.manual_seed(seed)
    clip, t5 = build_clip(folder), build_tokenizer()
    texts = {
        "tokenizer": clip,
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                projection_dim=16, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
            )
        ),
        "tokenizer_2": t5,
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    }  # fmt: skip
    FluxPipeline(
        **texts,
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.36,
            shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC if distilled else {"shift": 1.0}),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=distilled, axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder
