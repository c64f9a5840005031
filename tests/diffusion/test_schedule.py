"""Steps of both formulations and their solver's order, on clips with a known exact path to noise."""

from itertools import pairwise

import pytest
import torch

from fatezero.diffusion.ddim import ddim_move
from fatezero.diffusion.schedule import FlowSchedule, Schedule, Solver, reused_steps, timestep_at

DEVIATION = 0.6
"""The deviation of clean latents, which are Gaussian here: then the best prediction is a multiple of the latents."""


def ddim(steps: int) -> Schedule:
    sigmas = torch.linspace(0.05, 9.0, steps + 1, dtype=torch.float64)
    return Schedule(tuple(range(steps, 0, -1)), 1 / (1 + sigmas**2))


def flow(steps: int) -> FlowSchedule:
    return FlowSchedule.of(tuple(range(steps, 0, -1)), torch.linspace(0, 1, steps + 1, dtype=torch.float64))


def predicted(schedule: Schedule, z: torch.Tensor, level: int) -> torch.Tensor:
    """E[noise | z] for DDIM, E[noise - clean | z] for a flow."""
    a, b = schedule.signal(level), schedule.noise(level)
    variance = a**2 * DEVIATION**2 + b**2
    return z * (b / variance if schedule.formulation == "ddim" else (b - a * DEVIATION**2) / variance)


def exact(schedule: Schedule, level: int) -> torch.Tensor:
    """The factor by which a latent grows from the clean end: the ratio of standard deviations."""
    a, b = (torch.stack([of(0), of(level)]) for of in (schedule.signal, schedule.noise))
    deviation = (a**2 * DEVIATION**2 + b**2).sqrt()
    return deviation[1] / deviation[0]


def error(schedule: Schedule, order: int, upwards: bool, reuse: bool = False) -> float:
    levels = list(range(schedule.steps + 1))[:: 1 if upwards else -1]
    solver = Solver(schedule, order, levels[0] if reuse else None)
    z = exact(schedule, levels[0]) * torch.ones(1, dtype=torch.float64)
    for level, to in pairwise(levels):
        if not solver.reuses(level, to):
            d = predicted(schedule, z, level)
        z = solver.move(z, d, level, to)
    return float((z - exact(schedule, levels[-1])).abs())


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("world", [ddim, flow])
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_decreases_with_the_solvers_order(world, order, upwards):
    coarse, fine = (error(world(steps), order, upwards) for steps in (100, 200))
    assert coarse / fine > 0.9 * 2**order  # on these straight paths the second-order solver is even of third order
    assert order == 2 or coarse / fine < 2.2


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("world", [ddim, flow])
def test_reused_middle_predictions_keep_the_second_order_at_half_the_calls(world, upwards):
    coarse, fine = (error(world(steps), 2, upwards, reuse=True) for steps in (200, 400))
    assert coarse / fine > 3.6
    calls = 200 - len(reused_steps(world(200), 2))
    assert 100 <= calls < 120, "single steps at the ends have their own predictions"
    assert coarse < 0.2 * error(world(calls), 1, upwards)


def test_steps_that_reuse_a_prediction():
    """Pairs are counted from the noisy end; the first of a run, and those without a pair before them, reuse none."""
    assert reused_steps(flow(7), 2) == {2, 4}
    assert reused_steps(flow(7), 2, first=1) == {4}
    assert reused_steps(flow(7), 2, first=2) == {4}
    assert not reused_steps(flow(7), 1)


@pytest.mark.parametrize("world", [ddim, flow])
def test_an_odd_number_of_steps_ends_with_a_single_one(world):
    for upwards in (True, False):
        assert error(world(101), 2, upwards) < 0.5 * error(world(101), 1, upwards)


@pytest.mark.parametrize("world", [ddim, flow])
def test_a_step_is_straight_in_sigma(world):
    """x' = x + (sigma' - sigma) d, with x scaled so that the clean latents have factor 1."""
    schedule, (z, d) = world(10), torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    scale = [schedule.signal(level) if world is ddim else 1.0 for level in (7, 4)]
    expected = z / scale[0] + (schedule.sigma(4) - schedule.sigma(7)) * d
    assert torch.allclose(schedule.move(z, d, 7, 4) / scale[1], expected, atol=1e-12)


def test_a_ddim_step_equals_the_old_formula_bit_for_bit():
    schedule, (z, d) = ddim(10), torch.randn(2, 3, 4, 5, 5)
    assert torch.equal(schedule.move(z, d, 7, 6), ddim_move(z, d, schedule.alphas[7], schedule.alphas[6]))


@pytest.mark.parametrize("world", [ddim, flow])
def test_clean_latents_and_predictions_imply_each_other(world):
    schedule, (z, d) = world(10), torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    assert torch.allclose(schedule.towards(z, schedule.clean(z, d, 6), 6), d)
    clean = torch.randn_like(z)
    noisy = schedule.signal(6) * clean + schedule.noise(6) * d
    direction = d if world is ddim else d - clean
    assert torch.allclose(schedule.clean(noisy, direction, 6), clean)


def test_an_unfinished_pair_of_steps_is_discarded():
    schedule = flow(10)
    solver, z = Solver(schedule, 2), torch.ones(1, dtype=torch.float64)
    solver.move(z, z, 10, 9)
    assert torch.equal(solver.move(z, z, 6, 5), schedule.move(z, z, 6, 5))


def test_the_levels_at_which_the_model_is_called():
    schedule = Schedule((30, 20, 10), torch.tensor([0.99, 0.9, 0.5, 0.1]))
    assert [timestep_at(schedule, level) for level in range(4)] == [10, 10, 20, 30]
