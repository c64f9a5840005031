"""A small random MiniMax H3, its latents and texts."""

import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel

from fatezero.hosts.diffusers.h3 import JointDenoiser

SHAPES = ((1, 24, 7, 8, 6), (1, 32, 2, 11))
"""Of the latents of a video and its sound."""
WIDTH = 16
"""Of the text's embeddings."""


def small_h3(seed: int = 0, **options) -> MiniMaxH3Transformer3DModel:
    """A random transformer of four blocks in float64, with weights that make attention uneven."""
    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 24, "hidden_size": 32, "num_layers": 4, "num_refiner_layers": 1,
        "ffn_dim": 48, "text_dim": WIDTH, "freq_dim": 32, "time_embed_hidden_dim": 32, "time_embed_dim": 16,
        "rope_freq_dim": 3,
    }  # fmt: skip
    model = MiniMaxH3Transformer3DModel(**{**settings, **options}).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        size = (1.7 if "norm_q" in name or "norm_k" in name else 1.0) if weight.ndim == 1 else weight[0].numel() ** -0.5
        weight.normal_(0, size) if weight.ndim > 1 or "bias" in name else weight.copy_(size + 0.1 * weight.normal_())
    return model


def joint_denoiser(**options) -> JointDenoiser:
    return JointDenoiser(small_h3(**options), MiniMaxH3Scheduler(12.0), SHAPES)


def random_text(seed: int, tokens: int = 9) -> torch.Tensor:
    return torch.randn(1, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_streams(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def host_weights(model: MiniMaxH3Transformer3DModel) -> dict[str, torch.Tensor]:
    """A transformer's weights by their names in ComfyUI."""
    own, found = dict(model.state_dict()), {"rope.inv_freq": model.rope.inv_freq}
    names = {
        "proj_in": "video_patch_proj", "audio_proj_in": "audio_patch_proj", "context_embedder": "condition_proj",
        "time_embedder.linear_1": "time_embedder.proj_in", "time_embedder.linear_2": "time_embedder.proj_out",
        "norm_out.norm": "final_layer.norm", "norm_out.linear": "final_layer.adaln_proj.linear",
        "proj_out": "final_layer.video_out", "audio_proj_out": "final_layer.audio_out",
        "token_refiner.final_norm": "token_refiner.final_norm",
    }  # fmt: skip
    parts = {
        "norm1": "norm1", "norm2": "norm2", "attn.norm_q": "attn.q_norm", "attn.norm_k": "attn.k_norm",
        "attn.to_out.0": "attn.out_proj", "ff.net.2": "mlp.fc2", "adaln_proj.linear": "adaln_proj.linear",
    }  # fmt: skip
    stacks = [("transformer_blocks", "blocks", model.transformer_blocks)]
    stacks.append(("token_refiner.refiner_blocks", "token_refiner.blocks", model.token_refiner.refiner_blocks))
    for theirs, ours, blocks in stacks:
        for i in range(len(blocks)):
            names |= {f"{theirs}.{i}.{part}": f"{ours}.{i}.{name}" for part, name in parts.items()}
            qkv = [own.pop(f"{theirs}.{i}.attn.to_{name}.weight") for name in "qkv"]
            found[f"{ours}.{i}.attn.qkv_proj.weight"] = torch.cat(qkv)
            up, gate = own.pop(f"{theirs}.{i}.ff.net.0.proj.weight").chunk(2)
            found[f"{ours}.{i}.mlp.fc1.weight"] = torch.cat([gate, up])
    for name, weight in own.items():
        layer, _, kind = name.rpartition(".")
        found[f"{names[layer]}.{kind}"] = weight
    return {name: weight.float().contiguous() for name, weight in found.items()}
