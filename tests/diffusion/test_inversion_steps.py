"""TokenFlow's starts of an edit: an inversion with more steps than the edit, or random noise."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from fatezero import AttentionStore, Edit, PnPSettings, StoreSettings, edit, invert
from fatezero.demo.model import build_scheduler
from fatezero.diffusion.edit import EditPass
from fatezero.diffusion.invert import InversionSettings, levels_among
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.hosts.diffusers.schedulers import ddim_schedule
from fatezero.methods.flow_edit import DrawnNoise, FlowEditSettings
from fatezero.store.store import StoreError
from small import THREE_LEVELS, random_latents, random_text, relative, small_unet


@pytest.fixture(scope="module")
def denoiser() -> DiffusersDenoiser:
    return DiffusersDenoiser(small_unet(**THREE_LEVELS), build_scheduler())


@pytest.mark.parametrize("order", [1, 2])
def test_the_store_has_the_levels_of_the_edits_steps(denoiser, order):
    fine = invert(denoiser, random_latents(2), random_text(0), steps=20, order=order)
    found = invert(denoiser, random_latents(2), random_text(0), steps=4, order=order, inversion_steps=20)
    at = [0, *(1 + 5 * i for i in range(4))]
    assert torch.equal(found.latents, fine.latents[at])
    assert (found.store.steps, found.store.inversion_steps, found.store.memory) == (4, 20, "recompute")
    assert found.store.timesteps == denoiser.schedule(4).timesteps


def test_the_edits_number_of_steps_changes_nothing(denoiser):
    plain = invert(denoiser, random_latents(2), random_text(0), steps=4)
    same = invert(denoiser, random_latents(2), random_text(0), steps=4, inversion_steps=4, memory="maps")
    assert torch.equal(plain.latents, same.latents) and same.store.inversion_steps is None


def test_a_saved_store_keeps_the_number(denoiser, tmp_path):
    inversion = invert(denoiser, random_latents(2), random_text(0), steps=4, key_frames="self", inversion_steps=20)
    inversion.store.save(tmp_path / "clip.safetensors")
    loaded = replace(inversion, store=AttentionStore.load(tmp_path / "clip.safetensors"))
    assert loaded.store.inversion_steps == 20
    first, again = (
        edit(denoiser, one, random_text(1), random_text(2), fusion=PnPSettings()) for one in (inversion, loaded)
    )
    assert torch.equal(first, again)
    forged = replace(inversion.store, inversion_steps=2)
    forged.save(tmp_path / "forged.safetensors")
    with pytest.raises(StoreError, match="inversion_steps"):
        AttentionStore.load(tmp_path / "forged.safetensors")


def test_numbers_and_memories_that_do_not_fit_are_refused(denoiser):
    arguments = (denoiser, random_latents(2), random_text(0), 4)
    with pytest.raises(ValueError, match="inversion_steps is 7"):
        invert(*arguments, inversion_steps=7)
    with pytest.raises(ValueError, match="memory is maps"):
        invert(*arguments, inversion_steps=20, memory=StoreSettings("maps"))
    with pytest.raises(ValueError, match="multiple of steps, such as 40"):
        invert(*arguments, inversion_steps=6)
    with pytest.raises(ValueError, match="at least steps, 50"):
        InversionSettings(50, inversion_steps=20)


def test_sdedit_from_noise_of_each_frame(denoiser):
    """The first latents are the clip's plus this noise, scaled down for a strength below 1."""
    inversion, schedule = invert(denoiser, random_latents(2), random_text(0), steps=4), denoiser.schedule(4)
    one = Edit(random_text(1), random_text(2), 7.5, strength=0.5, sdedit_seed=3)
    with EditPass(denoiser, inversion, [one, replace(one, sdedit_seed=None)]) as run:
        z, inverted = run.start
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).double()
    assert relative(z, schedule.signal(2) * inversion.latents[0] + schedule.noise(2) * noise) < 1e-12
    assert relative(z, inverted) > 0.1 and relative(noise[0], noise[1]) > 0.1
    with pytest.raises(ValueError, match="sdedit_seed"):
        DrawnNoise(FlowEditSettings()).check(one)


def test_all_timesteps_of_sd_hold_the_levels_of_50_steps():
    """SD's offset leaves 999 of 1000 steps, which the paper of TokenFlow inverts with."""
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", steps_offset=1, set_alpha_to_one=False)
    fine, own = (ddim_schedule(scheduler, steps) for steps in (999, 50))
    assert levels_among(own, fine) == [0, *range(1, 1000, 20)][: own.steps + 1]
    with pytest.raises(ValueError, match="below 1000"):
        ddim_schedule(scheduler, 1000)
