"""UniPC (Zhao et al., NeurIPS 2023, arXiv 2302.04867): a multistep solver of order 2 with one prediction per step.

With c the predicted clean latents, and a and s the signal and the noise of a level, the solution for a constant c is
    z' = (s' / s) z + (a' - a s' / s) c.
The predictor takes c linear in lambda = log(a / s) through the last two predictions. The corrector takes the step again
once c is known at its end. Both weigh the predictions by B(h) = exp(-h) - 1 ("bh2").
"""

from __future__ import annotations

from collections.abc import Iterable
from math import expm1, inf, log
from typing import TYPE_CHECKING, Any, NamedTuple

from .schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


class Point(NamedTuple):
    """The latents of a level, and the clean latents predicted there."""

    z: Tensor
    clean: Tensor
    level: int


class UniPC:
    """Moves latents from level to level, noisy to clean, from any level. The first and the last step have order 1."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._points: list[Point] = []
        """The last two, the newest last."""

    @property
    def state(self) -> list[Point]:
        """See `Steps.state`."""
        return self._points

    @state.setter
    def state(self, points: Iterable[Any]) -> None:
        self._points = [Point(*point) for point in points]

    def move(self, z: Tensor, d: Tensor, level: int, to: int) -> Tensor:
        """The latents of the next less noisy level `to`, from z and its prediction d at `level`."""
        clean = self.schedule.clean(z, d, level)
        if self._points:
            z = self._corrected(clean, level)
        self._points = [*self._points[-1:], Point(z, clean, level)]
        return self._predicted(to)

    def _predicted(self, to: int) -> Tensor:
        *before, last = self._points
        if not before or to == 0:
            return self._along(last.clean, to)
        return self._along(last.clean + 0.5 * self._slope(to), to)

    def _corrected(self, clean: Tensor, level: int) -> Tensor:
        *before, last = self._points
        change = clean - last.clean
        if not before:
            return self._along(last.clean + 0.5 * change, level)
        h, r = self._h(last.level, level), self._ratio(level)
        first, second = _moments(h)
        of_slope = (second - first) / (r - 1)
        return self._along(last.clean + of_slope * self._slope(level) + (first - of_slope) * change, level)

    def _along(self, clean: Tensor, to: int) -> Tensor:
        """The last point's latents at another level, for constant clean latents."""
        last, schedule = self._points[-1], self.schedule
        ratio = (schedule.noise(to) / schedule.noise(last.level)).item()
        return ratio * last.z + (schedule.signal(to) - ratio * schedule.signal(last.level)).item() * clean

    def _slope(self, to: int) -> Tensor:
        """The change of the clean latents over the step to a level, from the last two points."""
        before, last = self._points
        return (before.clean - last.clean) / self._ratio(to)

    def _ratio(self, to: int) -> float:
        """The last step's size, which is negative, relative to that to a level."""
        before, last = self._points
        return self._h(last.level, before.level) / self._h(last.level, to)

    def _h(self, level: int, to: int) -> float:
        return self._log_snr(to) - self._log_snr(level)

    def _log_snr(self, level: int) -> float:
        signal, noise = self.schedule.signal(level).item(), self.schedule.noise(level).item()
        return log(signal / noise) if signal else -inf


def _moments(h: float) -> tuple[float, float]:
    """The integrals of the first and second power over a step of size h, relative to B(h): the paper's phi_2, phi_3."""
    b = expm1(-h)
    phi_2 = b / -h - 1
    phi_3 = phi_2 / -h - 0.5
    return phi_2 / b, 2 * phi_3 / b
