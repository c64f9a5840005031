"""The start of an edit: the inversion's noise, unless the store has another start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..imports import torch
from ..store.backends import Levels
from ..store.records import SourceStep
from ..store.store import AttentionStore
from .parts import Edit, Prediction, Start
from .schedule import Schedule, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from .branches import Branches, EditRun


class Inverted:
    """Edits start from the inverted noise; with a strength below 1, from the clip with less of it."""

    draws = 0

    def check(self, edit: Edit) -> None:
        """Every edit supports an inversion."""

    def check_steps(self, steps: int) -> None:
        """Any number of steps is possible."""

    def schedule(self, schedule: Schedule) -> Schedule:
        return schedule

    def levels(self, clip: Tensor, schedule: Schedule) -> Levels:
        raise TypeError("an inversion computes its levels")

    def solver(self, schedule: Schedule, order: int, reuse_from: int | None) -> Solver:
        return Solver(schedule, order, reuse_from)

    def follows(self, level: int) -> bool:
        return False

    def latents(self, run: EditRun) -> Tensor:
        """The noisiest level; a later start mixes the clip with the eps of that level, or with noise of its own."""
        schedule, store, level = run.schedule, run.store, run.schedule.steps - run.first
        noise = store.level(store.steps).to(run.denoiser.device)
        if not run.first and run.sdedit_seed is None:
            return noise
        clip = store.level(0).to(noise.device)
        if run.sdedit_seed is None:
            eps = (noise - schedule.signal(schedule.steps) * clip) / schedule.noise(schedule.steps)
        else:
            eps = torch.randn(clip.shape, generator=torch.Generator().manual_seed(run.sdedit_seed)).to(clip)
        return (schedule.signal(level) * clip + schedule.noise(level) * eps).to(noise.dtype)

    def predict(self, run: EditRun, z: Tensor, step: int, predict: Callable[[Branches], Prediction]) -> Prediction:
        return predict(run.branches(z, step))

    def source_prediction(self, branches: Branches, source: SourceStep) -> Tensor | None:
        return None

    def moved(self, run: EditRun, z: Tensor, predicted: Prediction, level: int) -> Tensor:
        return run.solver.move(z, predicted.noise, level, level - 1)


INVERTED = Inverted()


def start_of(store: AttentionStore) -> Start:
    """The start of a store's edits."""
    return store.start or INVERTED
