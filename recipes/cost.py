"""How often an edit calls the model."""

from __future__ import annotations

from typing import NamedTuple

from ..diffusion.parts import Edit, Start, first_step
from ..diffusion.start import INVERTED


class Calls(NamedTuple):
    """Calls of the model on the whole clip: to invert, to edit once, and for the source of all edits of a pass."""

    invert: float
    edit: float
    source: float


def calls_of(
    edit: Edit,
    steps: int,
    kept_steps: int = 0,
    frames: int = 1,
    spans_clip: bool = False,
    start: Start = INVERTED,
) -> Calls:
    """What a run of `steps` costs where the store keeps the attention of so many steps, none with memory "recompute".

    A propagation evaluates its key frames once more, and the source in every step. A layout counts its own gradients.
    """
    branches = 1 if edit.guidance_scale == 1 else 2
    injection, first = edit.fusion, first_step(edit.strength, steps)
    preparing = 0 if injection is None else injection.preparing_calls(steps, edit.mask, spans_clip)
    if start.draws:
        times = start.draws * branches * (steps - first)
        return Calls(0, times + preparing, times)
    if edit.propagation is not None:
        evaluated = (steps - first) * edit.propagation.evaluated(frames)
        return Calls(steps, branches * evaluated + preparing, evaluated)
    reading = range(max(first, kept_steps), steps)
    computed = 0 if injection is None else sum(injection.reads_source(step, steps) for step in reading)
    return Calls(steps, branches * (steps - first) + preparing, computed)
