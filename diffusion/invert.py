"""Inversion, with a record of what the edit needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..attention.condition import Condition
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames, Windows
from ..imports import no_grad, torch
from ..settings import check, setting
from ..store.backends import Records, level_name
from ..store.budget import Demand, StoreSettings, plan_store
from ..store.records import Recorder, whole_clip
from ..store.states import UNSAVED, States
from ..store.store import AttentionStore
from ..store.streams import with_shapes
from .denoiser import (
    Denoiser,
    check_finite,
    check_latents,
    chunks_of,
    clip_frames,
    frames_of,
    in_parts,
    joined,
    keys_on,
    refuse_clip_norm,
    usual_windows,
)
from .schedule import Schedule, Solver, timestep_at
from .spread import ONE_PROCESS, Spread

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, total steps)."""


GROUP = "The inversion"


@dataclass(frozen=True)
class InversionSettings:
    """Settings of the inversion besides its store. Raises ValueError for a number out of range."""

    steps: int = setting(50, "Steps of the inversion and the edit. The paper uses 50.", least=1, group=GROUP)
    key_frames: tuple[str | int, ...] = setting(
        ("self", "middle"),
        "Frames whose keys and values every frame attends to; more of them mean less flicker. A list of self, first, "
        "middle, last, previous and offsets such as -1. The paper uses self, middle; the authors' style settings "
        "middle. Frames of a video transformer attend to all.",
        group=GROUP,
    )
    key_frames_least_channels: int = setting(
        0, "Layers with fewer channels attend to their own frame only; the authors' least_sc_channel.", least=0,
        group=GROUP,
    )  # fmt: skip
    order: int = setting(
        1,
        "Order of the solver of inversion and edit: 1 (Euler), or 2 (midpoint), with the same number of model calls.",
        least=1, most=2, group=GROUP,
    )  # fmt: skip
    reuse_midpoint: bool = setting(
        False,
        "With order 2, begin each pair of steps with the previous pair's middle prediction instead of a model call "
        "(FireFlow, arXiv 2412.07517): half the calls, nearly as exact, or with twice the steps more exact. "
        "Attention is recomputed.",
        group=GROUP,
    )
    clip_norm: bool = setting(
        False,
        "Compute the ResNet blocks' normalization statistics over the whole clip instead of each frame, as the "
        "authors' code does. Steadier light, sometimes less detail. For UNets.",
        group=GROUP,
    )
    inversion_steps: int | None = setting(
        None,
        "Steps of the inversion alone: a multiple of steps, for more exact noise; the edit still takes steps. "
        "TokenFlow's code uses 500 with 50, its paper 1000: give 999, all timesteps of SD. Attention is recomputed.",
        least=1, shown="as steps", group=GROUP,
    )  # fmt: skip
    chunk_frames: int | None = setting(
        None,
        "Frames per model call. Results do not depend on it with key frames self, first, middle and last. With "
        "neighbours, clip_norm, temporal layers or a video transformer (which counts frames of the latents), chunks "
        "overlap and approximate the whole clip.",
        least=1, shown="all", group="This run",
    )  # fmt: skip
    window_frames: int | None = setting(
        None,
        "Frames of the video in a model call. A longer clip runs in overlapping windows, whose predictions are blended "
        "at each step, with weights that fall towards a window's ends: on a video transformer, with temporal layers, "
        "neighbours or clip_norm. Memory follows the window.",
        least=1, unit="frames", shown="the model's training length, if it has one", group="This run",
    )  # fmt: skip
    window_overlap: int | None = setting(
        None, "Frames that neighbouring windows share.", least=1, unit="frames", shown="half a window",
        group="This run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.inversion_steps is not None and self.inversion_steps < self.steps:
            raise ValueError(f"inversion_steps is {self.inversion_steps}; it must be at least steps, {self.steps}")
        if self.reuse_midpoint and self.order == 1:
            raise ValueError("reuse_midpoint needs order 2, whose pairs of steps have a middle prediction")
        if self.window_frames is not None and self.chunk_frames is not None:
            raise ValueError("chunk_frames and window_frames exclude each other: leave one of them out")
        if self.window_frames is not None and (self.window_overlap or 0) >= self.window_frames:
            raise ValueError(
                f"window_overlap is {self.window_overlap}; it must be less than window_frames, {self.window_frames}"
            )

    @property
    def keys(self) -> KeyFrames:
        return KeyFrames(self.key_frames, self.key_frames_least_channels)

    def windows(self, frames_per_latent: int = 1) -> Windows | None:
        """The windows on a model that codes so many frames in a latent; None for the model's own."""
        if self.window_frames is None:
            return None
        return Windows.of_video(self.window_frames, self.window_overlap, frames_per_latent)


@dataclass(frozen=True)
class Inversion:
    """An inverted clip. `latents`: (steps + 1, frames, c, h, w), clean to noisy."""

    store: AttentionStore

    @property
    def latents(self) -> Tensor:
        return self.store.latents


@no_grad
def invert(
    denoiser: Denoiser,
    latents: Tensor,
    source_embeddings: Tensor | Condition,
    steps: int = 50,
    key_frames: KeyFrames | Iterable[str | int] | str | int = ("self", "middle"),
    clip_norm: bool = False,
    memory: str | StoreSettings = "recompute",
    chunk_frames: int | None = None,
    *,
    windows: Windows | None = None,
    order: int = 1,
    reuse_midpoint: bool = False,
    inversion_steps: int | None = None,
    prompt: str | None = None,
    extra: dict[str, Any] | None = None,
    attachments: dict[str, Tensor] | None = None,
    spread: Spread = ONE_PROCESS,
    states: States = UNSAVED,
    progress: Progress | None = None,
) -> Inversion:
    """DDIM inversion of a clip at guidance 1 (FateZero Sec. 3.1), or inversion of a rectified flow.

    latents: (frames, c, h, w), in the model's scale. source_embeddings: (1, tokens, dim), or a `Condition`. key_frames:
    see `KeyFrames`; ignored by video transformers, whose frames attend to all. clip_norm: compute the ResNet blocks'
    GroupNorm statistics over the whole clip. memory: a name, or `StoreSettings`. chunk_frames: frames per call, None
    for all; `KeyFrames.chunks` says when this is approximate. windows: the same, kept in the store, so that edits run
    in the same windows; None for those of the host, else of a model with a training length
    (`Denoiser.trained_frames`), unless the store's memory needs the whole clip in one call. order: of the solver, 1 or
    2, see `Solver`.
    reuse_midpoint: half the calls of order 2, in the edit too (FireFlow); needs memory "recompute".
    inversion_steps: of the inversion alone, a multiple of the edit's, whose levels the store keeps; needs memory
    "recompute". prompt, extra, attachments: saved in the store, for checks of edits and the caller's own use; `extra`
    is JSON, `attachments` are tensors. spread: the processes that share the chunks, with memory "recompute". states:
    where every step is saved, to continue an interrupted run with the same `latents`; only without stored attention.

    In first order the model is called at the *target* timestep with the latents of the previous level, as in the
    authors' code; in second order at the latents' own. Raises ValueError for bad shapes or options, ArithmeticError for
    numbers out of range, and MemoryError, with the bytes, if the chosen memory does not fit.
    """
    settings, keys = _solved(StoreSettings.of(memory), order, reuse_midpoint), keys_on(denoiser, key_frames)
    check_latents(latents)
    if denoiser.spans_clip:
        refuse_clip_norm(clip_norm)
    source = Condition.of(source_embeddings, "source_embeddings").to(latents)
    schedule = fine = denoiser.schedule(steps)
    if inversion_steps not in (None, steps):
        fine, settings = denoiser.schedule(inversion_steps), recomputed(settings)
    kept_at = levels_among(schedule, fine)
    if windows is None and chunk_frames is None:
        windows = training_windows(denoiser, clip_frames(denoiser, latents), settings.memory)
    calls = ClipCalls(keys, clip_norm, Windows.of(chunk_frames) or windows)
    sites = denoiser.sites(*latents.shape[-2:])
    shape, size = tuple(latents.shape), latents.element_size()
    parts = in_parts(denoiser, calls, latents, schedule.timesteps[0])
    demand = Demand(sites, shape, size, steps, keys, denoiser.dtype, source.text_tokens, source.nbytes, parts)
    plan = plan_store(settings, demand, latents.device)
    if plan.memory != "recompute" and spread is not ONE_PROCESS:
        raise ValueError(f'memory "{plan.memory}" works in one process only: use "recompute" with several')
    store = AttentionStore(
        memory=plan.memory,
        levels=latents.expand(steps + 1, *latents.shape),  # only the shape; `filling` writes the values
        source=source,
        timesteps=schedule.timesteps,
        alphas=tuple(schedule.alphas.tolist()),
        key_frames=keys,
        clip_norm=clip_norm,
        formulation=schedule.formulation,
        order=order,
        reuse_midpoint=reuse_midpoint,
        inversion_steps=None if fine is schedule else fine.steps,
        windows=windows,
        model=denoiser.identity(),
        prompt=prompt,
        extra=with_shapes(extra, denoiser),
        attachments=attachments or {},
    )
    recorded = {site.name for site in sites if settings.keeps(site, plan.memory)}
    precision = settings.stored(denoiser.dtype)

    def called(z: Tensor, level: int) -> tuple[Tensor, Records]:
        """The prediction at a level's timestep, and the records for the edit's step there."""
        step = steps - level  # of the edit
        kept, timestep = recorded if 0 <= step < store.kept_steps else set(), timestep_at(fine, level)
        chunks = chunks_of(denoiser, calls, z, timestep)
        recorders = {chunk: Recorder(keys, chunk, kept, plan.memory, precision) for chunk in chunks}

        def predict(chunk: Chunk) -> Tensor:
            return denoiser.predict_noise(frames_of(z, chunk), timestep, source, recorders[chunk])

        predicted = joined(chunks, spread.each(chunks, predict))
        return predicted, whole_clip(list(recorders.values()), sites) if kept else {}

    with store.filling(plan, settings, demand, latents.device) as put, denoiser.hooked(clip_norm):
        solver, saved = Solver(fine, order, 0 if reuse_midpoint else None), UNSAVED if store.kept_steps else states
        _carry(latents, solver, called, _put_at(kept_at, put, saved), store.kept_steps > 0, saved, progress)
    return Inversion(store)


def training_windows(denoiser: Denoiser, frames: int, memory: str) -> Windows | None:
    """The windows of the model's training for a longer clip, unless a memory stores the attention of the whole clip."""
    usual = usual_windows(denoiser)
    fits = usual is None or frames <= usual.frames or memory not in ("auto", "recompute")
    return None if fits else usual


def _solved(settings: StoreSettings, order: int, reuse_midpoint: bool) -> StoreSettings:
    """The settings of the store for a solver; ValueError for settings that do not go together."""
    InversionSettings(order=order, reuse_midpoint=reuse_midpoint)
    return recomputed(settings, "reuse_midpoint") if reuse_midpoint else settings


def recomputed(settings: StoreSettings, why: str = "inversion_steps") -> StoreSettings:
    """The settings of a store without attention, which another setting needs; ValueError for another memory."""
    if settings.memory not in ("auto", "recompute"):
        raise ValueError(f'memory is {settings.memory}; {why} needs "recompute"')
    return replace(settings, memory="recompute")


def levels_among(schedule: Schedule, fine: Schedule) -> list[int]:
    """The levels of a finer schedule at which a schedule has its own. Raises ValueError if one is missing."""
    found = [int((fine.alphas - alpha).abs().argmin()) for alpha in schedule.alphas]
    if not torch.allclose(fine.alphas[found].double(), schedule.alphas.double(), rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"inversion_steps is {fine.steps}: its noise levels do not include those of {schedule.steps} steps; give a "
            f"multiple of steps, such as {10 * schedule.steps}"
        )
    return found


def _put_at(kept_at: Sequence[int], put: Callable[[int, Tensor, Records], None], states: States) -> Callable[..., None]:
    """A function that puts the kept levels of a finer schedule into the store, and saves the new ones."""

    def put_kept(level: int, z: Tensor, records: Records, new: bool = True) -> None:
        if level in kept_at:
            put(kept_at.index(level), z, records)
            if new:
                states.save(level_name(level), z)

    return put_kept


STATE = "inversion"
"""The name of the state of an inversion, whose levels have their own."""


def _carry(
    z: Tensor,
    solver: Solver,
    called: Callable[[Tensor, int], tuple[Tensor, Records]],
    put: Callable[..., None],
    keeps: bool,
    states: States,
    progress: Progress | None,
) -> None:
    """Carry clean latents to noise, and put every level into the store, with the records that the edit reads there."""
    steps, order, begin, predicted = solver.schedule.steps, solver.order, 0, z
    if (found := states.load(STATE, z.device)) is not None:
        begin, z, predicted, solver.state = found
        for level in range(begin):
            if (kept := states.load(level_name(level), z.device)) is not None:
                put(level, kept, {}, new=False)
    records: Records = {}
    if order == 1:
        put(begin, z, {})
    for level in range(begin, steps):
        if not solver.reuses(level, level + 1):
            predicted, records = called(z, level + (order == 1))
        if order == 2:
            put(level, z, records)
        z = solver.move(z, predicted, level, level + 1)
        check_finite(z, f"the inversion's latents at step {level + 1} of {steps}")
        if order == 1:
            put(level + 1, z, records)
        reused = level + 1 < steps and solver.reuses(level + 1, level + 2)
        states.save(STATE, (level + 1, z, predicted if reused else None, solver.state))
        if progress:
            progress(level + 1, steps)
    if order == 2:
        put(steps, z, called(z, steps)[1] if keeps else {})
