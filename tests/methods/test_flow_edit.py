"""FlowEdit beside its own equations, on a flow and on DDIM, alone and with what else an edit has."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fatezero import (
    FlowEditSettings,
    FlowSmoothing,
    FusionSettings,
    Moved,
    MoveObjects,
    PromptEdit,
    Shift,
    TokenFlowSettings,
    draw,
    edit,
)
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk
from fatezero.attention.masks import GivenMask
from fatezero.demo.model import build_scheduler
from fatezero.demo.video_model import build_tokenizer
from fatezero.diffusion.denoiser import Guidance
from fatezero.hosts.diffusers import DiffusersDenoiser, VideoTransformerDenoiser
from tests.hosts import test_transformer as wan
from tests.small import random_latents, random_text, relative, small_unet

STEPS = 5


class World:
    """A model with a clip and texts of its shapes."""

    def __init__(self, name):
        if name == "flow":
            self.denoiser = VideoTransformerDenoiser(wan.small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
            self.clip, self.text = wan.random_latents(), wan.random_text
        else:
            self.denoiser = DiffusersDenoiser(small_unet(), build_scheduler())
            self.clip, self.text = random_latents(2, 8, 8), random_text

    def edited(self, settings=None, target=3, guidance_scale=5.0, **more):
        inversion = draw(self.denoiser, self.clip, self.text(2), STEPS, settings, "self")
        return edit(self.denoiser, inversion, self.text(target), self.text(4), guidance_scale, **more)


@pytest.fixture(scope="module", params=["flow", "ddim"])
def world(request):
    return World(request.param)


def reference(world, settings, guidance_scale, first):
    """The paper's algorithm, in latents where the clean clip counts once."""
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
def test_it_is_the_papers(world, settings, strength):
    done = world.edited(settings, strength=strength)
    assert relative(done, reference(world, settings, 5.0, STEPS - round(STEPS * strength))) < 1e-5


def test_nothing_changes_where_both_branches_are_the_same(world):
    done = world.edited(FlowEditSettings(3.0), target=2, guidance_scale=3.0)
    assert relative(done, world.clip) < 1e-5
    assert relative(world.edited(FlowEditSettings(3.0), guidance_scale=3.0), world.clip) > 1e-3


def test_a_seed_repeats(world):
    first, again, other = (world.edited(FlowEditSettings(2.0, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative(first, other) > 1e-3


def test_with_fusion_and_a_mask(world, request):
    """The source's attention makes another edit, and outside the mask the clip is the source to the last digit."""
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


def test_a_store_of_drawn_noise_is_not_saved(world, tmp_path):
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
