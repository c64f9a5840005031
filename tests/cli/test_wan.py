"""The command on a Wan pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from wan import write_wan

from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.wan import WanCheckpoint
from fatezero.video.read import open_video, read_video

WORDS = ("--source", "a red square on water", "--target", "a green square on water")
SIZE = ("--count", 6, "--size", "48x32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("preset", ["style", "shape", "attribute+", "flow_edit", "wan_edit"])
def test_it_edits_the_given_number_of_frames(command, folder, tmp_path, preset):
    output = command("edit", CLIP, "--model", folder, *WORDS, *SIZE, "--preset", preset, "--steps", 3, "-o", "out.mp4")
    assert "3 latents of 48x32" in output
    assert ("for the inversion" in output) == (preset not in ("flow_edit", "wan_edit"))
    width, height = open_video(CLIP).size if preset == "attribute+" else (48, 32)  # a mask keeps the clip's own pixels
    assert read_video(tmp_path / "out.mp4").frames.shape == (6, height, width, 3)


def test_a_pair_of_transformers_and_a_store_in_a_file(command, tmp_path):
    folder = write_wan(tmp_path / "pair", pair=True)
    assert WanCheckpoint.load(str(folder)).boundary == 0.875
    shared = (CLIP, "--model", folder, *WORDS[:2], *SIZE, "--steps", 4, "--order", 2)
    command("invert", *shared, "-o", "store.safetensors")
    command("edit", "--model", folder, *WORDS[2:], "--store", "store.safetensors", "-o", "kept.mp4")
    command("edit", *shared, *WORDS[2:], "-o", "fresh.mp4")
    kept, fresh = (read_video(tmp_path / name).frames for name in ("kept.mp4", "fresh.mp4"))
    assert kept.shape == (6, 32, 48, 3)
    assert torch.equal(kept, fresh)


def test_the_tokens_inside_a_mask(command, folder, tmp_path):
    """With a LoRA, and with a store of keys and values, which other edits can use too."""
    mask = np.zeros((32, 48, 3), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    random = torch.Generator().manual_seed(0)
    parts = {"lora_A": (2, 24), "lora_B": (24, 2)}
    save_file(
        {
            f"blocks.{i}.attn1.to_q.{part}.weight": 0.5 * torch.randn(shape, generator=random)
            for i in range(4)
            for part, shape in parts.items()
        },
        tmp_path / "lora.safetensors",
    )
    shared = (CLIP, "--model", folder, *WORDS, *SIZE, "--steps", 4, "--edit-mask", "mask.png", "--kv-edit.grow", 0)
    edit = ("edit", *shared, "--preset", "kv_edit", "--lossless")
    assert "2.66667 for the edit, 4 for the source" in command(*edit, "-o", "computed.mkv")
    kept = command(*edit, "--memory", "keys_values", "-o", "kept.mkv")
    assert "-> store with memory keys_values" in kept and "2.66667 for the edit\n" in kept
    auto = command(*edit, "--memory", "auto", "-o", "auto.mkv")
    assert "-> store with memory keys_values" in auto and "2.66667 for the edit\n" in auto
    assert "-> store with memory recompute" in command(
        *edit, "--memory", "auto", "--budget-gb", 0.0001, "--dry-run", "-o", "o.mkv"
    )
    assert read_video(tmp_path / "auto.mkv").frames.equal(read_video(tmp_path / "kept.mkv").frames)
    assert "8 for the edit, 4 for" in command(*edit, "--kv-edit.tokens", "all", "-o", "all.mkv")
    command(*edit, "--lora", "lora.safetensors", "-o", "lora.mkv")
    command("edit", *shared[:-2], "--preset", "shape", "--memory", "keys_values", "-o", "fused.mkv", "--lossless")
    computed, kept, every, lora, fused = (
        read_video(tmp_path / f"{name}.mkv").frames for name in ("computed", "kept", "all", "lora", "fused")
    )
    assert (computed.int() - kept.int()).abs().max() <= 4, "up to rounding, which random weights amplify"
    third = computed.shape[-1] // 3
    for other in (every, lora, fused):
        assert not torch.equal(other[..., :third], computed[..., :third])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--preset", "pnp"), "Plug-and-Play"),
        (("--propagation", "tokenflow"), "TokenFlow"),
        (("--clip-norm",), "clip_norm"),
        (("--shift", "square: 0:0.1,0"), "layout needs a UNet"),
        (("--temporal", "demo"), "--temporal is for image models"),
        (("--size", "40x32"), "multiples of 16"),
    ],
)
def test_options_a_transformer_does_not_support(refused, folder, tmp_path, options, error):
    assert error in refused("edit", CLIP, "--model", folder, *WORDS, *options, "-o", "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_it_generates_clips(command, folder, tmp_path):
    command("generate", "--model", folder, "--prompt", "a red square on water", "--frames", 5, "--size", "48x32",
            "--steps", 2, "-o", "new.mp4")  # fmt: skip
    assert read_video(tmp_path / "new.mp4").frames.shape == (5, 32, 48, 3)
