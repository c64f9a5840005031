"""Models of every family by one interface."""

import pytest
import torch

from fatezero import edit, invert
from fatezero.files.bundled import DEMO
from fatezero.hosts.diffusers.load import FAMILIES, loader_of, open_model
from fatezero.hosts.diffusers.model_files import CheckpointError
from fatezero.models import DEMOS
from fatezero.models import FAMILIES as FACTS
from tests.wan import write_wan


def test_each_family_has_a_loader_and_a_bundled_model():
    assert {loader.family for loader in FAMILIES} == set(FACTS)
    assert {loader_of(name).family.demo for name in DEMOS} == set(DEMOS)
    assert all(family.demo_folder.is_dir() for family in FACTS)


def test_the_family_is_that_of_the_folder(tmp_path):
    folders = {"demo-wan": write_wan(tmp_path / "wan"), "demo": DEMO}
    for name, folder in folders.items():
        assert loader_of(str(folder)).family.demo == name


@pytest.mark.parametrize("name", DEMOS)
def test_a_clip_goes_through_every_model_alike(name):
    model = open_model(name)
    clip = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    latents = model.encode_clip(clip)
    shape = (model.latent_frames(3), model.channels, 32 // model.factor, 48 // model.factor)
    assert latents.shape == shape and latents.dtype == torch.float32
    blocks = model.blocks("a red circle")
    text, empty = model.encode_prompt("a red circle", 48, 32, blocks), model.encode_negative("", 48, 32, blocks)
    assert text.text_tokens == empty.text_tokens
    inversion = invert(model.denoiser, latents, text, 2)
    result = model.decode_clip(edit(model.denoiser, inversion, text, empty, 1.0), 3)
    assert result.shape == clip.shape and result.min() >= 0 and result.max() <= 1
    assert model.denoiser.spans_clip == model.family.spans_clip
    assert {p.dtype for part in model.networks for p in part.parameters()} == {model.dtype}


def test_options_without_effect_are_refused():
    for options, reason in (({"config": str(DEMO)}, "single file"), ({"temporal": "demo"}, "video model")):
        with pytest.raises(CheckpointError, match=reason):
            open_model("demo-wan", **options)
    with pytest.raises(CheckpointError, match="UNet"):
        open_model("demo-wan").with_control("any", torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
