"""Tune-A-Video: both authors' results, including training steps, and invariants of temporal layers."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from fatezero import FusionSettings, PnPSettings, TokenFlowSettings, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.demo.model import build_scheduler
from fatezero.diffusion.parts import Edit
from fatezero.diffusion.training import clip_loss
from fatezero.hosts.diffusers.memory import LiveBytes, activation_bytes
from fatezero.hosts.diffusers.temporal import (
    convert_temporal_layers,
    inflated_unet,
    load_temporal_layers,
    save_inflated_unet,
    save_temporal_layers,
    temporal_layers,
)
from fatezero.hosts.diffusers.unet import DiffusersDenoiser, with_temporal_layers, without_temporal_layers
from fatezero.methods.tune_a_video import (
    ClassPictures,
    LayerSettings,
    TuneSettings,
    Validation,
    ValidationSettings,
    optimizer_class,
    tune,
)
from small import (
    FIXTURES,
    levels_of,
    random_latents,
    random_text,
    reference_denoiser,
    reference_inversion,
    relative,
    small_unet,
    stepped,
)

KEYS = ("first", "previous")
CASES = ("tav_official", "tav_fatezero_lora")


def given(name):
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    weights = {k.removeprefix("weights."): t.double() for k, t in tensors.items() if k.startswith("weights.")}
    return tensors | {k: tensors[k].double() for k in ("z0", "train_noise") if k in tensors}, weights


def with_layers(weights):
    denoiser = reference_denoiser()
    with_temporal_layers(denoiser.unet, weights)
    return denoiser


@pytest.mark.parametrize("name", ["tav_official", "tav_fatezero_lora", "tav_fatezero_conv"])
def test_the_authors_prediction_and_a_step_of_their_sampling(name):
    tensors, weights = given(name)
    denoiser = with_layers(weights)
    source = Condition.of(tensors["source"], "source")
    with torch.no_grad(), denoiser.hooked(clip_norm=True):
        control = Control(KeyFrames(KEYS), Chunk.whole(5))
        predicted = denoiser.predict_noise(tensors["z0"], 401, source, control)
    assert relative(predicted, tensors["predicted"]) < 1e-6
    inversion = reference_inversion(denoiser, tensors, tensors["uncond"], 5, KEYS, clip_norm=True)
    after = stepped(denoiser, inversion, Edit(tensors["target"], tensors["uncond"], 12.5), 2, tensors["sampled.2"])
    assert relative(after, tensors["sampled.3"].double()) < 5e-6, "stored latents are rounded to single precision"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "within"), [("tav_official", 1e-4), ("tav_fatezero_lora", 1e-6), ("tav_fatezero_conv", 1e-6)]
)
def test_the_authors_inversion_and_sampling(name, within):
    """The official case is chaotic: changing z0 by 1e-15 changes the sample by 3e-5; ours differs by 1.2e-5."""
    tensors, weights = given(name)
    denoiser = with_layers(weights)
    inversion = invert(denoiser, tensors["z0"], tensors["uncond"], steps=5, key_frames=KEYS, clip_norm=True)
    assert relative(inversion.latents[1::2], levels_of(tensors, "inverted", 5)[1::2]) < 1e-6
    sampled = edit(denoiser, inversion, tensors["target"], tensors["uncond"], 12.5)
    assert relative(sampled, tensors["sampled.5"].double()) < within


@pytest.mark.parametrize("name", CASES)
def test_the_authors_training(name):
    tensors, weights = given(name)
    denoiser = with_layers(weights)
    before = {k: w.detach().clone() for k, w in denoiser.trained().items()}
    frozen = {k: w.detach().clone() for k, w in denoiser.unet.state_dict().items()}
    norms = []
    draws = list(zip(tensors["train_timesteps"].tolist(), tensors["train_noise"], strict=True))
    losses = tune(
        denoiser,
        tensors["z0"],
        tensors["source"],
        TuneSettings(steps=3),
        draws,
        progress=lambda *values: norms.append(values[3]),
    )
    assert relative(torch.tensor(losses), tensors["train_losses"]) < 1e-6
    assert relative(torch.tensor(norms), tensors["train_grad_norms"]) < 1e-6
    after = denoiser.trained()
    expected = {k.removeprefix("tuned."): t.double() for k, t in tensors.items() if k.startswith("tuned.")}
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        change = (tensor - before[key]).norm()
        assert (after[key] - tensor).norm() < 1e-3 * change + 1e-7 * tensor.norm(), key
    tuned = {weight.data_ptr() for weight in after.values()}
    for key, weight in denoiser.unet.state_dict().items():
        assert weight.data_ptr() in tuned or torch.equal(weight, frozen[key]), key
    assert not any(w.grad is not None for w in denoiser.unet.parameters())


def test_the_authors_training_with_convolutions_and_class_pictures():
    """As in FateZero's files: each step on the clip follows one on pictures, without temporal layers."""
    tensors = {k: t.double() if t.is_floating_point() else t for k, t in given("tav_fatezero_trained")[0].items()}
    denoiser = with_layers(given("tav_fatezero_lora")[1])
    before = {k: w.detach().clone() for k, w in denoiser.trained(convolutions=True).items()}
    on_pictures, on_clip = [], []
    pictures = ClassPictures(
        tensors["class_latents"].flatten(0, 1),
        tensors["class_text"],
        draws=list(
            zip([(0, 1), (2, 3), (4, 5)], tensors["class_timesteps"].tolist(), tensors["class_noise"], strict=True)
        ),
        progress=lambda *values: on_pictures.append(values),
    )
    tune(
        denoiser,
        tensors["z0"],
        tensors["source"],
        TuneSettings(steps=3, train_convolutions=True),
        list(zip(tensors["train_timesteps"].tolist(), tensors["train_noise"], strict=True)),
        class_pictures=pictures,
        progress=lambda done, of, *values: on_clip.append(values),
    )
    values = torch.tensor([(*a, *b) for a, b in zip(on_pictures, on_clip, strict=True)], dtype=torch.float64)
    assert relative(values, tensors["losses"]) < 1e-6
    expected = {k.removeprefix("tuned."): t for k, t in tensors.items() if k.startswith("tuned.")}
    after = denoiser.trained(convolutions=True)
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        change = (tensor - before[key]).norm()
        assert (after[key] - tensor).norm() < 1e-3 * change + 1e-7 * tensor.norm(), key


# --- invariants -------------------------------------------------------------------------


def randomized(unet, seed=3):
    """Fresh layers with random output weights, so that frames attend to each other."""
    random = torch.Generator().manual_seed(seed)
    for layer in temporal_layers(with_temporal_layers(unet)).attentions.values():
        for weight in (layer.to_out.weight, layer.to_out.bias):
            weight.data = 0.3 * torch.randn(weight.shape, generator=random, dtype=torch.float64)
    return unet


def predicted(unet, latents, key_frames=("self",)):
    denoiser = DiffusersDenoiser(unet, build_scheduler())
    with torch.no_grad(), denoiser.hooked():
        control = Control(KeyFrames(tuple(key_frames)), Chunk.whole(len(latents)))
        return denoiser.predict_noise(latents, 401, Condition.of(random_text(2), "text"), control)


def test_fresh_layers_change_nothing_and_are_removed():
    unet, latents = small_unet(), random_latents(3)
    weights = {name: w.clone() for name, w in unet.state_dict().items()}
    plain = predicted(unet, latents)
    assert torch.equal(predicted(with_temporal_layers(unet), latents), plain)
    other = predicted(randomized(unet), latents)
    assert relative(other, plain) > 1e-2
    without_temporal_layers(unet)
    assert unet.state_dict().keys() == weights.keys()
    assert torch.equal(predicted(unet, latents), plain)
    assert not any(module._forward_hooks for module in unet.modules())


def test_other_weights_of_a_checkpoint_replace_the_models_until_removed():
    unet, latents = small_unet(), random_latents(2)
    plain = predicted(unet, latents)
    name = next(n for n, _ in unet.named_parameters() if n.endswith("attn1.to_q.weight"))
    tuned = unet.get_parameter(name).data.flip(0)
    weights = temporal_layers(with_temporal_layers(unet)).named()
    state = {n: w.detach().clone() for n, w in weights.items()} | {name: tuned}
    with_temporal_layers(unet, state)
    assert torch.equal(unet.get_parameter(name).data, tuned)
    assert relative(predicted(unet, latents), plain) > 1e-6
    without_temporal_layers(unet)
    assert torch.equal(predicted(unet, latents), plain)


def test_a_change_of_one_frame_changes_all():
    unet, latents = randomized(small_unet()), random_latents(4)
    changed = latents.clone()
    changed[2] += 1
    difference = (predicted(unet, changed) - predicted(unet, latents)).abs().amax((1, 2, 3))
    assert (difference > 1e-8).all()


def test_which_frames_sparse_causal_attention_changes():
    """Without temporal layers a change of frame j changes frames j and j + 1, of the first frame all."""
    latents = random_latents(4)
    for frame, frames in ((2, [2, 3]), (0, [0, 1, 2, 3])):
        changed = latents.clone()
        changed[frame] += 1
        unet = small_unet()
        difference = (predicted(unet, changed, KEYS) - predicted(unet, latents, KEYS)).abs().amax((1, 2, 3))
        assert (difference > 1e-9).nonzero()[:, 0].tolist() == frames


def test_names_and_counts_for_sds_shapes():
    """On the meta device: 686 keys of the base, 798 with the official set, 74,354,880 trained numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        base = set(unet.state_dict())
        with_temporal_layers(unet)
    layers = temporal_layers(unet)
    names = base | set(layers.named())
    assert (len(base), len(names)) == (686, 798)
    trained = DiffusersDenoiser(unet, build_scheduler()).trained()
    assert sum(weight.numel() for weight in trained.values()) == 74_354_880


def test_the_variant_with_convolutions_has_902_keys():
    _, weights = given("tav_fatezero_lora")
    assert sum("conv_temporal" in name for name in weights) == 104, "52 modules, two tensors each"
    assert 686 + sum("conv_temporal" in n or "temporal." in n for n in weights) == 902


@pytest.mark.parametrize(
    ("fusion", "propagation"), [(FusionSettings(), None), (PnPSettings(), None), (PnPSettings(), TokenFlowSettings(2))]
)
def test_other_methods_run_on_it(fusion, propagation):
    denoiser = DiffusersDenoiser(randomized(small_unet()), build_scheduler())
    inversion = invert(denoiser, random_latents(4), random_text(2), steps=2, key_frames=KEYS)
    edited = edit(denoiser, inversion, random_text(3), random_text(4), 3.0, fusion=fusion, propagation=propagation)
    assert edited.isfinite().all()
    chunked = edit(denoiser, inversion, random_text(3), random_text(4), 3.0, fusion=fusion, chunk_frames=3)
    assert relative(chunked, edited) > 1e-6, "windows approximate the whole clip"


def test_tuning_is_repeatable_lowers_the_loss_and_restores_gradients():
    latents, text = random_latents(3, 8, 8), random_text(2)

    def tuned(seed):
        denoiser = DiffusersDenoiser(with_temporal_layers(small_unet()), build_scheduler())
        torch.manual_seed(5)
        settings = TuneSettings(steps=6, learning_rate=3e-3, seed=seed)
        return tune(denoiser, latents, text, settings), denoiser

    torch.manual_seed(0)
    first, denoiser = tuned(1)
    assert not any(weight.requires_grad for weight in small_unet().parameters())
    fixed = [(401, random_latents(3, 8, 8, seed=9))] * 12
    losses = tune(denoiser, latents, text, TuneSettings(learning_rate=3e-3), fixed)
    assert losses[-1] < losses[0]
    assert len(first) == 6


def test_a_file_of_temporal_layers_fits_any_model_of_its_shapes(tmp_path):
    unet, latents = randomized(small_unet()), random_latents(3)
    save_temporal_layers(unet, tmp_path / "layers.safetensors")
    other = with_temporal_layers(small_unet(), load_temporal_layers(tmp_path / "layers.safetensors"))
    assert torch.equal(predicted(other, latents), predicted(unet, latents))
    with pytest.raises(ValueError, match="has no temporal layers"):
        save_temporal_layers(small_unet(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no temporal layers at"):
        load_temporal_layers(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="not a valid safetensors"):
        load_temporal_layers(tmp_path / "text.safetensors")


@pytest.mark.parametrize("name", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)])
def test_a_folder_of_the_official_layout(tmp_path, name):
    """With the official class names, recognised by its weights; loaded again it computes the same."""
    _, weights = given(name)
    denoiser = with_layers(weights)
    save_inflated_unet(denoiser.unet, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "3D" in config["_class_name"] and all("3D" in block for block in config["down_block_types"])
    file = torch.load(tmp_path / "diffusion_pytorch_model.bin", weights_only=True)
    base = reference_denoiser().unet.state_dict()
    assert file.keys() == base.keys() | weights.keys()
    again = inflated_unet(tmp_path, torch.float64)
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in denoiser.unet.state_dict().items())
    (tmp_path / "other").mkdir()
    assert inflated_unet(tmp_path / "other", torch.float64) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"down_blocks.0.temp_convs.0.conv1.0.weight": torch.zeros(1)}, "ModelScope's temporal layers"),
        ({"down_blocks.0.motion_modules.0.proj.weight": torch.zeros(1)}, "AnimateDiff's temporal layers"),
        ({"conv_in.weight": torch.zeros(1)}, "has no temporal layers"),
        ({"nowhere.attn_temp.to_q.weight": torch.zeros(2, 2)}, "the checkpoint lacks"),
    ],
)
def test_other_layers_are_refused_by_name(weights, message):
    unet = small_unet()
    with pytest.raises(ValueError, match=message):
        with_temporal_layers(unet, weights)
    assert temporal_layers(unet) is None


def test_layers_that_do_not_fit_are_refused_by_name():
    unet = small_unet()
    weights = {n: w.detach().clone() for n, w in temporal_layers(with_temporal_layers(unet)).named().items()}
    name = next(iter(weights))
    with pytest.raises(ValueError, match=f"{name} is .*; this model needs"):
        with_temporal_layers(unet, weights | {name: torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="has a weight conv_never.weight"):
        with_temporal_layers(unet, weights | {"conv_never.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no temporal layers to tune"):
        tune(DiffusersDenoiser(small_unet(), build_scheduler()), random_latents(2), random_text(1))


# --- fresh layers and the two kinds -------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
def test_fresh_layers_with_convolutions_change_nothing(rank):
    unet, latents = small_unet(), random_latents(3)
    plain = predicted(unet, latents)
    names = temporal_layers(with_temporal_layers(unet, kind="fatezero", rank=rank)).named()
    assert torch.equal(predicted(unet, latents), plain)
    convolved = [name for name, m in small_unet().named_modules() if getattr(m, "kernel_size", None) == (3, 3)]
    assert sum("conv_temporal" in name for name in names) == 2 * len(convolved)


def test_rank_needs_convolutions():
    with pytest.raises(ValueError, match="rank has no effect"):
        LayerSettings(rank=4)


def test_the_two_kinds_convert_without_loss():
    unet, latents = randomized(small_unet()), random_latents(3)
    before = {name: w.detach().clone() for name, w in temporal_layers(unet).named().items()}
    expected = predicted(unet, latents)
    convert_temporal_layers(unet)
    assert temporal_layers(unet).kind == "fatezero"
    assert torch.equal(predicted(unet, latents), expected)
    convert_temporal_layers(unet)
    after = temporal_layers(unet).named()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="no temporal layers"):
        convert_temporal_layers(small_unet())


@pytest.mark.parametrize("rank", [None, 3])
def test_convolutions_with_an_effect_are_not_dropped(rank):
    unet = with_temporal_layers(small_unet(), kind="fatezero", rank=rank)
    convert_temporal_layers(unet)
    assert temporal_layers(unet).kind == "official", "identities are dropped without loss"
    unet = with_temporal_layers(small_unet(), kind="fatezero", rank=rank)
    conv = next(iter(temporal_layers(unet).convolutions.values()))
    (conv.full if rank is None else conv.up).weight.data[0, 0, 0] = 0.5
    with pytest.raises(ValueError, match="no convolution over frames"):
        convert_temporal_layers(unet)


# --- tuning -------------------------------------------------------------------------------


def fresh_denoiser(dtype=torch.float64, kind="official", **scheduler):
    torch.manual_seed(4)
    unet = with_temporal_layers(small_unet(), kind=kind).to(dtype)
    return DiffusersDenoiser(unet, DDIMScheduler.from_config(build_scheduler().config, **scheduler))


LATENTS, TEXT, FAST = random_latents(3, 8, 8), random_text(2), TuneSettings(steps=5, learning_rate=1e-2, seed=3)


def test_an_interrupted_tuning_resumes_with_the_same_result():
    whole, states = fresh_denoiser(), []
    losses = tune(whole, LATENTS, TEXT, FAST, deviation=0.1 * torch.ones_like(LATENTS))
    first = fresh_denoiser()
    short = replace(FAST, steps=3)
    tune(first, LATENTS, TEXT, short, deviation=0.1 * torch.ones_like(LATENTS), keep=states.append, keep_every=2)
    assert [len(state["losses"]) for state in states] == [2, 3]
    for state in states:
        again = fresh_denoiser()
        done = tune(again, LATENTS, TEXT, FAST, deviation=0.1 * torch.ones_like(LATENTS), resume=state)
        assert done == losses
        assert all(torch.equal(w, whole.trained()[n]) for n, w in again.trained().items())


def test_a_state_of_another_tuning_is_refused():
    states = []
    tune(fresh_denoiser(), LATENTS, TEXT, replace(FAST, steps=1), keep=states.append)
    with pytest.raises(ValueError, match="seed 3, not 4"):
        tune(fresh_denoiser(), LATENTS, TEXT, replace(FAST, seed=4), resume=states[0])
    other = DiffusersDenoiser(with_temporal_layers(small_unet(), kind="fatezero"), build_scheduler())
    with pytest.raises(ValueError, match="another model"):
        tune(other, LATENTS, TEXT, FAST, resume=states[0])


def test_the_autoencoder_is_sampled_anew_in_each_step():
    plain, spread, again = (
        tune(fresh_denoiser(), LATENTS, TEXT, replace(FAST, learning_rate=0.0), deviation=deviation)
        for deviation in (None, *(0.5 * torch.ones_like(LATENTS),) * 2)
    )
    assert spread == again and all(a != b for a, b in zip(plain, spread, strict=True))


def test_a_model_that_predicts_v_is_trained_on_v():
    """v = sqrt(abar) eps - sqrt(1 - abar) z (arXiv 2202.00512)."""
    denoiser, timestep, noise = fresh_denoiser(prediction_type="v_prediction"), 601, random_latents(3, 8, 8, seed=7)
    signal = denoiser.scheduler.alphas_cumprod[timestep].double()
    noisy = signal.sqrt() * LATENTS + (1 - signal).sqrt() * noise
    with torch.no_grad(), denoiser.hooked(clip_norm=True):
        epsilon = denoiser.predict_noise(
            noisy, timestep, Condition.of(TEXT, "text"), Control(KeyFrames(KEYS), Chunk.whole(3))
        )
    v = (epsilon - (1 - signal).sqrt() * noisy) / signal.sqrt()
    expected = ((v - (signal.sqrt() * noise - (1 - signal).sqrt() * LATENTS)) ** 2).mean()
    (loss,) = tune(denoiser, LATENTS, TEXT, TuneSettings(steps=1), [(timestep, noise)])
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# --- class pictures, prior and validation -------------------------------------------------


PICTURES = ClassPictures(random_latents(5, 8, 8, seed=20), random_text(5), 0.1 * torch.ones(5, 4, 8, 8))


def test_a_tuning_with_class_pictures_resumes_with_the_same_result():
    settings, states = replace(FAST, class_batch=2, prior_preservation=0.5), []
    whole, first, again = fresh_denoiser(), fresh_denoiser(), fresh_denoiser()
    losses = tune(whole, LATENTS, TEXT, settings, class_pictures=PICTURES)
    tune(first, LATENTS, TEXT, replace(settings, steps=3), class_pictures=PICTURES, keep=states.append)
    assert tune(again, LATENTS, TEXT, settings, class_pictures=PICTURES, resume=states[-1]) == losses
    assert all(torch.equal(w, whole.trained()[n]) for n, w in again.trained().items())
    assert losses != tune(fresh_denoiser(), LATENTS, TEXT, settings)


def test_class_pictures_do_not_change_temporal_layers():
    denoiser, norms = fresh_denoiser(), []
    before = {n: w.detach().clone() for n, w in denoiser.trained().items()}
    still = [(401, random_latents(3, 8, 8, seed=9))]
    pictures = replace(PICTURES, progress=lambda loss, norm: norms.append(norm))
    settings = TuneSettings(steps=1, learning_rate=1e-2, clip_gradients=0)  # so that no gradient remains
    tune(denoiser, LATENTS, TEXT, settings, still, class_pictures=pictures)
    assert len(norms) == 1 and norms[0] > 0
    temporal = {n: w for n, w in denoiser.trained().items() if "attn_temp" in n}
    assert temporal and all(torch.equal(w, before[n] * (1 - 1e-4)) for n, w in temporal.items()), "one decay"


def test_prior_preservation_adds_the_distance_from_the_untuned_image_model():
    noise, t = random_latents(3, 8, 8, seed=7), 601
    denoiser = DiffusersDenoiser(randomized(small_unet()), build_scheduler())
    plain, with_prior = (
        tune(denoiser, LATENTS, TEXT, TuneSettings(1, learning_rate=0, prior_preservation=weight), [(t, noise)])[0]
        for weight in (0.0, 2.0)
    )
    noisy, _ = denoiser.noised(LATENTS, noise, t)
    condition = Condition.of(TEXT, "text")
    with torch.no_grad():
        with denoiser.hooked(clip_norm=True):
            whole = denoiser.predict_noise(noisy, t, condition, Control(KeyFrames(KEYS), Chunk.whole(3)))[:1]
        image = DiffusersDenoiser(small_unet(), build_scheduler())
        with image.hooked():
            single = image.predict_noise(noisy[:1], t, condition, Control(KeyFrames(("self",)), Chunk.whole(1)))
    assert with_prior - plain == pytest.approx(2 * ((whole - single) ** 2).mean().item(), rel=1e-6)


def test_validation_clips_equal_an_inversion_and_an_edit():
    shown, denoiser, empty = {}, fresh_denoiser(), random_text(6)
    validation = Validation(
        [random_text(7), random_text(8)], empty, empty, shown.__setitem__, ValidationSettings(2, 3, 4.0)
    )
    losses = tune(denoiser, LATENTS, TEXT, FAST, validation=validation)
    assert list(shown) == [2, 4, 5] and losses == tune(fresh_denoiser(), LATENTS, TEXT, FAST)
    inversion = invert(denoiser, LATENTS, empty, steps=3, key_frames=KEYS, clip_norm=True)
    for clip, seed in zip(shown[5], (7, 8), strict=True):
        expected = edit(denoiser, inversion, random_text(seed), empty, 4.0, fusion=None, prompt=None)
        assert relative(clip, expected) < 1e-9


def test_convolutions_to_train_must_exist():
    with pytest.raises(ValueError, match="train_convolutions has no effect"):
        tune(fresh_denoiser(), LATENTS, TEXT, replace(FAST, train_convolutions=True))
    with pytest.raises(TypeError, match="unknown"):
        tune(fresh_denoiser(), LATENTS, TEXT, FAST, unknown=1)


@pytest.mark.parametrize("kind", ["official", "fatezero"])
def test_trained_weights_of_a_half_precision_model_are_float32(kind):
    denoiser, dtypes, convolutions = fresh_denoiser(torch.bfloat16, kind=kind), [], kind == "fatezero"
    begun = {name: w.detach().clone() for name, w in denoiser.trained(convolutions).items()}

    def look(*_):
        dtypes.append({weight.dtype for weight in denoiser.trained(convolutions).values()})

    settings = replace(FAST, train_convolutions=convolutions)
    losses = tune(denoiser, LATENTS.float(), TEXT.float(), settings, progress=look)
    assert dtypes == [{torch.float32}] * 5 and all(loss == loss for loss in losses)
    assert all(w.dtype == torch.bfloat16 for w in denoiser.trained(convolutions).values())
    assert any(not torch.equal(w, begun[name]) for name, w in denoiser.trained(convolutions).items())
    assert not any("forward" in vars(module) for module in denoiser.unet.modules())
    exact = tune(fresh_denoiser(torch.float32, kind=kind), LATENTS.float(), TEXT.float(), settings)
    assert losses == pytest.approx(exact, rel=0.05)


def test_a_tuned_model_reconstructs_its_clip_better():
    """At each timestep the loss is lower than before tuning."""

    def error(denoiser):
        with torch.no_grad(), denoiser.hooked(clip_norm=True):
            return [
                clip_loss(
                    denoiser, LATENTS, random_latents(3, 8, 8, seed=t), t, Condition.of(TEXT, "t"), KeyFrames(KEYS)
                ).item()
                for t in range(50, 1000, 150)
            ]

    denoiser = fresh_denoiser()
    before = error(denoiser)
    tune(denoiser, LATENTS, TEXT, replace(FAST, steps=30))
    assert sum(error(denoiser)) < 0.97 * sum(before)


def test_the_8_bit_optimizer_names_its_package():
    with pytest.raises(ImportError, match="needs bitsandbytes"):
        optimizer_class("adamw8bit")


def test_nan_values_end_a_tuning():
    with pytest.raises(ArithmeticError, match="step 1 of the tuning"):
        tune(fresh_denoiser(), LATENTS * float("inf"), TEXT, FAST)


def test_memory_is_estimated():
    """Compared with a real step of a model wide enough for small tensors not to matter."""
    torch.manual_seed(0)
    unet = small_unet(block_out_channels=(32, 32), attention_head_dim=4).float()
    denoiser = DiffusersDenoiser(with_temporal_layers(unet), build_scheduler())
    shape, text, keys = (8, 4, 32, 32), Condition.of(random_text(2).float(), "text"), KeyFrames(KEYS)
    estimate = activation_bytes(denoiser, shape, text, keys, clip_norm=True)
    latents = torch.randn(shape)
    with torch.enable_grad(), denoiser.training(), denoiser.hooked(True):
        gradients = sum(weight.nbytes for weight in denoiser.trained().values())
        with LiveBytes() as live:
            clip_loss(denoiser, latents, torch.randn(shape), 500, text, keys).backward()
    assert estimate == pytest.approx(live.most - gradients, rel=0.15)
    assert estimate < 0.5 * activation_bytes(denoiser, shape, text, keys, True, recompute=False)
