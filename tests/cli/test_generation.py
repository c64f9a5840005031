"""`fatezero generate`."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, TextToVideoSDPipeline, UNet3DConditionModel
from PIL import Image

from fatezero.demo.scenes import SIZE
from fatezero.files.bundled import DEMO
from fatezero.hosts.diffusers import DiffusersVideoDenoiser
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.hosts.diffusers.load import open_model
from fatezero.video.read import read_video

PROMPT = ("--prompt", "a red circle on grass")
BOX = "circle: 0:0.5,0.5,0.5"
DRAW = ("generate", *PROMPT, "--frames", 4, "--temporal", "demo", "--guidance-scale", 5)


@pytest.mark.slow
def test_an_object_follows_its_box(command, tmp_path):
    """The same noise with a box at the left or right: every frame is red there."""
    strong = ("--layout.energy", "inside", "--layout.scale", 60, "--layout.most-change", 0.1, "--layout.repeats", 2)
    for name, x in (("left", 0.3), ("right", 0.7)):
        output = command(*DRAW, *strong, "--steps", 8, "--box", f"red circle: 0:{x},0.5,0.5", "-o", f"{name}.mp4")
        assert "8 steps, 6 of them with guidance" in " ".join(output.split()) and "image model" not in output
        frames = read_video(tmp_path / f"{name}.mp4").frames.float() / 255
        red = (frames[..., 0] - frames[..., 1:].amax(-1)).clamp(min=0)
        across = (red.sum(1) * (torch.arange(SIZE) + 0.5) / SIZE).sum(-1) / red.sum((1, 2))
        assert ((across - x).abs() < 0.08).all()


def test_seeds_sizes_masks_and_a_plan(command, tmp_path):
    command(*DRAW, "--steps", 2, "--seed", 1, "--size", "80x64", "-o", "a.mp4")
    assert read_video(tmp_path / "a.mp4").frames.shape == (4, 64, 80, 3)
    output = command(*DRAW, "--steps", 4, "--mask", "circle: a.mp4", "-o", "b.mp4", "--dry-run")
    assert "4 frames of 64x64, 4 steps, 3 of them with guidance" in " ".join(output.split())
    output = command(*DRAW, "--steps", 4, "--box", BOX, "--layout.guided-steps", "0,3", "-o", "b.mp4", "--dry-run")
    assert "4 steps, 2 of them with guidance" in " ".join(output.split())
    output = command("generate", *PROMPT, "--frames", 2, "--steps", 1, "-o", "c.mp4", "--dry-run")
    assert "an image model" in " ".join(output.split())


def test_heat_maps_of_every_word(command, refused, tmp_path):
    command(*DRAW, "--steps", 2, "--maps", "maps", "-o", "m.mp4")
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert names == {"steps.png", "a_1.mp4", "red_2.mp4", "circle_3.mp4", "on_4.mp4", "grass_5.mp4"}
    assert read_video(tmp_path / "maps" / "circle_3.mp4").frames.shape == (4, 64, 64, 3)
    assert "exists" in refused(*DRAW, "--steps", 2, "--maps", "maps", "-o", "n.mp4")
    assert "maps: " in refused(*DRAW, "--maps", "m.mp4", "-o", "n.mp4")
    forward = ("--box", BOX, "--layout.mode", "forward")
    assert "forward guidance replaces attention" in refused(*DRAW, *forward, "--maps", "x", "-o", "n.mp4")


def test_objects_relative_to_the_models_own_layout(command, refused, tmp_path):
    """The same noise: a shift and a swap change the clip, each in its own way, and say how many steps they guide."""
    few = (*DRAW, "--steps", 2, "--layout.guided-steps", "0")
    command(*DRAW, "--steps", 2, "-o", "plain.mp4")
    kinds = {"shift": ("--shift", "circle: 0:0.25,0"), "swap": ("--swap", "circle: grass")}
    for name, given in kinds.items():
        output = command(*few, *given, "--layout.appearance", 2, "-o", f"{name}.mp4")
        assert "2 steps, 1 of them with guidance" in " ".join(output.split())
    plain, shift, swap = (read_video(tmp_path / f"{name}.mp4").frames.float() for name in ("plain", *kinds))
    assert (shift - plain).abs().mean() > 1 and (swap - plain).abs().mean() > 1 and (swap - shift).abs().mean() > 1
    assert "'tree'" in refused(*few, "--swap", "circle: tree")
    assert "needs backward guidance" in refused(*few, *kinds["shift"], "--layout.mode", "forward")
    assert "appearance has no effect" in refused(*few, "--box", BOX, "--layout.appearance", 2)


def test_refusals(refused):
    assert "missing --prompt" in refused("generate")
    assert "'square' is not in the prompt" in refused(*DRAW, "--box", "square: 0:0.5,0.5,0.5")
    assert "must be frame:x,y,size" in refused(*DRAW, "--box", "circle: here")
    assert "both sides must be multiples" in refused(*DRAW, "--size", "65x64")
    assert "mode is 'sideways'" in refused(*DRAW, "--layout.mode", "sideways")
    assert "guided_steps is 'soon'" in refused(*DRAW, "--box", BOX, "--layout.guided-steps", "soon")
    assert "frames is 0" in refused("generate", *PROMPT, "--frames", 0)


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    """A random text-to-video model in ModelScope's layout, with the demo's text encoder and autoencoder."""
    torch.manual_seed(0)
    demo = Checkpoint.load("demo")
    unet = UNet3DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("video model")
    TextToVideoSDPipeline(
        AutoencoderKL.from_pretrained(DEMO / "vae"), demo.text_encoders[0], demo.tokenizer, unet, demo.scheduler
    ).save_pretrained(folder)
    return folder


def test_a_text_to_video_model_generates_a_clip(command, refused, video_model, tmp_path):
    part = ("generate", *PROMPT, "--model", video_model, "--frames", 3, "--steps", 2)
    command(*part, "--box", "circle: 0:0.5,0.5,0.5", "--maps", "maps", "-o", "v.mp4")
    assert read_video(tmp_path / "v.mp4").frames.shape == (3, 64, 64, 3)
    assert len(read_video(tmp_path / "maps" / "grass_5.mp4").frames) == 3
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command(*part, "--mask", "red circle: mask.png", "-o", "m.mp4")
    assert not torch.equal(read_video(tmp_path / "m.mp4").frames, read_video(tmp_path / "v.mp4").frames)
    assert "is already a video model" in refused(*part, "--temporal", "demo", "-o", "w.mp4")
    error = refused("edit", tmp_path / "v.mp4", "--source", "a", "--target", "b", "--model", video_model, "-o", "x.mp4")
    assert "attention UNet" in error


def test_a_text_to_video_model_in_a_variant_only(video_model, tmp_path):
    TextToVideoSDPipeline.from_pretrained(video_model).save_pretrained(tmp_path / "half", variant="fp16")
    model = open_model(str(tmp_path / "half"), videos=True, variant="fp16")
    assert isinstance(model.denoiser, DiffusersVideoDenoiser)


def test_the_full_help_names_every_setting(command):
    output = command("generate", "--help-all")
    for name in ("--box", "--ellipse", "--mask", "--layout.scale", "--layout.mode", "--key-frames", "--seed"):
        assert name in output
