"""Small random Wan transformers, and a pipeline folder with them."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from fatezero.demo.video_model import build_tokenizer
from tests.small import TEXT

CHANNELS = 4
"""Of the small transformers' latents."""


def small_wan(seed: int = 0, **options) -> WanTransformer3DModel:
    """A random Wan transformer of four blocks in float64; its own code takes norms in float32."""
    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 32, "num_layers": 4, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**{**settings, **options}).double().eval().requires_grad_(False)


def write_wan(folder, pair=False, seed=0):
    """A random Wan pipeline of a few thousand weights, with the causal autoencoder in its own layout."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 512
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)

    def transformer():
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=4,
            rope_max_seq_len=32,
        )  # fmt: skip

    pipeline = WanPipeline(
        tokenizer,
        UMT5EncoderModel(text),
        AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        transformer(),
        transformer() if pair else None,
        boundary_ratio=0.875 if pair else None,
    )
    pipeline.save_pretrained(folder)
    return folder
