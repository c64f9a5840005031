"""FlowEdit: the authors' results, its equations on a flow and on DDIM, and combined with other parts."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file

from fatezero import (
    FlowEditSettings,
    FlowSmoothing,
    FusionSettings,
    Moved,
    MoveObjects,
    PromptEdit,
    Shift,
    TokenFlowSettings,
    Windows,
    draw,
    edit,
    invert,
)
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk
from fatezero.attention.masks import GivenMask
from fatezero.demo.model import build_scheduler
from fatezero.demo.video_model import build_tokenizer
from fatezero.diffusion.denoiser import Guidance
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.diffusion.unipc import UniPC
from fatezero.hosts.diffusers import DiffusersDenoiser, VideoTransformerDenoiser
from fatezero.recipes.recipe import Recipe
from tests.hosts import test_transformer as wan
from tests.small import FIXTURES, random_latents, random_text, relative, small_unet

STEPS = 5


# --- the authors' results -------------------------------------------------------------------


class ReferenceWan(VideoTransformerDenoiser):
    """The transformer of the reference results, with one result's timesteps and sigmas."""

    def __init__(self, given):
        weights = load_file(FIXTURES / "flow_edit.safetensors")
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=3
        )
        transformer.load_state_dict({k[8:]: t for k, t in weights.items() if k.startswith("weights.")})
        super().__init__(transformer.double().eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.timesteps, self.sigmas = tuple(given["timesteps"].tolist()), given["sigmas"]

    def schedule(self, steps):
        return FlowSchedule.of(self.timesteps, self.sigmas.flip(0))


@pytest.mark.parametrize(
    ("name", "recipe", "first"),
    [
        ("flow_edit", Recipe(noise=FlowEditSettings(3.5, draws=2), guidance_scale=13.5), 3),
        ("flow_edit_n_min", Recipe(noise=FlowEditSettings(3.5, n_min=3), guidance_scale=13.5), 3),
        ("wan_edit", Recipe.of_preset("wan_edit"), 9),
    ],
)
def test_the_authors_results_are_reproduced(name, recipe, first):
    """The authors' code rounds the edit to single precision in each step (6e-8); guidance amplifies it to 6e-7."""
    given = load_file(FIXTURES / f"{name}.safetensors")
    z0, source, target, negative, noises = (
        given[key].double() for key in ("z0", "source", "target", "negative", "noises")
    )
    denoiser, steps = ReferenceWan(given), len(given["timesteps"])
    drawn = draw(denoiser, z0, source, steps, recipe.noise, noises=noises)
    done = edit(denoiser, drawn, target, negative, recipe.guidance_scale, strength=1 - first / steps)
    assert relative(done, given["edited"].double()) < 1e-6


@pytest.mark.parametrize("first", [0, 3])
def test_unipc_equals_diffusers(first):
    """For non-linear predictions, from the first step and from the middle."""
    theirs = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    theirs.set_timesteps(8)
    theirs.set_begin_index(first)
    schedule = FlowSchedule.of(tuple(theirs.timesteps.tolist()), theirs.sigmas.flip(0))
    ours, z, expected = UniPC(schedule), *(torch.randn(2, 3, 4, 4, dtype=torch.float64),) * 2
    for step in range(first, 8):
        z = ours.move(z, (3 * z).sin() + step, 8 - step, 7 - step)
        expected = theirs.step((3 * expected).sin() + step, theirs.timesteps[step], expected).prev_sample
    assert relative(z, expected) < 1e-6


# --- the equations --------------------------------------------------------------------------


class World:
    """A model with a clip and prompts of matching shapes."""

    def __init__(self, name):
        if name == "flow":
            self.denoiser = VideoTransformerDenoiser(wan.small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
            self.clip, self.text = wan.random_latents(), wan.random_text
        else:
            self.denoiser = DiffusersDenoiser(small_unet(), build_scheduler())
            self.clip, self.text = random_latents(2, 8, 8), random_text

    def edited(self, settings=None, target=3, guidance_scale=5.0, noises=None, **more):
        inversion = draw(self.denoiser, self.clip, self.text(2), STEPS, settings, "self", noises=noises)
        return edit(self.denoiser, inversion, self.text(target), self.text(4), guidance_scale, **more)


@pytest.fixture(scope="module", params=["flow", "ddim"])
def world(request):
    return World(request.param)


def reference(world, settings, guidance_scale, first):
    """The paper's algorithm, in latents scaled so that the clean clip has factor 1."""
    denoiser, clip = world.denoiser, world.clip
    schedule = denoiser.schedule(STEPS)
    levels = draw(denoiser, clip, world.text(2), STEPS, settings, "self").store.drawn
    source, target, negative = (Condition(world.text(seed)) for seed in (2, 3, 4))
    keys = draw(denoiser, clip, world.text(2), STEPS, settings, "self").store.key_frames
    plain = Control(keys, Chunk.whole(len(clip)))

    def predicted(z, timestep, text, scale):
        return denoiser.predict_noise(z, timestep, text, plain, Guidance(negative, plain, scale))

    x = clip
    with denoiser.hooked():
        for step in range(first, STEPS):
            level, timestep, differences = STEPS - step, schedule.timesteps[step], []
            for number in range(settings.draws):
                z_source = levels.of_draw(number)[level]
                z = z_source + schedule.scale(level) * (x - clip)
                differences.append(
                    predicted(z, timestep, target, guidance_scale)
                    - predicted(z_source, timestep, source, settings.source_guidance)
                )
            x = x + (schedule.sigma(level - 1) - schedule.sigma(level)) * torch.stack(differences).mean(0)
    return x


@pytest.mark.parametrize("settings", [FlowEditSettings(2.0), FlowEditSettings(1.5, draws=3, seed=7)])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_it_equals_the_papers_algorithm(world, settings, strength):
    done = world.edited(settings, strength=strength)
    assert relative(done, reference(world, settings, 5.0, STEPS - round(STEPS * strength))) < 1e-5


@pytest.mark.parametrize("first", [0, 2])
def test_the_last_steps_are_plain_sampling(world, first):
    """With `n_min` of all steps it samples from the noised clip; with fewer it continues from FlowEdit."""
    denoiser, schedule, settings = (
        world.denoiser,
        world.denoiser.schedule(STEPS),
        FlowEditSettings(2.0, n_min=STEPS - first),
    )
    drawn = draw(denoiser, world.clip, world.text(2), STEPS, settings, "self").store
    z, plain = drawn.level(STEPS - first), Control(drawn.key_frames, Chunk.whole(len(world.clip)))
    guidance = Guidance(Condition(world.text(4)), plain, 5.0)
    with denoiser.hooked():
        for step in range(first, STEPS):
            d = denoiser.predict_noise(z, schedule.timesteps[step], Condition(world.text(3)), plain, guidance)
            z = schedule.move(z, d, STEPS - step, STEPS - step - 1)
    assert relative(world.edited(settings, strength=1 - first / STEPS), z) < 1e-6
    half, whole = (world.edited(FlowEditSettings(2.0, n_min=n)) for n in (2, 0))
    assert relative(half, whole) > 1e-3


def test_given_noise_equals_that_of_the_seed(world):
    """In the order of use; noise of skipped steps may be omitted, and too little is refused."""
    settings = FlowEditSettings(2.0, draws=2, seed=3, n_min=1)
    levels = draw(world.denoiser, world.clip, world.text(2), STEPS, settings).store.drawn
    pairs = [(level, number) for level in range(STEPS, 1, -1) for number in range(2)] + [(1, 0)]
    noises = torch.stack([levels.noise.at(level, number, world.clip) for level, number in pairs])
    other = replace(settings, seed=9)
    assert torch.equal(world.edited(other, noises=noises), world.edited(settings))
    fewer = world.edited(other, noises=noises[-5:], strength=0.6)
    assert torch.equal(fewer, world.edited(settings, strength=0.6))
    assert torch.equal(fewer, world.edited(other, noises=list(noises), strength=0.6))
    with pytest.raises(ValueError, match="noises has 5 samples"):
        world.edited(other, noises=noises[-5:])
    with pytest.raises(ValueError, match="noises has shape"):
        world.edited(other, noises=noises[0])


def test_n_min_above_the_edits_steps(world):
    with pytest.raises(ValueError, match="n_min is 4, but the edit runs only 3"):
        world.edited(FlowEditSettings(n_min=4), strength=0.6)


def test_wan_edit_needs_a_flow():
    with pytest.raises(ValueError, match="variant wan_edit"):
        World("ddim").edited(FlowEditSettings(variant="wan_edit"))
    flow, settings = World("flow"), FlowEditSettings(3.0, variant="wan_edit")
    timesteps = draw(flow.denoiser, flow.clip, flow.text(2), STEPS, settings).store.timesteps
    assert all(timestep == int(timestep) for timestep in timesteps)
    assert relative(flow.edited(settings, target=2, guidance_scale=3.0), flow.clip) < 1e-5
    assert relative(flow.edited(settings), flow.edited(FlowEditSettings(3.0))) > 1e-3


def test_equal_branches_change_nothing(world):
    done = world.edited(FlowEditSettings(3.0), target=2, guidance_scale=3.0)
    assert relative(done, world.clip) < 1e-5
    assert relative(world.edited(FlowEditSettings(3.0), guidance_scale=3.0), world.clip) > 1e-3


def test_a_seed_repeats(world):
    first, again, other = (world.edited(FlowEditSettings(2.0, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative(first, other) > 1e-3


def test_with_fusion_and_a_mask(world, request):
    """The source's attention changes the edit; outside the mask the clip equals the source bit for bit."""
    tokenizer = build_tokenizer() if world.denoiser.spans_clip else request.getfixturevalue("tokenizer")
    prompt = PromptEdit("a red circle on grass", "a blue star on grass", tokenizer)
    mask = torch.zeros(1, *world.clip.shape[-2:])
    mask[:, :4, :4] = 1
    fusion = FusionSettings(0.8, 0.8, blend_latents=True, blend_latents_until=1.0)
    done = world.edited(FlowEditSettings(2.0), prompt=prompt, fusion=fusion, mask=GivenMask(mask))
    outside = (mask == 0).expand(len(done), -1, -1)[:, None].expand_as(done)
    assert torch.equal(done[outside], world.clip[outside])
    plain = world.edited(FlowEditSettings(2.0), mask=GivenMask(mask))
    assert relative(done[~outside], plain[~outside]) > 1e-3


def test_a_store_of_sampled_noise_is_not_saved(world, tmp_path):
    with pytest.raises(ValueError, match="cannot be saved"):
        draw(world.denoiser, world.clip, world.text(2), STEPS).store.save(tmp_path / "store.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "part",
    [
        {"propagation": TokenFlowSettings(2)},
        {"smoothing": FlowSmoothing()},
        {"layout": MoveObjects(objects=[Moved(Shift.parse("0:0.1,0"), [1], [1])])},
    ],
)
def test_parts_that_need_an_inversion(part):
    with pytest.raises(ValueError, match="needs an inversion"):
        World("ddim").edited(**part)


def test_longer_clips_are_edited_in_chunks_of_the_models_training(monkeypatch):
    """So that the effect does not fade as clips grow; a given number of frames takes precedence. An inversion's edits
    run in its windows.
    """
    denoiser = VideoTransformerDenoiser(wan.small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    latents, texts = wan.random_latents(5), [wan.random_text(seed) for seed in (0, 1)]

    def edited(chunk_frames=None, invert_first=False, windows=None):
        begin = invert if invert_first else draw
        start = begin(denoiser, latents, texts[0], 2, windows=windows)
        return edit(denoiser, start, texts[1], guidance_scale=1.0, chunk_frames=chunk_frames)

    whole, split, inverted = edited(), edited(windows=Windows(4, 2)), edited(invert_first=True)
    in_windows = invert(denoiser, latents, texts[0], 2, windows=Windows(4, 2))
    assert relative(whole, split) > 1e-6
    monkeypatch.setattr(VideoTransformerDenoiser, "trained_frames", 4)
    assert torch.equal(edited(), split)
    assert torch.equal(edited(5), whole)
    assert torch.equal(edited(invert_first=True), edit(denoiser, in_windows, texts[1], guidance_scale=1.0))
    assert relative(edited(invert_first=True), inverted) > 1e-6
    stored = invert(denoiser, latents, texts[0], 2, memory="queries_keys").store
    assert stored.windows is None, "attention is stored for the whole clip"


def test_gain_scales_the_change_of_a_step():
    denoiser = VideoTransformerDenoiser(wan.small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    clip, texts = wan.random_latents(3), [wan.random_text(seed) for seed in (0, 1)]

    def change(gain):
        start = draw(denoiser, clip, texts[0], 2, FlowEditSettings(1.0, gain=gain))
        return edit(denoiser, start, texts[1], guidance_scale=1.0, strength=0.5) - clip

    assert change(0.0).abs().max() < 1e-12
    assert relative(change(2.0), 2 * change(1.0)) < 1e-9
