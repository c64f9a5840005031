"""The demo world's video transformer: its parts and its trainer, on few clips and steps."""

from collections import Counter
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from fatezero.demo import train_video as trainer
from fatezero.demo.scenes import VOCABULARY, random_scene
from fatezero.demo.train_video import LENGTHS, VideoSettings, batch_at, length_at, train_video
from fatezero.demo.video_model import TEXT_TOKENS, VideoPainter, build_tokenizer, encode_ids, token_ids

SMALL = VideoSettings(clips=2, frames=16, steps=3, save_every=1)
CPU = torch.device("cpu")


def test_each_word_of_the_world_is_a_token_and_captions_fit():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in VOCABULARY)
    random = Random(0)
    _, mask = token_ids(tokenizer, [random_scene(random).caption for _ in range(200)])
    assert mask.sum(1).max() < TEXT_TOKENS


def test_text_is_zero_padded_and_ignores_the_padding():
    tokenizer = build_tokenizer()
    encoder = VideoPainter(tokenizer).text.eval()
    ids, mask = token_ids(tokenizer, ["a red circle"])
    text = encode_ids(encoder, ids, mask)
    assert (text[:, 4:] == 0).all() and (text[:, :4] != 0).any(-1).all()
    assert torch.allclose(encode_ids(encoder, ids[:, :4], mask[:, :4]), text[:, :4], atol=1e-6)


def test_batches_depend_only_on_seed_and_step():
    latents, settings = torch.randn(5, 16, 4, 16, 16), VideoSettings()
    batch, again = (batch_at(latents, 7, settings) for _ in range(2))
    assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in vars(batch))
    assert len(batch.clips) * batch.clips.shape[2] == settings.frames
    random = torch.Generator().manual_seed(0)
    early, late = (Counter(length_at(step, settings, random) for _ in range(300)) for step in (0, settings.steps - 1))
    assert set(early) == set(late) == set(LENGTHS)
    assert early[1] > 150 > 2 * late[1]


@pytest.mark.slow
def test_an_interrupted_training_resumes_with_the_same_result(tmp_path, monkeypatch):
    def trained(name):
        (tmp_path / name).mkdir(exist_ok=True)
        train_video(tmp_path / name / "out", tmp_path / name, SMALL, CPU, lambda _: None)
        return load_file(tmp_path / name / "transformer.safetensors")

    whole = trained("whole")
    monkeypatch.setattr(trainer, "batch_at", lambda *given: _stop() if given[1] == 2 else batch_at(*given))
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    monkeypatch.setattr(trainer, "batch_at", batch_at)
    again = trained("stopped")
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def _stop():
    raise KeyboardInterrupt
