"""The loops of `fatezero.diffusion` inside the host's own sampling.

They run in the host's `CFGGuider`, so that its memory management, ControlNets, LoRA, wrappers and guidance
functions work as under a KSampler. The host samples in variance-exploding space, x = z / sqrt(abar); the loops
stay in DDIM's z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import comfy.context_windows
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control, Kind
from ..attention.key_frames import Chunk, KeyFrames
from ..diffusion.denoiser import Guidance, Windows, frames_meet
from ..diffusion.invert import Progress
from ..diffusion.schedule import Schedule
from ..store.identity import ModelIdentity
from ..store.records import Beside
from .comfyui_conditions import HostCondition, check_read
from .comfyui_noise import noise_of
from .comfyui_sameness import same_forward, same_in_place, with_parts
from .comfyui_temporal import temporal_layers
from .comfyui_transformer import HookedTransformer, hooked, is_transformer
from .comfyui_unet import HookedModel, module_of_node, node_of

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
    low: _Branch | None = None

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
        self._edited = _Branch(guider.edited, options, guider.conds | guider.others)
        for role, conditions in self._edited.conditions.items():
            if not role.startswith("negative"):
                check_read(conditions, role.partition(".")[0])
        of_source = guider.source_options(options)
        of_source.pop("context_handler", None)
        self._source = _Branch(guider.sourced, of_source, guider.others)
        for branch in (self._edited, self._source):
            branch.low = _low_of(branch)
        self._here = guider.edited.patcher
        """The MODEL whose weights are in place."""
        self._prepared = [self._here]
        """The MODELs that the run has called, the host's own first."""
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
            beside.predicted = self.predict_noise(beside.latents, timestep, beside.condition, beside.control)
            beside = None
        branch = branch.at(float(sigma))
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
        self._bring(branch)
        with (
            branch.hooked.answering(answers, self._clip_norm),
            branch.hooked.deriving(value, parts) as derived,
            _of_chunk([branch.conditions[condition.role]], control.chunk) as (positive,),
        ):
            comfy.samplers.calc_cond_batch(self._model, [positive], x, sigma.expand(len(x)), branch.options)
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
        """The clean latents: of the source plainly, of the edit with the model's guidance functions.

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
            model = branch.hooked.patcher.model
            if condition.role == "source":
                return comfy.samplers.calc_cond_batch(model, [positive], x, sigma, branch.options)[0]
            if not control.chunk.is_whole:
                _check_per_frame(branch.options)
            return self._guided(model, x, sigma, negative, positive, scale, branch.options)

    def _guided(
        self, model: Any, x: Tensor, sigma: Tensor, negative: Any, positive: Any, scale: float, options: dict[str, Any]
    ) -> Tensor:
        """The host's guidance, inside what other nodes wrap around it; these may change the guider's `cfg`."""

        def predict(x: Tensor, sigma: Tensor, options: dict[str, Any], seed: int | None) -> Tensor:
            cfg = self._guider.cfg
            return comfy.samplers.sampling_function(model, x, sigma, negative, positive, cfg, options, seed=seed)

        wrappers = comfy.patcher_extension.get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True)
        if wrappers and negative is None:
            raise ValueError(
                "guidance: is 1, where no negative prompt is evaluated, but a node on the model changes guidance "
                "(CFG Override, LazyCache): remove it, or take another guidance"
            )
        self._guider.cfg = scale
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(predict, self._guider, wrappers)
        return executor.execute(x, sigma, options, None)

    def _bring(self, branch: _Branch) -> None:
        """Make a branch's MODEL the host's current one, and bring in its weights where others are in place."""
        wanted = branch.hooked.patcher
        if wanted is self._here:
            return
        if not same_in_place(self._here, wanted):
            comfy.model_management.load_models_gpu(with_parts(wanted))
        if wanted in self._prepared:
            wanted.model.current_patcher = wanted
        else:
            wanted.pre_run()
            self._prepared.append(wanted)
        self._here = wanted

    def restore(self) -> None:
        """Bring the edit's own weights in again, as the host left them, and clean up after the other MODELs."""
        self._bring(self._edited)
        for patcher in self._prepared[1:]:
            patcher.cleanup()
        self._here.model.current_patcher = self._here


PER_FRAME = {
    "nodes_cfg", "nodes_custom_sampler", "nodes_easycache", "nodes_eps", "nodes_fresca", "nodes_model_advanced",
    "nodes_pag", "nodes_slg", "nodes_tcfg",
}  # fmt: skip
"""Modules of the host whose guidance is each frame's own: chunks of a clip give what the whole gives."""


def _check_per_frame(options: dict[str, Any]) -> None:
    """Raise ValueError, naming the node, for guidance that may look at several frames, where a call has some alone."""
    found = [options.get("sampler_cfg_function"), options.get("sampler_calc_cond_batch_function")]
    found += [*options.get("sampler_pre_cfg_function", []), *options.get("sampler_post_cfg_function", [])]
    found += comfy.patcher_extension.get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True)
    for hook in found:
        if hook is not None and module_of_node(hook) not in PER_FRAME:
            raise ValueError(
                f"model: guidance of {node_of(hook)} may depend on all frames, of which chunks, context windows and "
                "TokenFlow's batches have some: run the clip whole, or remove it"
            )


def _low_of(branch: _Branch) -> _Branch | None:
    """What takes over from a branch's model, with options of its own."""
    low = getattr(branch.hooked, "low", None)
    if low is None:
        return None
    options = comfy.model_patcher.create_model_options_clone(low.patcher.model_options)
    comfy.sampler_helpers.prepare_model_patcher(low.patcher, branch.conditions, options)
    options.pop("context_handler", None)
    options["transformer_options"]["sample_sigmas"] = branch.options["transformer_options"]["sample_sigmas"]
    return _Branch(low, options, branch.conditions)


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
        kinds: Sequence[Kind] = get_args(Kind),
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

    loop: Loop | None
    """What `DDIMSampler` runs: a method of those that derive from this, or a function; None for its own steps."""

    @property
    def reached(self) -> int:
        """How many attention layers the last UNet calls reached."""
        lows = (getattr(hooked, "low", None) for hooked in (self.edited, self.sourced))
        return len(set().union(self.edited.reached, self.sourced.reached, *(low.reached for low in lows if low)))

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
        try:  # noisy to clean, also for an inversion: the host's nodes find their steps so
            falling = sigmas.sort(descending=True).values
            return super().inner_sample(noise, latent_image, device, sampler, falling, *rest, **more)
        finally:
            self.conds |= self.others

    def sample(self, *args: Any, **more: Any) -> Tensor:
        """The result is where the host keeps latents, so that it stays the same tensor in its outputs."""
        return super().sample(*args, **more).to(comfy.model_management.intermediate_device())

    def source_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the source branch: those of the MODEL it was inverted with."""
        if self.sourced is self.edited:
            return options
        own = comfy.model_patcher.create_model_options_clone(self.sourced.patcher.model_options)
        source = {role: conds for role, conds in self.others.items() if role == "source"}
        comfy.sampler_helpers.prepare_model_patcher(self.sourced.patcher, source, own)
        own["transformer_options"]["sample_sigmas"] = options["transformer_options"]["sample_sigmas"]
        return own


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
