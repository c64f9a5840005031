"""Files with random weights for the demo model: a LoRA and a ControlNet."""

from itertools import pairwise

import torch
from comfyui.host import Host
from safetensors.torch import save_file

from fatezero.files.bundled import DEMO
from fatezero.hosts.comfyui.single_file import single_file

PREFIX = "model.diffusion_model."


def write_lora(host: Host) -> str:
    """A random LoRA of all attention layers, in the kohya layout."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in single_file(DEMO).items():
        if name.startswith(PREFIX) and ".attn" in name and name.endswith("weight"):
            key = "lora_unet_" + name.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")
            tensors[f"{key}.lora_up.weight"] = 0.2 * torch.randn(weight.shape[0], 2, generator=random)
            tensors[f"{key}.lora_down.weight"] = 0.2 * torch.randn(2, weight.shape[1], generator=random)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, host.base / "models/loras/random.safetensors")
    return "random.safetensors"


def write_controlnet(host: Host) -> str:
    """A random ControlNet for the demo model, in the layout that shares the model's other weights."""
    random = torch.Generator().manual_seed(0)
    unet = {k.removeprefix(PREFIX): v for k, v in single_file(DEMO).items() if k.startswith(PREFIX)}
    widths = [3, 16, 16, 32, 32, 96, 96, 256, unet["input_blocks.0.0.weight"].shape[0]]
    tensors = {"lora_controlnet": torch.zeros(1)}

    def convolution(name: str, given: int, made: int, size: int, scale: float = 1.0) -> None:
        values = torch.randn(made, given, size, size, generator=random) / (given * size * size) ** 0.5
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = scale * values, torch.zeros(made)

    for i, (given, made) in enumerate(pairwise(widths)):
        convolution(f"input_hint_block.{2 * i}", given, made, 3)
    blocks = sorted({int(k.split(".")[1]) for k in unet if k.startswith("input_blocks.")})
    made = 0
    for block in blocks:
        outs = [f"input_blocks.{block}.0.{k}.weight" for k in ("out_layers.3", "op")] + [
            f"input_blocks.{block}.0.weight"
        ]
        made = next(unet[k].shape[0] for k in outs if k in unet)
        convolution(f"zero_convs.{block}.0", made, made, 1, 0.5)
    convolution("middle_block_out.0", made, made, 1, 0.5)
    save_file(tensors, host.base / "models/controlnet/random.safetensors")
    return "random.safetensors"
