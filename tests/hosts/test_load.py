"""Models of every family through one interface."""

from importlib.util import find_spec

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
    assert {loader.family for loader in FAMILIES if loader.family.demo} == {family for family in FACTS if family.demo}
    assert {loader_of(name).family.demo for name in DEMOS} == set(DEMOS)
    assert all(family.demo_folder.is_dir() for family in FACTS)


def test_the_family_is_read_from_the_folder(tmp_path):
    folders = {"demo-wan": write_wan(tmp_path / "wan"), "demo": DEMO}
    for name, folder in folders.items():
        assert loader_of(str(folder)).family.demo == name


@pytest.mark.parametrize("name", DEMOS)
def test_every_model_encodes_and_decodes_a_clip(name):
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
    for options, reason in (({"config": str(DEMO)}, "single file"), ({"temporal": "demo"}, "video transformer")):
        with pytest.raises(CheckpointError, match=reason):
            open_model("demo-wan", **options)
    with pytest.raises(CheckpointError, match="UNet"):
        open_model("demo-wan").with_control("any", torch.zeros(1, 64, 64, 3, dtype=torch.uint8))


def test_the_attention_kernel_is_a_choice():
    edits = {}
    for kernel in ("auto", "sdpa", "native", "_native_math"):
        model = open_model("demo-wan", attention=kernel)
        latents = torch.randn(3, model.channels, 8, 8, generator=torch.Generator().manual_seed(0))
        text, empty = model.encode_prompt("a red circle", 64, 64), model.encode_negative("", 64, 64)
        edits[kernel] = edit(model.denoiser, invert(model.denoiser, latents, text, 2), text, empty, 2.0)
    assert torch.equal(edits["auto"], edits["sdpa"])
    for other in ("native", "_native_math"):
        assert torch.allclose(edits[other], edits["auto"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "kernel", "reason"),
    [
        ("demo", "sage", "UNet takes auto, sdpa or xformers"),
        ("demo-wan", "flash_hub", "takes auto, sdpa or one of"),
        ("demo-wan", "nonsense", "takes auto, sdpa or one of"),
    ],
)
def test_a_kernel_unsupported_by_a_model_is_refused(name, kernel, reason):
    with pytest.raises(CheckpointError, match=f"attention: {kernel}.*{reason}"):
        open_model(name, attention=kernel)


HAS_XFORMERS = find_spec("xformers") is not None and torch.cuda.is_available()


@pytest.mark.skipif(HAS_XFORMERS, reason="xformers is usable here")
@pytest.mark.parametrize("name", DEMOS)
def test_xformers_is_refused_by_name_where_it_cannot_run(name):
    with pytest.raises(CheckpointError, match="attention: xformers cannot be used"):
        open_model(name, attention="xformers")


@pytest.mark.skipif(not HAS_XFORMERS, reason="needs xformers and a GPU")
@pytest.mark.parametrize("name", DEMOS)
def test_xformers_gives_the_same_edit(name):
    edits = []
    for kernel in ("auto", "xformers"):
        model = open_model(name, "cuda", torch.float32, attention=kernel)
        latents = torch.randn(2, model.channels, 16, 16, generator=torch.Generator().manual_seed(0)).cuda()
        text, empty = model.encode_prompt("a red circle", 64, 64), model.encode_negative("", 64, 64)
        edits.append(edit(model.denoiser, invert(model.denoiser, latents, text, 2), text, empty, 2.0))
    assert torch.allclose(*edits, atol=1e-2, rtol=1e-2)
