"""The loops of `fatezero.diffusion` inside the host's own sampling.

They run in the host's `CFGGuider`, so that its memory management, ControlNets, LoRA, wrappers and guidance
functions work as under a KSampler. The host samples in variance-exploding space, x = z / sqrt(abar); the loops
stay in DDIM's z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import comfy.context_windows
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...attention.condition import Condition
from ...attention.control import SEPARATE, AttentionSite, Control, Kind
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.denoiser import Guidance, Windows, frames_meet
from ...diffusion.invert import Progress
from ...diffusion.schedule import Schedule
from ...methods.tune_a_video import TRAINED_KEYS
from ...store.identity import ModelIdentity
from ...store.records import Beside
from .conditions import HostCondition, check_read
from .noise import noise_of
from .sameness import same_forward, same_in_place
from .temporal import temporal_layers
from .unet import HookedModel, module_of_node, node_of
from .wan import HookedTransformer, hooked, is_transformer

WrappersMP = comfy.patcher_extension.WrappersMP

Loop = Callable[["ComfyDenoiser", Tensor, Progress], Tensor]
"""A loop of the library on latents (frames, 4, h, w) as the UNet knows them; returns latents."""


# --- the denoiser ---------------------------------------------------------------------


@dataclass
class _Branch:
    """What evaluates some roles: a hooked model, its options during the run, its conditions."""

    hooked: HookedModel | HookedTransformer
    options: dict[str, Any]
    conditions: dict[str, Any]
    guider: LoopGuider | SideGuider
    low: _Branch | None = None

    @property
    def around_predictions(self) -> list[Any]:
        """What other nodes wrap around the predictions of its MODEL."""
        kind = WrappersMP.PREDICT_NOISE
        return list(comfy.patcher_extension.get_all_wrappers(kind, self.options, is_model_options=True))

    def at(self, sigma: float) -> _Branch:
        """What evaluates them at a sigma: of Wan 2.2's pair the one or the other."""
        return self if self.low is None or sigma >= self.hooked.boundary else self.low  # type: ignore[union-attr]


class ComfyDenoiser:
    """A MODEL inside a running `LoopGuider`, as the loops of `fatezero.diffusion` call it.

    Its guider's `edited` evaluates the positive and negative prompt, its `sourced` the source prompt; that one may
    carry other weights (a LoRA before the edit only), and is then brought in and out.
    """

    def __init__(
        self, guider: LoopGuider, options: dict[str, Any], device: torch.device, schedule: Schedule | None
    ) -> None:
        """options: the MODEL's, of this run. device: where the host runs the model. schedule: of the run, where a loop
        of the library asks for it.
        """
        self.device = device
        self._guider = guider
        self._model = guider.inner_model
        self._schedule = schedule
        self._handler = options.pop("context_handler", None)  # our own chunks follow its windows
        self._edited = _Branch(guider.edited, options, guider.conds | guider.others, guider)
        for role, conditions in self._edited.conditions.items():
            if not role.startswith("negative"):
                check_read(conditions, role.partition(".")[0])
        self._source = self._edited
        if guider.sourced is not guider.edited:
            self._source = _branch_of(guider.sides[id(guider.sourced)], guider.others)
        for branch in (self._edited, self._source):
            if branch.hooked.low is not None:
                branch.low = _branch_of(guider.sides[id(branch.hooked.low)], branch.conditions)
        self._here = guider.edited.patcher
        """The MODEL whose weights are in place."""
        self._clip_norm = False
        self.noise = noise_of(guider.model_patcher)
        self.clean: Tensor | None = None
        """The last prediction of the clean latents, for previews."""

    @property
    def in_use(self) -> Schedule:
        """The schedule of the run."""
        assert self._schedule is not None
        return self._schedule

    @property
    def spans_clip(self) -> bool:
        return isinstance(self._edited.hooked, HookedTransformer)

    @property
    def pairs(self) -> bool:
        return self.spans_clip

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
        if steps != self.in_use.steps:
            raise ValueError(f"steps: {steps}, but the sampling runs {self.in_use.steps}")
        return self.in_use

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        return list(self._edited.hooked.sites(height, width).values())

    def identity(self) -> ModelIdentity:
        return self._edited.hooked.identity()

    def _check_windows(self, key_frames: KeyFrames) -> None:
        """Raise ValueError where the source was inverted in other context windows than the edit's, and frames meet."""
        handlers = (self._handler, self._guider.sourced.patcher.model_options.get("context_handler"))
        one, other = (
            held and {name: value for name, value in vars(held).items() if name not in ("_step", "_model")}
            for held in handlers
        )
        if one != other and frames_meet(self, key_frames, self._clip_norm):
            raise ValueError(
                "model: the edit has other context windows than the inversion, in which frames attend to each other: "
                "connect one MODEL with Context Windows to both"
            )

    def windows(self, latents: Tensor, timestep: float) -> Windows | None:
        """The context windows that a node set on the MODEL, with the weights of its fuse method."""
        handler = self._handler
        if handler is None or len(latents) <= handler.context_length:
            return None
        sigma, options = self.noise.sigma(timestep)[None], self._edited.options
        handler.set_step(sigma.to(options["transformer_options"]["sample_sigmas"]), options)
        windows = handler.get_context_windows(self._model, self.noise.to_host(latents), options)
        weighted = ((w.index_list, _window_weights(handler, w.index_list, len(latents), sigma)) for w in windows)
        return [_with_frame_before(handler, frames, weights) for frames, weights in weighted]

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
        beside: Beside | None = None,
    ) -> Tensor:
        """Raises the host's InterruptProcessingException between UNet calls, and ValueError for one that never ran."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition)
        branch = self._source if condition.role == "source" else self._edited
        if branch is self._source or beside is not None:
            self._check_windows(control.key_frames)
        sigma = self.noise.sigma(timestep).to(latents)
        x = self.noise.to_host(latents * self.noise.scale(sigma))
        away = Control(control.key_frames, control.chunk) if guidance is None else guidance.control
        # a negative, or what a guidance node adds, may be prompts of several lengths, none of which is looked into
        answers = {0: (control, condition.text_tokens), 1: (away, None)}
        if beside is not None and not self._joins(beside, condition, x, sigma):
            beside.control.captured.prediction = self.predict_noise(
                beside.latents, timestep, beside.condition, beside.control
            )
            beside = None
        branch = branch.at(float(sigma))
        if not control.chunk.is_whole:
            check_parts(branch, condition.guided)
        self._bring(branch)
        with (
            self._with_source(beside, control.chunk) as pair,
            branch.hooked.answering(answers, self._clip_norm, pair, _whole(branch.conditions[condition.role])),
        ):
            clean = self._evaluate(branch, x, sigma.expand(len(x)), condition, control, guidance)
        self.clean = clean
        return self.noise.of_host((x - clean) / sigma)

    def _joins(self, beside: Beside, condition: HostCondition, x: Tensor, sigma: Tensor) -> bool:
        """Whether the source can run in the edit's calls: on a MODEL that computes the same, without weights that a
        prompt brings, and where the host calls both together, which it does with texts of one shape.
        """
        assert isinstance(beside.condition, HostCondition)
        edit, source = (branch.at(float(sigma)).hooked for branch in (self._edited, self._source))
        if _unknown(self._source.at(float(sigma)).around_predictions):  # which may change the source's prediction
            return False
        if not (isinstance(edit, HookedTransformer) and isinstance(source, HookedTransformer)):
            return False
        if "model_function_wrapper" in edit.patcher.model_options:  # which may call branches one by one
            return False
        entries = [entry for c in (beside.condition, condition) for entry in self._branch_conditions(c)]
        parts = [comfy.samplers.get_area_and_mult(entry, x, sigma[None]) for entry in entries]
        together = all(part and part.hooks is None and comfy.samplers.can_concat_cond(part, parts[0]) for part in parts)
        return together and (edit is source or same_forward(edit.given, source.given))

    def _branch_conditions(self, condition: HostCondition) -> Any:
        branch = self._source if condition.role == "source" else self._edited
        return branch.conditions[condition.role]

    @contextmanager
    def _with_source(self, beside: Beside | None, chunk: Chunk) -> Iterator[tuple[Beside, Any] | None]:
        """The source's branch and its conditions on a chunk's frames, for `HookedTransformer.answering`."""
        if beside is None:
            yield None
            return
        assert isinstance(beside.condition, HostCondition)
        with _of_chunk([self._branch_conditions(beside.condition)], chunk) as (conditions,):
            yield beside, conditions

    def gradient(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, value: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Raises the host's InterruptProcessingException before it begins."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition)
        branch, sigma = self._edited, self.noise.sigma(timestep).to(latents)
        assert isinstance(branch.hooked, HookedModel)
        held = temporal_layers(branch.hooked.patcher)
        parts = [self._model.diffusion_model, *([held.layers] if held else [])]
        away = Control(control.key_frames, control.chunk)
        answers = {0: (control, condition.text_tokens), 1: (away, None)}
        x = latents * (1 + sigma**2).sqrt()
        if not control.chunk.is_whole:
            check_parts(branch, guided=False)
        self._bring(branch)
        with (
            branch.hooked.answering(answers, self._clip_norm),
            branch.hooked.deriving(value, parts) as derived,
            _of_chunk([branch.conditions[condition.role]], control.chunk) as (positive,),
        ):
            self._plainly(branch, positive, x, sigma.expand(len(x)), branch.options)
        assert derived.found is not None
        energy, gradient = derived.found
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
        """The clean latents: of the edit with the model's guidance functions, of source and negatives plainly.

        For an area of the negative the host adds the same area of the positive, which takes nothing of the source: it
        is left out where the whole does.
        """
        positive, negative, scale = branch.conditions[condition.role], None, 1.0
        if type(control) is not Control:
            positive = _whole(positive)
        if guidance is not None:
            assert isinstance(guidance.negative, HostCondition)
            negative, scale = branch.conditions[guidance.negative.role], guidance.scale
        with _of_chunk([positive, negative], control.chunk) as (positive, negative):
            if not condition.guided:
                return self._predicted(branch, partial(self._plainly, branch, positive), x, sigma, 1.0)
            if negative is None and branch.around_predictions:
                raise ValueError(
                    "guidance: is 1, where no negative prompt is evaluated, but a node on the model changes guidance "
                    "(CFG Override, LazyCache): remove it, or take another guidance"
                )
            return self._predicted(branch, partial(self._guided, branch, positive, negative), x, sigma, scale)

    def _predicted(
        self, branch: _Branch, predict: Callable[..., Tensor], x: Tensor, sigma: Tensor, scale: float
    ) -> Tensor:
        """A prediction inside what other nodes wrap around those of its MODEL; these may change the guider's `cfg`."""
        branch.guider.cfg = scale
        clean: Tensor = _wrapped(WrappersMP.PREDICT_NOISE, predict, branch.guider, branch.options)(
            x, sigma, branch.options, self._guider.seed
        )
        return clean

    @staticmethod
    def _guided(
        branch: _Branch, positive: Any, negative: Any, x: Tensor, sigma: Tensor, options: dict[str, Any],
        seed: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The host's guidance."""
        model, guider = branch.hooked.patcher.model, branch.guider
        clean: Tensor = guider.function(model, x, sigma, negative, positive, guider.cfg, options, seed=seed)
        return clean

    @staticmethod
    def _plainly(
        branch: _Branch, positive: Any, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: int | None = None
    ) -> Tensor:
        """The host's sampling function, without guidance, other nodes' neither."""
        options = {name: value for name, value in options.items() if not name.startswith("sampler_")}
        options["sampler_post_cfg_function"] = [lambda args: args["cond_denoised"]]
        model = branch.hooked.patcher.model
        clean: Tensor = branch.guider.function(model, x, sigma, None, positive, 1.0, options, seed=seed)
        return clean

    def _bring(self, branch: _Branch) -> None:
        """Make a branch's MODEL the host's current one, and bring in its weights where others are in place."""
        wanted = branch.hooked.patcher
        if wanted is self._here:
            return
        if not same_in_place(self._here, wanted):
            comfy.sampler_helpers.prepare_sampling(wanted, self._guider.shape, branch.conditions, branch.options)
        wanted.model.current_patcher = wanted
        self._here = wanted

    def restore(self) -> None:
        """Bring the edit's own weights in again, as the host left them."""
        self._bring(self._edited)


def _branch_of(side: SideGuider, conditions: dict[str, Any]) -> _Branch:
    """What a further MODEL of the run evaluates."""
    options = {name: value for name, value in side.running.items() if name != "context_handler"}
    return _Branch(side.hooked, options, conditions, side)


FRAME_BY_FRAME = ("fatezero", "easycache")
"""Whose wrappers around calls go by what a call holds, whatever the clip."""
PER_FRAME = {
    "nodes_cfg", "nodes_custom_sampler", "nodes_easycache", "nodes_eps", "nodes_fresca", "nodes_model_advanced",
    "nodes_pag", "nodes_slg", "nodes_tcfg",
}  # fmt: skip
"""Modules of the host whose guidance is each frame's own: chunks of a clip give what the whole gives."""


def windowing(wrappers: dict[str, dict[Any, Any]]) -> list[Any]:
    """The names of a MODEL's wrappers that may call it on parts of a clip (AnimateDiff-Evolved's context options)."""
    around_calls = wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    return [name for name, held in around_calls.items() if held and name not in FRAME_BY_FRAME]


def check_parts(branch: _Branch, guided: bool) -> None:
    """Raise ValueError, naming it, for what goes by the frames of a whole clip, where a call has some alone.

    guided: whether guidance functions count.
    """
    options = branch.options["transformer_options"]
    names = [f"a node's wrapper {name}" for name in windowing(options.get("wrappers", {}))]
    if options.get("patches", {}).get("forward_timestep_embed_patch"):
        names = ["AnimateDiff's motion modules"]
    if names:
        raise ValueError(
            f"model: {names[0]} must see all frames of a clip, but this run takes them in parts: set chunk_frames to "
            "0, and leave out TokenFlow and Context Windows (AnimateDiff-Evolved has context options of its own)"
        )
    found = _unknown(branch.around_predictions + (_guidance_of(branch.options) if guided else []))
    if found:
        raise ValueError(
            f"model: guidance of {node_of(found[0])} may depend on all frames, of which chunks, context windows and "
            "TokenFlow's batches have some: run the clip whole, or remove it"
        )


def _guidance_of(options: dict[str, Any]) -> list[Any]:
    one = [options.get("sampler_cfg_function"), options.get("sampler_calc_cond_batch_function")]
    many = [*options.get("sampler_pre_cfg_function", []), *options.get("sampler_post_cfg_function", [])]
    return [hook for hook in one + many if hook is not None]


def _unknown(hooks: Sequence[Any]) -> list[Any]:
    """Those of guidance that are not known to go frame by frame."""
    return [hook for hook in hooks if module_of_node(hook) not in PER_FRAME]


def _with_frame_before(handler: Any, frames: list[int], weights: Sequence[float]) -> tuple[list[int], list[float]]:
    """A context window and the frame before it, which comes along where the host's handler has `causal_window_fix`."""
    before, weights = frames[0] - 1, [float(weight) for weight in weights]
    if before < 0 or not getattr(handler, "causal_window_fix", False):
        return frames, weights
    if before in frames:
        raise ValueError(
            f"model: a context window holds the frame before it already ({before}): switch off causal_window_fix"
        )
    return [before, *frames], [0.0, *weights]


def _window_weights(handler: Any, frames: Sequence[int], clip: int, sigma: Tensor) -> Sequence[float]:
    """How much each frame of a context window counts, as the host's handler fuses windows."""
    if handler.fuse_method.name == comfy.context_windows.ContextFuseMethods.RELATIVE:
        middle, reach = (frames[0] + frames[-1]) / 2, (frames[-1] - frames[0] + 1e-2) / 2
        return [max(1e-2, 1 - abs(frame - middle) / reach) for frame in frames]
    return comfy.context_windows.get_context_weights(len(frames), clip, frames, handler, sigma=sigma)


def _whole(conditions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conditions that are for the whole picture: a prompt's own, without those that the host adds for areas."""
    return [entry for entry in conditions if "area" not in entry]


@contextmanager
def _of_chunk(conditions: list[Any], chunk: Chunk) -> Iterator[list[Any]]:
    """The host's conditions with what they hold for each frame cut to a chunk's frames, ControlNet hints too."""
    if chunk.is_whole:
        yield conditions
        return
    frames = list(chunk.frame_indices)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == chunk.clip:
            return value[frames]
        if isinstance(getattr(value, "cond", None), Tensor):
            return value._copy_with(cut(value.cond))
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    hints: dict[Any, Tensor] = {}
    for control in (c.get("control") for entries in conditions for c in entries or []):
        while control is not None:
            hint = control.cond_hint_original
            if hint is not None and len(hint) > 1:  # of fewer frames than the clip's, the host repeats them
                hints[control] = hint
            control = control.previous_controlnet
    try:
        for control, hint in hints.items():
            control.cond_hint_original, control.cond_hint = hint[[f % len(hint) for f in frames]], None
        yield [entries and [cut(c) for c in entries] for entries in conditions]
    finally:
        for control, hint in hints.items():
            control.cond_hint_original, control.cond_hint = hint, None


# --- guiders and the sampler ------------------------------------------------------------


class LoopGuider(comfy.samplers.CFGGuider):
    """A GUIDER that holds what a loop of the library evaluates; `DDIMSampler` runs the loop."""

    def __init__(
        self,
        model: Any,
        conditions: Sequence[HostCondition],
        source_model: Any = None,
        chunk_frames: int | None = None,
        kinds: Sequence[Kind] = SEPARATE,
    ) -> None:
        """source_model: the MODEL that evaluates the source prompt, if not the same. chunk_frames: frames of one
        UNet call, for which the host then makes room. kinds: of attention layers that are hooked.

        Raises ValueError for a MODEL that is no attention UNet, or with options that cannot be honoured.
        """
        check_options(model)
        self.edited = hooked(model, kinds)
        source_model = source_model or model
        self.sourced = self.edited if source_model is model else hooked(source_model)
        one_text = all(len(text) == 1 for c in conditions for text, _ in c.conditioning if text is not None)
        self.edited.one_text = self.sourced.one_text = one_text
        if chunk_frames is not None:
            most = chunk_frames + 3  # with their key frames
            room = room_for(lambda frames: min(frames, most))
            self.edited.patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "fatezero", room)
        super().__init__(self.edited.patcher)
        self.inner_set_conds({c.role: c.conditioning for c in conditions})
        self.edited.patcher = self.model_patcher  # the host may take a delegate for conditions with hooks
        self.function: Callable[..., Any] = comfy.samplers.sampling_function
        """The host's sampling function, as the wrappers of the edit's MODEL left it."""
        self.sides: dict[int, SideGuider] = {}
        """The further MODELs of the run under way, by the id of their hooked form."""
        self.shape: Sequence[int] = ()
        """Of its latents."""
        self.seed: int | None = None
        self._given: tuple[Tensor, ...] | None = None
        """Noise, latents and sigmas of the run, until they are sampled."""

    loop: Loop | None
    """What `DDIMSampler` runs: a method of those that derive from this, or a function; None for its own steps."""

    @property
    def reached(self) -> int:
        """How many attention layers the last UNet calls reached."""
        return len(set().union(*(model.reached for model in self._models())))

    def schedule(self, sigmas: Tensor) -> Schedule:
        """The noise levels of a run along falling sigmas, as `inner_sample` has them for either way."""
        return noise_of(self.model_patcher).along(sigmas)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: torch.device, sampler: Any, sigmas: Tensor, *rest: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        # The source and further edits separately from the first: a ControlNet of one target may ask to be
        # applied to every other prompt it is processed with.
        others = {role: self.conds.pop(role) for role in [*self.conds] if role not in ("positive", "negative")}
        self.others: dict[str, Any] = {}
        for group in {role.partition(".")[2] if role != "source" else role for role in others}:
            ends = {"positive": group} if group == "source" else {n: f"{n}.{group}" for n in ("positive", "negative")}
            named = {name: others[role] for name, role in ends.items() if role in others}
            done = comfy.samplers.process_conds(self.inner_model, noise, named, device)
            self.others |= {ends[name]: processed for name, processed in done.items()}
        for side in self.sides.values():
            sampler = _Inside(side, sampler)
        try:  # noisy to clean, also for an inversion: the host's nodes find their steps so
            falling = sigmas.sort(descending=True).values
            return super().inner_sample(noise, latent_image, device, sampler, falling, *rest, **more)
        finally:
            self.conds |= self.others

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any) -> Any:
        """The result is where the host keeps latents, so that it stays the same tensor in its outputs."""
        self._given, self.seed = (noise, latent_image, sigmas), more.get("seed")
        self.function = comfy.samplers.sampling_function
        try:
            result = super().sample(noise, latent_image, sampler, sigmas, *rest, **more)
            return result.to(comfy.model_management.intermediate_device())
        finally:  # our clones do not outlive the run, and the host ejects what a MODEL injected only while it lives
            for hooked in self._models():
                hooked.patcher.eject_model()

    def _models(self) -> list[HookedModel | HookedTransformer]:
        """The edit's model, and the further ones of a run."""
        own = [self.edited] if self.sourced is self.edited else [self.edited, self.sourced]
        return own + [model.low for model in own if model.low is not None]

    def outer_sample(self, noise: Tensor, *rest: Any, **more: Any) -> Any:
        """As the host has it, inside what other nodes wrap around samplings with the further MODELs of the run too."""
        before, self.function, self.shape = self.function, comfy.samplers.sampling_function, noise.shape
        of_source = {role: conds for role, conds in self.conds.items() if role == "source"}
        self.sides = {
            id(model): SideGuider(model, self.conds if model is self.edited.low else of_source, before)
            for model in self._models()[1:]
        }
        run: Callable[..., Any] = partial(self._sampled_once, super().outer_sample)
        for side in self.sides.values():
            run = partial(side.around, run)
        try:
            return run(noise, *rest, **more)
        finally:
            self.sides = {}

    def _sampled_once(
        self, run: Callable[..., Any], noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *rest: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        """The host's sampling inside all wrappers; ValueError where one has it do other than what was asked."""
        given, self._given = self._given, None
        if self.loop is not None and (given is None or not all(map(_equal, given, (noise, latent_image, sigmas)))):
            raise ValueError(
                "model: a node on it samples more than once, or changes noise, latents or sigmas (AnimateDiff's "
                "iteration options, image injection), which an inversion or edit cannot follow: remove it"
            )
        for side in self.sides.values():
            self.conds |= side.conds
        return run(noise, latent_image, sampler, sigmas, *rest, **more)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.cpu(), other.cpu()))


class SideGuider(comfy.samplers.CFGGuider):
    """What the sampling wrappers of a further MODEL of a run find for a guider: of the source's, where it is not the
    edit's, and of what takes over below a sigma.
    """

    def __init__(
        self, model: HookedModel | HookedTransformer, conds: dict[str, Any], function: Callable[..., Any]
    ) -> None:
        """function: the host's sampling function as it is outside all wrappers."""
        super().__init__(model.patcher)
        self.model_options: dict[str, Any] = model.patcher.model_options
        self.hooked, self.conds, self.function = model, dict(conds), function
        self.inner_model = model.patcher.model
        self.running: dict[str, Any] = {}
        """The options of the run under way."""

    def around(self, run: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """A sampling inside the wrappers of this MODEL."""
        patcher, own = self.model_patcher, self.model_options

        def loaded_later(model: Any, shape: Any, conds: Any, **more: Any) -> tuple[Any, Any, list[Any]]:
            return model.model, conds, []  # when it is its turn, which may be never

        def inside(noise: Tensor, *args: Any, **more: Any) -> Any:
            self.function, options = comfy.samplers.sampling_function, self.model_options
            prepare = _wrapped(WrappersMP.PREPARE_SAMPLING, loaded_later, None, options)
            _, self.conds, _ = prepare(patcher, noise.shape, self.conds, model_options=options)
            comfy.samplers.cast_to_load_options(self.model_options, patcher.load_device, patcher.model_dtype())
            patcher.pre_run()
            return run(noise, *args, **more)

        self.model_options = comfy.model_patcher.create_model_options_clone(own)
        # AnimateDiff-Evolved puts a sampling function of its own in the host's place: here for this MODEL alone.
        of_others, comfy.samplers.sampling_function = comfy.samplers.sampling_function, self.function
        try:
            comfy.sampler_helpers.prepare_model_patcher(patcher, self.conds, self.model_options)
            return _wrapped(WrappersMP.OUTER_SAMPLE, inside, self, self.model_options)(*args, **more)
        finally:
            comfy.samplers.sampling_function = of_others
            comfy.samplers.cast_to_load_options(self.model_options, patcher.offload_device)
            self.model_options = own
            patcher.cleanup()


class _Inside(comfy.samplers.Sampler):
    """A sampler inside what other nodes wrap around samplers with a further MODEL of the run."""

    def __init__(self, side: SideGuider, sampler: Any) -> None:
        self._side, self._sampler = side, sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *rest: Any) -> Any:
        own = comfy.model_patcher.create_model_options_clone(self._side.model_options)
        own["transformer_options"]["sample_sigmas"] = sigmas

        def run(side: Any, sigmas: Tensor, of_side: dict[str, Any], *rest: Any) -> Any:
            self._side.running = of_side["model_options"]
            return self._sampler.sample(guider, sigmas, extra_args, *rest)

        of_side = {**extra_args, "model_options": own}
        return _wrapped(WrappersMP.SAMPLER_SAMPLE, run, self._sampler, own)(self._side, sigmas, of_side, *rest)


def _wrapped(kind: str, run: Callable[..., Any], owner: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """A function inside the wrappers of a kind that a MODEL's options hold."""
    wrappers = comfy.patcher_extension.get_all_wrappers(kind, options, is_model_options=True)
    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(run, owner, wrappers)
    execute: Callable[..., Any] = executor.execute
    return execute


class DDIMSampler(comfy.samplers.Sampler):
    """A SAMPLER of deterministic DDIM steps: towards the clip along falling sigmas, to noise along rising ones.

    In our own guiders it runs their loop, in others the plain steps.
    """

    def sample(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        if not isinstance(guider, LoopGuider) or guider.loop is None:
            return _plain_ddim(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask)
        denoiser = ComfyDenoiser(guider, extra_args["model_options"], latent_image.device, guider.schedule(sigmas))

        def progress(done: int, of: int) -> None:
            if callback is not None and denoiser.clean is not None:  # None while an edit of less strength waits
                callback(done - 1, denoiser.clean, denoiser.clean, of)

        try:
            return denoiser.noise.to_host(guider.loop(denoiser, denoiser.noise.of_host(latent_image), progress))
        finally:
            denoiser.restore()


def _plain_ddim(
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Any,
    noise: Tensor,
    latent_image: Tensor,
    denoise_mask: Tensor | None,
) -> Tensor:
    """Steps with anyone's guider, DDIM's or a flow's: x' = x + d (sigma' - sigma).

    Each evaluates the noisier of its two levels, x scaled to it, as FateZero's inversion does.
    """
    noisy = noise_of(guider.model_patcher)
    rises = bool(sigmas[0] < sigmas[-1])
    if denoise_mask is not None:
        raise ValueError("latent_image: has a noise mask, which DDIM Sampler takes with FateZero's own guiders alone")
    if rises:
        check_quiet(noise, "an inversion adds none")
    begin = noisy.scale(sigmas[0])
    x = latent_image * begin if rises else noisy.noised(latent_image, noise, sigmas[0])
    for i, (here, there) in enumerate(pairwise(sigmas)):
        at = torch.maximum(here, there)
        scaled = x if at == here else noisy.rescaled(x, here, at)  # a guider may move it
        clean = guider(scaled, at.expand(len(x)), **extra_args)
        x = x + (scaled - clean) / at * (there - here)
        if callback is not None:
            callback(i, clean, scaled, len(sigmas) - 1)
    return x if rises else x / noisy.scale(sigmas[-1])


def check_quiet(noise: Tensor, why: str) -> None:
    """Raise ValueError, saying why, where random noise is connected."""
    if noise.any():
        raise ValueError(f"noise: {why}; connect Disable Noise")


def check_options(model: Any) -> None:
    """Raise ValueError for options of a MODEL that an edit cannot honour."""
    handler = model.model_options.get("context_handler")
    if handler is not None:
        dim, own = getattr(handler, "dim", None), 2 if is_transformer(model) else 0
        if dim != own:
            raise ValueError(f"model: context windows along dim {dim}; frames lie along dim {own}")
        for name in ("freenoise", "cond_retain_index_list", "split_conds_to_windows", "latent_retain_index_list"):
            if getattr(handler, name, None):
                raise ValueError(f"model: context windows with {name}, which an edit has no use for: switch it off")
    clones = model.get_additional_models_with_key("multigpu")
    if clones:
        raise ValueError(f"model: is spread over {len(clones) + 1} GPUs (MultiGPU); an edit runs on one: remove it")


def run_in_host(guider: LoopGuider, samples: Tensor, sigmas: Tensor, noise_mask: Tensor | None = None) -> Tensor:
    """Run a guider's loop on LATENT samples (frames, 4, h, w), with the host's progress bar and previews."""
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
    return guider.sample(
        torch.zeros_like(samples), samples, DDIMSampler(), sigmas, denoise_mask=noise_mask, callback=callback,
        disable_pbar=True, seed=0,
    )  # fmt: skip


def room_for(frames: Callable[[int], int]) -> Callable[..., Any]:
    """A wrapper that has the host make room for other numbers of frames than a clip's."""

    def prepare(executor: Any, model: Any, shape: Sequence[int], *rest: Any, **more: Any) -> Any:
        return executor(model, [frames(shape[0]), *shape[1:]], *rest, **more)

    return prepare
