"""Minimum quality of the bundled checkpoint; the model card has figures on more scenes."""

import json

import pytest
import torch
from torch import nn

from fatezero.demo.evaluate import close_up_accuracy, judge_accuracy, map_overlap, painting_accuracy, replay_psnr
from fatezero.demo.judge import load_judge
from fatezero.demo.show import show
from fatezero.files.bundled import DEMO
from fatezero.hosts.diffusers.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load("demo")


def test_it_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 16_000_000


def test_it_has_the_sizes_hosts_expect_of_sd1(checkpoint):
    for module in (checkpoint.unet, checkpoint.vae):
        assert {m.num_groups for m in module.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert {site.heads for site in checkpoint.denoiser.sites(16, 16)} == {8}
    assert checkpoint.vae.config["scaling_factor"] == 0.18215
    text = checkpoint.text_encoders[0].config
    assert (text.hidden_act, text.max_position_embeddings) == ("quick_gelu", 77)
    ids = checkpoint.tokenizer("a red circle", padding="max_length", max_length=77).input_ids
    assert (ids[0], ids[4], len(ids)) == (checkpoint.tokenizer.bos_token_id, checkpoint.tokenizer.eos_token_id, 77)


def test_diffusers_loads_it_as_a_stable_diffusion_pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32, local_files_only=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle on sand", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)


def test_the_judge_reads_rendered_scenes():
    assert judge_accuracy(load_judge(), count=500) >= 0.99


def test_the_judge_recognises_each_of_two_things(checkpoint):
    assert close_up_accuracy(load_judge(), count=30) >= 0.99
    assert close_up_accuracy(load_judge(), checkpoint, count=30) >= 0.98


@pytest.mark.slow
def test_it_generates_held_out_captions(checkpoint):
    right = painting_accuracy(checkpoint, load_judge(), count=16, batch=16)
    assert right["colour"] >= 0.9
    assert right["shape"] >= 0.8


@pytest.mark.slow
def test_inversion_and_replay_are_close_to_the_autoencoder(checkpoint):
    coded, replayed = replay_psnr(checkpoint, clips=2)
    assert coded > 30
    assert replayed > coded - 2


@pytest.mark.slow
def test_attention_of_the_object_word_lies_on_the_object(checkpoint):
    overlap, _ = map_overlap(checkpoint, clips=4)
    assert overlap >= 0.5


@pytest.mark.slow
def test_the_demo_edits_and_preserves_better_than_plain_ddim(tmp_path):
    from rich.console import Console

    from fatezero.cli.app import progress_bar

    rows = show(tmp_path, 10, torch.device("cpu"), Console(quiet=True), progress_bar)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{edit}{kind}" for edit in ("attribute", "shape", "style") for kind in (".mp4", "+.mp4", ".png")
    } | {"overview.png", "summary.md", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    ours = [row for row in rows if row["method"] in ("FateZero", "FateZero+")]
    assert [row["edit"] for row in ours] == [edit for edit in ("attribute", "shape", "style") for _ in range(2)]
    assert all(row["success"] == 1.0 for row in ours)
    assert all(torch.isfinite(torch.tensor([v for v in row.values() if not isinstance(v, str)])).all() for row in rows)
