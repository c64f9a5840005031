"""A denoiser for the loops of `fatezero.diffusion`, from a MODEL inside the host's sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...attention.condition import Condition
from ...attention.control import AttentionSite, Control
from ...attention.key_frames import Chunk, ClipCalls, KeyFrames
from ...attention.packed import PackedChunk, Packing
from ...attention.temporal_kind import TRAINED_KEYS
from ...diffusion.ddim import guide
from ...diffusion.denoiser import Guidance, WeightedFrames, clip_frames, frames_meet
from ...diffusion.schedule import Schedule
from ...store.identity import ModelIdentity
from ...store.records import PairedBranch
from .chunks import (
    WrappersMP,
    around_predictions,
    check_parts,
    conditions_of_chunk,
    mixing_guidance,
    whole_conditions,
    windows_of,
)
from .conditions import HostCondition, check_read, with_pictures_of
from .guides import Guides
from .hook import Hook
from .latents import unpacked_parts
from .noise import noise_of
from .sameness import WINDOWS, same_in_place
from .temporal import temporal_layers

if TYPE_CHECKING:
    from .sampling import LoopGuider, SideGuider


@dataclass
class _Branch:
    """A hooked model that evaluates some roles, with its options during the run and its conditions."""

    hooked: Hook
    options: dict[str, Any]
    conditions: dict[str, Any]
    guider: LoopGuider | SideGuider
    low: _Branch | None = None

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The model's, from each prompt."""
        return [entry["model_conds"] for entries in self.conditions.values() for entry in entries]

    def check_parts(self, guided: bool) -> None:
        """Raise ValueError, naming it, for what needs all frames of a clip. guided: whether guidance functions run."""
        check_parts(self.options, guided, self.hooked.family.spans_clip)
        found = set().union(*map(self.hooked.need_clip, self.inputs))
        if self.hooked.family.attention and found:
            raise ValueError(
                f"model: {', '.join(sorted(found))} of a prompt needs all frames of the clip, but this run "
                "splits them: remove Context Windows, set chunk_frames to 0, or window_frames to the clip's length"
            )

    def at(self, sigma: float) -> _Branch:
        """The branch at a sigma: this one, or that of the MODEL for low noise."""
        return self if self.low is None or sigma >= self.hooked.boundary else self.low


class ComfyDenoiser:
    """The denoiser of a MODEL inside a running `LoopGuider`.

    The guider's `edited` evaluates the positive and negative prompt, its `sourced` the source prompt. If their weights
    differ (e.g. a LoRA on the edit only), those of the next call are loaded first.
    """

    def __init__(
        self, guider: LoopGuider, options: dict[str, Any], device: torch.device, schedule: Schedule | None
    ) -> None:
        """options: of the MODEL in this run. device: where the host runs the model. schedule: of the run, for a loop of
        the library.
        """
        self.device = device
        self._guider = guider
        self._model = guider.inner_model
        self._schedule = schedule
        self.of_edits: Schedule | None = None
        """That of a store's edits, where its inversion takes more steps."""
        attends = guider.edited.family.attention
        self._handler = options.pop(WINDOWS, None) if attends else None  # our own chunks use its windows
        self._edited = _Branch(guider.edited, options, guider.conds | guider.others, guider)
        for role, conditions in self._edited.conditions.items():
            if attends and not role.startswith("negative"):
                check_read(conditions, role.partition(".")[0], guider.edited.reads)
        self._source = self._edited
        if guider.sourced is not guider.edited:
            self._source = _side_branch(guider.sides[id(guider.sourced)], self._edited.conditions)
        for branch in (self._edited, self._source):
            if branch.hooked.low is not None:
                branch.low = _side_branch(guider.sides[id(branch.hooked.low)], branch.conditions)
        self._loaded = guider.edited.patcher
        """The MODEL whose weights are loaded."""
        self._clip_norm = False
        self.noise = noise_of(guider.model_patcher)
        self.clean: Tensor | None = None
        """The last prediction of the clean latents, for previews."""
        self._parts: dict[str, Tensor] = {}

    @property
    def in_use(self) -> Schedule:
        """The schedule of the run."""
        assert self._schedule is not None
        return self._schedule

    @property
    def spans_clip(self) -> bool:
        return self._edited.hooked.family.spans_clip

    @property
    def trained_frames(self) -> int | None:
        """None if a MODEL, or a node on it, needs all frames of a clip, if the clip begins with a reference, and with
        Context Windows, which say what is split.
        """
        hooked = self._edited.hooked
        if hooked.handler is not None:
            return None
        try:
            for branch in filter(None, (self._edited, self._edited.low)):
                branch.check_parts(True)
        except ValueError:
            return None
        return None if any(map(hooked.has_reference, self._edited.inputs)) else hooked.trained_frames

    @property
    def packing(self) -> Packing | None:
        guides = self._guider.guides or self._guider.edit_guides
        shapes = (getattr(self._model, "latent_shapes", None) or ()) if guides is None else guides.shapes
        return self._edited.hooked.packing(shapes) if len(shapes) > 1 else None

    @property
    def pairs(self) -> bool:
        return self._edited.hooked.pairs

    def subset_grid(self, height: int, width: int) -> tuple[int, int] | None:
        return self._edited.hooked.family.subset_grid(height, width)

    @property
    def embeds_guidance(self) -> bool:
        return False  # it is part of the host's conditioning

    @property
    def frames_meet(self) -> bool:
        return self.spans_clip or any(temporal_layers(branch.hooked.patcher) for branch in (self._edited, self._source))

    @property
    def trained_with(self) -> tuple[tuple[str | int, ...], bool]:
        tuned = temporal_layers(self._edited.hooked.patcher) is not None
        return (TRAINED_KEYS, True) if tuned else (("self",), False)

    @property
    def dtype(self) -> torch.dtype:
        return self._model.manual_cast_dtype or self._model.get_dtype()

    def schedule(self, steps: int) -> Schedule:
        if self.of_edits is not None and steps == self.of_edits.steps:
            return self.of_edits
        if steps != self.in_use.steps:
            raise ValueError(f"steps: {steps}, but the sampling runs {self.in_use.steps}")
        return self.in_use

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        return list(self._edited.hooked.sites(height, width).values())

    def identity(self) -> ModelIdentity:
        return self._edited.hooked.identity()

    def _check_windows(self, key_frames: KeyFrames) -> None:
        """Raise ValueError if inversion and edit have different context windows, and frames depend on each other."""
        handlers = (self._handler, self._guider.sourced.patcher.model_options.get(WINDOWS))
        edit, source = (
            handler and {name: value for name, value in vars(handler).items() if name not in ("_step", "_model")}
            for handler in handlers
        )
        if edit != source and frames_meet(self, ClipCalls(key_frames, self._clip_norm)):
            raise ValueError(
                "model: the edit and the inversion have different context windows, in which frames attend to each "
                "other: connect the same MODEL with Context Windows to both"
            )

    def windows(self, latents: Tensor, timestep: float) -> list[WeightedFrames] | None:
        """The context windows of a node on the MODEL, with the weights of its fuse method."""
        handler, packing, frames = self._handler, self.packing, clip_frames(self, latents)
        if handler is None or frames <= handler.context_length:
            return None
        x, sigma = self.noise.to_host(latents), self.noise.sigma(timestep)[None]
        if packing is not None:
            x = unpacked_parts(x, packing.shapes)[0]
        return windows_of(handler, self._model, x, frames, sigma, self._edited.options, packing)

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        self._clip_norm = clip_norm
        try:
            yield
        finally:
            self._clip_norm = False

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        paired: PairedBranch | None = None,
    ) -> Tensor:
        """Raises the host's InterruptProcessingException between UNet calls, and ValueError for a skipped call."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition)
        if guidance is not None and not condition.guided:  # of the source
            away = self.predict_noise(latents, timestep, guidance.negative, guidance.control)
            return guide(away, self.predict_noise(latents, timestep, condition, control), guidance.scale)
        branch = self._edited if condition.of_edit else self._source
        if branch.hooked.family.attention and (branch is self._source or paired is not None):
            self._check_windows(control.key_frames)
        sigma = self.noise.sigma(timestep).to(latents)
        if not control.chunk.is_whole:
            branch.at(float(sigma)).check_parts(condition.guided)
        guides = self._guider.guides_of(condition)
        x = self._input(latents, sigma, guides)
        unguided = Control(control.key_frames, control.chunk) if guidance is None else guidance.control
        # negatives, and branches that guidance nodes add, may combine prompts of several lengths, so all tokens count
        controls = {0: (control, condition.text_tokens), 1: (unguided, None)}
        reading = [condition, *([] if guidance is None or guidance.control.rows is None else [guidance.negative])]
        if paired is not None and not self._joins(paired, reading, x, sigma):
            source = paired.control
            source.captured.prediction = self.predict_noise(paired.latents, timestep, paired.condition, source)
            paired = None
        branch = branch.at(float(sigma))
        self._load(branch)
        with (
            self._with_source(paired, control.chunk, sigma) as pair,
            branch.hooked.controlled(
                controls, self._clip_norm, pair, whole_conditions(branch.conditions[condition.role])
            ),
        ):
            clean = self._evaluate(branch, x, sigma.expand(len(x)), condition, control, guidance)
        self.clean = self._of_clip(clean, control.chunk, condition.role)
        return self._prediction(latents, clean, sigma, guides)

    def _of_clip(self, clean: Tensor, chunk: Chunk, role: str) -> Tensor:
        """Clean latents for a preview: of packed streams those of all windows so far."""
        if not isinstance(chunk, PackedChunk):
            return clean
        part = self.noise.from_host(clean)
        if 0 in chunk.owned or role not in self._parts:
            self._parts[role] = chunk.zeros(part)
        chunk.add(part, self._parts[role])
        return self.noise.to_host(self._parts[role])

    def _input(self, latents: Tensor, sigma: Tensor, guides: Guides | None) -> Tensor:
        """The model's input for latents at a sigma, in the host's space."""
        x = self.noise.to_host(latents * self.noise.scale(sigma))
        return x if guides is None else guides.seen(x, sigma)

    def _prediction(self, latents: Tensor, clean: Tensor, sigma: Tensor, guides: Guides | None) -> Tensor:
        """The prediction for latents, from the model's clean ones for their `_input`."""
        x = self.noise.to_host(latents * self.noise.scale(sigma))
        return self.noise.predicted(x, clean if guides is None else guides.predicted(clean), sigma)

    def _joins(self, paired: PairedBranch, reading: Sequence[Condition], x: Tensor, sigma: Tensor) -> bool:
        """Whether the source can run in the calls of the edit, or beside: with an equal MODEL, without weights from a
        prompt's hooks, and in the same calls with texts of one shape, which the host batches. reading: of the branches
        that read its records.
        """
        edit, source = (branch.at(float(sigma)) for branch in (self._edited, self._source))
        if not edit.hooked.pairs or mixing_guidance(around_predictions(source.options)):  # may change its prediction
            return False
        entries = [entry for c in (paired.condition, *reading) for entry in self._conditions(c)]
        parts = [comfy.samplers.get_area_and_mult(entry, x, sigma[None]) for entry in entries]
        if not all(part and part.hooks is None for part in parts) or not edit.hooked.joins(source.hooked):
            return False
        return edit.hooked.separate_calls or all(comfy.samplers.can_concat_cond(part, parts[0]) for part in parts)

    def _conditions(self, condition: Condition) -> Any:
        assert isinstance(condition, HostCondition)
        return self._edited.conditions[condition.role]

    @contextmanager
    def _with_source(
        self, paired: PairedBranch | None, chunk: Chunk, sigma: Tensor
    ) -> Iterator[tuple[PairedBranch, Any] | None]:
        """The source's branch and its conditions on a chunk's frames, for `Hook.controlled`."""
        if paired is None:
            yield None
            return
        assert isinstance(paired.condition, HostCondition)
        guides = self._guider.guides_of(paired.condition)
        x = self._input(paired.latents, sigma, guides)
        of_call = paired if guides is None else replace(paired, latents=self.noise.from_host(x))
        given = [self._conditions(paired.condition)]
        with conditions_of_chunk(self._source.hooked, given, chunk) as (conditions,):
            yield of_call, conditions
        found = paired.control.captured
        if guides is not None and found.prediction is not None:
            clean = self.noise.clean(x, found.prediction, sigma)
            found.prediction = self._prediction(paired.latents, clean, sigma, guides)

    def gradient(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, value: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Raises the host's InterruptProcessingException before the call."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition)
        branch, sigma = self._edited, self.noise.sigma(timestep).to(latents)
        temporal = temporal_layers(branch.hooked.patcher)
        parts = [self._model.diffusion_model, *([temporal.layers] if temporal else [])]
        controls = {0: (control, condition.text_tokens), 1: (Control(control.key_frames, control.chunk), None)}
        x = latents * (1 + sigma**2).sqrt()
        if not control.chunk.is_whole:
            branch.check_parts(False)
        self._load(branch)
        with (
            branch.hooked.controlled(controls, self._clip_norm),
            branch.hooked.derivative(value, parts) as derivative,
            conditions_of_chunk(branch.hooked, [branch.conditions[condition.role]], control.chunk) as (positive,),
        ):
            self._plainly(branch, positive, x, sigma.expand(len(x)), branch.options)
        assert derivative.found is not None
        energy, gradient = derivative.found
        return energy, gradient.to(latents)

    def _evaluate(
        self,
        branch: _Branch,
        x: Tensor,
        sigma: Tensor,
        condition: HostCondition,
        control: Control,
        guidance: Guidance | None,
    ) -> Tensor:
        """The clean latents; for the edit with the model's guidance functions, for source and negatives without.

        For an area of the negative the host adds the same area of the positive, without fusion; this is dropped if the
        whole positive is fused.
        """
        positive, negative, scale = branch.conditions[condition.role], None, 1.0
        if branch.hooked.family.attention and not control.is_plain:
            positive = whole_conditions(positive)
        if condition.role.startswith("negative"):  # it guides the source
            edit = branch.conditions[condition.role.replace("negative", "positive")]
            positive = with_pictures_of(positive, edit, branch.conditions["source"])
        if guidance is not None:
            assert isinstance(guidance.negative, HostCondition)
            negative, scale = branch.conditions[guidance.negative.role], guidance.scale
        with conditions_of_chunk(branch.hooked, [positive, negative], control.chunk) as (positive, negative):
            if not condition.guided:
                return self._predicted(branch, partial(self._plainly, branch, positive), x, sigma, 1.0)
            return self._predicted(branch, partial(self._guided, branch, positive, negative), x, sigma, scale)

    def _predicted(
        self, branch: _Branch, predict: Callable[..., Tensor], x: Tensor, sigma: Tensor, scale: float
    ) -> Tensor:
        """A prediction inside the wrappers of other nodes on the MODEL, which may change the guider's `cfg`."""
        branch.guider.cfg = scale
        clean: Tensor = wrapped(WrappersMP.PREDICT_NOISE, predict, branch.guider, branch.options)(
            x, sigma, branch.options, self._guider.seed
        )
        return clean

    @staticmethod
    def _guided(
        branch: _Branch, positive: Any, negative: Any, x: Tensor, sigma: Tensor, options: dict[str, Any],
        seed: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The host's sampling function with guidance."""
        model, guider = branch.hooked.patcher.model, branch.guider
        clean: Tensor = guider.function(model, x, sigma, negative, positive, guider.cfg, options, seed=seed)
        return clean

    @staticmethod
    def _plainly(
        branch: _Branch, positive: Any, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: int | None = None
    ) -> Tensor:
        """The host's sampling function without guidance, including that of other nodes."""
        options = {name: value for name, value in options.items() if not name.startswith("sampler_")}
        options["sampler_post_cfg_function"] = [lambda args: args["cond_denoised"]]
        model = branch.hooked.patcher.model
        clean: Tensor = branch.guider.function(model, x, sigma, None, positive, 1.0, options, seed=seed)
        return clean

    def _load(self, branch: _Branch) -> None:
        """Make a branch's MODEL the current one, and load its weights if they differ."""
        patcher = branch.hooked.patcher
        if patcher is self._loaded:
            return
        if not same_in_place(self._loaded, patcher):
            comfy.sampler_helpers.prepare_sampling(patcher, self._guider.shape, branch.conditions, branch.options)
        patcher.model.current_patcher = patcher
        self._loaded = patcher

    def restore(self) -> None:
        """Load the edit's weights again, as the host left them."""
        self._load(self._edited)


def _side_branch(side: SideGuider, conditions: dict[str, Any]) -> _Branch:
    """The branch of an additional MODEL of the run."""
    options = {name: value for name, value in side.running.items() if name != WINDOWS}
    return _Branch(side.hooked, options, conditions, side)


def wrapped(kind: str, run: Callable[..., Any], owner: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """A function inside the wrappers of a kind in a MODEL's options."""
    wrappers = comfy.patcher_extension.get_all_wrappers(kind, options, is_model_options=True)
    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(run, owner, wrappers)
    execute: Callable[..., Any] = executor.execute
    return execute
