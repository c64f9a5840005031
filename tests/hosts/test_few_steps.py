"""Models for few steps: timesteps recognised by name, and LCM with sampled noise."""

import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors.torch import save_file

from fatezero import FlowEditSettings, draw, edit
from fatezero.files.bundled import DEMO, LORAS
from fatezero.files.lora import LoraFile, few_steps_of
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model_files import CheckpointError
from fatezero.hosts.diffusers.schedulers import as_ddim, ddim_schedule, with_timesteps
from small import random_latents, relative

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("path", "timesteps"),
    [
        ("latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", "lcm"),
        ("TCD-SD15-LoRA.safetensors", "lcm"),
        ("sdxl_lightning_4step_lora.safetensors", "trailing"),
        ("Hyper-SD15-8steps-lora.safetensors", "trailing"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", "auto"),
        ("demo-few-steps", "auto"),
        ("hyperrealism.safetensors", None),
        ("style_1000steps.safetensors", None),
        ("elcmar.safetensors", None),
        ("demo", None),
    ],
)
def test_models_for_few_steps_are_recognised_by_name(path, timesteps):
    assert few_steps_of(path) == timesteps


def test_a_bundled_lora_has_a_name():
    assert LoraFile.parse("demo-few-steps=0.5") == LoraFile("demo-few-steps", 0.5)
    assert LORAS["demo-few-steps"].parent.name == "wan"


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler])
def test_timesteps_of_lcm_and_tcd_equal_their_schedulers(kind):
    ours, theirs = as_ddim(kind(**SD)), kind(**SD)
    for steps in range(1, 51):
        theirs.set_timesteps(steps)
        assert ddim_schedule(ours, steps).timesteps == tuple(theirs.timesteps.tolist())
    with pytest.raises(ValueError, match="at most 50"):
        ddim_schedule(ours, 51)


def test_trailing_timesteps_equal_lightnings_scheduler():
    own = DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    theirs = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    theirs.set_timesteps(4)
    schedule = ddim_schedule(with_timesteps(own, "trailing"), 4)
    assert schedule.timesteps == tuple(theirs.timesteps.tolist())
    sigmas = (1 / schedule.alphas - 1).sqrt().flip(0).float()
    assert torch.allclose(sigmas, theirs.sigmas, rtol=1e-5), "down to clean latents"
    assert ddim_schedule(with_timesteps(own, "leading"), 4).timesteps == ddim_schedule(own, 4).timesteps


@pytest.fixture
def lora(tmp_path):
    """Write a LoRA with a name."""

    def of(name):
        up, down = 0.1 * torch.randn(128, 2), 0.1 * torch.randn(2, 128)
        save_file({f"unet.{LAYER}.lora_B.weight": up, f"unet.{LAYER}.lora_A.weight": down}, tmp_path / name)
        return str(tmp_path / name)

    return of


def test_a_lora_sets_its_timesteps(lora):
    for name, timesteps in (("lcm.safetensors", (999, 759, 499, 259)), ("lightning.safetensors", (999, 749, 499, 249))):
        model = Checkpoint.load("demo", lora=lora(name))
        assert model.denoiser.schedule(4).timesteps == timesteps
        assert name in model.notes[-1] and "timesteps" in model.notes[-1]
    given = Checkpoint.load("demo", lora=lora("lcm.safetensors"), timesteps="leading")
    assert given.denoiser.schedule(4).timesteps == Checkpoint.load("demo").denoiser.schedule(4).timesteps
    with pytest.raises(CheckpointError, match="timesteps has no effect.*Wan"):
        open_model("demo-wan", timesteps="trailing")


def test_a_folder_sets_its_schedulers_timesteps(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("judge"))
    LCMScheduler(**SD).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "LCMScheduler"))
    assert Checkpoint.load(str(folder)).denoiser.schedule(4).timesteps == (999, 759, 499, 259)


@torch.no_grad()
def test_flow_edit_with_lcm_equals_a_loop_over_its_schedulers_predictions():
    """The edit changes by a share of the difference of both clean predictions, as in an Euler step."""
    model = Checkpoint.load("demo", timesteps="lcm")
    clip = random_latents(1).float()
    source, target = (model.encode_prompt(text, 64, 64) for text in ("a red square on water", "a star on sand"))
    start = draw(model.denoiser, clip, source, 4, FlowEditSettings(source_guidance=1.0), "self")
    ours = edit(model.denoiser, start, target, guidance_scale=1.0)

    scheduler = LCMScheduler(**SD)
    scheduler.set_timesteps(4)
    levels = start.latents

    def clean(z, t, text):
        noise, alpha = model.unet(z, t, text.embeddings).sample, scheduler.alphas_cumprod[t]
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return out * (z - (1 - alpha).sqrt() * noise) / alpha.sqrt() + skip * z

    change, sigmas = torch.zeros_like(clip), [*(1 / scheduler.alphas_cumprod[scheduler.timesteps] - 1).sqrt(), 0.0]
    for i, t in enumerate(scheduler.timesteps):
        z, share = levels[4 - i].float(), sigmas[i + 1] / sigmas[i]
        moved = z + scheduler.alphas_cumprod[t].sqrt() * change
        change = share * change + (1 - share) * (clean(moved, t, target) - clean(z, t, source))
    assert relative(ours, clip + change) < 1e-4
    assert relative(ours, clip) > 1e-2
