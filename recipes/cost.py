"""The number of model calls of an edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from ..diffusion.parts import Edit, Injection, Start, first_step
from ..diffusion.start import INVERTED
from ..store.records import Memory


class Calls(NamedTuple):
    """Model calls on the whole clip: of the inversion, of one edit's steps, of the source, which edits of a pass share,
    and of what one edit computes before its first step.
    """

    invert: float
    edit: float
    source: float
    prepare: float = 0

    @property
    def parts(self) -> dict[str, float]:
        """The calls by what they are for, in words."""
        names = {"inversion": self.invert, "edit": self.edit, "source": self.source, "mask": self.prepare}
        return {name: calls for name, calls in names.items() if calls}


def beside_plain(parts: Mapping[str, float], plain: float) -> str:
    """The cost of parts of a run relative to plain sampling of its edits, which takes `plain` calls."""
    shares = ", ".join(f"{name} {calls / plain:.2f}" for name, calls in parts.items())
    return f"{sum(parts.values()) / plain:.2f} times plain sampling ({plain:g} calls): {shares}"


def fastest_memory(injections: Iterable[Injection | None], grid: tuple[int, int] | None) -> Memory:
    """The memory that a pass of edits with these injections gains most from. grid: see `Denoiser.subset_grid`."""
    reading = [one for one in injections if one is not None]
    of_keys_values = reading and all(one.reads_store("keys_values", grid) for one in reading)
    return "keys_values" if of_keys_values else "queries_keys"


def calls_of(
    edit: Edit,
    steps: int,
    kept_steps: int = 0,
    frames: int = 1,
    spans_clip: bool = False,
    start: Start = INVERTED,
    memory: Memory = "queries_keys",
    grid: tuple[int, int] | None = None,
    reused: AbstractSet[int] = frozenset(),
) -> Calls:
    """The calls of a run of `steps`. kept_steps: steps whose attention the store keeps, in its `memory`; 0 with
    "recompute". grid: see `Denoiser.subset_grid`; a call on a share of the tokens counts as this share. reused: the
    steps of a whole edit that reuse a prediction (`reused_steps`).

    A propagation evaluates its pivots once more, and the source in every step. Gradients of a layout are not counted.
    """
    injection, first = edit.fusion, first_step(edit.strength, steps)
    prepare = 0 if injection is None else injection.preparing_calls(steps, edit, spans_clip)
    called = [step for step in range(first, steps) if step not in reused or step < first + 2]
    share = 1.0 if edit.propagation is None else edit.propagation.evaluated(frames)
    tokens = 1.0 if injection is None or start.draws else injection.token_share(edit, frames, grid)
    kept = kept_steps if injection is None or injection.reads_store(memory, grid) else 0

    def branches(some: Iterable[int]) -> float:
        return sum((2 if edit.guides(step, steps) else 1) * (tokens if read([step]) else 1) for step in some)

    def read(some: Iterable[int]) -> int:
        return 0 if injection is None else sum(injection.reads_source(step, steps) for step in some)

    if start.draws:
        followed = [step for step in called if start.follows(steps - step)]
        plain = called[len(followed) :]
        of_draws = start.draws * branches(followed)
        return Calls(0, of_draws + branches(plain), of_draws + read(plain), prepare)
    inverted = steps - len(reused)
    if edit.propagation is not None:
        return Calls(inverted, share * branches(called), share * len(called), prepare)
    return Calls(inverted, branches(called), read(step for step in called if step >= kept), prepare)
