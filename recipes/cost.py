"""The number of model calls of an edit."""

from __future__ import annotations

from typing import NamedTuple

from ..diffusion.parts import Edit, Start, first_step
from ..diffusion.start import INVERTED
from ..store.records import Memory


class Calls(NamedTuple):
    """Model calls on the whole clip: of the inversion, of one edit, and of the source, which edits of a pass share."""

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
    memory: Memory = "queries_keys",
    grid: tuple[int, int] | None = None,
) -> Calls:
    """The calls of a run of `steps`. kept_steps: steps whose attention the store keeps, in its `memory`; 0 with
    "recompute". grid: see `Denoiser.subset_grid`; a call on a share of the tokens counts as this share.

    A propagation evaluates its pivots once more, and the source in every step. Gradients of a layout are not counted.
    """
    branches = 1 if edit.guidance_scale == 1 else 2
    injection, first = edit.fusion, first_step(edit.strength, steps)
    preparing = 0 if injection is None else injection.preparing_calls(steps, edit, spans_clip)

    share = 1.0 if injection is None or start.draws else injection.token_share(edit, frames, grid)
    kept = kept_steps if injection is None or injection.reads_store(memory, grid) else 0

    def read(some: range) -> int:
        return 0 if injection is None else sum(injection.reads_source(step, steps) for step in some)

    if start.draws:
        followed = sum(start.follows(steps - step) for step in range(first, steps))
        plain = range(first + followed, steps)
        of_draws = start.draws * branches * followed
        return Calls(0, of_draws + branches * len(plain) + preparing, of_draws + read(plain))
    if edit.propagation is not None:
        evaluated = (steps - first) * edit.propagation.evaluated(frames)
        return Calls(steps, branches * evaluated + preparing, evaluated)
    computed = steps - first - (1 - share) * read(range(first, steps))
    return Calls(steps, branches * computed + preparing, read(range(max(first, kept), steps)))
