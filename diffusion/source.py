"""The source's branch of a step: read from a store, or computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..attention.capture import Captured
from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.masks import mask_sites, word_heat
from ..attention.prompt import PromptEdit
from ..imports import no_grad
from ..store.backends import FileBackend, Records, read_ahead
from ..store.budget import NOT_IN_PARTS, record_shapes
from ..store.records import PairedBranch, Recorder, SourceStep
from ..store.store import AttentionStore, StoreError
from ..store.streams import video_shape
from .denoiser import Denoiser, chunks_of, frames_meet, frames_of, joined
from .invert import Inversion
from .schedule import Schedule, same_levels

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a step reads from the source.

    layers: the attention layers whose queries and keys it reads, or with `values` their keys and values. feature:
    whether it reads the feature of the decoder's ResNet block. prediction: the model's prediction. own_level: whether
    the source's latents have the edit's noise level, as for Plug-and-Play and TokenFlow. Else they are those of the
    inversion's call at that timestep, as for FateZero: one level cleaner, or with a second-order inversion the same.
    """

    layers: set[str] = field(default_factory=set)
    feature: bool = False
    own_level: bool = False
    prediction: bool = False
    values: bool = False

    @property
    def nothing(self) -> bool:
        return not (self.layers or self.feature or self.prediction)

    def recorder(self, key_frames: KeyFrames, chunk: Chunk) -> Recorder:
        """A recorder of the source's branch that captures all of these."""
        recorder = Recorder(key_frames, chunk, self.layers, values=self.values)
        recorder.captured.features = {} if self.feature else None
        return recorder


SourceOf = Callable[[int, Chunk], SourceStep]
"""The source at a step, on a chunk of the clip."""


@contextmanager
def sources(
    denoiser: Denoiser,
    store: AttentionStore,
    chunks: list[list[Chunk]],
    needs: list[Needs],
    in_order: bool = True,
    begin: int = 0,
) -> Iterator[SourceOf]:
    """The source at each step and chunk: from the store, read ahead if in order from step `begin`, or computed again.

    Raises ValueError for stored attention that does not fit the chunks.
    """

    def is_stored(step: int) -> bool:
        return bool(needs[step].layers) and store.keeps(step)

    meet = frames_meet(denoiser, store.calls())
    if meet and any(is_stored(step) and len(chunks[step]) > 1 for step in range(store.steps)):
        raise ValueError(NOT_IN_PARTS.format(memory=store.memory))

    def job(step: int, chunk: Chunk) -> Callable[[], Records]:
        return lambda: store.fetch(step, needs[step].layers, chunk, denoiser.device)

    steps = range(begin, store.steps) if in_order else ()
    jobs = (job(step, chunk) for step in steps if is_stored(step) for chunk in chunks[step])
    with read_ahead(denoiser.device, store.on_disk, jobs) as take:

        def source_of(step: int, chunk: Chunk) -> SourceStep:
            if is_stored(step):
                records = take() if in_order else job(step, chunk)()
                return SourceStep(Captured(records), store.key_frames, chunk, stored=True)
            return source_for(denoiser, store, step, needs[step], chunk)

        yield source_of


def source_for(denoiser: Denoiser, store: AttentionStore, step: int, needs: Needs, chunk: Chunk) -> SourceStep:
    """The source's branch at an edit step: evaluated now, or within the edit's call by hosts that pair branches. Keys
    and values are read from a store that keeps them, if a step does not need those of its own level.
    """
    if needs.values and not needs.own_level and store.keeps(step, values=True):
        if not chunk.is_whole:
            raise ValueError(NOT_IN_PARTS.format(memory=store.memory))
        records = store.on_demand(step, chunk, denoiser.device)
        return SourceStep(Captured(records), store.key_frames, chunk, stored=True)
    if needs.nothing or not denoiser.pairs:
        return compute_source(denoiser, store, step, needs, chunk).step
    recorder = needs.recorder(store.key_frames, chunk)
    z = _latents(denoiser, store, step, needs, chunk)
    return SourceStep(recorder.captured, store.key_frames, chunk, paired=PairedBranch(z, store.source, recorder))


def _latents(denoiser: Denoiser, store: AttentionStore, step: int, needs: Needs, chunk: Chunk) -> Tensor:
    """The source's latents that an edit step reads."""
    level = store.steps - step if needs.own_level else store.source_level(step)
    return frames_of(store.level(level).to(denoiser.device, non_blocking=True), chunk)


def compute_source(
    denoiser: Denoiser,
    store: AttentionStore,
    step: int,
    needs: Needs,
    chunk: Chunk,
    prepare: Callable[[Recorder], None] | None = None,
) -> Recorder:
    """The source's branch at an edit step (0 the noisiest); without a model call if the step needs nothing.

    prepare: called with the control before the model call, which is then always made.
    """
    recorder = needs.recorder(store.key_frames, chunk)
    if prepare is not None:
        prepare(recorder)
    elif needs.nothing:
        return recorder
    z = _latents(denoiser, store, step, needs, chunk)
    recorder.captured.prediction = denoiser.predict_noise(z, store.timesteps[step], store.source, recorder)
    return recorder


# --- the source's attention to words --------------------------------------------------------


@no_grad
def source_heats(
    denoiser: Denoiser,
    inversion: Inversion,
    tokens: Sequence[Sequence[int]],
    step: int,
    mask_tokens: int = 256,
    chunk_frames: int | None = None,
) -> list[Tensor]:
    """Heat maps of the source's attention to some sets of its tokens at an edit step: (frames, y, x) for each.

    From the layers of the blend masks, which are read or computed once for all sets.
    """
    store = inversion.store
    if denoiser.spans_clip:
        heat = _heat_without_maps(denoiser, store, step, chunk_frames)
        return [heat[:, list(chosen)].sum(1) for chosen in tokens]
    sites = mask_sites(denoiser.sites(*video_shape(store)[1:]), mask_tokens)
    z = store.level(store.source_level(step)).to(denoiser.device)
    chunks = chunks_of(denoiser, store.calls(chunk_frames), z, store.timesteps[step])
    layers = {site.name for site in sites}
    parts: list[list[Tensor]] = [[] for _ in tokens]
    every_step = [Needs(layers if other == step else set()) for other in range(store.steps)]
    by_step = [chunks] * store.steps
    with denoiser.hooked(store.clip_norm), sources(denoiser, store, by_step, every_step) as source_of:
        for chunk in chunks:
            source = source_of(step, chunk)
            for own, chosen in zip(parts, tokens, strict=True):
                own.append(word_heat(source.maps(sites, denoiser.dtype), chosen))
    return [joined(chunks, own) for own in parts]


def _heat_without_maps(denoiser: Denoiser, store: AttentionStore, step: int, chunk_frames: int | None) -> Tensor:
    """The source's attention in a video transformer: (frames, tokens, y, x)."""
    z, timestep = store.level(store.source_level(step)).to(denoiser.device), store.timesteps[step]
    chunks = chunks_of(denoiser, store.calls(chunk_frames), z, timestep)
    sites, tokens = mask_sites(denoiser.sites(*video_shape(store)[1:]), 0), range(store.source.text_tokens)
    with denoiser.hooked():
        return attention_to(denoiser, store, z, step, store.source, sites, chunks, tokens)[1]


def attention_to(
    denoiser: Denoiser,
    store: AttentionStore,
    z: Tensor,
    step: int,
    condition: Condition,
    sites: Sequence[AttentionSite],
    chunks: Sequence[Chunk],
    tokens: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The predicted noise of latents z at a step's timestep, (frames, c, h, w), and the attention to some tokens of
    the text in some layers of one grid, (frames, all tokens, y, x), without maps. Called while the denoiser is hooked.
    """
    names, count = {site.name for site in sites}, condition.text_tokens
    recorders = [Control(store.key_frames, chunk) for chunk in chunks]
    for recorder in recorders:
        recorder.watch(names, tokens)
    parts = [denoiser.predict_noise(frames_of(z, r.chunk), store.timesteps[step], condition, r) for r in recorders]
    return joined(chunks, parts), joined(chunks, [r.heat(count) for r in recorders])


def source_heat(
    denoiser: Denoiser, inversion: Inversion, prompt: PromptEdit, step: int, mask_tokens: int = 256
) -> Tensor:
    """The heat map of the source's blend words at an edit step: (frames, y, x)."""
    count = inversion.store.source.text_tokens
    return source_heats(denoiser, inversion, [prompt.blend_tokens(count, count)[0]], step, mask_tokens)[0]


def check_store(
    store: AttentionStore, denoiser: Denoiser, schedule: Schedule, prompt: PromptEdit | None = None
) -> None:
    """Raise StoreError for a store of another model, schedule or prompt."""
    if not store.model.matches(denoiser.identity()):
        raise StoreError(
            "the store was made by another model: invert again with this one "
            f"(store: {store.model.layout}; model: {denoiser.identity().layout})"
        )
    same = store.formulation == schedule.formulation and same_levels(store.alphas, schedule)
    if store.timesteps == schedule.timesteps and not same:
        noisy, own = store.alphas[-1], float(schedule.alphas[-1])
        raise StoreError(
            f"the store was made on another schedule of noise: its noisiest alpha is {noisy:.5f}, this model's "
            f"{own:.5f}; edit with the model of the inversion, or one of the same betas"
        )
    if store.timesteps != schedule.timesteps:
        raise StoreError(
            f"the store was made on another schedule: its timesteps start {store.timesteps[:3]}, "
            f"this scheduler's {schedule.timesteps[:3]}"
        )
    if isinstance(store.backend, FileBackend):
        _check_backend(store, store.backend, denoiser)
    if prompt is not None and store.prompt is not None and store.prompt != prompt.source:
        raise StoreError(f"the store was made with the prompt {store.prompt!r}, not {prompt.source!r}")


def _check_backend(store: AttentionStore, backend: FileBackend, denoiser: Denoiser) -> None:
    """Raise StoreError if the shapes of a file's attention differ from this model's layers."""
    sites = {site.name: site for site in denoiser.sites(*store.levels.shape[-2:])}
    for step in backend.steps:
        for name, parts in backend.tensors(step).items():
            found = {part: tensor.shape for part, tensor in parts.items() if not part.endswith("_scale")}
            form = "map" if "map" in parts else store.memory
            if name not in sites or found != record_shapes(
                sites[name], store.frames, store.key_frames, store.source.text_tokens, form
            ):
                raise StoreError(f"the store's attention of {name} at step {step} does not fit this model")
