"""GUIDERs and the SAMPLER that run the loops of `fatezero.diffusion` inside the host's sampling.

They run in the host's `CFGGuider`, so that its memory management, ControlNets, LoRA, wrappers and guidance functions
work as with a KSampler. The host samples in variance-exploding space, x = z / sqrt(abar); the loops use DDIM's z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...attention.control import Kind
from ...attention.key_frames import Windows
from ...diffusion.invert import Progress
from ...diffusion.schedule import Schedule
from ...store.records import Memory
from .chunks import WrappersMP
from .conditions import NOTHING, HostCondition
from .denoiser import ComfyDenoiser, wrapped
from .families import family_of, hooked, hooks_always, takes_of
from .guides import Guides
from .hook import ALL_KINDS, Hook
from .latents import packed, shapes_of, zeros_like
from .noise import is_flow, noise_of
from .sameness import WINDOWS

Loop = Callable[[ComfyDenoiser, Tensor, Progress], Tensor]
"""A loop of the library on its latents (frames, c, h, w); returns latents."""


class LoopGuider(comfy.samplers.CFGGuider):
    """A GUIDER with the models and conditions of a library loop, which `DDIMSampler` runs."""

    def __init__(
        self,
        model: Any,
        conditions: Sequence[HostCondition],
        source_model: Any = None,
        windows: Windows | None = None,
        kinds: Sequence[Kind] = ALL_KINDS,
        controls: bool = True,
    ) -> None:
        """source_model: the MODEL for the source prompt, if different. windows: of the model's calls, for the host's
        memory estimate. kinds: of the hooked attention layers. controls: whether the loop controls attention.

        Raises ValueError for an unsupported MODEL, or unsupported options.
        """
        hooks = controls or windows is not None
        takes = takes_of(model) if hooks else NOTHING
        attends = not is_flow(model) or all(condition.fits_attention(takes) for condition in conditions)
        attends = attends and (hooks or hooks_always(model))
        self.edited = hooked(model, kinds, attends)
        check_options(model, self.edited)
        source_model = source_model or model
        self.sourced = self.edited if source_model is model else hooked(source_model, attends=attends)
        one_text = all(len(text) == 1 for c in conditions for text, _ in c.conditioning if text is not None)
        self.edited.one_text = self.sourced.one_text = one_text
        dim = family_of(model).frame_dim
        if windows is not None and not self.edited.family.attention:
            raise ValueError(
                "chunk_frames: has no effect on this model's calls, like window_frames: use Context Windows for long "
                "clips"
            )
        if windows is not None:
            most = windows.frames + (3 if dim == 0 else 0)  # including key frames
            room = room_for(lambda size: size * min(self._frames or size, most) // (self._frames or size), dim)
            self.edited.patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "fatezero", room)
        super().__init__(self.edited.patcher)
        self.inner_set_conds({c.role: c.conditioning for c in conditions})
        self.edited.patcher = self.model_patcher  # the host may replace it for conditions with hooks
        self.function: Callable[..., Any] = comfy.samplers.sampling_function
        """The host's sampling function inside the wrappers of the edit's MODEL."""
        self.sides: dict[int, SideGuider] = {}
        """The additional MODELs of the current run, by the id of their hook."""
        self.shape: Sequence[int] = ()
        """The shape of the latents."""
        self.seed: int | None = None
        self._frames = 0
        """The frames of a video that is packed with its sound; 0 for other latents."""
        self._given: tuple[Tensor, ...] | None = None
        """Noise, latents and sigmas of the run, until sampling starts."""

    guides: Guides | None = None
    """The guides and clean frames of the run's LATENT."""
    edit_guides: Guides | None = None
    """Those of the edit's calls, and of the result."""
    loop: Loop | None
    """The loop for `DDIMSampler`: a method of a subclass, or a function; None for its own steps."""

    @property
    def layers_run(self) -> int:
        """The number of attention layers that ran in the last UNet calls."""
        return len(set().union(*(model.ran for model in self._models())))

    def guides_of(self, condition: HostCondition) -> Guides | None:
        """The guides and clean frames of a prompt's calls."""
        return self.edit_guides if condition.of_edit else self.guides

    def fills_or_reads(self, memory: Memory) -> None:
        """Set the memory of the run's store."""
        for model in self._models():
            model.memory = memory

    def schedule(self, sigmas: Tensor) -> Schedule:
        """The noise levels of a run, for decreasing sigmas as in `inner_sample`."""
        return noise_of(self.model_patcher).schedule_of(sigmas)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: torch.device, sampler: Any, sigmas: Tensor, *rest: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        # Process the source and additional edits separately from the first: a target's ControlNet may request to be
        # applied to all other prompts processed with it.
        others = {role: self.conds.pop(role) for role in [*self.conds] if role not in ("positive", "negative")}
        self.others: dict[str, Any] = {}
        of_edits = self.conds | others
        of_source = of_edits.pop("source", [])
        for guides, entries in ((self.guides, of_source), (self.edit_guides, chain(*of_edits.values()))):
            mask = None if guides is None else guides.call_mask().to(device)
            for entry in entries if mask is not None else ():
                entry["denoise_mask"] = mask
        for model in self._models():  # the host sets it on the edit's only
            model.patcher.model.latent_shapes = more.get("latent_shapes")
        given = self._inputs(latent_image, *rest, **more) if self.edited.reads_latents else {}
        for group in {role.partition(".")[2] if role != "source" else role for role in others}:
            ends = {"positive": group} if group == "source" else {n: f"{n}.{group}" for n in ("positive", "negative")}
            named = {name: others[role] for name, role in ends.items() if role in others}
            done = comfy.samplers.process_conds(self.inner_model, noise, named, device, **given)
            self.others |= {ends[name]: processed for name, processed in done.items()}
        for side in self.sides.values():
            sampler = _Inside(side, sampler)
        try:  # noisy to clean, also for an inversion, because the host's nodes find their steps by sigma
            decreasing = sigmas.sort(descending=True).values
            return super().inner_sample(noise, latent_image, device, sampler, decreasing, *rest, **more)
        finally:
            self.conds |= self.others

    def _inputs(
        self, latent_image: Tensor, denoise_mask: Any, callback: Any, disable_pbar: bool, seed: int | None, **more: Any
    ) -> dict[str, Any]:
        """What models may read for their conditions, from the arguments of the host's `inner_sample`."""
        latents = self.inner_model.process_latent_in(latent_image) if latent_image.any() else latent_image
        return {"latent_image": latents, "denoise_mask": denoise_mask, "seed": seed, **more}

    def sample(self, noise: Any, latent_image: Any, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any) -> Any:
        """Moves the result to the host's device for latents, so that it is the same tensor in the host's outputs."""
        shapes = shapes_of(noise)
        self._frames = shapes[0][2] if len(shapes) > 1 else 0
        self._given, self.seed = (packed(noise), packed(latent_image), sigmas), more.get("seed")
        self.function = comfy.samplers.sampling_function
        try:
            result = super().sample(noise, latent_image, sampler, sigmas, *rest, **more)
            return result.to(comfy.model_management.intermediate_device())
        finally:  # our clones end with the run, and the host ejects injections only of living MODELs
            for hooked in self._models():
                hooked.patcher.eject_model()

    def _models(self) -> list[Hook]:
        """The hooks of the edit's MODEL and the additional ones of a run."""
        own = [self.edited] if self.sourced is self.edited else [self.edited, self.sourced]
        return own + [model.low for model in own if model.low is not None]

    def outer_sample(self, noise: Tensor, *rest: Any, **more: Any) -> Any:
        """The host's sampling, inside the sampling wrappers of the run's additional MODELs too."""
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
        """The host's sampling inside all wrappers; ValueError if a wrapper changes its inputs or repeats it."""
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
    """The guider for sampling wrappers of an additional MODEL of a run: the source's, if it is not the edit's, and the
    low-noise model.
    """

    def __init__(self, model: Hook, conds: dict[str, Any], function: Callable[..., Any]) -> None:
        """function: the host's sampling function outside all wrappers."""
        super().__init__(model.patcher)
        self.model_options: dict[str, Any] = model.patcher.model_options
        self.hooked, self.conds, self.function = model, dict(conds), function
        self.inner_model = model.patcher.model
        self.running: dict[str, Any] = {}
        """The options of the current run."""

    def around(self, run: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Run a sampling inside the wrappers of this MODEL."""
        patcher, own = self.model_patcher, self.model_options

        def loaded_later(model: Any, shape: Any, conds: Any, **more: Any) -> tuple[Any, Any, list[Any]]:
            return model.model, conds, []  # loaded before its first call, which may never come

        def inside(noise: Tensor, *args: Any, **more: Any) -> Any:
            self.function, options = comfy.samplers.sampling_function, self.model_options
            prepare = wrapped(WrappersMP.PREPARE_SAMPLING, loaded_later, None, options)
            _, self.conds, _ = prepare(patcher, noise.shape, self.conds, model_options=options)
            comfy.samplers.cast_to_load_options(self.model_options, patcher.load_device, patcher.model_dtype())
            patcher.pre_run()
            return run(noise, *args, **more)

        self.model_options = comfy.model_patcher.create_model_options_clone(own)
        # AnimateDiff-Evolved replaces the host's sampling function: here only for this MODEL.
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
    """A sampler inside the sampler wrappers of an additional MODEL of the run."""

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
    """A SAMPLER of deterministic DDIM steps: sampling along decreasing sigmas, inversion along rising ones.

    With our own guiders it runs their loop, with others plain steps.
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
        clip = latent_image if guider.guides is None else guider.guides.without_guides(latent_image)

        def progress(done: int, of: int) -> None:
            if callback is not None and denoiser.clean is not None:  # None before an edit of lower strength starts
                callback(done - 1, denoiser.clean, denoiser.clean, of)

        try:
            done = denoiser.noise.to_host(guider.loop(denoiser, denoiser.noise.from_host(clip), progress))
            return done if guider.edit_guides is None else guider.edit_guides.finished(done)
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
    """DDIM or flow steps with any guider: x' = x + d (sigma' - sigma).

    Each step evaluates the noisier of its two levels, with x scaled to it, like FateZero's inversion.
    """
    noisy = noise_of(guider.model_patcher)
    rises = bool(sigmas[0] < sigmas[-1])
    if denoise_mask is not None:
        raise ValueError("latent_image: DDIM Sampler supports a noise mask only with FateZero's guiders: remove it")
    if rises:
        check_quiet(noise, "an inversion adds none")
    begin = noisy.scale(sigmas[0])
    x = latent_image * begin if rises else noisy.noised(latent_image, noise, sigmas[0])
    for i, (here, there) in enumerate(pairwise(sigmas)):
        at = torch.maximum(here, there)
        scaled = x if at == here else noisy.rescaled(x, here, at)  # a guider may change it
        clean = guider(scaled, at.expand(len(x)), **extra_args)
        x = x + (scaled - clean) / at * (there - here)
        if callback is not None:
            callback(i, clean, scaled, len(sigmas) - 1)
    return x if rises else x / noisy.scale(sigmas[-1])


def check_quiet(noise: Any, why: str) -> None:
    """Raise ValueError, with the reason, if random noise is connected."""
    if packed(noise).any():
        raise ValueError(f"noise: {why}: connect Disable Noise")


def check_options(model: Any, hook: Hook) -> None:
    """Raise ValueError for unsupported options of a MODEL in a run with a hook."""
    handler = model.model_options.get(WINDOWS)
    own = family_of(model).frame_dim
    if handler is not None and hook.family.attention:
        if not hook.host_windows:
            raise ValueError(
                f"model: latents of {hook.family.title} are in groups, which Context Windows split: remove that node, "
                "and set window_frames"
            )
        if (dim := handler.dim) != own:
            raise ValueError(f"model: context windows along dim {dim}, but frames are along dim {own}: change dim")
        unsupported = {"freenoise", "cond_retain_index_list", "split_conds_to_windows", "latent_retain_index_list"}
        for name in sorted(unsupported - hook.window_options):
            if getattr(handler, name, None):
                raise ValueError(f"model: edits do not support context windows with {name}: switch it off")
    clones = model.get_additional_models_with_key("multigpu")
    if clones:
        raise ValueError(f"model: uses {len(clones) + 1} GPUs (MultiGPU), but edits run on one: remove it")


def run_in_host(guider: LoopGuider, samples: Any, sigmas: Tensor, noise_mask: Any = None) -> Any:
    """Run a guider's loop on LATENT samples, with the host's progress bar and previews."""
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
    return guider.sample(
        zeros_like(samples), samples, DDIMSampler(), sigmas, denoise_mask=noise_mask, callback=callback,
        disable_pbar=True, seed=0,
    )  # fmt: skip


def room_for(frames: Callable[[int], int], dim: int = 0) -> Callable[..., Any]:
    """A wrapper that changes the number of frames, along a dimension, in the host's memory estimate."""

    def prepare(executor: Any, model: Any, shape: Sequence[int], *rest: Any, **more: Any) -> Any:
        return executor(model, [*shape[:dim], frames(shape[dim]), *shape[dim + 1 :]], *rest, **more)

    return prepare
