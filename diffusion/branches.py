"""The run of one edit: its inputs on their device, and the branches of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..attention.condition import Condition
from ..attention.key_frames import Chunk, ClipCalls
from ..store.records import Recorder, SourceStep
from ..store.store import AttentionStore
from ..store.streams import video_of, with_kept_sound, with_video
from .denoiser import Denoiser, Guidance, frames_of
from .parts import Edit, EditContext, Injected, Prediction, Prepare, check_parts, first_step
from .schedule import Schedule, reused_steps
from .source import Needs, compute_source, source_for
from .start import start_of
from .steering import EditSteering

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """The branches of one edit at one step, evaluated on any frames. Only `edit` predicts, and it always injects.

    store: the edit's, or a view of it with other noise. z: the edit's latents, (frames, c, h, w).
    """

    run: EditRun
    store: AttentionStore
    z: Tensor
    step: int
    made: list[Prediction] = field(default_factory=list)
    """All results of `edit`."""

    def source(self, chunk: Chunk, prepare: Prepare | None = None) -> Recorder:
        """The source's branch on a chunk."""
        prepared = None if prepare is None else lambda recorder: prepare("source", recorder)
        return compute_source(self.run.denoiser, self.store, self.step, self.run.needs(self.step), chunk, prepared)

    def source_for(self, chunk: Chunk) -> SourceStep:
        """The source's branch on a chunk, for `edit`; it may run only within that call."""
        return source_for(self.run.denoiser, self.store, self.step, self.run.needs(self.step), chunk)

    def edit(self, source: SourceStep, prepare: Prepare | None = None) -> Prediction:
        """The guided prediction of the edit on the source's chunk."""
        self.made.append(self.run.predict(self, source, prepare))
        return self.made[-1]


class EditRun:
    """One edit with checked inputs, on the model's device.

    in_order: whether each step is predicted once and in order. first: its first step, 0 the noisiest. negative: None at
    guidance 1, and where guidance is the model's input.
    """

    def __init__(
        self, denoiser: Denoiser, store: AttentionStore, schedule: Schedule, edit: Edit, in_order: bool = True
    ) -> None:
        if not math.isfinite(edit.guidance_scale):
            raise ValueError(f"guidance_scale is {edit.guidance_scale}; it must be a finite number")
        self.start = start_of(store)
        check_parts(edit, denoiser.spans_clip, self.start)
        self.denoiser, self.store, self.schedule, self._edit = denoiser, store, schedule, edit
        like = store.level(0)[:1].to(denoiser.device)
        self.target = Condition.of(edit.target_embeddings, "target_embeddings").to(like)
        self.negative: Condition | None = None
        if denoiser.embeds_guidance:
            if edit.guidance_until != 1:
                raise ValueError("guidance_until needs a negative prompt: this model has guidance as an input")
            self.target = self.target.with_guidance(edit.guidance_scale)
        elif edit.guidance_scale != 1:
            if edit.negative_embeddings is None:
                raise ValueError(f"guidance_scale={edit.guidance_scale} needs negative_embeddings")
            self.negative = Condition.of(edit.negative_embeddings, "negative_embeddings").to(like)
        self.guidance_scale, self.sdedit_seed = edit.guidance_scale, edit.sdedit_seed
        self.propagation, self.smoothing, self.layout = edit.propagation, edit.smoothing, edit.layout
        self.first = first_step(edit.strength, schedule.steps)
        reuse = store.reuse_midpoint and in_order
        self._reused = reused_steps(schedule, store.order, self.first) if reuse else set()
        self.solver = self.start.solver(schedule, store.order, schedule.steps - self.first if reuse else None)
        self.last: Prediction | None = None
        """The prediction of the last step."""
        self.start.check_steps(schedule.steps - self.first)
        self.context = EditContext(denoiser, store, self.target, like)
        injection = edit.fusion
        self.injected = Injected(edit, self.context) if injection is None else injection.injected(edit, self.context)
        self._steering: EditSteering | None = None
        self.maps = edit.maps

    def prepare(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Called once, while the denoiser is hooked. chunks: of every step."""
        if self.layout is not None:
            self._steering = self.layout.prepared(self.context, chunks)
            self.context.area = self._steering.area
        self.injected.prepare(chunks)
        if self.maps is not None:
            self.maps.prepare(self.context, chunks)

    def begin(self) -> Tensor:
        """The latents of the first step, (frames, c, h, w)."""
        level = self.schedule.steps - self.first
        z = self.with_kept(self.start.latents(self), level)
        return z if self._steering is None else self._steering.initial(z, self.schedule.noise(level).item())

    @property
    def state(self) -> Any:
        """What the steps so far leave to later ones besides the latents, for `States.save`."""
        maps = None if self.maps is None else self.maps.state
        heat = self.injected.over_steps and self.injected.over_steps.state
        return self.solver.state, self.last if self._reused else None, heat, maps

    def resume(self, state: Any) -> None:
        """Continue from the state of an interrupted run; called after `prepare`."""
        self.solver.state, last, heat, maps = state
        self.last = last and Prediction(*last)
        if self.injected.over_steps is not None:
            self.injected.over_steps.state = heat
        if self.maps is not None:
            self.maps.resume(maps)

    def guided(self, z: Tensor, step: int, calls: ClipCalls) -> Tensor:
        """The input latents of a step, moved by the layout's guidance if it acts in this step."""
        steps, steering = self.schedule.steps, self._steering
        if steering is None or step < self.first or not steering.guides(step, steps):
            return z
        timestep, alpha = self.schedule.timesteps[step], self.schedule.alphas[steps - step]
        return steering.moved(self.denoiser, z, timestep, alpha, self.target, calls)

    def reuses(self, step: int) -> bool:
        """Whether a step takes the prediction of the last one."""
        return step in self._reused

    def negative_at(self, step: int) -> Condition | None:
        """The negative prompt of a step; None for a step without guidance."""
        return self.negative if self._edit.guides(step, self.schedule.steps) else None

    @property
    def shares_source(self) -> bool:
        """Whether this edit can share one evaluation of the source with other edits of the pass."""
        own = self.injected.own_level or self.injected.own_source
        return self.propagation is None and not own and not self.start.draws

    def needs(self, step: int) -> Needs:
        """What a step reads from the source."""
        return replace(self.injected.needs(step), prediction=self.start.follows(self.schedule.steps - step))

    def branches(self, z: Tensor, step: int, store: AttentionStore | None = None) -> Branches:
        """The branches of a step for latents z. store: a view of the edit's store, with other noise."""
        return Branches(self, store or self.injected.store, z, step)

    def predict(self, branches: Branches, source: SourceStep, prepare: Prepare | None = None) -> Prediction:
        """The guided prediction on the source's chunk. prepare: called with the control of each branch."""
        step = branches.step
        control, negative = self.injected.controls(source, step)
        if self.maps is not None:
            self.maps.watch(control, self.context.sites)
        if prepare is not None:
            prepare("target", control)
            prepare("negative", negative)
        unwanted = self.negative_at(step)
        guidance = None if unwanted is None else Guidance(unwanted, negative, self.guidance_scale)
        latents, timestep = frames_of(branches.z, source.chunk), self.schedule.timesteps[step]
        noise = self.denoiser.predict_noise(latents, timestep, self.target, control, guidance, source.paired)
        mask = self.injected.latent_mask(source, control, step)
        of_source = self.start.source_prediction(branches, source)
        found = Prediction(noise, None if mask is None else mask.to(branches.z), of_source)
        if self.maps is None:
            return found
        return found._replace(heat=self.maps.heat(control), attention_mask=self.injected.attention_mask(control))

    def smoothed(self, z: Tensor, step: int, predicted: Prediction) -> Prediction:
        """A prediction with its clean latents smoothed."""
        if self.smoothing is None:
            return predicted
        level = self.schedule.steps - step
        source = self.store.level(0).to(z.device, non_blocking=True)
        clean = self.schedule.clean(z, predicted.noise, level)
        video = video_of(self.store, clean)
        smoothed = self.smoothing.smoothed(video, video_of(self.store, source), self.store.key_frames.everyone)
        if smoothed is video:
            return predicted
        held = self.target.held_frames
        smoothed[:held] = video[:held]
        smoothed = with_video(self.store, clean, smoothed)
        return predicted._replace(noise=self.schedule.towards(z, smoothed, level), source=None)

    def move(self, z: Tensor, step: int, predicted: Prediction) -> Tensor:
        """The step from level steps - step to the next less noisy level."""
        level = self.schedule.steps - step
        z = self.start.moved(self, z, predicted, level)
        if self._steering is not None:
            z = self._steering.after_step(z, level - 1, step)
        if predicted.mask is not None:
            source = self.store.level(self.injected.restored_level(level)).to(z.device, non_blocking=True)
            z = source + predicted.mask * (z - source)
        return self.with_kept(z, level - 1)

    def with_kept(self, z: Tensor, level: int) -> Tensor:
        """The latents of a level with the source's sound, if edits keep it."""
        return with_kept_sound(self.store, z, self.store.level(level))
