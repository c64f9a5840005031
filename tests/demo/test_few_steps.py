"""The demo world's LoRA for few steps, and its trainer."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fatezero.demo import train_few_steps as trainer
from fatezero.demo.scenes import SIZE, Scene, random_motion, render
from fatezero.demo.temporal import TemporalSettings, captions_of
from fatezero.demo.train_few_steps import (
    FewStepsSettings,
    batch_at,
    changed_weights,
    new_lora,
    save_lora,
    train_few_steps,
)
from fatezero.files.bundled import FEW_STEPS
from fatezero.hosts.diffusers.load import open_model
from tests.small import relative

SMALL = FewStepsSettings(clips=2, frames=8, steps=3, save_every=1)
CPU = torch.device("cpu")


def test_batches_depend_only_on_seed_and_step():
    latents, captions = torch.randn(4, 16, 4, 16, 16), captions_of(TemporalSettings(clips=4))
    for step in range(20):
        batch, again = (batch_at(latents, captions, step, FewStepsSettings()) for _ in range(2))
        assert torch.equal(batch.noised, again.noised) and batch.captions == again.captions
        assert (batch.next < batch.sigmas).all() and batch.sigmas.max() <= 1 and batch.next.min() >= 0
        assert batch.noised.shape[0] * batch.noised.shape[2] == FewStepsSettings().frames
        assert not any(Scene.parse(caption).held_out for caption in batch.captions if caption)


def test_a_saved_lora_is_the_change_of_the_weights(tmp_path):
    plain = open_model("demo-wan").networks[0]
    lora = {name: 0.1 * torch.randn_like(factor) for name, factor in new_lora(plain, 2).items()}
    save_lora(tmp_path / "lora.safetensors", lora, FewStepsSettings(rank=2))
    fused = open_model("demo-wan", lora=str(tmp_path / "lora.safetensors")).networks[0]
    expected = changed_weights(plain, lora)
    assert len(expected) == 60
    for name, weight in fused.named_parameters():
        assert relative(weight, expected.get(name, plain.get_parameter(name))) < 1e-3, name


@torch.no_grad()
def test_the_bundled_lora_brings_guidance():
    """Its velocities without guidance are closer to the guided steps of the model, on a held-out caption."""
    assert FEW_STEPS.stat().st_size < 500_000
    with safe_open(FEW_STEPS, "pt") as file:
        assert file.metadata()["guidance"] == "1"
    plain, few = open_model("demo-wan"), open_model("demo-wan", lora="demo-few-steps=1")
    assert "60 of 60 layers" in few.notes[0]
    scene = Scene.parse("a striped red circle on grass")
    assert scene.held_out
    clip = plain.encode_clip(render(scene, random_motion(trainer.Random(1), 1, 8), 8).frames).transpose(0, 1)[None]
    text, empty = (plain.encode_prompt(words, SIZE, SIZE).embeddings for words in (scene.caption, ""))
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))

    def velocity(model, z, sigma, text):
        return model.networks[0](z, torch.tensor([1000 * sigma]), text, return_dict=False)[0]

    def guided(z, sigma):
        away = velocity(plain, z, sigma, empty)
        return away + 5 * (velocity(plain, z, sigma, text) - away)

    for sigma, after in ((5 / 6, 8 / 11), (0.6, 4 / 9), (0.25, 0.0)):  # of 7 steps
        z, middle = (1 - sigma) * clip + sigma * noise, (sigma + after) / 2
        target = guided(z + (middle - sigma) * guided(z, sigma), middle)
        before, now = ((velocity(model, z, sigma, text) - target).norm() for model in (plain, few))
        assert now < 0.95 * before, sigma


@pytest.mark.slow
def test_an_interrupted_training_resumes_with_the_same_result(tmp_path, monkeypatch):
    def trained(name):
        (tmp_path / name).mkdir(exist_ok=True)
        train_few_steps(tmp_path / f"{name}.safetensors", tmp_path / name, SMALL, CPU, lambda _: None)
        return load_file(tmp_path / f"{name}.safetensors")

    def stop(*given):
        if given[2] == 2:
            raise KeyboardInterrupt
        return batch_at(*given)

    whole = trained("whole")
    monkeypatch.setattr(trainer, "batch_at", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    monkeypatch.setattr(trainer, "batch_at", batch_at)
    again = trained("stopped")
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
