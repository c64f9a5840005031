"""LoRAs on transformers without attention control: fused completely, or refused by name."""

import pytest
import torch
from safetensors.torch import save_file

from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.lora_files import LoraError
from tests.flow_models import write_flux, write_ltx2, write_qwen_image
from tests.wan import write_wan_i2v, write_wan_vace

CASES = {
    "wan i2v": (write_wan_i2v, "blocks.0.attn1.to_q"),
    "wan vace": (write_wan_vace, "blocks.1.attn2.to_k"),
    "ltx2": (write_ltx2, "transformer_blocks.0.attn1.to_q"),
    "qwen image": (write_qwen_image, "transformer_blocks.0.attn.add_k_proj"),
    "flux": (write_flux, "single_transformer_blocks.0.attn.to_v"),
}


def weight_of(model, layer):
    return model.transformer.get_submodule(layer).weight.clone()


def low_rank(rows, columns, rank=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_a_lora_is_added(tmp_path, name):
    write, layer = CASES[name]
    folder = str(write(tmp_path / "model"))
    before = weight_of(open_model(folder), layer)
    down, up = low_rank(*before.shape)
    save_file(
        {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up},
        tmp_path / "a.safetensors",
    )
    model = open_model(folder, lora=f"{tmp_path / 'a.safetensors'}=0.5")
    assert torch.allclose(weight_of(model, layer), before + 0.5 * up @ down, atol=1e-5)
    assert "1 of 1 layers at strength 0.5 (1 in the transformer)" in model.notes[0]


def test_names_of_the_original_code_are_converted(tmp_path):
    """Three projections in one layer, in the names of kohya's trainer, with an alpha of half the rank."""
    folder, layer = str(write_flux(tmp_path / "model")), "transformer_blocks.0.attn.to_k"
    before = weight_of(open_model(folder), layer)
    down, up = low_rank(3 * before.shape[0], before.shape[1])
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = weight_of(open_model(folder, lora=str(tmp_path / "a.safetensors")), layer)
    rows = len(before)
    assert torch.allclose(found, before + 0.5 * up[rows : 2 * rows] @ down, atol=1e-5)
    other = {f"lora_unet_other_0.lora_{part}.weight": tensor.clone() for part, tensor in (("down", down), ("up", up))}
    save_file({**tensors, **other}, tmp_path / "b.safetensors")
    with pytest.raises(LoraError, match="match"):
        open_model(folder, lora=str(tmp_path / "b.safetensors"))


def test_a_lora_of_another_family_is_refused_by_name(tmp_path):
    down, up = low_rank(24, 24)
    names = (
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
    )
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "wan.safetensors")
    with pytest.raises(LoraError, match="LoRA for Wan, but the model is Qwen-Image"):
        open_model(str(write_qwen_image(tmp_path / "model")), lora=str(tmp_path / "wan.safetensors"))
