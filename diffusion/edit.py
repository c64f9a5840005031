"""The edit: denoise with the target prompt, and ask its parts what they take of the source and how frames agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control
from ..attention.key_frames import Chunk
from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from ..imports import no_grad, torch
from ..settings import setting, whole_steps
from ..store.backends import DrawnLevels
from ..store.records import Recorder, SourceStep
from ..store.store import AttentionStore
from .ddim import guide
from .denoiser import Denoiser, Guidance, check_finite, chunks_of, frames_of, joined
from .invert import Inversion, Progress
from .schedule import Schedule, Solver
from .source import Asks, check_store, compute_source, source_for, sources
from .spread import ONE_PROCESS, Spread
from .steering import EditSteering

if TYPE_CHECKING:
    from torch import Tensor

# --- the parts of an edit -----------------------------------------------------------------


class Injection(Protocol):
    """What an edit takes of the source: `FusionSettings`, `PnPSettings`."""

    def injected(self, asked: Edit, context: EditContext) -> Injected:
        """The same in one edit; ValueError for what does not fit it."""

    def reads_source(self, step: int, steps: int) -> bool:
        """Whether a step reads the source."""

    def preparing_calls(self, steps: int, mask: GivenMask | None, spans_clip: bool) -> int:
        """Calls of the model before the first step. spans_clip: whether it is a video transformer."""

    def summary(self, steps: int) -> str:
        """What it does in so many steps, in a line."""


class Propagation(Protocol):
    """How frames agree beyond the key frames that their attention sees: `TokenFlowSettings`."""

    def predict(
        self, step: int, steps: int, clip: int, branches: Branches, chunk_frames: int | None
    ) -> list[tuple[Chunk, Prediction]]:
        """The chunks of a clip that a step predicts, whose weights sum to 1 for each frame, and their predictions.

        chunk_frames: the most frames of one UNet call, where the method leaves a choice.
        """

    def evaluated(self, clip: int) -> float:
        """How many frames a branch evaluates in a step, as a multiple of the clip's."""

    def summary(self, clip: int) -> str:
        """What it does with so many frames, in a line."""


class Smoothing(Protocol):
    """What becomes of the clean latents that a step predicts: `FlowSmoothing`."""

    def smoothed(self, clean: Tensor, source: Tensor) -> Tensor:
        """Those of the whole clip (frames, c, h, w), beside the source's."""

    def summary(self) -> str:
        """What it does, in a line."""


class Layouts(Protocol):
    """Where things shall be: `LayoutGuidance`, `MoveObjects`."""

    @property
    def keeps_rest(self) -> bool:
        """Whether the clip changes in an area alone, which is known once it is prepared."""

    def prepared(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> EditSteering:
        """The same in one edit, while the denoiser is hooked; chunks: of every step.

        Raises ValueError for what does not fit.
        """

    def summary(self, steps: int) -> str:
        """What it does in so many steps, in a line."""


class EditContext:
    """What the parts of an edit know of its run.

    like, latents_like: of the device and dtype of the model, and of the latents. area: see `EditSteering`.
    """

    area: Tensor | None = None

    def __init__(self, denoiser: Denoiser, store: AttentionStore, target: Condition, latents_like: Tensor) -> None:
        self.denoiser, self.store, self.target = denoiser, store, target
        self.steps = store.steps
        self.sites: list[AttentionSite] = denoiser.sites(*store.levels.shape[-2:])
        self.spans_clip = denoiser.spans_clip
        self.latents_like = latents_like
        self.like = latents_like.to(denoiser.dtype)


class Injected:
    """What one edit takes of the source, step by step; this one takes nothing, and keeps latents outside a mask given.

    own_level: see `Asks`.
    """

    own_level = True

    def __init__(self, asked: Edit, context: EditContext) -> None:
        self.context = context
        self._inside = None if asked.mask is None else self.of_latents(asked.mask)

    def of_latents(self, mask: GivenMask) -> Tensor:
        """A mask on the latents' grid, (frames, 1, h, w); ValueError for one to be joined with another."""
        if not mask.replaces:
            raise ValueError(f"a mask joined as \"{mask.how}\" needs one of the edit's own: FateZero's, that blends")
        store = self.context.store
        height, width = store.levels.shape[-2:]
        return mask.at((height, width), store.frames).to(self.context.latents_like)[:, None]

    def prepare(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Called once, while the denoiser is hooked; chunks: of every step."""

    def asks(self, step: int) -> Asks:
        """What a step reads of the source."""
        return Asks(own_level=self.own_level)

    def controls(self, source: SourceStep, step: int) -> tuple[Control, Control]:
        """Of the target's branch and the negative's, on the source's chunk."""
        return Control(source.key_frames, source.chunk), Control(source.key_frames, source.chunk)

    def latent_mask(self, source: SourceStep, control: Control, step: int) -> Tensor | None:
        """Where latents stay the edit's own, told after its branch: (frames of the chunk, 1, h, w); None for all."""
        return None if self._inside is None else self._inside[list(source.chunk.frame_indices)]

    def blends_latents(self, step: int) -> bool:
        """Whether a step has such a mask."""
        return self._inside is not None


@dataclass(frozen=True)
class Edit:
    """One edit of an inverted clip: the arguments of `edit` that differ from edit to edit."""

    target_embeddings: Tensor | Condition
    negative_embeddings: Tensor | Condition | None = None
    guidance_scale: float = setting(
        7.5, "Classifier-free guidance. The paper takes 7.5.", least=1, most=100, step=0.1, group="The edit"
    )
    prompt: PromptEdit | None = None
    fusion: Injection | None = None
    mask: GivenMask | None = None
    propagation: Propagation | None = None
    smoothing: Smoothing | None = None
    layout: Layouts | None = None
    strength: float = setting(
        1.0,
        "Share of the steps that the edit runs. Below 1 it starts from the clip with less of the inverted noise "
        "(SDEdit), and stays closer to it.",
        least=0, most=1, step=0.01, group="The edit",
    )  # fmt: skip

    @property
    def injection(self) -> Injection | None:
        """`fusion`; FateZero's with its defaults where there is a prompt pair alone."""
        if self.fusion is None and self.prompt is not None:
            from ..methods.fatezero import FusionSettings

            return FusionSettings()
        return self.fusion


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
    progress: Progress | None = None,
) -> Tensor:
    """Edit an inverted clip; (frames, c, h, w).

    target_embeddings, negative_embeddings: (1, tokens, dim), or `Condition`s; the negative
    ones may be None at guidance 1. prompt: how source and target words meet; without it there is no FateZero
    fusion. fusion: what is taken of the source: `FusionSettings`, or `PnPSettings`, which need no prompt; with neither
    the edit is plain DDIM from the inverted noise. propagation: how frames agree beyond their key frames
    (`TokenFlowSettings`). chunk_frames: see `invert`. mask: replaces or joins FateZero's blend mask of self-attention
    and latents; without FateZero, latents outside it are the inversion's. smoothing: of what the edit changes, over
    time (`FlowSmoothing`). layout: where objects shall be (`MoveObjects`, `LayoutGuidance`). strength: see `Edit`.

    Fusion touches the conditional branch alone. UNet calls: two a step (one at guidance 1), and
    one more in every step that reads a source that is not kept (`unet_calls`).

    Raises StoreError for a store of another model, schedule or prompt, and ValueError for
    options that do not fit each other, before the first step; ArithmeticError where numbers leave their range.
    """
    one = Edit(
        target_embeddings, negative_embeddings, guidance_scale, prompt, fusion, mask, propagation, smoothing, layout,
        strength,
    )  # fmt: skip
    return edit_many(denoiser, inversion, [one], chunk_frames, progress=progress)[0]


def edit_many(
    denoiser: Denoiser,
    inversion: Inversion,
    edits: Sequence[Edit],
    chunk_frames: int | None = None,
    *,
    spread: Spread = ONE_PROCESS,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Several edits of an inverted clip in one pass: each step's source is read, or computed, once for all.

    spread: the processes that share the chunks. Errors are those of `edit`.
    """
    if not edits:
        return []
    steps = inversion.store.steps
    with EditPass(denoiser, inversion, edits, chunk_frames, spread=spread) as run:
        zs = run.start
        for step in range(steps):
            zs = run.steered(zs, step)
            zs = run.move(zs, step, run.predict(zs, step))
            for z in zs:
                check_finite(z, f"the edit's latents at step {step + 1} of {steps}")
            if progress:
                progress(step + 1, steps)
    return zs


class Prediction(NamedTuple):
    """What a step gives: noise (frames, c, h, w), and the mask of latents (frames, 1, h, w) where it blends them.

    Of the whole clip, or of a chunk of it.
    """

    noise: Tensor
    mask: Tensor | None
    source: Tensor | None = None
    """What the same step predicts of the source, where its noise was drawn."""


class EditPass:
    """Several edits of an inverted clip, step by step (0 the noisiest); inside `with`, the denoiser is hooked.

    in_order: whether each step is predicted once and after the one before, so that a store on disk can be read
    ahead. spread: see `edit_many`. Errors are those of `edit`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        inversion: Inversion,
        edits: Sequence[Edit],
        chunk_frames: int | None = None,
        in_order: bool = True,
        spread: Spread = ONE_PROCESS,
    ) -> None:
        store, self._schedule = inversion.store, denoiser.schedule(inversion.store.steps)
        for one in edits:
            check_store(store, denoiser, self._schedule, one.prompt)
        self._denoiser, self._store, self._in_order = denoiser, store, in_order
        self._chunk_frames, self._spread = chunk_frames, spread
        self._steps = store.steps
        self._runs = [_Run(denoiser, store, self._schedule, one) for one in edits]
        self._noise = store.level(store.steps).to(denoiser.device)
        self.start: list[Tensor] = []
        """Where each edit begins: the inverted noise, or with less strength the clip with so much of it."""
        self._chunks = [
            chunks_of(denoiser, store.key_frames, self._noise, timestep, chunk_frames, store.clip_norm)
            for timestep in store.timesteps
        ]
        self._open = ExitStack()

    @no_grad
    def __enter__(self) -> EditPass:
        with ExitStack() as opened:
            opened.enter_context(self._denoiser.hooked(self._store.clip_norm))
            # One source serves all edits that take the inversion's own calls; each of the others asks for its own.
            together = [run for run in self._runs if run.shares_source]
            layers = [
                set().union(*(run.injected.asks(step).layers for run in together if step >= run.first))
                for step in range(self._steps)
            ]
            asks = [Asks(names) for names in layers]
            shared = sources(self._denoiser, self._store, self._chunks, asks, self._in_order)
            self._source_of = opened.enter_context(shared)
            for run in self._runs:
                run.prepare(self._chunks)
            self.start = [run.start(self._noise) for run in self._runs]
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @no_grad
    def steered(self, zs: Sequence[Tensor], step: int) -> list[Tensor]:
        """Each edit's latents as the step begins from, moved where a layout guides it."""
        return [run.steered(z, step, self._chunk_frames) for run, z in zip(self._runs, zs, strict=True)]

    @no_grad
    def predict(self, zs: Sequence[Tensor], step: int) -> list[Prediction | None]:
        """Each edit's prediction for its latents (frames, c, h, w); None before its first step."""
        chunks, parts = self._chunks[step], dict[int, list[Prediction]]()
        together = [i for i, run in enumerate(self._runs) if run.shares_source and step >= run.first]

        def of_chunk(chunk: Chunk) -> tuple[Prediction, ...]:
            source, found = self._source_of(step, chunk), list[Prediction]()
            for i in together:
                found.append(self._runs[i].predict(zs[i], step, source))
                if source.beside is not None and i != together[-1]:  # it was evaluated for this one alone
                    source = self._source_of(step, chunk)
            return tuple(found)

        if together:
            by_run = zip(*self._spread.each(chunks, of_chunk), strict=True)
            parts = {i: list(own) for i, own in zip(together, by_run, strict=True)}
        return [
            None if step < run.first else run.smoothed(z, step, self._of_run(run, z, step, chunks, parts.get(i, [])))
            for i, (run, z) in enumerate(zip(self._runs, zs, strict=True))
        ]

    def _of_run(
        self, run: _Run, z: Tensor, step: int, chunks: Sequence[Chunk], shared: Sequence[Prediction]
    ) -> Prediction:
        """An edit's prediction; shared: what was made of the source that others use too."""
        if run.shares_source:
            return _joined(chunks, shared)
        branches = Branches(self._denoiser, self._store, run, z, step)
        if run.propagation is not None:
            found = run.propagation.predict(step, self._steps, self._store.frames, branches, self._chunk_frames)
        elif self._store.drawn is not None:
            return self._drawn(self._store.drawn, run, z, step)
        else:
            return self._of_chunks(branches, step)
        return _joined([chunk for chunk, _ in found], [part for _, part in found])

    def _of_chunks(self, branches: Branches, step: int) -> Prediction:
        """An edit's prediction with a source of its own."""
        chunks = self._chunks[step]
        parts = self._spread.each(chunks, lambda chunk: branches.edit(branches.source_for(chunk)))
        return _joined(chunks, parts)

    def _drawn(self, levels: DrawnLevels, run: _Run, z: Tensor, step: int) -> Prediction:
        """The mean prediction over draws of noise, z being of the first."""
        level, found = self._steps - step, list[Prediction]()
        first = levels[level].to(z.device)
        for draw in range(levels.draws):
            levels.draw = draw
            branches = Branches(self._denoiser, self._store, run, z + (levels[level].to(z.device) - first), step)
            found.append(self._of_chunks(branches, step))
        levels.draw = 0
        noise, source = (torch.stack([getattr(p, name) for p in found]).mean(0) for name in ("noise", "source"))
        return Prediction(noise, found[0].mask, source)

    @no_grad
    def move(self, zs: Sequence[Tensor], step: int, predicted: Sequence[Prediction | None]) -> list[Tensor]:
        """Each edit's latents one level cleaner."""
        return [z if p is None else run.move(z, step, p) for run, z, p in zip(self._runs, zs, predicted, strict=True)]

    @property
    def steers(self) -> bool:
        """Whether an edit has a layout, which moves latents before a step."""
        return any(run.layout is not None for run in self._runs)

    @property
    def blends_latents(self) -> bool:
        """Whether an edit puts latents of the inversion back, which `move` alone does."""
        return any(run.injected.blends_latents(step) for run in self._runs for step in range(self._steps))


def _joined(chunks: Sequence[Chunk], parts: Sequence[Prediction]) -> Prediction:
    def whole(found: list[Tensor | None]) -> Tensor | None:
        given = [part for part in found if part is not None]
        return joined(chunks, given) if given else None

    noise = joined(chunks, [part.noise for part in parts])
    return Prediction(noise, whole([part.mask for part in parts]), whole([part.source for part in parts]))


# --- one edit -----------------------------------------------------------------------------


Prepare = Callable[[str, Control], None]
"""Called with a branch's name ("source", "target", "negative") and its control, before it is evaluated."""


@dataclass(frozen=True)
class Branches:
    """The branches of one edit at one step, to be evaluated on any frames."""

    denoiser: Denoiser
    store: AttentionStore
    run: _Run
    z: Tensor
    step: int

    def source(self, chunk: Chunk, prepare: Prepare | None = None) -> Recorder:
        """The source on a chunk."""
        prepared = None if prepare is None else lambda recorder: prepare("source", recorder)
        return compute_source(self.denoiser, self.store, self.step, self.run.asks(self.step), chunk, prepared)

    def source_for(self, chunk: Chunk) -> SourceStep:
        """The source on a chunk for `edit`, which may evaluate it."""
        return source_for(self.denoiser, self.store, self.step, self.run.asks(self.step), chunk)

    def edit(self, source: SourceStep, prepare: Prepare | None = None) -> Prediction:
        """The guided prediction of the edit on the source's chunk."""
        return self.run.predict(self.z, self.step, source, prepare)


def check_of_transformers(propagation: Any, smoothing: Any, layout: Any) -> None:
    """Raise ValueError for a part of an edit that is for UNets alone, where a video transformer edits."""
    if part := _part_asked(propagation, smoothing, layout):
        raise ValueError(
            f"{part} is for UNets, whose latents are single frames: a video transformer's frames agree by themselves; "
            "leave it out"
        )


def check_of_drawn(propagation: Any, smoothing: Any, layout: Any) -> None:
    """Raise ValueError for a part of an edit that has no meaning where noise is drawn."""
    if part := _part_asked(propagation, smoothing, layout):
        raise ValueError(f"{part} needs an inversion, and does not go with drawn noise (FlowEdit)")


def _part_asked(propagation: Any, smoothing: Any, layout: Any) -> str | None:
    """The name of the first of these parts that an edit has."""
    parts = ((propagation, "TokenFlow"), (smoothing, "flow smoothing"), (layout, "a layout"))
    return next((name for part, name in parts if part), None)


class _Run:
    """One edit with its inputs checked, on the device it runs on."""

    def __init__(self, denoiser: Denoiser, store: AttentionStore, schedule: Schedule, asked: Edit) -> None:
        if not math.isfinite(asked.guidance_scale):
            raise ValueError(f"guidance_scale is {asked.guidance_scale}; it must be a finite number")
        if denoiser.spans_clip:
            check_of_transformers(asked.propagation, asked.smoothing, asked.layout)
        if store.drawn is not None:
            check_of_drawn(asked.propagation, asked.smoothing, asked.layout)
        self.denoiser, self.store, self.schedule = denoiser, store, schedule
        like = store.level(0)[:1].to(denoiser.device)
        self.target = Condition.of(asked.target_embeddings, "target_embeddings").to(like)
        self.negative: Condition | None = None
        if asked.guidance_scale != 1:
            if asked.negative_embeddings is None:
                raise ValueError(f"guidance_scale={asked.guidance_scale} needs negative_embeddings")
            self.negative = Condition.of(asked.negative_embeddings, "negative_embeddings").to(like)
        self.guidance_scale = asked.guidance_scale
        self._solver = Solver(schedule, store.order)
        self.propagation, self.smoothing = asked.propagation, asked.smoothing
        self.first = first_step(asked.strength, schedule.steps)
        self.context, injection = EditContext(denoiser, store, self.target, like), asked.injection
        self.injected = Injected(asked, self.context) if injection is None else injection.injected(asked, self.context)
        self.layout = asked.layout
        self._steering: EditSteering | None = None

    def prepare(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Called once, while the denoiser is hooked; chunks: of every step."""
        if self.layout is not None:
            self._steering = self.layout.prepared(self.context, chunks)
            self.context.area = self._steering.area
        self.injected.prepare(chunks)

    def start(self, noise: Tensor) -> Tensor:
        """The latents of the first step: the clip with so much of the eps that made the noise."""
        schedule, level, z = self.schedule, self.schedule.steps - self.first, noise
        if self.store.drawn is not None:
            return self.store.level(level).to(noise.device)
        if self.first:
            clip = self.store.level(0).to(noise.device)
            eps = (noise - schedule.signal(schedule.steps) * clip) / schedule.noise(schedule.steps)
            z = (schedule.signal(level) * clip + schedule.noise(level) * eps).to(noise.dtype)
        return z if self._steering is None else self._steering.started(z, schedule.noise(level).item())

    def steered(self, z: Tensor, step: int, chunk_frames: int | None) -> Tensor:
        """The latents that a step begins from."""
        steps, steering = self.schedule.steps, self._steering
        if steering is None or step < self.first or not steering.guides(step, steps):
            return z
        timestep, alpha = self.schedule.timesteps[step], self.schedule.alphas[steps - step]
        keys, norm = self.store.key_frames, self.store.clip_norm
        return steering.moved(self.denoiser, z, timestep, alpha, self.target, keys, norm, chunk_frames)

    @property
    def shares_source(self) -> bool:
        """Whether other edits of the pass can be served by the same evaluation of the source."""
        return self.propagation is None and not self.injected.own_level and self.store.drawn is None

    def asks(self, step: int) -> Asks:
        """What a step reads of the source."""
        return replace(self.injected.asks(step), prediction=self.store.drawn is not None)

    def predict(self, z: Tensor, step: int, source: SourceStep, prepare: Prepare | None = None) -> Prediction:
        """Noise of the source's chunk, and where its latents are the edit's own. prepare: both branches' controls."""
        control, negative = self.injected.controls(source, step)
        if prepare is not None:
            prepare("target", control)
            prepare("negative", negative)
        guidance = None if self.negative is None else Guidance(self.negative, negative, self.guidance_scale)
        latents, timestep = frames_of(z, source.chunk), self.schedule.timesteps[step]
        noise = self.denoiser.predict_noise(latents, timestep, self.target, control, guidance, source.beside)
        mask = self.injected.latent_mask(source, control, step)
        return Prediction(noise, None if mask is None else mask.to(z), self._of_source(source, step))

    def _of_source(self, source: SourceStep, step: int) -> Tensor | None:
        """The source's guided prediction, where its noise was drawn."""
        levels = self.store.drawn
        if levels is None:
            return None
        predicted = source.predicted if source.beside is None else source.beside.predicted
        assert predicted is not None
        if self.negative is None or levels.source_guidance == 1:
            return predicted
        z = frames_of(levels[self.schedule.steps - step].to(predicted.device), source.chunk)
        plain = Control(source.key_frames, source.chunk)
        away = self.denoiser.predict_noise(z, self.schedule.timesteps[step], self.negative, plain)
        return guide(away, predicted, levels.source_guidance)

    def smoothed(self, z: Tensor, step: int, predicted: Prediction) -> Prediction:
        """A prediction whose clean latents agree over time."""
        if self.smoothing is None:
            return predicted
        level = self.schedule.steps - step
        source = self.store.level(0).to(z.device, non_blocking=True)
        clean = self.schedule.clean(z, predicted.noise, level)
        smoothed = self.smoothing.smoothed(clean, source)
        if smoothed is clean:
            return predicted
        return Prediction(self.schedule.towards(z, smoothed, level), predicted.mask)

    def move(self, z: Tensor, step: int, predicted: Prediction) -> Tensor:
        """One step from level steps - step to the cleaner one."""
        level = self.schedule.steps - step
        if self.store.drawn is None:
            z = self._solver.move(z, predicted.noise, level, level - 1)
        else:
            z = self._moved_beside(self.store.drawn, z, predicted, level)
        if self._steering is not None:
            z = self._steering.carried(z, level - 1, step)
        if predicted.mask is not None:
            kept = self.store.level(level - 1).to(z.device, non_blocking=True)
            z = kept + predicted.mask * (z - kept)
        return z

    def _moved_beside(self, levels: DrawnLevels, z: Tensor, predicted: Prediction, level: int) -> Tensor:
        """FlowEdit's step (arXiv 2412.08629): x_edit' = x_edit + (sigma' - sigma) (d_edit - d_source), in latents that
        hold the level's noise: x_edit - x_0 = x - x_source.
        """
        assert predicted.source is not None
        here, there = (levels[at].to(z.device) for at in (level, level - 1))
        change = self.schedule.move(z - here, predicted.noise - predicted.source, level, level - 1)
        if level == 1:  # the clean clip itself, of which even DDIM's first level has a little less
            change = change / self.schedule.scale(0)
        return there + change


def first_step(strength: float, steps: int) -> int:
    """The step, 0 the noisiest, at which an edit of a strength begins; ValueError for a strength that leaves none."""
    if not 0 < strength <= 1 or steps - whole_steps(strength, steps) >= steps:
        raise ValueError(f"strength is {strength}; it must be above 0 and leave a step of {steps}, and at most 1")
    return steps - whole_steps(strength, steps)


class Calls(NamedTuple):
    """Calls of the model on the whole clip: to invert, to edit once, and for the source beside all edits of a pass."""

    invert: float
    edit: float
    source: float


def unet_calls(
    steps: int,
    guidance_scale: float,
    kept_steps: int,
    injection: Injection | None,
    mask: GivenMask | None = None,
    propagation: Propagation | None = None,
    frames: int = 1,
    strength: float = 1.0,
    spans_clip: bool = False,
    draws: int = 0,
) -> Calls:
    """What a run costs where the store keeps the attention of so many steps, none with memory "recompute".

    A propagation evaluates its key frames once more, and the source in every step. A layout's gradients are not
    counted: it tells them itself. draws: of FlowEdit's noise, where there is no inversion.
    """
    branches = 1 if guidance_scale == 1 else 2
    preparing = 0 if injection is None else injection.preparing_calls(steps, mask, spans_clip)
    first = first_step(strength, steps)
    if draws:
        return Calls(0, draws * branches * (steps - first) + preparing, draws * branches * (steps - first))
    if propagation is not None:
        times = (steps - first) * propagation.evaluated(frames)
        return Calls(steps, branches * times + preparing, times)
    computed = (
        0 if injection is None else sum(injection.reads_source(s, steps) for s in range(max(first, kept_steps), steps))
    )
    return Calls(steps, branches * (steps - first) + preparing, computed)
