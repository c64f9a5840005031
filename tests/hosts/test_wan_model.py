"""A Wan pipeline in a folder: text, frames, and edits by the command."""

import pytest
import torch
from diffusers import WanPipeline

from fatezero.hosts.diffusers.checkpoint import CheckpointError, kind_of
from fatezero.hosts.diffusers.wan import WanCheckpoint
from tests.wan import write_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return WanCheckpoint.load(str(folder))


def test_text_equals_the_pipelines(folder, checkpoint):
    assert kind_of(str(folder)) == "WanPipeline"
    expected, _ = WanPipeline.from_pretrained(folder).encode_prompt(
        "a red circle on grass", "", False, max_sequence_length=512
    )
    found = checkpoint.encode_prompt("a red circle on grass", 32, 32).embeddings
    assert found.shape == (1, 512, 16)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found[:, 6:] == 0).all()


def test_a_long_prompt_is_not_cut(checkpoint):
    assert checkpoint.encode_prompt("red " * 600, 32, 32).text_tokens == 601


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (7, 3), (9, 3)])
def test_frames_and_their_latents(checkpoint, frames, latents):
    clip = torch.rand(frames, 3, 32, 48)
    z = checkpoint.encode_clip(clip)
    assert z.shape == (latents, 16, 4, 6)
    assert checkpoint.latent_frames(frames) == latents
    assert checkpoint.decode_clip(z, frames).shape == clip.shape
    pipeline_z = (z[0, :, 0, 0] * torch.tensor(checkpoint.vae.config["latents_std"])) + torch.tensor(
        checkpoint.vae.config["latents_mean"]
    )
    first = checkpoint.vae.encode(clip[:1].transpose(0, 1)[None] * 2 - 1).latent_dist.mean[0, :, 0, 0, 0]
    assert torch.allclose(pipeline_z, first, atol=1e-5), "the first latent is the first frame's"


def test_tiles_if_memory_is_short(folder, monkeypatch):
    loaded = WanCheckpoint.load(str(folder))
    assert "whole" in loaded.coding(32, 32)
    monkeypatch.setattr("fatezero.hosts.diffusers.clips.available_bytes", lambda device: 10_000)
    assert "tiles" in loaded.coding(32, 32)
    assert loaded.vae.use_tiling


def test_a_folder_of_another_kind(tmp_path):
    with pytest.raises(CheckpointError, match="without a Wan transformer"):
        WanCheckpoint.load("demo")
