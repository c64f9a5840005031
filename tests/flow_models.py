"""Small random pipelines of picture transformers and of video transformers with sound, in folders."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from fatezero.demo.model import build_tokenizer as build_clip
from fatezero.demo.video_model import build_tokenizer

DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 64, "max_image_seq_len": 1024}
"""A schedule that is shifted by the tokens of a picture."""


def write_flux(folder, distilled=True, seed=0):
    """A random Flux pipeline: dev, which takes guidance as an input, or schnell."""
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
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=0.36,
            shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC if distilled else {"shift": 1.0}),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=distilled, axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_qwen_image(folder, seed=0):
    """A random Qwen-Image pipeline with one token per byte."""
    torch.manual_seed(seed)
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer({**vocabulary, "<|endoftext|>": len(vocabulary)}, [])
    size = {"hidden_size": 16, "intermediate_size": 16}
    text = Qwen2_5_VLConfig(
        text_config={
            **size, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": len(vocabulary),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={**size, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
    )  # fmt: skip
    QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
        AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 1.1, 1.2, 1.3],
        ),
        Qwen2_5_VLForConditionalGeneration(text),
        tokenizer,
        QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


LTX23 = {
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
    "rope_type": "split", "perturbed_attn": True, "use_prompt_embeddings": False,
}  # fmt: skip
"""What LTX-2.3's transformer has other than LTX-2's."""
OF_STREAMS = {
    "per_modality_projections": True, "video_hidden_dim": 24, "audio_hidden_dim": 12,
    "video_connector_attention_head_dim": 12, "audio_connector_attention_head_dim": 6, "proj_bias": True,
}  # fmt: skip
"""LTX-2.3's connectors, with a projection of the text for each stream."""


def write_ltx2(folder, seed=0, **options):
    """A random LTX-2 pipeline, including its sound parts. options: of the transformer."""
    torch.manual_seed(seed)
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *map(chr, range(33, 127))]
    tokenizer = GemmaTokenizer({letter: i for i, letter in enumerate(letters)}, [], model_max_length=1024)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Gemma3Config(
        text_config={**size, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer)},
        vision_config={**size, "image_size": 8, "patch_size": 4},
    )
    heads = {"video_connector_attention_head_dim": 8, "audio_connector_attention_head_dim": 8}
    connectors = heads if options.get("use_prompt_embeddings", True) else OF_STREAMS
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.1),
        vae=AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=8, latent_channels=2, ch_mult=(1,), num_res_blocks=1, mel_bins=16
        ),
        text_encoder=Gemma3ForConditionalGeneration(text),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=2, video_connector_num_attention_heads=2,
            video_connector_num_layers=1, video_connector_num_learnable_registers=4,
            audio_connector_num_attention_heads=2, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=4, **connectors,
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
            audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=6,
            audio_cross_attention_dim=12, num_layers=2, caption_channels=16, **options,
        ),
        vocoder=LTX2Vocoder(in_channels=8, hidden_channels=16, upsample_kernel_sizes=[2], upsample_factors=[2],
                            resnet_kernel_sizes=[3], resnet_dilations=[[1]]),
    )  # fmt: skip
    pipeline.vae.latents_mean.normal_()
    pipeline.vae.latents_std.uniform_(0.5, 2.0)
    pipeline.save_pretrained(folder)
    return folder
