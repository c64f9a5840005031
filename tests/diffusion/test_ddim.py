import math

import pytest
import torch

from fatezero.diffusion.ddim import ddim_move, guide


def test_moving_back_with_the_same_noise_restores_the_latents():
    z, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    a, b = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    there = ddim_move(z, noise, a, b)
    assert torch.allclose(ddim_move(there, noise, b, a), z, atol=1e-13)
    assert torch.allclose(ddim_move(z, noise, a, a), z, atol=1e-13)


def test_a_move_keeps_the_predicted_clean_latents():
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    a, b = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    z = a.sqrt() * clean + (1 - a).sqrt() * noise
    assert torch.allclose(ddim_move(z, noise, a, b), b.sqrt() * clean + (1 - b).sqrt() * noise)


def test_coefficients_are_in_double_precision(denoiser):
    schedule = denoiser.schedule(20)
    for level, alpha in enumerate(schedule.alphas.tolist()):
        assert schedule.signal(level).item() == pytest.approx(math.sqrt(alpha), rel=1e-15)
        assert schedule.noise(level).item() == pytest.approx(math.sqrt(1 - alpha), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_move_keeps_the_precision_of_the_latents(denoiser, dtype):
    z, noise = torch.randn(2, 1, 4, 8, 8, dtype=dtype)
    assert denoiser.schedule(20).move(z, noise, 3, 4).dtype == dtype


def test_guidance_one_is_the_positive_branch():
    negative, positive = torch.randn(2, 4)
    assert torch.allclose(guide(negative, positive, 1.0), positive)
    assert torch.allclose(guide(negative, positive, 0.0), negative)


def test_the_schedule_equals_the_schedulers(denoiser):
    schedule = denoiser.schedule(50)
    assert schedule.timesteps[:2] == (981, 961)
    assert schedule.timesteps[-1] == 1
    cumulative = denoiser.scheduler.alphas_cumprod
    assert schedule.alphas[0] == cumulative[0]
    assert schedule.alphas[1] == cumulative[1]
    assert schedule.alphas[-1] == cumulative[981]


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range_are_refused(denoiser, steps):
    with pytest.raises(ValueError, match="steps"):
        denoiser.schedule(steps)
