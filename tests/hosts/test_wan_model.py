"""A Wan pipeline in a folder: text, frames, and edits by the command."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from fatezero.hosts.diffusers.causal import TimeTiles
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


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("frames", [1, 7, 9])
def test_the_parts_of_a_clip_are_coded_as_the_whole_clip(folder, frames, tiled):
    """Also in tiles of large frames, each with its own state."""
    model = WanCheckpoint.load(str(folder))
    if tiled:
        model.vae.enable_tiling(32, 32, 24, 24)
    clip = torch.rand(frames, 3, 32, 48)
    whole = model.encode_clip(clip)
    assert torch.equal(model.encode_parts(clip.split(4)), whole)
    parts = list(model.decode_parts(whole, frames))
    assert [len(part) for part in parts][:2] == [1, 4][: len(parts)]
    assert torch.equal(torch.cat(parts), model.decode_clip(whole, frames))


@pytest.mark.parametrize("tiled", [False, True])
def test_the_parts_of_a_clip_by_wan_2_2s_autoencoder(tiled):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, temperal_downsample=[False, True, True],
    ).eval().requires_grad_(False)  # fmt: skip
    if tiled:
        vae.enable_tiling(64, 64, 48, 48)
    clip = torch.rand(1, 3, 9, 96, 160) * 2 - 1
    whole, tiles = vae.encode(clip).latent_dist.mean, TimeTiles(vae)
    assert torch.equal(torch.cat([tiles.encode(clip[:, :, a:b]) for a, b in ((0, 1), (1, 5), (5, 9))], 2), whole)
    tiles = TimeTiles(vae)
    assert torch.equal(torch.cat([tiles.decode(z) for z in whole.split(1, 2)], 2), vae.decode(whole).sample)


def test_the_demos_frames_are_coded_one_by_one():
    model = WanCheckpoint.load("demo-wan")
    clip = torch.rand(3, 3, 64, 64)
    latents = model.encode_parts(clip.split(2))
    assert torch.equal(latents, model.encode_clip(clip))
    assert torch.equal(torch.cat(list(model.decode_parts(latents, 3))), model.decode_clip(latents, 3))
