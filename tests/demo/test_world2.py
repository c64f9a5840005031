"""World 2: scenes with ground truth, a judge that needs no weights, cases, and trainers that resume."""

import json
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from fatezero.benchmark.run import BenchmarkSettings, check_world, chosen_methods, run_benchmark
from fatezero.demo import model, video_model
from fatezero.demo.scenes import visible_pixels
from fatezero.demo.training import TRIAL, Plan, train_weights
from fatezero.demo.world2 import train as trainer
from fatezero.demo.world2.cases import KINDS, OF_A_THING, sample_cases
from fatezero.demo.world2.data import NOTHING, Latents, captions_of, owners_of_words
from fatezero.demo.world2.judge import UNREAD, read_word
from fatezero.demo.world2.model import (
    LATENT_SIZE,
    TEXT_TOKENS,
    ShapeReader,
    WordReader,
    area_weight,
    build_transformer,
    build_unet,
)
from fatezero.demo.world2.render import render
from fatezero.demo.world2.scenes import (
    ACTIONS,
    SHAPES,
    SIZE,
    VOCABULARY,
    WORDS,
    Motion,
    Scene,
    Thing,
    Track,
    random_scene,
    scenes,
)
from fatezero.files.bundled import WORLD2
from fatezero.video.motion import warp

CPU = torch.device("cpu")
FISH = Scene((Thing("red", "fish", "striped", "big", "gliding"), Thing("blue", "ball", place="right")), "bricks")
PASSING = Motion((Track(0, 0), Track(-8, 4)), pan=(10.0, 4.0), zoom=0.2)


def shifted(frames, seed=0):
    """Frames with the errors of a weak autoencoder: soft, and noisy."""
    soft = torch.nn.functional.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    return soft + 0.04 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))


# --- scenes and pictures ----------------------------------------------------------------


def test_captions_are_parsed_back_and_each_word_is_a_token(tmp_path):
    random = Random(0)
    drawn = [random_scene(random) for _ in range(300)]
    clip, t5 = model.build_tokenizer(tmp_path, VOCABULARY), video_model.build_tokenizer(VOCABULARY, TEXT_TOKENS)
    for scene in drawn:
        assert Scene.parse(scene.caption) == scene
        assert set(scene.caption.split()) <= set(VOCABULARY)
    for tokenizer in (clip, t5):
        assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in VOCABULARY)
    captions = [scene.caption for scene in drawn]
    assert video_model.token_ids(t5, captions)[1].sum(1).max() < TEXT_TOKENS


@pytest.mark.parametrize(
    "caption", ["a red circle", "a red dog on sand", "a red ball at noon on sand", "a ball on ice"]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="world 2"):
        Scene.parse(caption)


def test_scenes_repeat_by_seed_and_training_lacks_held_out_ones():
    def first(held_out):
        return list(islice(scenes(3, held_out), 30))

    assert first(False) == first(False)
    assert not any(scene.held_out for scene, _ in first(False))
    assert all(scene.held_out for scene, _ in first(True))


def test_pictures_repeat_and_are_those_of_the_clip():
    clip, again = (render(FISH, PASSING, 5) for _ in range(2))
    assert torch.equal(clip.frames, again.frames)
    assert clip.frames.shape == (5, 3, SIZE, SIZE) and clip.masks.shape == (2, 5, SIZE, SIZE)
    single = render(FISH, PASSING, 5, at=[0.0])
    assert torch.allclose(single.frames[0], clip.frames[2], atol=1e-5)


def test_the_front_thing_hides_the_one_behind():
    both, behind = render(FISH, PASSING, 3), render(replace(FISH, things=FISH.things[1:]), PASSING.without(0), 3)
    assert both.masks.sum(0).max() <= 1 + 1e-6
    assert torch.allclose(both.masks[1], behind.masks[0] * (1 - both.masks[0]))
    assert both.masks[1].sum() < 0.95 * behind.masks[0].sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("action", ACTIONS)
def test_flow_carries_each_frame_to_the_next(shape, action):
    scene = Scene((Thing("red", shape, "dotted", "big", action),), "bricks", clutter="stones")
    clip = render(scene, replace(PASSING, tracks=PASSING.tracks[:1]), 17)
    seen = visible_pixels(clip)[:, None]
    moved, still = warp(clip.frames[1:], clip.flow), clip.frames[1:]

    def error(frames):
        return ((frames - clip.frames[:-1]).abs() * seen).sum() / seen.sum() / 3

    assert error(moved) < 0.025
    assert error(moved) < 0.5 * error(still)


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_of_an_edit_differs_only_where_its_words_say(kind):
    (case,) = sample_cases(1, 1, 3, [kind])
    (again,) = sample_cases(1, 1, 3, [kind])
    assert case == again and case.source.held_out | case.target.held_out
    changed = (case.clip.frames - case.truth.frames).abs().amax(1) > 1 / 255
    assert changed.any()
    if case.at is not None and case.source.style == "photo":
        assert (changed & (case.clip.mask == 0) & (case.truth.mask == 0)).sum() == 0
    if kind in OF_A_THING:
        assert [word for _, word in case.changed] == [kind]


# --- the judge --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_reads_the_truth_as_the_target_and_the_source_as_not(kind):
    (case,) = sample_cases(2, 1, 9, [kind])
    assert case.judged(shifted(case.truth.frames)) == [(True, True, True)] * 5
    changed = [changed for changed, _, _ in case.judged(shifted(case.clip.frames))]
    assert sum(changed) <= (4 if kind == "action" else 0)


@pytest.mark.parametrize("kind", WORDS)
def test_every_word_is_read_from_soft_pictures(kind):
    place = (None if kind in ("background", "clutter", "style") else 0, kind)
    at = [-0.5, 0.25]
    for word in WORDS[kind]:
        scene = FISH.with_word(place, word)
        frames = shifted(render(scene, PASSING, at=at).frames)
        assert read_word(FISH, PASSING, frames, place, at) == [word] * 2


def test_a_picture_without_likeness_is_unread():
    noise = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert read_word(FISH, PASSING, noise, (0, "shape"), [-0.5, 0.25]) == [UNREAD] * 2


# --- models and trainers ----------------------------------------------------------------


def test_shapes_are_read_from_a_layer_and_things_weigh_more():
    unet = build_unet()
    reader = ShapeReader(unet.up_blocks[0], 64)
    owner = torch.zeros(2, LATENT_SIZE, LATENT_SIZE, dtype=torch.uint8)
    owner[:, :16] = 3
    unet(torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE), 500, torch.randn(2, 77, 64))
    reader(owner).backward()
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.abs().sum() > 0
    weight = area_weight(owner)
    assert weight.mean() == pytest.approx(1) and weight[:, 0].min() == pytest.approx(3 * weight[:, -1].max().item())


def test_the_words_of_a_caption_describe_its_things():
    random = Random(1)
    for scene in (random_scene(random) for _ in range(50)):
        assert " ".join(word for word, _ in scene.described()) == scene.caption
    caption = "comic drawing of a big striped red fish at left in front of a blue ball on sand with stones"
    fish, ball = (SHAPES.index(shape) + 1 for shape in ("fish", "ball"))
    expected = [NOTHING] * 4 + [fish] * 7 + [NOTHING] * 3 + [ball] * 3 + [NOTHING] + [0] * 3 + [NOTHING] * 3
    assert owners_of_words(caption, 24, before=1).tolist() == expected
    assert owners_of_words("", 4).tolist() == [NOTHING] * 4


def test_attention_to_the_words_of_what_covers_a_place_is_measured():
    """Queries of zero attend evenly: to a fish's words in 3 of 8 tokens, to the ground's in 2, to no ball's."""
    unet, transformer = build_unet(), build_transformer()
    owner = torch.zeros(2, 1, LATENT_SIZE, LATENT_SIZE, dtype=torch.uint8)
    owner[0, :, :16], owner[1, :, :16] = 1, 2
    words = torch.tensor([[NOTHING, 1, 1, 1, NOTHING, 0, 0, NOTHING]] * 2, dtype=torch.uint8)
    fish, ground = (-torch.tensor(share + 1e-4).log() for share in (3 / 8, 2 / 8))
    expected = (3 * fish + ground + ground) / 5  # things weigh three times as much, and the ball is not told of
    x, text = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE), torch.randn(2, 8, 64)
    for layer, call in (
        (unet.mid_block.attentions[0].transformer_blocks[0].attn2, lambda: unet(x, 500, text)),
        (transformer.blocks[1].attn2, lambda: transformer(x[:, :, None], torch.tensor([500.0, 500]), text)),
    ):
        for weight in layer.to_q.parameters():
            torch.nn.init.zeros_(weight)
        reader = WordReader([layer])
        call()
        error = reader(owner, words)
        assert error.item() == pytest.approx(expected.item(), rel=1e-4)
        error.backward()
        assert layer.to_q.weight.grad.abs().sum() > 0
        assert reader(owner, torch.full_like(words, NOTHING)) == 0
        reader.remove()
        assert not layer._forward_pre_hooks


def test_models_trained_on_a_gpu_have_5_to_10_million_parameters():
    large = trainer.Settings()
    for network in (build_unet(large.width), build_transformer(large.heads, large.ffn)):
        assert 5e6 < sum(weight.numel() for weight in network.parameters()) < 10e6


@pytest.mark.parametrize("part", ["unet", "wan"])
def test_a_training_starts_from_finished_models_of_other_sizes(tmp_path, part):
    bundled, settings = WORLD2, replace(trainer.Settings().tiny(), unet_steps=0, steps=0)
    run = trainer.Run(tmp_path, tmp_path / "state", [part], start=bundled)
    trainer.train(run, settings, CPU, lambda _: None)
    files = sorted(
        path.relative_to(bundled) for path in (bundled / part).rglob("*.safetensors") if "vae" not in path.parts
    )
    assert files
    for file in files:
        own, found = load_file(bundled / file), load_file(tmp_path / file)
        assert own.keys() == found.keys() and all(torch.equal(found[name], own[name]) for name in own)
    names = [path.read_text(encoding="utf-8") for path in (tmp_path / part).rglob("*.json")]
    assert not any(str(bundled) in text for text in names), "no path of this machine"


def test_bundled_models_do_not_name_the_folder_that_they_were_trained_from():
    files = list(WORLD2.parent.rglob("config.json"))
    assert files
    assert not [file for file in files if "/" in str(json.loads(file.read_text()).get("_name_or_path", ""))]


def test_latents_grow_by_whole_files_and_are_read_back(tmp_path):
    vae = trainer.load_vae()

    def grown():
        latents = Latents(tmp_path, vae, clips=False, part=1, parts=2)
        assert latents.grow(3) and not latents.grow(4)
        return latents

    first, second = grown(), grown()
    assert len(list(tmp_path.iterdir())) == 2
    assert first.captions == second.captions == [c for n in (0, 1, 1000, 1001) for c in captions_of((n, 1, False))]
    chosen, owned = first.at(torch.tensor([3, 0]))
    assert chosen.shape == (2, 1, 4, LATENT_SIZE, LATENT_SIZE) and (owned > 0).any()
    assert torch.equal(chosen, second.at(torch.tensor([3, 0]))[0])


def test_a_training_of_some_minutes_keeps_its_number_of_steps(tmp_path):
    def train(stop=None):
        weight, done = torch.nn.Parameter(torch.ones(2)), []

        def error_of(step):
            done.append(step)
            if step == stop:
                _stop()
            weight.square().sum().backward()
            return 1.0

        plan = Plan("test", tmp_path / "state.safetensors", 7, 1e-3, 0.9, save_every=1, minutes=1e-9)
        train_weights({"weight": weight}, plan, error_of, lambda _: None)
        return done

    with pytest.raises(KeyboardInterrupt):
        train(stop=5)
    assert train() == list(range(5, 6 + TRIAL)), "it ends once it is measured"
    assert train() == []


@pytest.mark.slow
def test_methods_run_on_world_2_with_its_models(tmp_path):
    trainer.train(trainer.Run(tmp_path, tmp_path / "state"), trainer.Settings().tiny(), CPU, lambda _: None)
    settings = BenchmarkSettings(each=1, kinds=("removal",), frames=3, steps=2, model=str(tmp_path), world=2)
    methods = chosen_methods(["autoencoder only", "FateZero+", "Wan: FateZero+"], quick=False)
    check_world(settings, methods)
    rows = run_benchmark(tmp_path / "run", settings, methods)
    assert [row["method"] for row in rows] == [method.name for method in methods]
    assert rows[0]["changed"] == 0 and rows[0]["kept"] == 1 and rows[0]["preserved_db"] > 22


def test_the_bundled_model_edits_colours(tmp_path):
    settings = BenchmarkSettings(each=2, kinds=("colour",), frames=3, steps=10, world=2)
    methods = chosen_methods(["autoencoder only", "FateZero+"], quick=False)
    check_world(settings, methods)
    before, after = (
        [row for row in run_benchmark(tmp_path, settings, methods) if row["method"] == m.name] for m in methods
    )
    assert all(row["changed"] == 0 for row in before)
    assert sum(row["success"] for row in after) / len(after) > 0.5


def test_the_bundled_transformer_edits_clutter_and_fusion_keeps_the_rest(tmp_path):
    settings = BenchmarkSettings(each=2, kinds=("clutter",), frames=3, steps=10, seed=31, world=2)
    methods = chosen_methods(["Wan: inversion + prompt", "Wan: FateZero+"], quick=False)
    check_world(settings, methods)
    rows = run_benchmark(tmp_path, settings, methods)
    lost, fused = ([row for row in rows if row["method"] == method.name] for method in methods)
    assert all(row["kept"] == 0 for row in lost) and all(row["kept"] == 1 for row in fused)
    assert sum(row["success"] for row in fused) >= 1
    assert all(own["preserved_db"] > 5 + other["preserved_db"] for own, other in zip(fused, lost, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "missing"}, "folder"),
        ({"pairs": (("a red circle on sand", "a blue circle on sand"),)}, "pairs"),
        ({"methods": ["Wan: few_steps"]}, "first world"),
    ],
)
def test_settings_that_world_2_lacks_are_refused(tmp_path, given, message):
    for part in ("unet", "wan"):
        (tmp_path / part).mkdir()
    names = given.pop("methods", ["FateZero+"])
    settings = BenchmarkSettings(**{"world": 2, "model": str(tmp_path), **given})
    with pytest.raises(ValueError, match=message):
        check_world(settings, chosen_methods(names, quick=False))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "wan"])
def test_a_stopped_training_resumes_with_the_same_result(tmp_path, monkeypatch, part):
    settings, file = trainer.Settings().tiny(), {"unet": "painter", "wan": "transformer"}[part]

    def trained(name):
        trainer.train(trainer.Run(tmp_path / name, tmp_path / name, [part]), settings, CPU, lambda _: None)
        return load_file(tmp_path / name / f"{file}.safetensors")

    whole, grow = trained("whole"), trainer.grown
    monkeypatch.setattr(trainer, "grown", lambda *given: grow(*given) if given[2] == 0 else _stop())
    with pytest.raises(KeyboardInterrupt):
        trained("stopped")
    monkeypatch.setattr(trainer, "grown", grow)
    again = trained("stopped")
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def _stop():
    raise KeyboardInterrupt
