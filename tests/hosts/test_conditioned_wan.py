"""Attention control of Wan's models with inputs besides text, on diffusers."""

import pytest
import torch

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, draw, edit, invert
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.methods.kv_edit import KVEditSettings
from tests.small import relative
from tests.wan import write_wan_i2v, write_wan_vace

SOURCE, TARGET, NEGATIVE = "a red square on water", "a green circle on water", "blue"
FRAMES, HEIGHT, WIDTH, STEPS = 3, 4, 6, 4
KINDS = ("2.1", "2.2", "flf2v", "5B", "vace")


class Everyone(Control):
    """The model's own attention, computed by a control."""


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("wan"), request.param
    found = open_model(str(write_wan_vace(folder) if kind == "vace" else write_wan_i2v(folder, kind)))
    for network in found.networks:
        network.double()
    pictures = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    shape = (FRAMES, found.channels, HEIGHT, WIDTH)
    return found.for_clip(ClipFacts(shape, 8.0, lambda: iter(pictures)))


@pytest.fixture(scope="module")
def latents(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(FRAMES, model.channels, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def text(model):
    return {name: model.encode_prompt(name, 48, 32) for name in (SOURCE, TARGET, NEGATIVE)}


@pytest.fixture(scope="module")
def inversion(model, latents, text):
    return invert(model.denoiser, latents, text[SOURCE], STEPS)


@pytest.fixture
def edited(model, inversion, text):
    pair = PromptEdit(SOURCE, TARGET, model.tokenizer)

    def run(fusion, mask=None, of=inversion):
        given = None if mask is None else GivenMask(torch.as_tensor(mask))
        matches = pair if isinstance(fusion, FusionSettings) else None
        return edit(model.denoiser, of, text[TARGET], text[NEGATIVE], 5.0, matches, fusion, mask=given)

    return run


def fused(**more):
    return FusionSettings(cross_replace_steps=0.0, self_replace_steps=1.0, **more)


@pytest.mark.parametrize("timestep", [950.0, 300.0])
def test_a_control_computes_the_models_attention(model, latents, text, timestep):
    """For several branches in any order, and on both sides of Wan 2.2's boundary."""
    control = Everyone(KeyFrames(("all",)), Chunk.whole(FRAMES))
    plain = {name: model.velocity(latents, timestep, text[name].to(latents), range(FRAMES)) for name in text}
    with model.denoiser.hooked():
        for order in (list(text), list(text)[::-1]):
            found = model.denoiser.predicted([(latents, text[name], control) for name in order], timestep)
            for name, velocity in zip(order, found, strict=True):
                assert relative(velocity, plain[name]) < 1e-6
    again = model.velocity(latents, timestep, text[TARGET].to(latents), range(FRAMES))
    assert torch.equal(again, plain[TARGET]), "the model is restored"


def test_the_memories_agree(model, latents, text, edited):
    results = [
        edited(FusionSettings(0.7, 0.6), of=invert(model.denoiser, latents, text[SOURCE], STEPS, memory=memory))
        for memory in ("recompute", "queries_keys", "maps")
    ]
    assert relative(results[1], results[0]) < 1e-6
    assert relative(results[2], results[0]) < 1e-6
    assert relative(results[0], edited(None)) > 1e-3


def test_a_mask_of_ones_keeps_the_edits_attention_and_of_zeros_the_sources(edited):
    full = edited(fused(blend_self_attention=True), torch.ones(1, HEIGHT, WIDTH))
    assert relative(full, edited(FusionSettings(0.0, 0.0))) < 1e-6
    none = edited(fused(blend_self_attention=True), torch.zeros(1, HEIGHT, WIDTH))
    assert relative(none, edited(fused())) < 1e-6
    assert relative(none, full) > 1e-4


def test_the_same_prompt_replays_the_clip(model, latents, text):
    drawn = draw(model.denoiser, latents, text[SOURCE], STEPS, FlowEditSettings(source_guidance=1.0))
    same = PromptEdit(SOURCE, SOURCE, model.tokenizer)
    found = edit(model.denoiser, drawn, text[SOURCE], None, 1.0, same, FusionSettings(1.0, 1.0))
    assert relative(found, latents) < 1e-6


def test_tokens_inside_a_mask(model, latents, text, edited):
    half = torch.zeros(1, HEIGHT, WIDTH)
    half[..., :2] = 1
    found = edited(KVEditSettings(grow=0), half)
    assert torch.equal(found[..., 2:], latents[..., 2:])
    assert relative(found[..., :2], latents[..., :2]) > 1e-2
    stored = invert(model.denoiser, latents, text[SOURCE], STEPS, memory="keys_values")
    assert relative(edited(KVEditSettings(grow=0), half, of=stored), found) < 1e-6


def test_the_first_frame_of_flow_edit_is_the_edits_picture(model, latents, text):
    """Also with guidance of the source's branch, whose negative prompt has the source's picture."""
    if not model.pipeline.config.get("expand_timesteps"):
        pytest.skip("the picture is no latent of the clip")
    others = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    own = model.for_clip(ClipFacts(tuple(latents.shape), 8.0, lambda: iter(others)))
    target, negative = (own.encode_prompt(name, 48, 32) for name in (TARGET, NEGATIVE))
    clip, picture = latents.clone(), own.inputs["first"][0].double()
    clip[0] = model.inputs["first"][0]
    for settings in (FlowEditSettings(source_guidance=4.0), FlowEditSettings(gain=1.3)):
        drawn = draw(model.denoiser, clip, text[SOURCE], STEPS, settings)
        found = edit(model.denoiser, drawn, target, negative, 5.0)
        assert relative(found[0], picture) < 1e-5
    assert relative(clip[0], picture) > 1e-2
