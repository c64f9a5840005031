"""The trainer of the demo world's temporal layers, on few clips and steps, and the bundled layers."""

import pytest
import torch
from safetensors.torch import load_file

from fatezero.demo import temporal
from fatezero.demo.judge import load_judge
from fatezero.demo.model import labels
from fatezero.demo.scenes import SIZE, scenes
from fatezero.demo.temporal import TemporalSettings, train_temporal
from fatezero.diffusion.generate import generate
from fatezero.hosts.diffusers.checkpoint import Checkpoint

SMALL = TemporalSettings(clips=2, frames=2, steps=3, save_every=1)
CPU = torch.device("cpu")


def test_clips_repeat_move_and_show_no_held_out_scene():
    job = (3, 5, 4)
    clips = temporal._render(job)
    assert clips.shape == (5, 4, 3, SIZE, SIZE) and torch.equal(clips, temporal._render(job))
    assert not any(scene.held_out for scene in temporal._scenes(job))
    assert all((clip[0] != clip[3]).any() for clip in clips)


@pytest.mark.slow
def test_an_interrupted_training_resumes_with_the_same_result(tmp_path, monkeypatch):
    def trained(name):
        (tmp_path / name).mkdir(exist_ok=True)
        train_temporal(tmp_path / name / "t.safetensors", tmp_path / name, SMALL, CPU, lambda _: None)
        return load_file(tmp_path / name / "t.safetensors")

    whole = trained("whole")
    step, count = temporal._step, 0

    def stops(*given):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(temporal, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    monkeypatch.setattr(temporal, "_step", step)
    again = trained("stopped")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_the_bundled_layers_generate_a_consistent_clip():
    """For a held-out caption: right in nearly every frame, with colour and position close to adjacent frames."""
    checkpoint, judge = Checkpoint.load("demo", temporal="demo"), load_judge()
    scene, _ = next(s for s in scenes(9, held_out=True, things=1))
    noise = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text, empty = (checkpoint.encode_prompt(words, SIZE, SIZE) for words in (scene.caption, ""))
    frames = {}
    for name, model in (("video", checkpoint), ("image", Checkpoint.load("demo"))):
        keys, norm = (("first", "previous"), True) if name == "video" else (("self",), False)
        made = generate(model.denoiser, noise, text, empty, 10, 5.0, keys, norm)
        frames[name] = model.decode_latents(made)
    right = sum(read == labels(scene) for read in judge.read(frames["video"]))
    assert right >= 5
    differences = {name: f.diff(dim=0).abs().mean().item() for name, f in frames.items()}
    assert 0.002 < differences["video"] < 0.5 * differences["image"]
