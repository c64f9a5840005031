"""The trainer, on a few pictures and steps: that it learns, resumes and writes what hosts load."""

from dataclasses import replace

import pytest
import torch

from fatezero.demo import model, train
from fatezero.demo.scenes import Scene
from fatezero.demo.train import Painter, Pictures, TrainSettings, _draw, grounding_loss, train_painter, word_columns

SMALL = TrainSettings(unet_steps=4, unet_batch=2, save_every=2, compile=False, grounded_steps=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    threads = torch.get_num_threads()
    drawn = Pictures(*_draw((0, 8, None)))
    torch.set_num_threads(threads)
    return drawn


def painted(pictures, tokenizer, state, **options) -> Painter:
    state.mkdir(exist_ok=True)
    latents = torch.randn(len(pictures.scenes), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return train_painter(latents, pictures, tokenizer, state, options.pop("settings", SMALL), CPU, print, **options)


def test_pictures_repeat_and_carry_their_masks(pictures):
    again = _draw((0, 8, None))
    torch.set_num_threads(2)
    assert torch.equal(again[0], pictures.frames)
    assert pictures.masks.shape == (8, 2, 16, 16)
    for scene, masks in zip(pictures.scenes, pictures.masks, strict=True):
        assert not scene.held_out
        assert [bool(mask.any()) for mask in masks] == [True, len(scene.things) == 2]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(pictures, tokenizer, tmp_path, monkeypatch):
    whole = painted(pictures, tokenizer, tmp_path / "whole")
    save = train._save_state

    def save_and_stop(path, live, average, optimiser, step):
        save(path, live, average, optimiser, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_save_state", save_and_stop)
        painted(pictures, tokenizer, tmp_path / "parts")
    assert train._saved_step(tmp_path / "parts" / "painter.safetensors") == 2
    resumed = painted(pictures, tokenizer, tmp_path / "parts")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_grounded_stage_changes_the_model_and_goes_on_from_the_first(pictures, tokenizer, tmp_path):
    first = painted(pictures, tokenizer, tmp_path / "a")
    before = [p.clone() for p in first.parameters()]
    second = painted(
        pictures, tokenizer, tmp_path / "a", grounded=True, start=first, settings=replace(SMALL, average=0.0)
    )
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(second.parameters(), before, strict=True))
    assert 0 < moved < 0.1


def test_grounding_rewards_attention_on_the_object(tokenizer):
    scene = Scene.parse("a red circle on sand")
    columns = word_columns(tokenizer, scene)[None]
    assert columns[0, 0].nonzero()[:, 0].tolist() == [3], "the noun, after the start mark"
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, 4:10, 4:10] = 1
    on, off = torch.full((2, 256, 77), 1e-3), torch.full((2, 256, 77), 1e-3)
    on[:, masks[0, 0].flatten() == 1, 3] = 0.9
    off[:, masks[0, 0].flatten() == 0, 3] = 0.9
    assert grounding_loss([on], columns, masks) < 0.1 * grounding_loss([off], columns, masks)
    nobody = grounding_loss([off], torch.zeros_like(columns), masks)
    assert nobody == 0, "captions without a thing have nothing to ground"


def test_latents_are_given_unit_variance_without_changing_the_picture(pictures):
    torch.manual_seed(0)
    vae = model.build_vae()
    pixels = pictures.frames.float() / 127.5 - 1
    before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    train._standardise(vae, pictures.frames, CPU)
    latents = vae.encode(pixels).latent_dist.mean * model.LATENT_SCALE
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(vae.decode(vae.encode(pixels).latent_dist.mean).sample, before, atol=1e-3)


def test_every_word_of_the_world_is_one_token(tokenizer):
    from fatezero.demo.scenes import VOCABULARY

    for word in VOCABULARY:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    ids = model.token_ids(tokenizer, ["a red circle", ""])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, 4] == ids[1, 1] == tokenizer.eos_token_id
    text = "zebra, 42%"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).replace(" ", "") == "zebra,42%"
