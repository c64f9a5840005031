"""GUIDERs and the SAMPLER that run the loops of `fatezero.diffusion` inside the host's own sampling.

They run in the host's `CFGGuider`, so that its memory management, ControlNets, LoRA, wrappers and guidance functions
work as under a KSampler. The host samples in variance-exploding space, x = z / sqrt(abar); the loops stay in DDIM's z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...attention.control import Kind
from ...diffusion.invert import Progress
from ...diffusion.schedule import Schedule
from ...store.records import Memory
from .chunks import WrappersMP
from .conditions import HostCondition
from .denoiser import ComfyDenoiser, wrapped
from .families import family_of, hooked
from .hook import ALL_KINDS, Hook
from .noise import noise_of

Loop = Callable[[ComfyDenoiser, Tensor, Progress], Tensor]
"""A loop of the library on its latents (frames, c, h, w); returns latents."""


class LoopGuider(comfy.samplers.CFGGuider):
    """A GUIDER with the model and conditions of a loop of the library; `DDIMSampler` runs the loop."""

    def __init__(
        self,
        model: Any,
        conditions: Sequence[HostCondition],
        source_model: Any = None,
        chunk_frames: int | None = None,
        kinds: Sequence[Kind] = ALL_KINDS,
    ) -> None:
        """source_model: the MODEL that evaluates the source prompt, if not the same. chunk_frames: frames of one
        UNet call, for which the host then makes room. kinds: of attention layers that are hooked.

        Raises ValueError for a MODEL that cannot be edited, or with options that cannot be honoured.
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
        """The number of attention layers that the last calls reached."""
        return len(set().union(*(model.reached for model in self._models())))

    def fills_or_reads(self, memory: Memory) -> None:
        """Set the memory of the store of the run."""
        for model in self._models():
            model.memory = memory

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

    def _models(self) -> list[Hook]:
        """The edit's model, and the further ones of a run."""
        own = [self.edited] if self.sourced is self.edited else [self.edited, self.sourced]
        return own + [model.low for model in own if model.low is not None]

    def outer_sample(self, noise: Tensor, *rest: Any, **more: Any) -> Any:
        """The host's, inside the sampling wrappers of the further MODELs of the run too."""
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
        """The host's sampling inside all wrappers; ValueError where one changes its inputs or repeats it."""
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
    """The guider that the sampling wrappers of a further MODEL of a run receive: the source's, where it is not the
    edit's, or the one for low noise.
    """

    def __init__(self, model: Hook, conds: dict[str, Any], function: Callable[..., Any]) -> None:
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
            return model.model, conds, []  # loaded when it is first called

        def inside(noise: Tensor, *args: Any, **more: Any) -> Any:
            self.function, options = comfy.samplers.sampling_function, self.model_options
            prepare = wrapped(WrappersMP.PREPARE_SAMPLING, loaded_later, None, options)
            _, self.conds, _ = prepare(patcher, noise.shape, self.conds, model_options=options)
            comfy.samplers.cast_to_load_options(self.model_options, patcher.load_device, patcher.model_dtype())
            patcher.pre_run()
            return run(noise, *args, **more)

        self.model_options = comfy.model_patcher.create_model_options_clone(own)
        # AnimateDiff-Evolved replaces the host's sampling function: here for this MODEL only.
        of_others, comfy.samplers.sampling_function = comfy.samplers.sampling_function, self.function
        try:
            comfy.sampler_helpers.prepare_model_patcher(patcher, self.conds, self.model_options)
            return wrapped(WrappersMP.OUTER_SAMPLE, inside, self, self.model_options)(*args, **more)
        finally:
            comfy.samplers.sampling_function = of_others
            comfy.samplers.cast_to_load_options(self.model_options, patcher.offload_device)
            self.model_options = own
            patcher.cleanup()


class _Inside(comfy.samplers.Sampler):
    """A sampler inside the sampler wrappers of a further MODEL of the run."""

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
        return wrapped(WrappersMP.SAMPLER_SAMPLE, run, self._sampler, own)(self._side, sigmas, of_side, *rest)


class DDIMSampler(comfy.samplers.Sampler):
    """A SAMPLER of deterministic DDIM steps: towards the clip along falling sigmas, to noise along rising ones.

    With our guiders it runs their loop, with others plain steps.
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
        raise ValueError("latent_image: has a noise mask, which DDIM Sampler takes only with FateZero's guiders")
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
    """Raise ValueError with a reason where random noise is connected."""
    if noise.any():
        raise ValueError(f"noise: {why}; connect Disable Noise")


def check_options(model: Any) -> None:
    """Raise ValueError for options of a MODEL that an edit cannot honour."""
    handler = model.model_options.get("context_handler")
    if handler is not None:
        dim, own = getattr(handler, "dim", None), family_of(model).frame_dim
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
    """A wrapper that has the host reserve memory for another number of frames than the clip's."""

    def prepare(executor: Any, model: Any, shape: Sequence[int], *rest: Any, **more: Any) -> Any:
        return executor(model, [frames(shape[0]), *shape[1:]], *rest, **more)

    return prepare
