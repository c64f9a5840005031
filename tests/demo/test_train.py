"""The trainer, on few pictures and steps: it learns, resumes and writes files that hosts load."""

import pytest
import torch

from fatezero.demo import model, train
from fatezero.demo.scenes import COLOURS
from fatezero.demo.train import (
    Painter,
    Pictures,
    TrainSettings,
    _augmented,
    _render,
    _render_close,
    _scenes,
    _scenes_close,
    train_painter,
)
from fatezero.demo.training import saved_step

SMALL = TrainSettings(unet_steps=2, unet_batch=2, save_every=1, compile=False)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return Pictures(_render((0, 8, None)), _scenes((0, 8, None)))


def painted(pictures, tokenizer, state) -> Painter:
    state.mkdir(exist_ok=True)
    latents = torch.randn(len(pictures.scenes), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return train_painter(latents, [s.caption for s in pictures.scenes], tokenizer, state, SMALL, CPU, print)


def test_pictures_repeat_and_show_no_held_out_scene(pictures):
    assert torch.equal(_render((0, 8, None)), pictures.frames)
    assert pictures.frames.shape == (8, 3, 64, 64)
    assert not any(scene.held_out for scene in pictures.scenes)


def test_close_ups_show_one_of_two_things_at_the_size_of_a_single_one():
    job = (0, 6, 2)
    frames, shown, whole = _render_close(job), _scenes_close(job), _scenes(job)
    assert frames.shape == (6, 3, 64, 64)
    assert [s.things[0] for s in shown] == [w.things[n % 2] for n, w in enumerate(whole)]
    for picture, scene in zip(frames, shown, strict=True):
        if scene.style == "photo" and scene.things[0].texture == "plain":
            middle = picture[:, 28:36, 28:36].float().mean((1, 2)) / 255
            assert (middle - torch.tensor(COLOURS[scene.things[0].colour])).abs().max() < 0.1


def test_pictures_are_shifted_slightly_for_the_judge():
    spot = torch.zeros(50, 1, 64, 64)
    spot[:, :, 31:33, 31:33] = 1
    moved = _augmented(spot, torch.Generator().manual_seed(0))
    mass = moved / moved.sum((2, 3), keepdim=True)
    x = (mass.sum(2)[:, 0] * (torch.arange(64) + 0.5)).sum(-1)
    assert (x - 32).abs().max() <= 3.5
    assert (x - 32).std() > 1
    assert not torch.equal(moved[0], moved[1])


def test_an_interrupted_run_resumes_with_the_same_result(pictures, tokenizer, tmp_path, monkeypatch):
    whole, batch = painted(pictures, tokenizer, tmp_path / "whole"), train.batch_of

    def batch_or_stop(seed, step, *given):
        if step == 1:
            raise KeyboardInterrupt
        return batch(seed, step, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "batch_of", batch_or_stop)
        painted(pictures, tokenizer, tmp_path / "parts")
    assert saved_step(tmp_path / "parts" / "painter.safetensors") == 1
    resumed = painted(pictures, tokenizer, tmp_path / "parts")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_latents_are_given_unit_variance_without_changing_the_picture(pictures):
    torch.manual_seed(0)
    vae = model.build_vae()
    pixels = pictures.frames.float() / 127.5 - 1
    before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    train.standardise(vae, pictures.frames, CPU)
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
