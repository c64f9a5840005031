"""Models loaded from a folder or a single file, or by name."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_sdxl import write_sdxl

from fatezero.files.bundled import DEMO
from fatezero.hosts.comfyui.single_file import single_file
from fatezero.hosts.diffusers.checkpoint import Checkpoint, CheckpointError
from fatezero.hosts.diffusers.load import open_model


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint.load("demo")


def write_single_file(path):
    save_file({name: tensor.float() for name, tensor in single_file(DEMO).items()}, path)
    return path


def weights(checkpoint):
    parts = (checkpoint.unet, checkpoint.vae, checkpoint.text_encoders[0])
    return {f"{i}.{k}": v for i, part in enumerate(parts) for k, v in part.state_dict().items()}


def test_a_single_file_equals_the_folder_it_came_from(demo, tmp_path):
    path = write_single_file(tmp_path / "model.safetensors")
    loaded = Checkpoint.load(str(path), config=str(DEMO))
    ours, theirs = weights(demo), weights(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(theirs[name], tensor) for name, tensor in ours.items())
    text = [c.encode_prompt("a red circle", 64, 64).embeddings for c in (demo, loaded)]
    assert torch.allclose(*text)


def test_a_single_file_without_a_configuration_names_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    path = write_single_file(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="--model-config"):
        Checkpoint.load(str(path))


def test_a_safetensors_file_that_is_not_a_checkpoint(tmp_path):
    save_file({"lora_up": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors .* not a Stable Diffusion checkpoint"):
        Checkpoint.load(str(tmp_path / "lora.safetensors"))


def test_a_folder_that_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        Checkpoint.load(str(tmp_path))
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "MiniMaxH3ModularPipeline"}')
    with pytest.raises(CheckpointError, match="modular pipeline.*MiniMax H3.*ComfyUI"):
        open_model(str(tmp_path))


def test_pictures_and_sizes(demo):
    assert (demo.factor, demo.native_size, demo.sdxl) == (4, 64, False)
    frames = torch.rand(2, 3, 32, 48)
    latents = demo.encode_frames(frames)
    assert latents.shape == (2, 4, 8, 12)
    assert demo.decode_latents(latents).shape == frames.shape


def test_prompts_of_any_length(demo):
    short, long = "a red circle", " and ".join(["a red circle"] * 20)
    assert demo.blocks(short) == 1
    assert demo.blocks(short, long) == 2
    embeddings = demo.encode_prompt(long, 64, 64).embeddings
    assert embeddings.shape == (1, 154, 64)
    assert demo.encode_prompt(short, 64, 64, blocks=2).embeddings.shape == (1, 154, 64)
    ids = demo.tokenizer(short, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(demo.encode_prompt(short, 64, 64).embeddings, demo.text_encoders[0](ids).last_hidden_state)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


def test_sdxl_text_equals_the_pipelines(sdxl_folder):
    from diffusers import StableDiffusionXLPipeline

    checkpoint = Checkpoint.load(str(sdxl_folder))
    assert checkpoint.sdxl
    condition = checkpoint.encode_prompt("a red circle", 64, 32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    embeddings, _, pooled, _ = pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False)
    assert torch.allclose(condition.embeddings, embeddings, atol=1e-6)
    assert torch.allclose(condition.extras["text_embeds"], pooled, atol=1e-6)
    assert condition.extras["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]]


def test_sdxl_edits_end_to_end(sdxl_folder, tmp_path):
    from rich.console import Console

    from fatezero.cli.commands.edit import run_edits
    from fatezero.cli.config.settings import EditConfig, with_preset
    from fatezero.cli.progress import progress_bar
    from fatezero.cli.session import Session
    from fatezero.files.bundled import CLIP

    config = EditConfig(
        video=str(CLIP), source="a red square on water", target="a red circle on water", model=str(sdxl_folder),
        steps=2, count=2, size=(64, 64),
    )  # fmt: skip
    path = tmp_path / "out.mp4"
    session = Session(Console(quiet=True), progress_bar, "cpu", "float32")
    run_edits(session, [with_preset(config, "shape")], path, None, dry_run=False)
    assert path.exists()
