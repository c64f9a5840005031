"""The FateZero edit: denoise with the target prompt, fused with the inversion's attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.budget import record_shapes
from ..attention.control import AttentionSite, Control
from ..attention.fusion import Fuser, FusionSettings, StepPlan
from ..attention.key_frames import Piece
from ..attention.masks import GivenMask, foreign_columns, heat_of, mask_sites, soft_mask, threshold_mask, word_heat
from ..attention.prompt import Alignment, PromptEdit
from ..attention.records import Recorder, SourceStep
from ..attention.shelves import FileShelf, Records, read_ahead
from ..attention.store import AttentionStore, Condition, StoreError
from .ddim import Schedule, ddim_move
from .denoiser import Denoiser, Guidance, check_finite, frames_of, joined, pieces_of
from .invert import Inversion, Progress
from .prompt_mask import difference_levels, prompt_heat


class Injection(Protocol):
    """What an edit takes of the source in both of its guided branches, in place of FateZero's fusion."""

    def wanted(self, step: int, steps: int, sites: list[AttentionSite]) -> set[str]:
        """Names of the layers whose source attention a step reads."""

    def takes_feature(self, step: int, steps: int) -> bool:
        """Whether a step reads the source's feature."""

    def control(self, source: SourceStep, step: int, steps: int) -> Control:
        """What a guided branch does at a step."""


class Propagation(Protocol):
    """How frames agree beyond the key frames that their attention sees."""

    def predict(self, step: int, steps: int, clip: int, branches: Branches) -> list[tuple[Piece, Prediction]]:
        """The pieces of a clip that a step predicts, whose weights sum to 1 for each frame, and their predictions."""


@dataclass(frozen=True)
class Edit:
    """One edit of an inverted clip: the arguments of `edit` that differ from edit to edit."""

    target_embeddings: Tensor | Condition
    negative_embeddings: Tensor | Condition | None = None
    guidance_scale: float = 7.5
    prompt: PromptEdit | None = None
    fusion: FusionSettings | Injection | None = None
    mask: GivenMask | None = None
    propagation: Propagation | None = None


def edit(
    denoiser: Denoiser,
    inversion: Inversion,
    target_embeddings: Tensor | Condition,
    negative_embeddings: Tensor | Condition | None = None,
    guidance_scale: float = 7.5,
    prompt: PromptEdit | None = None,
    fusion: FusionSettings | Injection | None = None,
    chunk_frames: int | None = None,
    *,
    propagation: Propagation | None = None,
    mask: GivenMask | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Edit an inverted clip (FateZero Sec. 3.2 and 3.3); (frames, 4, h, w).

    target_embeddings, negative_embeddings: (1, tokens, dim), or `Condition`s; the negative
    ones may be None at guidance 1. prompt: how source and target words meet; without it there is no FateZero
    fusion. fusion: what is taken of the source: `FusionSettings`, or `PnPSettings`, which need no prompt; with neither
    the edit is plain DDIM from the inverted noise. propagation: how frames agree beyond their key frames
    (`TokenFlowSettings`). chunk_frames: see `invert`. mask: replaces or joins the blend mask of self-attention
    and latents.

    Fusion touches the conditional branch alone. UNet calls: two a step (one at guidance 1), and
    one more in every step that reads a source that is not kept (`unet_calls`).

    Raises StoreError for a store of another model, schedule or prompt, and ValueError for
    options that do not fit each other, before the first step; ArithmeticError where numbers leave their range.
    """
    alone = Edit(target_embeddings, negative_embeddings, guidance_scale, prompt, fusion, mask, propagation)
    return edit_many(denoiser, inversion, [alone], chunk_frames, progress=progress)[0]


def edit_many(
    denoiser: Denoiser,
    inversion: Inversion,
    edits: Sequence[Edit],
    chunk_frames: int | None = None,
    *,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Several edits of an inverted clip in one pass: each step's source is read, or computed, once for all.

    Errors are those of `edit`.
    """
    if not edits:
        return []
    steps = inversion.store.steps
    with EditPass(denoiser, inversion, edits, chunk_frames) as run:
        zs = run.start
        for step in range(steps):
            zs = run.move(zs, step, run.predict(zs, step))
            for z in zs:
                check_finite(z, f"the edit's latents at step {step + 1} of {steps}")
            if progress:
                progress(step + 1, steps)
    return zs


@dataclass(frozen=True)
class Prediction:
    """What a step gives: noise (frames, 4, h, w), and the mask of latents (frames, 1, h, w) where it blends them.

    Of the whole clip, or of the frames that a piece holds.
    """

    noise: Tensor
    mask: Tensor | None


class EditPass:
    """Several edits of an inverted clip, step by step (0 the noisiest); inside `with`, the denoiser is hooked.

    in_order: whether each step is predicted once and after the one before, so that a store on disk can be read
    ahead. Errors are those of `edit`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        inversion: Inversion,
        edits: Sequence[Edit],
        chunk_frames: int | None = None,
        in_order: bool = True,
    ) -> None:
        store, self._schedule = inversion.store, denoiser.schedule(inversion.store.steps)
        for one in edits:
            check_store(store, denoiser, self._schedule, one.prompt)
        self._denoiser, self._store, self._in_order = denoiser, store, in_order
        self._steps = store.steps
        self._runs = [_Run.prepared(denoiser, store, self._schedule, one) for one in edits]
        start = store.level(store.steps).to(denoiser.device)
        self.start = [start] * len(self._runs)
        """The inverted noise, for each edit."""
        self._pieces = [
            pieces_of(denoiser, store.key_frames, start, timestep, chunk_frames, store.clip_norm)
            for timestep in store.timesteps
        ]
        self._open = ExitStack()

    @torch.no_grad()
    def __enter__(self) -> EditPass:
        with ExitStack() as opened:
            opened.enter_context(self._denoiser.hooked(self._store.clip_norm))
            # One source serves all edits that fuse as FateZero; each of the others asks for its own.
            together = [run for run in self._runs if not run.alone]
            layers = [set().union(*(run.asks(step).layers for run in together)) for step in range(self._steps)]
            asks = [Asks(names) for names in layers]
            sources = _sources(self._denoiser, self._store, self._pieces, asks, self._in_order)
            self._source_of = opened.enter_context(sources)
            self._runs = [run.with_prompt_mask(self._pieces) for run in self._runs]
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @torch.no_grad()
    def predict(self, zs: Sequence[Tensor], step: int) -> list[Prediction]:
        """Each edit's prediction for its latents (frames, 4, h, w)."""
        pieces, parts = self._pieces[step], [list[Prediction]() for _ in self._runs]
        together = [i for i, run in enumerate(self._runs) if not run.alone]
        for piece in pieces if together else []:
            source = self._source_of(step, piece)
            for i in together:
                parts[i].append(self._runs[i].predict(zs[i], step, source))
        return [
            self._alone(run, z, step) if run.alone else _joined(pieces, own)
            for run, z, own in zip(self._runs, zs, parts, strict=True)
        ]

    def _alone(self, run: _Run, z: Tensor, step: int) -> Prediction:
        """An edit whose source no other one shares."""
        branches = Branches(self._denoiser, self._store, run, z, step)
        if run.propagation is not None:
            found = run.propagation.predict(step, self._steps, self._store.frames, branches)
        else:
            found = [(piece, branches.edit(branches.source(piece).step)) for piece in self._pieces[step]]
        return _joined([piece for piece, _ in found], [part for _, part in found])

    @torch.no_grad()
    def move(self, zs: Sequence[Tensor], step: int, predicted: Sequence[Prediction]) -> list[Tensor]:
        """Each edit's latents one level cleaner."""
        return [run.move(z, step, p) for run, z, p in zip(self._runs, zs, predicted, strict=True)]

    @property
    def blends_latents(self) -> bool:
        """Whether an edit puts latents of the inversion back, which `move` alone does."""
        return any(run.plan(step).blend_latents for run in self._runs for step in range(self._steps))


def _joined(pieces: Sequence[Piece], parts: Sequence[Prediction]) -> Prediction:
    masks = [part.mask for part in parts if part.mask is not None]
    return Prediction(joined(pieces, [part.noise for part in parts]), joined(pieces, masks) if masks else None)


# --- the source ---------------------------------------------------------------------------


SourceOf = Callable[[int, Piece], SourceStep]


@dataclass(frozen=True)
class Asks:
    """What a step reads of the source: the attention of some layers, and the feature.

    own_level: of the source's latents at the edit's own level of noise, as Plug-and-Play and TokenFlow take them; else
    of the inversion's call at that timestep, whose latents are one level cleaner, as FateZero takes them.
    """

    layers: set[str]
    feature: bool = False
    own_level: bool = False

    @property
    def nothing(self) -> bool:
        return not (self.layers or self.feature)


@contextmanager
def _sources(
    denoiser: Denoiser, store: AttentionStore, pieces: list[list[Piece]], asks: list[Asks], in_order: bool = True
) -> Iterator[SourceOf]:
    """The source's attention at each step and piece: from the store, read ahead if in order, or computed again."""

    def kept(step: int) -> bool:
        return bool(asks[step].layers) and store.keeps(step)

    def job(step: int, piece: Piece) -> Callable[[], Records]:
        return lambda: store.fetch(step, asks[step].layers, piece, denoiser.device)

    steps = range(store.steps) if in_order else ()
    jobs = (job(step, piece) for step in steps if kept(step) for piece in pieces[step])
    with read_ahead(denoiser.device, store.on_disk, jobs) as take:

        def source_of(step: int, piece: Piece) -> SourceStep:
            if kept(step):
                return SourceStep(take() if in_order else job(step, piece)(), store.key_frames, piece, stored=True)
            return compute_source(denoiser, store, step, asks[step], piece).step

        yield source_of


def compute_source(
    denoiser: Denoiser,
    store: AttentionStore,
    step: int,
    asks: Asks,
    piece: Piece,
    prepare: Callable[[Recorder], None] | None = None,
) -> Recorder:
    """The source's branch at an edit step (0 the noisiest); without a UNet call where nothing is asked of it.

    prepare: called with the control before the call, which is then made in any case.
    """
    recorder = Recorder(store.key_frames, piece, asks.layers)
    recorder.features = {} if asks.feature else None
    if prepare is not None:
        prepare(recorder)
    elif asks.nothing:
        return recorder
    level = store.steps - step - (0 if asks.own_level else 1)
    z = store.level(level).to(denoiser.device, non_blocking=True)
    denoiser.predict_noise(frames_of(z, piece), store.timesteps[step], store.source, recorder)
    return recorder


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

    @property
    def extends(self) -> bool:
        """Whether key frames that run together may all see each other: FateZero's fusion has key frames of its own."""
        return self.run.alignment is None

    def source(self, piece: Piece, prepare: Prepare | None = None) -> Recorder:
        """The source on a piece."""
        prepared = None if prepare is None else lambda recorder: prepare("source", recorder)
        return compute_source(self.denoiser, self.store, self.step, self.run.asks(self.step), piece, prepared)

    def edit(self, source: SourceStep, prepare: Prepare | None = None) -> Prediction:
        """The guided prediction of the edit on the source's piece."""
        return self.run.predict(self.z, self.step, source, prepare)


# --- one edit -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """One edit with its inputs checked, on the device it runs on."""

    denoiser: Denoiser
    store: AttentionStore
    schedule: Schedule
    target: Condition
    negative: Condition | None
    guidance_scale: float
    fusion: FusionSettings
    alignment: Alignment | None
    blend_columns: tuple[list[int], list[int]]
    sites: list[AttentionSite]
    mask_sites: list[AttentionSite]
    given: GivenMask | None
    given_at: dict[tuple[int, int], Tensor]
    """The given mask on each grid."""
    of_prompts: dict[tuple[int, int], Tensor]
    """The mask of the prompts' difference on each grid, where the edit takes one."""
    injection: Injection | None
    propagation: Propagation | None
    foreign: Tensor | None
    """Where each target column belongs to something else, (frames, columns, y, x), with `separate_words`."""

    @classmethod
    def prepared(cls, denoiser: Denoiser, store: AttentionStore, schedule: Schedule, asked: Edit) -> _Run:
        like = store.level(0)[:1].to(denoiser.device)
        injection = None if asked.fusion is None or isinstance(asked.fusion, FusionSettings) else asked.fusion
        fusion = asked.fusion if isinstance(asked.fusion, FusionSettings) else FusionSettings()
        prompt, given = None if injection else asked.prompt, asked.mask
        if given is not None and prompt is None:
            raise ValueError("a mask needs FateZero's fusion: prompt=PromptEdit(...) and fusion=FusionSettings(...)")
        if not math.isfinite(asked.guidance_scale):
            raise ValueError(f"guidance_scale is {asked.guidance_scale}; it must be a finite number")
        target = Condition.of(asked.target_embeddings, "target_embeddings").to(like)
        negative = None
        if asked.guidance_scale != 1:
            if asked.negative_embeddings is None:
                raise ValueError(f"guidance_scale={asked.guidance_scale} needs negative_embeddings")
            negative = Condition.of(asked.negative_embeddings, "negative_embeddings").to(like)
        height, width = store.levels.shape[-2:]
        sites = denoiser.sites(height, width)
        alignment, masking, given_at = None, [], {}
        columns: tuple[list[int], list[int]] = ([], [])
        if prompt is not None:
            alignment = prompt.align(store.source.columns, target.columns)
            alignment = alignment.to(like.to(denoiser.dtype))
            if given is not None:
                if not fusion.blends:
                    raise ValueError("a mask needs blend_self_attention or blend_latents: nothing else uses one")
                given_at = _on_grids(given, sites, like, store.frames)
            if fusion.blends and not (given is not None and given.alone):
                if fusion.masks_by_step or prompt.blend_words is not None:
                    columns = prompt.blend_columns(store.source.columns, target.columns)
                if fusion.masks_by_step:
                    if not columns[0]:
                        raise ValueError("a mask of attention needs blend_words of the source prompt")
                    if fusion.blend_latents and not columns[1]:
                        raise ValueError("blend_latents needs blend_words of the target prompt too")
                    masking = mask_sites(sites, fusion.mask_tokens)
        elif fusion.blends:
            raise ValueError("blend_self_attention and blend_latents need prompt=PromptEdit(..., blend_words=...)")
        return cls(
            denoiser, store, schedule, target, negative, asked.guidance_scale,
            fusion, alignment, columns, sites, masking, given, given_at, {}, injection, asked.propagation, None,
        )  # fmt: skip

    def with_prompt_mask(self, pieces: list[list[Piece]]) -> _Run:
        """This edit with the mask of its two prompts, where it takes one."""
        given_alone = self.given is not None and self.given.alone
        if self.alignment is None or given_alone or not self.fusion.masks_by_prompts:
            return self
        sites = mask_sites(self.sites, self.fusion.mask_tokens) if any(self.blend_columns) else []
        heat = prompt_heat(self.denoiser, self.store, self.target, self.blend_columns, sites, pieces)
        mask = GivenMask(soft_mask(heat.edit, self.fusion.blend_threshold))
        foreign = None
        if self.fusion.separate_words and heat.columns is not None:
            of_source = foreign_columns(heat.columns, self.blend_columns[0])
            foreign = torch.einsum("fsyx,sc->fcyx", of_source, self.alignment.matrix.to(of_source))
            foreign[:, self.blend_columns[1]] = 0
        return replace(self, of_prompts=_on_grids(mask, self.sites, heat.edit, self.store.frames), foreign=foreign)

    def plan(self, step: int) -> StepPlan:
        if self.alignment is None:
            return StepPlan(False, False, False, False)
        return StepPlan.of(self.fusion, step, self.schedule.steps)

    def asks(self, step: int) -> Asks:
        """What a step reads of the source."""
        if self.injection is not None:
            steps = self.schedule.steps
            wanted = self.injection.wanted(step, steps, self.sites)
            return Asks(wanted, self.injection.takes_feature(step, steps), own_level=True)
        wanted = self.plan(step).wanted(self.fusion, self.sites, self.mask_sites)
        return Asks(wanted, own_level=self.alignment is None)

    @property
    def alone(self) -> bool:
        """Whether it asks the source for what no other edit of the pass does."""
        return self.injection is not None or self.propagation is not None

    def predict(self, z: Tensor, step: int, source: SourceStep, prepare: Prepare | None = None) -> Prediction:
        """Noise of the source's piece, and where its latents are the edit's own. prepare: both branches' controls."""
        plan, timestep = self.plan(step), self.schedule.timesteps[step]
        control, negative = self.controls(source, plan, step)
        if prepare is not None:
            prepare("target", control)
            prepare("negative", negative)
        guidance = None if self.negative is None else Guidance(self.negative, negative, self.guidance_scale)
        latents = frames_of(z, source.piece)
        noise = self.denoiser.predict_noise(latents, timestep, self.target, control, guidance)
        if plan.blend_latents and isinstance(control, Fuser):
            return Prediction(noise, self.latent_mask(source, control).to(z))
        return Prediction(noise, None)

    def move(self, z: Tensor, step: int, predicted: Prediction) -> Tensor:
        """One DDIM step from level steps - step to the cleaner one."""
        level = self.schedule.steps - step
        z = ddim_move(z, predicted.noise, self.schedule.alphas[level], self.schedule.alphas[level - 1])
        if predicted.mask is not None:
            kept = self.store.level(level - 1).to(z.device, non_blocking=True)
            z = kept + predicted.mask * (z - kept)
        return z

    def controls(self, source: SourceStep, plan: StepPlan, step: int) -> tuple[Control, Control]:
        """Of the target's branch and the negative's, which FateZero's fusion leaves alone."""
        if self.injection is not None:
            target, negative = (self.injection.control(source, step, self.schedule.steps) for _ in range(2))
            return target, negative
        return self.control(source, plan), Control(source.key_frames, source.piece)

    def control(self, source: SourceStep, plan: StepPlan) -> Control:
        fuses = plan.fuse_cross or plan.fuse_self or plan.blend_latents or self.foreign is not None
        if self.alignment is None or not fuses:
            return Control(source.key_frames, source.piece)
        masks = None
        if plan.fuse_self and self.fusion.blend_self_attention:
            grids = {(s.height, s.width) for s in self.sites if s.kind == "self" and self.fusion.fuses(s)}
            masks = self.masks(grids, [self.source_heat(source)] if self.mask_sites else [], source.piece)
        keep = frozenset(s.name for s in self.mask_sites) if plan.blend_latents else frozenset()
        return Fuser(source, self.alignment, self.fusion, plan, masks, self.shares(source.piece), keep)

    def shares(self, piece: Piece) -> dict[tuple[int, int], Tensor] | None:
        """What each place of a piece keeps of its attention to each target column, less inside the mask to foreign
        ones: (held, columns, y, x) on each grid.
        """
        if self.foreign is None:
            return None
        foreign = self.foreign[list(piece.held)]
        grids = {(site.height, site.width) for site in self.sites if site.kind == "cross"}
        masks = self.masks(grids, [], piece)
        scaled = {grid: F.interpolate(foreign, size=grid, mode="bilinear", align_corners=False) for grid in grids}
        less = self.fusion.separate_words
        return {grid: 1 - less * masks[grid][:, None] * scaled[grid] for grid in grids}

    def latent_mask(self, source: SourceStep, control: Fuser) -> Tensor:
        """Where source or target show a blend word: (held, 1, h, w)."""
        heats = []
        if self.mask_sites:
            maps = [(site, control.maps[site.name]) for site in self.mask_sites]
            heats = [self.source_heat(source), word_heat(maps, self.blend_columns[1])]
        height, width = self.store.levels.shape[-2:]
        return self.masks({(height, width)}, heats, source.piece)[height, width][:, None]

    def source_heat(self, source: SourceStep) -> Tensor:
        return heat_of(source, self.mask_sites, self.blend_columns[0], self.denoiser.dtype)

    def masks(self, grids: set[tuple[int, int]], heats: list[Tensor], piece: Piece) -> dict[tuple[int, int], Tensor]:
        """The blend mask of a piece on some grids: the union of the masks found, with the mask given."""
        found = {}
        for grid in grids:
            masks = [threshold_mask(heat, grid, self.fusion.blend_threshold) for heat in heats]
            masks += [self.of_prompts[grid][list(piece.held)]] if self.of_prompts else []
            if self.given is not None:
                given = self.given_at[grid][list(piece.held)]
                masks = [self.given.joined(given, torch.stack(masks).amax(0)) if masks else given]
            found[grid] = torch.stack(masks).amax(0)
        return found


def _on_grids(
    mask: GivenMask, sites: list[AttentionSite], latents: Tensor, frames: int
) -> dict[tuple[int, int], Tensor]:
    """A mask on the latents' grid and those of the attention layers."""
    height, width = latents.shape[-2:]
    grids = {(height, width)} | {(site.height, site.width) for site in sites}
    return {grid: mask.at(grid, frames).to(latents) for grid in grids}


# --- a look at the source -------------------------------------------------------------------


@torch.no_grad()
def source_heats(
    denoiser: Denoiser,
    inversion: Inversion,
    columns: Sequence[Sequence[int]],
    step: int,
    mask_tokens: int = 256,
    chunk_frames: int | None = None,
) -> list[Tensor]:
    """Where the source attends to some sets of its columns at an edit step: (frames, y, x) for each.

    Taken from the layers that masks come from, which are read, or computed, once for all.
    """
    store = inversion.store
    sites = mask_sites(denoiser.sites(*store.levels.shape[-2:]), mask_tokens)
    z = store.level(store.steps - step - 1).to(denoiser.device)
    pieces = pieces_of(denoiser, store.key_frames, z, store.timesteps[step], chunk_frames, store.clip_norm)
    wanted = {site.name for site in sites}
    parts: list[list[Tensor]] = [[] for _ in columns]
    every_step = [Asks(wanted if other == step else set()) for other in range(store.steps)]
    by_step = [pieces] * store.steps
    with denoiser.hooked(store.clip_norm), _sources(denoiser, store, by_step, every_step) as source_of:
        for piece in pieces:
            source = source_of(step, piece)
            for own, chosen in zip(parts, columns, strict=True):
                own.append(heat_of(source, sites, chosen, denoiser.dtype))
    return [joined(pieces, own) for own in parts]


def source_heat(
    denoiser: Denoiser, inversion: Inversion, prompt: PromptEdit, step: int, mask_tokens: int = 256
) -> Tensor:
    """Where the source attends to the source's blend words at an edit step: (frames, y, x)."""
    width = inversion.store.source.columns
    return source_heats(denoiser, inversion, [prompt.blend_columns(width, width)[0]], step, mask_tokens)[0]


def check_store(
    store: AttentionStore, denoiser: Denoiser, schedule: Schedule, prompt: PromptEdit | None = None
) -> None:
    """Raise StoreError where a store does not belong to this model, schedule or prompt."""
    if not store.model.matches(denoiser.identity()):
        raise StoreError(
            "the store was made by another model: invert again with this one "
            f"(store: {store.model.layout}; model: {denoiser.identity().layout})"
        )
    same = len(store.alphas) == len(schedule.alphas) and torch.allclose(torch.tensor(store.alphas), schedule.alphas)
    if store.timesteps != schedule.timesteps or not same:
        raise StoreError(
            f"the store was made on another schedule: its timesteps start {store.timesteps[:3]}, "
            f"this scheduler's {schedule.timesteps[:3]}"
        )
    if isinstance(store.shelf, FileShelf):
        _check_shelf(store, store.shelf, denoiser)
    if prompt is not None and store.prompt is not None and store.prompt != prompt.source:
        raise StoreError(f"the store was made with the prompt {store.prompt!r}, not {prompt.source!r}")


def _check_shelf(store: AttentionStore, shelf: FileShelf, denoiser: Denoiser) -> None:
    """StoreError where a file's attention is not of the shape that this model's layers have."""
    sites = {site.name: site for site in denoiser.sites(*store.levels.shape[-2:])}
    for step in shelf.steps:
        for name, parts in shelf.tensors(step).items():
            found = {part: tensor.shape for part, tensor in parts.items() if not part.endswith("_scale")}
            if name not in sites or found != record_shapes(
                sites[name], store.frames, store.key_frames, store.source.columns, as_map="map" in parts
            ):
                raise StoreError(f"the store's attention of {name} at step {step} does not fit this model")


class Calls(NamedTuple):
    """UNet calls on the whole clip: to invert, to edit once, and for the source beside all edits of a pass."""

    invert: int
    edit: int
    source: int


def unet_calls(
    steps: int, guidance_scale: float, kept_steps: int, fusion: FusionSettings, mask: GivenMask | None = None
) -> Calls:
    """What a run costs where the store keeps the attention of so many steps, none with memory "recompute"."""
    plans = [StepPlan.of(fusion, step, steps) for step in range(kept_steps, steps)]
    computed = sum(p.fuse_cross or p.fuse_self or p.mask for p in plans)
    own_mask = fusion.masks_by_prompts and not (mask is not None and mask.alone)
    compared = 2 * len(difference_levels(steps)) if own_mask else 0
    return Calls(steps, steps * (1 if guidance_scale == 1 else 2) + compared, computed)
