"""The command on transformers called as their pipelines call them."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from flow_models import write_flux, write_ltx2, write_qwen_image
from PIL import Image
from wan import write_wan_i2v, write_wan_vace

from fatezero.files.bundled import CLIP
from fatezero.video.read import open_video, read_video

WORDS = ("--source", "a red square on water", "--target", "a green square on water")
SIZE = ("--count", 6, "--size", "64x64")
WRITERS = {
    "wan i2v": write_wan_i2v,
    "wan vace": write_wan_vace,
    "ltx2": write_ltx2,
    "qwen image": write_qwen_image,
    "flux": write_flux,
}


@pytest.fixture(scope="module", params=WRITERS)
def folder(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def vace(tmp_path_factory):
    return write_wan_vace(tmp_path_factory.mktemp("vace"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return write_wan_i2v(tmp_path_factory.mktemp("i2v"))


def without_weights(folder, tmp_path):
    """A model's folder with unreadable weights, for refusals before loading."""
    copy = shutil.copytree(folder, tmp_path / "model")
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(b"nothing")
    return copy


@pytest.mark.parametrize("preset", ["flow_edit", "flow_mask", "wan_edit"])
def test_it_edits_as_many_frames_as_it_is_given(command, folder, tmp_path, preset):
    output = command("edit", CLIP, "--model", folder, *WORDS, *SIZE, "--preset", preset, "--steps", 3, "-o", "out.mp4")
    assert "of 64x64, 3 steps" in output
    width, height = open_video(CLIP).size if preset == "flow_mask" else (64, 64)  # a mask keeps the clip's own pixels
    assert read_video(tmp_path / "out.mp4").frames.shape == (6, height, width, 3)
    assert open_video(tmp_path / "out.mp4").fps == open_video(CLIP).fps


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "injection fatezero needs control of the attention"),
        (("--preset", "pnp"), "injection pnp needs control of the attention"),
        (("--preset", "flow_edit", "--propagation", "tokenflow"), "TokenFlow"),
        (("--preset", "flow_edit", "--smoothing", "0.5"), "smoothing needs an inversion"),
        (("--preset", "flow_edit", "--shift", "square: 0:0.1,0"), "layout needs a UNet"),
        (("--injection", "none", "--memory", "maps"), "memory maps keeps attention"),
        (("--preset", "flow_edit", "--control", str(CLIP), "--controlnet", "a/b"), "controlnet: "),
    ],
)
def test_methods_that_need_attention_are_refused_before_loading(refused, folder, tmp_path, options, error):
    index = (folder / "model_index.json").read_text()
    if "LTX2" in index or ("Wan" in index and "attention" in error):
        pytest.skip("its attention is controlled")
    broken = without_weights(folder, tmp_path)
    assert error in refused("edit", CLIP, "--model", broken, *WORDS, *SIZE, *options, "-o", "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_sizes_and_temporal_layers_are_refused(refused, folder):
    shared = ("edit", CLIP, "--model", folder, *WORDS, "--preset", "flow_edit", "-o", "out.mp4")
    assert "multiples of" in refused(*shared, "--size", "63x31")
    assert "--temporal is for image models" in refused(*shared, "--temporal", "demo")
    assert "takes auto, sdpa or one of" in refused(*shared, "--attention", "xformer")


def test_attention_kernels_and_precisions(command, folder, tmp_path):
    shared = ("edit", CLIP, "--model", folder, *WORDS, *SIZE, "--preset", "flow_edit", "--steps", 2)
    command(*shared, "--attention", "native", "--dtype", "bfloat16", "-o", "out.mp4")
    assert read_video(tmp_path / "out.mp4").frames.shape == (6, 64, 64, 3)


def test_maps_omit_attention_without_control(command, flux, tmp_path):
    shared = ("edit", CLIP, "--model", flux, *WORDS, *SIZE, "--preset", "flow_mask", "--steps", 3)
    output = " ".join(command(*shared, "--maps", "maps", "-o", "out.mp4").split())
    assert "no heat maps" in output and "no masks" not in output
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert names == {"mask_latents.png", "mask_latents.mp4", "slice.png", "slice.mp4"}


def test_image_to_video_needs_a_clip(refused, i2v, tmp_path):
    broken = without_weights(i2v, tmp_path)
    assert "first frame" in refused("invert", CLIP, "--model", broken, *WORDS[:2], *SIZE)
    assert "first frame" in refused("generate", "--model", broken, "--prompt", "a red square")


@pytest.mark.parametrize("preset", ["style+", "shape", "kv_edit"])
@pytest.mark.parametrize("name", ["wan i2v", "wan vace"])
def test_wan_with_other_inputs_controls_its_attention(command, refused, tmp_path, name, preset):
    model = WRITERS[name](tmp_path / "model")
    shared = ("edit", CLIP, "--model", model, *WORDS, *SIZE, "--steps", 3, "--preset", preset, "-o", "out.mp4")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    mask = ("--edit-mask", "mask.png") if preset == "kv_edit" else ()
    command(*shared, *mask)
    assert len(read_video(tmp_path / "out.mp4").frames) == 6
    assert "Plug-and-Play needs a UNet" in refused(*shared[:-4], "--preset", "pnp", "-o", "other.mp4")


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "wan i2v"])
def test_a_store_and_a_new_clip(command, tmp_path, name):
    model = WRITERS[name](tmp_path / "model")
    invert = ("invert", CLIP, "--model", model, *WORDS[:2], *SIZE)
    command(*invert, "--steps", 3, "--memory", "auto", "-o", "s.safetensors")
    edit = ("edit", "--model", model, *WORDS[2:], "--injection", "none")
    command(*edit, "--store", "s.safetensors", "-o", "kept.mp4")
    command(*edit, CLIP, *WORDS[:2], *SIZE, "--steps", 3, "-o", "fresh.mp4")
    kept, fresh = (read_video(tmp_path / name).frames for name in ("kept.mp4", "fresh.mp4"))
    assert torch.equal(kept, fresh)
    command("generate", "--model", model, "--prompt", "a red square", "--frames", 5, "--size", "64x64", "--steps", 2)
    assert read_video(tmp_path / "clip.mp4").frames.shape == (5, 64, 64, 3)


def test_frames_too_small_for_ltx2_are_refused(refused, tmp_path):
    shared = ("edit", CLIP, "--model", write_ltx2(tmp_path / "model"), *WORDS, "--preset", "flow_edit")
    assert "at least 64x64" in refused(*shared, "--size", "64x32")


def test_guidance_as_an_input_takes_one_call_and_no_negative_prompt(command, refused, flux, tmp_path):
    shared = ("edit", CLIP, "--model", flux, *WORDS, "--count", 2, "--size", "32x32", "--preset", "flow_edit")
    assert "7 for the edit, 7 for the source" in command(*shared, "--steps", 10, "--dry-run")
    assert "negative has no effect" in refused(*shared, "--negative", "blue")
    assert "negative has no effect" in refused("generate", "--model", flux, "--prompt", "a", "--negative", "blue")
    found = set()
    for scale in (1.5, 4):
        guidance = ("--guidance-scale", scale, "--flow-edit.source-guidance", scale)
        command(*shared, *guidance, "--steps", 2, "-o", f"{scale}.mp4")
        found.add(json.loads((tmp_path / f"{scale}.mp4.json").read_text())["made"]["frames"])
    assert len(found) == 2


def test_vace_follows_a_control_video(command, refused, vace, i2v, tmp_path):
    shared = ("edit", CLIP, *WORDS, *SIZE, "--preset", "flow_edit", "--steps", 2)
    for name, options in {"plain": (), "controlled": ("--control", CLIP)}.items():
        output = command(*shared, "--model", vace, *options, "-o", f"{name}.mp4")
        assert ("control clip.mp4: in 2 of 2 steps" in output) == (name == "controlled")
    digests = [
        json.loads((tmp_path / f"{name}.mp4.json").read_text())["made"]["frames"] for name in ("plain", "controlled")
    ]
    assert digests[0] != digests[1]
    assert "control has no effect" in refused(*shared, "--model", i2v, "--control", CLIP)


def test_an_edit_may_have_its_own_first_frame(command, refused, i2v, vace, tmp_path):
    shared = ("edit", CLIP, *WORDS, *SIZE, "--preset", "flow_edit", "--steps", 2)
    Image.new("RGB", (64, 64), (0, 200, 0)).save(tmp_path / "green.png")
    for name, options in {"clips": (), "own": ("--first-frame", "green.png")}.items():
        command(*shared, "--model", i2v, *options, "-o", f"{name}.mp4")
    clips, own = (json.loads((tmp_path / f"{name}.mp4.json").read_text()) for name in ("clips", "own"))
    assert clips["made"]["frames"] != own["made"]["frames"]
    assert own["made"]["files"]["first_frame"]
    assert "first_frame has no effect" in refused(*shared, "--model", vace, "--first-frame", "green.png")
    assert "first_frame: " in refused(*shared, "--model", i2v, "--first-frame", "none.png")


def test_an_unknown_transformer_is_refused_by_name(refused, tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "X"]}'
    )
    error = refused("edit", CLIP, "--model", tmp_path, *WORDS, "--preset", "flow_edit")
    assert "CogVideoXPipeline" in error
    assert "VACE" in error


def test_a_scheduler_without_a_flow_is_refused(refused, flux, tmp_path):
    model = shutil.copytree(flux, tmp_path / "model")
    DDIMScheduler().save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    error = refused("edit", CLIP, "--model", model, *WORDS, *SIZE, "--preset", "flow_edit")
    assert "DDIMScheduler without a flow" in error
