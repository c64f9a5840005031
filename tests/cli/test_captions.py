"""`--source auto`: the source prompt by a captioning model, here a small random BLIP."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fatezero.cli.batch.workflow import filled
from fatezero.cli.config.settings import ConfigError
from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.caption import caption
from fatezero.video.read import read_video
from tests.tiny_blip import write_blip

EDIT = ("edit", CLIP, "--target", "a green square on water", "--count", 3, "--steps", 1)


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return write_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def words(blip) -> str:
    """The caption of the middle frame of the clip's first three."""
    return caption(str(blip), read_video(CLIP, count=3).frames[1], local_files_only=True)


def test_captions_are_the_same_each_time_and_differ_between_models(blip, words, tmp_path):
    frame = read_video(CLIP, count=3).frames[1]
    assert words and caption(str(blip), frame, local_files_only=True) == words
    assert "[" not in words, "no special tokens"
    assert caption(str(write_blip(tmp_path / "other", seed=3)), frame, local_files_only=True) != words


def test_an_edit_with_the_caption_of_the_middle_frame(command, blip, words, tmp_path):
    output = command(*EDIT, "--source", "auto", "--caption-model", blip, "-o", "auto.mp4")
    assert output.index(f"captioning the clip's middle frame with {blip}") < output.index(f"source prompt: {words}")
    record = json.loads((tmp_path / "auto.mp4.json").read_text())
    assert (record["source"], record["caption_model"]) == (words, "blip"), "without parent folders"
    command(*EDIT, "--source", words, "-o", "typed.mp4")
    frames = [read_video(tmp_path / name).frames for name in ("auto.mp4", "typed.mp4")]
    assert torch.equal(*frames)
    command("edit", "--config", "auto.mp4.json", "-o", "again.mp4")
    assert torch.equal(read_video(tmp_path / "again.mp4").frames, frames[0]), "no model is needed"


def test_a_store_keeps_the_caption(command, blip, words, tmp_path):
    part = ("--count", 3, "--steps", 1, "--source", "auto", "--caption-model", blip)
    command("invert", CLIP, *part, "-o", "store.safetensors")
    with safe_open(tmp_path / "store.safetensors", "pt") as file:
        assert words in str(file.metadata())
    part = ("--target", "a green square", "--preset", "style", "-o", "of_store.mp4")
    command("edit", "--store", "store.safetensors", *part)
    assert json.loads((tmp_path / "of_store.mp4.json").read_text())["source"] == words


def test_a_batch_with_captions(command, blip, words, tmp_path):
    jobs = {"source": "auto", "caption_model": str(blip), "count": 3, "steps": 1, "preset": "style",
            "clips": str(CLIP), "targets": ["a green square", "a blue circle"]}  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command("batch", "jobs.json", "-o", "out", "--device", "cpu")
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.mp4.json")]
    assert [record["source"] for record in records] == [words, words]


def test_refusals_before_anything_is_loaded(refused, blip, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    part = (*EDIT, "-o", "x.mp4")
    error = refused(*part, "--source", "auto")
    assert "--caption-model Salesforce/blip-image-captioning-base" in error
    assert "caption_model" in refused(*part, "--source", "auto", "--caption-model", "nowhere")
    assert "caption_model has no effect here: source is not auto" in refused(
        *part, "--source", "a red square", "--caption-model", blip
    )
    (tmp_path / "empty").mkdir()
    assert "could not load the model" in refused(*part, "--source", "auto", "--caption-model", "empty")
    assert "'jeep' is not in the prompt" in refused(
        *part, "--source", "auto", "--caption-model", blip, "--reweight", "jeep=2", "--preset", "shape"
    )
    with pytest.raises(ConfigError, match="connect a captioning node"):
        filled({}, {"source": "auto"}, {})
