"""The noise levels of a run, and the step between two of them.

With d = (x - clean) / sigma, which the model predicts, a step of either formulation is
    x' = x + (sigma' - sigma) d.
For deterministic DDIM (arXiv 2010.02502, Eq. 12 with eta 0), x = z / sqrt(abar), sigma = sqrt(1 / abar - 1) and d is
the noise. For Euler steps of a rectified flow (arXiv 2209.03003), x = z, sigma goes from 0 to 1, and d is the velocity,
noise - clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ..imports import torch
from .ddim import ddim_move

if TYPE_CHECKING:
    from torch import Tensor

Formulation = Literal["ddim", "flow"]


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run of DDIM: z = signal * clean + noise * eps at each.

    timesteps: of the model calls, noisy to clean; fractional in a host that defines its own noise levels. alphas:
    (steps + 1,), the cumulative alpha of every level, clean to noisy, in double precision: `alphas[0]` is the
    scheduler's final alpha, and `alphas[i + 1]` belongs to `timesteps[-1 - i]`.
    """

    timesteps: tuple[float, ...]
    alphas: Tensor
    formulation: ClassVar[Formulation] = "ddim"

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def signal(self, level: int) -> Tensor:
        """The factor of the clean latents at a level."""
        return self.alphas[level].sqrt()

    def noise(self, level: int) -> Tensor:
        """The factor of the noise at a level."""
        return (1 - self.alphas[level]).sqrt()

    def scale(self, level: int) -> float:
        """z / x, x being the latents in which a step is linear."""
        return self.signal(level).item()

    def sigma(self, level: int) -> float:
        """Noise / signal, in which a step is linear."""
        return float((1 / self.alphas[level] - 1).sqrt())

    def move(self, z: Tensor, d: Tensor, level: int, to: int) -> Tensor:
        """One step from a level to another along a prediction d."""
        return ddim_move(z, d, self.alphas[level], self.alphas[to])

    def clean(self, z: Tensor, d: Tensor, level: int) -> Tensor:
        """The clean latents that a prediction implies."""
        return (z - self.noise(level).item() * d) / self.signal(level).item()

    def towards(self, z: Tensor, clean: Tensor, level: int) -> Tensor:
        """The prediction that implies these clean latents."""
        return (z - self.signal(level).item() * clean) / self.noise(level).item()


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """The noise levels of a run of a rectified flow: z = (1 - sigma) clean + sigma noise.

    alphas: 1 - sigma of every level, clean to noisy, without rounding.
    """

    formulation: ClassVar[Formulation] = "flow"

    @classmethod
    def of(cls, timesteps: tuple[float, ...], sigmas: Tensor) -> FlowSchedule:
        """From sigmas (steps + 1,), clean to noisy."""
        return cls(timesteps, 1 - sigmas.double())

    def signal(self, level: int) -> Tensor:
        return self.alphas[level]

    def noise(self, level: int) -> Tensor:
        return 1 - self.alphas[level]

    def scale(self, level: int) -> float:
        return 1.0

    def sigma(self, level: int) -> float:
        return float(1 - self.alphas[level])

    def move(self, z: Tensor, d: Tensor, level: int, to: int) -> Tensor:
        return z + (self.alphas[level] - self.alphas[to]) * d

    def clean(self, z: Tensor, d: Tensor, level: int) -> Tensor:
        return z - self.sigma(level) * d

    def towards(self, z: Tensor, clean: Tensor, level: int) -> Tensor:
        return (z - clean) / self.sigma(level)


class Steps(Protocol):
    """A solver: moves latents from level to level."""

    state: Any
    """What it keeps from step to step, for `States.save`; set to resume a run."""

    def move(self, z: Tensor, d: Tensor, level: int, to: int) -> Tensor:
        """The latents of the adjacent level `to`, from z and its prediction d at `level`."""


class Solver:
    """Moves latents from level to level, in either direction.

    order: 1 takes each step along its own prediction. 2 takes steps in pairs by the midpoint method (second-order
    Runge-Kutta with the second prediction at the middle level, to which RF-Solver, arXiv 2411.04746, amounts), with the
    same number of calls. A pair whose middle level is too close to an end takes single steps.

    reuse_from: the level at which a run of order 2 starts, if each pair after the first begins with the previous pair's
    middle prediction (FireFlow, arXiv 2412.07517), which halves the calls; None: with its own. See `reuses`.
    """

    def __init__(self, schedule: Schedule, order: int, reuse_from: int | None = None) -> None:
        self.schedule, self.order, self.reuse_from = schedule, order, reuse_from
        self.state: tuple[Tensor, Tensor, int, float] | None = None
        """Of the current pair: latents, prediction and level of its beginning, and the sigma of that prediction."""

    def reuses(self, level: int, to: int) -> bool:
        """Whether the step between two adjacent levels takes the previous step's prediction, without a model call."""
        step = to - level
        before = level - 2 * step
        if self.order == 1 or self.reuse_from is None or (before - self.reuse_from) * step < 0:
            return False
        return self._begins_pair(level, to) and self._begins_pair(before, before + step)

    def move(self, z: Tensor, d: Tensor, level: int, to: int) -> Tensor:
        """The latents of the adjacent level `to`, from z and its prediction d at `level`."""
        if self.state is not None:
            (before, first, began, at), self.state = self.state, None
            if level == (began + to) / 2:  # the caller may have started over elsewhere
                centre = (self.schedule.sigma(began) + self.schedule.sigma(to)) / 2
                weight = (centre - at) / (self.schedule.sigma(level) - at)
                return self.schedule.move(before, (1 - weight) * first + weight * d, began, to)
        if self.order == 2 and self._begins_pair(level, to):
            at = 2 * level - to if self.reuses(level, to) else level
            self.state = z, d, level, self.schedule.sigma(at)
        return self.schedule.move(z, d, level, to)

    def _begins_pair(self, level: int, to: int) -> bool:
        """Pairs are counted from the noisy end, so that an inversion and its edit have the same pairs."""
        end, steps = 2 * to - level, self.schedule.steps
        return (steps - level) % 2 == 0 and 0 <= end <= steps and 0.25 <= self._share(level, to, end) <= 0.75

    def _share(self, level: int, between: int, end: int) -> float:
        """The position of the middle level between the ends, 0 to 1."""
        start, middle, stop = map(self.schedule.sigma, (level, between, end))
        return (middle - start) / (stop - start)


def reused_steps(schedule: Schedule, order: int, first: int = 0) -> set[int]:
    """The steps of an edit from step `first`, 0 the noisiest, that reuse a prediction. An inversion has as many."""
    solver = Solver(schedule, order, schedule.steps - first)
    levels = range(schedule.steps - first, 0, -1)
    return {schedule.steps - level for level in levels if solver.reuses(level, level - 1)}


def timestep_at(schedule: Schedule, level: int) -> float:
    """The timestep for latents of a level; for clean latents that of the next level, since models need some noise."""
    return schedule.timesteps[schedule.steps - max(level, 1)]


def same_levels(alphas: tuple[float, ...], schedule: Schedule) -> bool:
    """Whether alphas are those of a schedule, up to rounding."""
    own = schedule.alphas.double()
    return len(alphas) == len(own) and torch.allclose(torch.tensor(alphas, dtype=torch.float64), own)
