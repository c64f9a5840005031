"""The edit: denoise with the target prompt, with its injection, propagation, smoothing and layout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..attention.condition import Condition
from ..attention.key_frames import Chunk
from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from ..imports import no_grad
from ..store.states import UNSAVED, States
from .branches import Branches, EditRun
from .denoiser import Denoiser, check_finite, chunks_of, joined, usual_windows
from .edit_maps import EditMaps
from .invert import Inversion, Progress
from .parts import Edit, Injected, Injection, Layouts, Prediction, Propagation, Smoothing
from .source import Needs, check_store, sources
from .spread import ONE_PROCESS, Spread
from .start import start_of

if TYPE_CHECKING:
    from torch import Tensor

STATE = "edit"
"""The name of the state of an edit."""


def edit(
    denoiser: Denoiser,
    inversion: Inversion,
    target_embeddings: Tensor | Condition,
    negative_embeddings: Tensor | Condition | None = None,
    guidance_scale: float = 7.5,
    prompt: PromptEdit | None = None,
    fusion: Injection | None = None,
    chunk_frames: int | None = None,
    *,
    propagation: Propagation | None = None,
    mask: GivenMask | None = None,
    smoothing: Smoothing | None = None,
    layout: Layouts | None = None,
    strength: float = 1.0,
    sdedit_seed: int | None = None,
    maps: EditMaps | None = None,
    guidance_until: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Edit an inverted clip; returns latents (frames, c, h, w).

    target_embeddings, negative_embeddings: (1, tokens, dim), or `Condition`s; the negative ones may be None at
    guidance 1. prompt: the pair of prompts, which FateZero needs. fusion: the injection (`FusionSettings`,
    `PnPSettings`); None is plain sampling from the inverted noise. propagation: from key frames to the other frames
    (`TokenFlowSettings`). chunk_frames: see `invert`; None for the inversion's windows. mask: replaces or joins
    FateZero's blend mask; without FateZero, the edit restores the inversion's latents outside it. smoothing: filters
    the edit's changes over time (`FlowSmoothing`). layout: the positions of objects (`MoveObjects`, `LayoutGuidance`).
    strength, sdedit_seed, guidance_until: see `Edit`. maps: records attention to words, and masks; eight more model
    calls.

    FateZero injects into the conditional branch, Plug-and-Play into both. Model calls: two a step (one at guidance 1),
    and one more in every step that reads a source that is not in the store (`recipes.cost.calls_of`).

    Before the first step, raises StoreError for a store of another model, schedule or prompt, and ValueError for
    options that conflict; later, ArithmeticError for latents that are not finite.
    """
    one = Edit(
        target_embeddings, negative_embeddings, guidance_scale, prompt, fusion, mask, propagation, smoothing, layout,
        strength, sdedit_seed, maps, guidance_until,
    )  # fmt: skip
    return edit_many(denoiser, inversion, [one], chunk_frames, progress=progress)[0]


def edit_many(
    denoiser: Denoiser,
    inversion: Inversion,
    edits: Sequence[Edit],
    chunk_frames: int | None = None,
    *,
    spread: Spread = ONE_PROCESS,
    states: States = UNSAVED,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Several edits of an inverted clip in one pass that reads or computes each step's source once.

    spread: the processes that share the chunks. states: where every step is saved, to continue an interrupted run.
    Raises the errors of `edit`.
    """
    if not edits:
        return []
    steps = inversion.store.steps
    begin, *found = states.load(STATE, denoiser.device) or (0,)
    with EditPass(denoiser, inversion, edits, chunk_frames, spread=spread, begin=begin) as run:
        zs = run.resumed(*found) if found else run.start
        for step in range(begin, steps):
            zs = run.guided(zs, step)
            zs = run.move(zs, step, run.predict(zs, step))
            for z in zs:
                check_finite(z, f"the edit's latents at step {step + 1} of {steps}")
            if run.has_whole_state:
                states.save(STATE, (step + 1, zs, run.state))
            if progress:
                progress(step + 1, steps)
    return zs


class EditPass:
    """Several edits of an inverted clip, step by step (0 the noisiest). Inside `with`, the denoiser is hooked.

    in_order: whether each step is predicted once and in order, so that a store on disk can be read ahead. begin: the
    first step to predict. spread: see `edit_many`. Raises the errors of `edit`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        inversion: Inversion,
        edits: Sequence[Edit],
        chunk_frames: int | None = None,
        in_order: bool = True,
        spread: Spread = ONE_PROCESS,
        begin: int = 0,
    ) -> None:
        store = inversion.store
        schedule = start_of(store).schedule(denoiser.schedule(store.steps))
        for one in edits:
            check_store(store, denoiser, schedule, one.prompt)
        self._denoiser, self._store, self._in_order, self._begin = denoiser, store, in_order, begin
        self._calls, self._spread = store.calls(chunk_frames), spread
        self._steps = store.steps
        self._runs = [EditRun(denoiser, store, schedule, one, in_order) for one in edits]
        self.start: list[Tensor] = []
        """The latents of each edit's first step."""
        clip, usual = store.level(0).to(denoiser.device), usual_windows(denoiser) if start_of(store).draws else None
        self._chunks = [chunks_of(denoiser, self._calls, clip, timestep, usual) for timestep in store.timesteps]
        self._open = ExitStack()

    @no_grad
    def __enter__(self) -> EditPass:
        with ExitStack() as opened:
            opened.enter_context(self._denoiser.hooked(self._store.clip_norm))
            shared = sources(
                self._denoiser, self._store, self._chunks, self._shared_needs(), self._in_order, self._begin
            )
            self._source_of = opened.enter_context(shared)
            for run in self._runs:
                run.prepare(self._chunks)
            self.start = [run.begin() for run in self._runs]
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def _shared_needs(self) -> list[Needs]:
        """What each step reads from the source that several edits share."""
        together = [run for run in self._runs if run.shares_source]
        return [
            Needs(set().union(*(run.injected.needs(step).layers for run in together if step >= run.first)))
            for step in range(self._steps)
        ]

    @property
    def state(self) -> list[Any]:
        """What the steps so far leave to later ones besides the latents, for `States.save`."""
        return [run.state for run in self._runs]

    @property
    def has_whole_state(self) -> bool:
        """Whether this process has the whole `state`, and not only that of its own chunks."""
        parts = [one.over_steps for one in self.injections if one.over_steps is not None]
        return self._spread is ONE_PROCESS or not any(part.state for part in parts)

    def resumed(self, zs: list[Tensor], states: Sequence[Any]) -> list[Tensor]:
        """The latents of an interrupted run, whose state is restored."""
        for run, state in zip(self._runs, states, strict=True):
            run.resume(state)
        return zs

    @no_grad
    def guided(self, zs: Sequence[Tensor], step: int) -> list[Tensor]:
        """Each edit's input latents of a step, moved by layout guidance."""
        return [run.guided(z, step, self._calls) for run, z in zip(self._runs, zs, strict=True)]

    @no_grad
    def predict(self, zs: Sequence[Tensor], step: int) -> list[Prediction | None]:
        """Each edit's prediction for its latents (frames, c, h, w); None before its first step."""
        chunks, parts = self._chunks[step], dict[int, list[Prediction]]()
        called = [step >= run.first and not run.reuses(step) for run in self._runs]
        together = [i for i, run in enumerate(self._runs) if run.shares_source and called[i]]

        def of_chunk(chunk: Chunk) -> tuple[Prediction, ...]:
            source, found = self._source_of(step, chunk), list[Prediction]()
            for i in together:
                found.append(self._runs[i].branches(zs[i], step).edit(source))
                if source.paired is not None and i != together[-1]:  # it ran within that edit's call only
                    source = self._source_of(step, chunk)
            return tuple(found)

        if together:
            by_run = zip(*self._spread.each(chunks, of_chunk), strict=True)
            parts = {i: list(own) for i, own in zip(together, by_run, strict=True)}
        for i, (run, z) in enumerate(zip(self._runs, zs, strict=True)):
            if called[i]:
                run.last = run.smoothed(z, step, self._of_run(run, z, step, chunks, parts.get(i, [])))
            if run.maps is not None and run.last is not None:
                run.maps.record(self._store, step, run.last)
        return [run.last for run in self._runs]

    def _of_run(
        self, run: EditRun, z: Tensor, step: int, chunks: Sequence[Chunk], shared: Sequence[Prediction]
    ) -> Prediction:
        """An edit's prediction. shared: its parts by chunk, if it shares the source."""
        if run.shares_source:
            return _joined(chunks, shared)
        if run.propagation is None:
            return run.start.predict(run, z, step, self._of_chunks)
        branches, windows = run.branches(z, step), self._calls.windows
        longest = None if windows is None else windows.frames
        found = run.propagation.predict(step, self._steps, self._store.frames, branches, longest)
        if not all(any(part is made for made in branches.made) for _, part in found):
            raise TypeError(
                f"{type(run.propagation).__name__} predicts without `Branches.edit`, so that nothing is injected"
            )
        return _joined([chunk for chunk, _ in found], [part for _, part in found])

    def _of_chunks(self, branches: Branches) -> Prediction:
        """An edit's prediction with its own source."""
        chunks = self._chunks[branches.step]
        return _joined(chunks, self._spread.each(chunks, lambda chunk: branches.edit(branches.source_for(chunk))))

    @no_grad
    def move(self, zs: Sequence[Tensor], step: int, predicted: Sequence[Prediction | None]) -> list[Tensor]:
        """Each edit's latents at the next less noisy level."""
        return [z if p is None else run.move(z, step, p) for run, z, p in zip(self._runs, zs, predicted, strict=True)]

    @property
    def guides_layout(self) -> bool:
        """Whether an edit has a layout, which can move latents before a step."""
        return any(run.layout is not None for run in self._runs)

    @property
    def injections(self) -> list[Injected]:
        """What each edit injects, prepared."""
        return [run.injected for run in self._runs]

    @property
    def blends_latents(self) -> bool:
        """Whether an edit restores latents of the inversion, which `move` does."""
        return any(run.injected.blends_latents(step) for run in self._runs for step in range(self._steps))


def _joined(chunks: Sequence[Chunk], parts: Sequence[Prediction]) -> Prediction:
    def whole(found: Sequence[Tensor | None]) -> Tensor | None:
        given = [part for part in found if part is not None]
        return joined(chunks, given) if given else None

    noise, *others = zip(*parts, strict=True)
    return Prediction(joined(chunks, noise), *map(whole, others))
