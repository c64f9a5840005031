"""Models and LoRAs given to the command."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fatezero.cli.config.files import config_of
from fatezero.cli.config.paths import bare_name, files_of, renamed
from fatezero.cli.config.settings import FILES, FILES_OF_OBJECTS, ConfigError, EditConfig
from fatezero.cli.config.values import checked
from fatezero.files.bundled import CLIP

WORDS = ("--source", "a red square on water", "--target", "a green square on water")
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff"


def write_loras(folder):
    for name, key, side in (("a", KEY, 128), ("b", KEY, 128), ("w", "diffusion_model.blocks.0.self_attn.q.diff", 192)):
        save_file({key: torch.full((side, side), 0.01)}, folder / f"{name}.safetensors")


def test_several_loras_are_applied_recorded_and_compared(command, refused, tmp_path):
    write_loras(tmp_path)
    loras = ("--lora", "a.safetensors", "--lora", "b.safetensors=0.5")
    output = command("edit", CLIP, *WORDS, *loras, "--steps", 1, "--count", 1, "-o", "out/")
    assert "LoRA a.safetensors: 1 of 1 layers (1 in the UNet)" in output
    assert "LoRA b.safetensors: 1 of 1 layers at strength 0.5" in output
    record = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert record["lora"] == [str(tmp_path / "a.safetensors"), f"{tmp_path / 'b.safetensors'}=0.5"]
    assert {"lora", "lora 2"} < record["made"]["files"].keys()
    command("edit", "--config", "out/edit.json", "-o", "again/", "--dry-run")
    save_file({KEY: torch.ones(128, 128)}, tmp_path / "b.safetensors")
    assert "--lora" in refused("edit", "--config", "out/edit.json", "-o", "again/", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", CLIP, *WORDS, "--model", "demo-wan"), "LoRA w.safetensors=1: 1 of 1 layers (1 in the transformer)"),
        (("invert", CLIP, *WORDS[:2], "--model", "demo-wan"), "(1 in the transformer)"),
        (("tune", CLIP, "--prompt", "a red square"), "LoRA a.safetensors: 1 of 1 layers (1 in the UNet)"),
        (("generate", "--prompt", "a red square", "--temporal", "demo"), "LoRA a.safetensors: 1 of 1 layers"),
    ],
)
def test_every_command_takes_a_lora(command, tmp_path, arguments, message):
    write_loras(tmp_path)
    name = "w.safetensors" if "demo-wan" in arguments else "a.safetensors"
    (tmp_path / "w.safetensors").rename(tmp_path / "w.safetensors=1")  # an equals sign in a name
    name = "w.safetensors=1" if name.startswith("w") else name
    assert message in command(*arguments, "--lora", name, "--dry-run").replace("\n", " ")


def test_a_lora_of_another_model_is_refused_before_anything_runs(refused, tmp_path):
    write_loras(tmp_path)
    error = refused("edit", CLIP, *WORDS, "--lora", "w.safetensors", "--dry-run")
    assert "w.safetensors is a LoRA for Wan" in error
    assert "the model is Wan" in refused(
        "edit", CLIP, *WORDS, "--model", "demo-wan", "--lora", "a.safetensors", "--dry-run"
    )


def test_loras_of_a_file():
    assert config_of({"lora": "a.safetensors"}).lora == ("a.safetensors",)
    assert config_of({"lora": ["a.safetensors", "b.safetensors=0.8"]}).lora == ("a.safetensors", "b.safetensors=0.8")
    assert config_of({"lora": ""}).lora == () == EditConfig().lora
    for wrong in (3, ["a", 3], {"a": 1}, "a.safetensors=inf"):
        with pytest.raises(ConfigError, match="lora"):
            checked({"lora": wrong})


def test_loras_under_other_names(tmp_path):
    write_loras(tmp_path)
    config = EditConfig(lora=(f"{tmp_path / 'a.safetensors'}", f"{tmp_path / 'b.safetensors'}=0.5"))
    assert list(files_of(config).values())[-2:] == [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert renamed(config, bare_name).lora == ("a.safetensors", "b.safetensors=0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variant", "fp16"), "has no variant 'fp16'; its variants: none"),
        (("--model", "models/nowhere"), "no model at models/nowhere: give a diffusers folder"),
        (("--model", "a.safetensors"), "a.safetensors is a LoRA, not a model"),
    ],
)
def test_models_that_are_refused_before_anything_runs(refused, tmp_path, options, message):
    write_loras(tmp_path)
    assert message in refused("edit", CLIP, *WORDS, *options, "--dry-run")


def test_every_path_setting_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = [name for name in FILES if hasattr(EditConfig(), name)]
    named = {name: f"~/{name}" for name in own}
    several = {"lora": ["~/a.safetensors", "~/b=0.5"], **{name: ["a burger: ~/m.mp4"] for name in FILES_OF_OBJECTS}}
    found = checked({**named, **several})
    assert {name: found[name] for name in own} == {name: str(tmp_path / name) for name in own}
    assert set(FILES) - set(own) == {"class_pictures"}, "of tuning"
    assert found["lora"] == (f"{tmp_path}/a.safetensors", f"{tmp_path}/b=0.5")
    assert all(found[name] == (f"a burger: {tmp_path}/m.mp4",) for name in FILES_OF_OBJECTS)
    assert all("~" not in file for file in files_of(EditConfig(**found)).values())
