"""A tiny random SDXL in diffusers' folder layout: two text encoders, pooled text and sizes."""

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fatezero.demo.model import build_scheduler, build_vae
from fatezero.files.bundled import DEMO
from small import small_unet


def write_sdxl(folder, force_zeros_for_empty_prompt=True, **vae):
    """Write the folder. vae: settings of the autoencoder."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")

    def config(**options):
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            projection_dim=12, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, **options,
        )  # fmt: skip

    torch.manual_seed(0)
    of_vae = {key: value for key, value in build_vae().config.items() if not key.startswith("_")}
    unet = small_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        transformer_layers_per_block=(1, 2),
    ).float()
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(of_vae | vae),
        text_encoder=CLIPTextModel(config()),
        text_encoder_2=CLIPTextModelWithProjection(config(hidden_act="gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
    ).save_pretrained(folder)
    return folder
