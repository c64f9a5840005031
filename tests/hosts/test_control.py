"""A ControlNet on a UNet equals diffusers' pipeline, in every chunk of inversion and edit."""

import json
import re
import shutil
from itertools import groupby

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.cli.commands.edit import run_edits
from fatezero.cli.commands.invert import run_invert
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.cli.progress import no_bars
from fatezero.cli.session import Session
from fatezero.diffusion.edit import edit
from fatezero.diffusion.generate import generate
from fatezero.diffusion.invert import invert
from fatezero.files.bundled import CLIP, DEMO
from fatezero.hosts.diffusers.checkpoint import Checkpoint, CheckpointError
from fatezero.hosts.diffusers.controlnet import load_controlnet
from fatezero.hosts.diffusers.lora_layers import _aliases
from fatezero.methods.tokenflow import TokenFlowSettings
from fatezero.store.store import StoreError
from fatezero.video.read import read_video
from small import small_unet

PROMPT = "a red square on water"


def controlnet_for(unet, shrinks=(16, 32, 96)):
    """A ControlNet with a UNet's weights and non-zero output."""
    torch.manual_seed(0)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=shrinks)
    for weight in (w for name, w in model.named_parameters() if "controlnet_" in name):
        torch.nn.init.normal_(weight, std=0.1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def demo():
    return Checkpoint.load("demo")


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    path = tmp_path_factory.mktemp("control") / "edges"
    controlnet_for(demo.unet).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def noise(frames=1):
    return torch.randn(frames, 4, 16, 16, generator=torch.Generator().manual_seed(2))


def drawn(checkpoint, steps=4):
    text, empty = checkpoint.encode_prompt(PROMPT, 64, 64), checkpoint.encode_prompt("", 64, 64)
    return generate(checkpoint.denoiser, noise(), text, empty, steps, 5.0, "self", clip_norm=False)


@pytest.fixture(scope="module")
def pipeline(folder):
    found = StableDiffusionControlNetPipeline.from_pretrained(
        DEMO, controlnet=ControlNetModel.from_pretrained(folder), torch_dtype=torch.float32, safety_checker=None
    )
    found.set_progress_bar_config(disable=True)
    found.scheduler = DDIMScheduler.from_config(found.scheduler.config)
    return found


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.25, 1.0), (0.25, 0.75)])
def test_it_equals_diffusers(demo, folder, pipeline, pictures, start, end):
    ours = drawn(demo.with_control(str(folder), pictures[:1], 0.7, start, end))
    theirs = pipeline(
        PROMPT, image=pictures[:1].movedim(-1, 1) / 255, latents=noise(), num_inference_steps=4, guidance_scale=5.0,
        controlnet_conditioning_scale=0.7, control_guidance_start=start, control_guidance_end=end, output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, drawn(demo), atol=1e-2)


def test_strength_zero_is_off_bit_for_bit(demo, folder, pictures):
    off = demo.with_control(str(folder), pictures[:1], 0.0)
    assert torch.equal(drawn(off), drawn(demo))
    assert off.denoiser.identity() == demo.denoiser.identity()


def test_every_frame_follows_its_own_picture(demo, folder, pictures):
    denoiser = demo.with_control(str(folder), pictures).denoiser
    text, keys, z = demo.encode_prompt(PROMPT, 64, 64), KeyFrames(("self",)), noise(3)

    def predicted(*frames):
        with torch.no_grad(), denoiser.hooked():
            control = Control(keys, Chunk.of(frames, 3))
            return denoiser.predict_noise(z[list(frames)], 501, text, control)

    whole = predicted(0, 1, 2)
    for i in range(3):
        assert torch.allclose(predicted(i), whole[i : i + 1], atol=1e-5)
    assert torch.allclose(predicted(2, 0), whole[[2, 0]], atol=1e-5)


def test_it_acts_on_inversion_and_edit_with_every_memory(demo, folder, pictures):
    denoiser = demo.with_control(str(folder), pictures[:2]).denoiser
    text, target, empty = (demo.encode_prompt(words, 64, 64) for words in (PROMPT, "a red circle on water", ""))
    found = {}
    for memory in ("recompute", "queries_keys"):
        inversion = invert(denoiser, noise(2), text, 2, memory=memory)
        found[memory] = edit(denoiser, inversion, target, empty, 5.0)
    assert torch.allclose(found["recompute"], found["queries_keys"], atol=1e-4)
    plain = invert(demo.denoiser, noise(2), text, 2)
    assert not torch.allclose(inversion.latents, plain.latents, atol=1e-2)
    one = invert(denoiser, noise(2), text, 2, key_frames="self", chunk_frames=1)
    assert torch.allclose(one.latents, invert(denoiser, noise(2), text, 2, key_frames="self").latents, atol=1e-4)


def test_tokenflow_gives_every_frame_its_own_picture(demo, folder, pictures):
    """Pivots of both batches, and each batch: the hints of a call are those of its frames, in its order."""
    denoiser = demo.with_control(str(folder), pictures).denoiser
    hints = pictures.movedim(-1, 1) / 255
    calls: list[list[int]] = []

    def collect(module, inputs):
        calls.append([int((hints - hint).abs().flatten(1).sum(1).argmin()) for hint in inputs[0]])
        assert all(torch.allclose(hint, hints[i], atol=1e-6) for hint, i in zip(inputs[0], calls[-1], strict=True))

    embedding = denoiser.controlnet.model.controlnet_cond_embedding
    handle = embedding.register_forward_pre_hook(collect)
    text, target, empty = (demo.encode_prompt(words, 64, 64) for words in (PROMPT, "a red circle on water", ""))
    inversion = invert(denoiser, noise(3), text, 2, key_frames="self")
    calls.clear()
    flow = TokenFlowSettings(batch_frames=2, pivots=[[1, 2], [0, 2]])
    controlled = edit(denoiser, inversion, target, empty, 5.0, propagation=flow)
    handle.remove()
    pivots, batches = ([1, 2], [0, 2]), ([0, 1], [2])
    assert [call for call, _ in groupby(calls)] == [pivots[0], *batches, pivots[1], *batches]
    plain = edit(demo.denoiser, invert(demo.denoiser, noise(3), text, 2, key_frames="self"), target, empty, 5.0,
                 propagation=flow)  # fmt: skip
    assert not torch.allclose(controlled, plain, atol=1e-2)


# --- files ----------------------------------------------------------------------------------


def in_the_original_layout(model):
    """A ControlNet's weights with the names of the original code."""
    model.up_blocks = []  # as a UNet has them
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    names = {layer: alias for alias, layer in _aliases(model, layers)}
    last = len(model.controlnet_cond_embedding.blocks)
    hints = {"conv_in": 0, "conv_out": 2 * last + 2} | {f"blocks.{i}": 2 * i + 2 for i in range(last)}
    names |= {f"controlnet_cond_embedding.{name}": f"input_hint_block.{at}" for name, at in hints.items()}
    names |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(model.controlnet_down_blocks))}
    names["controlnet_mid_block"] = "middle_block_out.0"
    split = {name: name.rpartition(".") for name in model.state_dict()}
    return {f"control_model.{names[split[n][0]]}.{split[n][2]}": w.contiguous() for n, w in model.state_dict().items()}


def test_single_files_of_both_layouts(tmp_path):
    unet = small_unet().float()
    model = controlnet_for(unet, (4, 8, 16, 32)).float()
    wide = controlnet_for(unet, (16, 32, 96, 256)).float()
    expected = wide.state_dict()
    save_file(expected, tmp_path / "a.safetensors")
    save_file(in_the_original_layout(wide), tmp_path / "b.safetensors")
    for name in ("a", "b"):
        loaded = load_controlnet(str(tmp_path / f"{name}.safetensors"), unet, 8).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], w) for key, w in expected.items())
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="could not load"):
        load_controlnet(str(tmp_path / "other.safetensors"), unet, 8)


def test_mismatches_are_refused(demo, folder, tmp_path):
    def changed(**values):
        path = tmp_path / "c"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, path)
        (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | values))
        return path

    controlnet_for(small_unet(), (16, 32)).save_pretrained(tmp_path / "small")
    controlnet_for(demo.unet, (16, 32)).save_pretrained(tmp_path / "half")
    for path, message in (
        (tmp_path / "small", r"another kind of model: its block_out_channels is \[8, 16\]"),
        (tmp_path / "half", "downscales pictures by 2, the model by 4"),
        (changed(global_pool_conditions=True), "pools its pictures"),
        (tmp_path / "none", "no model at"),
        (tmp_path, "no config.json"),
        (CLIP, "could not load"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_controlnet(str(path), demo.unet, 4)


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def run(folder, tmp_path):
    """The frames of an edit of the bundled clip with a ControlNet and the clip as hint."""
    console = Console(quiet=True)

    def of(output="out/", store=None, inverting=False, overwrite=False, **settings):
        session = Session(console, no_bars, "cpu", "float32", overwrite=overwrite)
        config = EditConfig(video=str(CLIP), source=PROMPT, target="a green square on water", steps=1, count=1)
        settings = {"controlnet": str(folder), "control": str(CLIP), **settings}
        for name, value in settings.items():
            config = EditConfig(**{**vars(config), name: value})
        if inverting:
            return run_invert(session, config, tmp_path / store, dry_run=False)
        config = with_preset(config, "attribute")
        run_edits(session, [config], f"{tmp_path}/{output}", tmp_path / store if store else None, dry_run=False)
        return read_video(tmp_path / output).frames

    return of


def test_the_command_edits_with_it(run, tmp_path):
    controlled = run("a/")
    assert not torch.equal(controlled, run("b/", controlnet="", control=""))
    assert torch.equal(run("c/", controlnet_strength=0.0), read_video(tmp_path / "b").frames)
    record = json.loads((tmp_path / "a" / "edit.json").read_text())
    assert record["control"] == str(CLIP) and record["controlnet"].endswith("edges")
    assert "control" in record["made"]["files"]

    run(store="s.safetensors", inverting=True)
    assert torch.equal(run("d/", store="s.safetensors"), controlled)
    with pytest.raises(StoreError, match=r"made by another model.*ControlNet of"):
        run("e/", store="s.safetensors", controlnet="", control="")
    with pytest.raises(StoreError, match="from 0.5 to 1"):
        run("e/", store="s.safetensors", control_start=0.5)


def test_a_dry_run_prints_the_number_of_steps_it_acts_in(command, folder):
    words = (CLIP, "--source", PROMPT, "--target", "a green square on water", "--dry-run")
    output = command("edit", *words, "--controlnet", folder, "--control", CLIP, "--control-end", 0.5)
    assert "ControlNet edges: in 25 of 50 steps" in output


def test_the_command_refuses(run, refused, folder, tmp_path):
    for i in range(9):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"control: .*has 8 frames.*9 are needed"):
        run("e/", video=f"{tmp_path}/*.png", count=9)
    words = (CLIP, "--source", PROMPT, "--target", "a green square on water", "--dry-run")
    for options, output in (
        (("--controlnet", folder), "missing --control"),
        (("--control", CLIP), "control has no effect here: no controlnet is given"),
        (("--controlnet", folder, "--control", "none.mp4"), "none.mp4"),
        (("--controlnet", "models/x", "--control", CLIP), "no model at models/x"),
        (("--controlnet", folder, "--control", CLIP, "--control-start", 0.6, "--control-end", 0.5), "must be below"),
        (("--controlnet", folder, "--control", CLIP, "--control-start", 0.9999), "no step of 50 is between"),
        (("--controlnet", folder, "--control", CLIP, "--controlnet-strength", -1), "controlnet_strength is -1"),
        (("--controlnet", folder, "--control", CLIP, "--model", "demo-wan"), "controlnet: needs a UNet"),
    ):
        assert re.search(re.escape(output), refused("edit", *words, *options)), output
