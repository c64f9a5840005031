"""ComfyUI as a host: a MODEL's UNet, hooked on a clone and called through the host's sampling.

The loops of `fatezero.diffusion` run inside the host's own `CFGGuider`, so that its memory
management, ControlNets, LoRA, wrappers and guidance functions work as under a KSampler. The
host samples in variance-exploding space, x = z / sqrt(abar); the loops stay in DDIM's z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..attention.control import AttentionSite, Control
from ..attention.fusion import FusionSettings
from ..attention.key_frames import KeyFrames
from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from ..attention.store import (
    MEMORIES,
    AttentionStore,
    Condition,
    Memory,
    ModelIdentity,
    check_memory,
    format_bytes,
    store_bytes,
)
from ..diffusion.ddim import Schedule
from ..diffusion.denoiser import Guidance
from ..diffusion.edit import check_store, edit, heat_of, mask_source
from ..diffusion.invert import Inversion, invert
from .comfyui_unet import HookedModel, identity_of, schedule_of

Conditioning = list[tuple[Tensor, dict[str, Any]]]
"""The host's CONDITIONING: (embeddings, options) pairs."""


# --- conditions -----------------------------------------------------------------------


@dataclass(frozen=True)
class HostCondition(Condition):
    """One CONDITIONING and the name it goes by in the run: source, positive or negative."""

    role: str = "source"
    conditioning: Conditioning = field(default_factory=list)

    @classmethod
    def of_socket(cls, conditioning: Conditioning, role: str, socket: str) -> HostCondition:
        """Wrap what a socket got.

        Raises ValueError where there is more than one prompt, or an area or mask of one: the
        attention of such parts does not line up with the clip's.
        """
        entries = [(embeddings, options) for embeddings, options in conditioning if embeddings is not None]
        if role != "negative" and len(entries) != 1:
            raise ValueError(f"{socket}: got {len(entries)} prompts combined; FateZero needs a single one")
        for _, options in entries:
            if "area" in options and role != "negative":
                raise ValueError(f"{socket}: an area of the picture is set; FateZero needs a prompt for all of it")
        embeddings, options = entries[0]
        pooled = options.get("pooled_output")
        return cls(embeddings[:1], {} if pooled is None else {"pooled_output": pooled}, role, conditioning)

    @classmethod
    def restored(cls, condition: Condition, options: dict[str, Any]) -> HostCondition:
        """The source's conditioning again, from a store that was saved."""
        conditioning = [(condition.embeddings, {**condition.extras, **options})]
        return cls(condition.embeddings, condition.extras, "source", conditioning)


# --- the store ------------------------------------------------------------------------


@dataclass
class HostStore(AttentionStore):
    """A store that remembers the MODEL it was made with, for the recomputed source branch.

    patcher: the MODEL, None for a store read from a file.
    """

    patcher: Any = None

    def get_ram_usage(self) -> int:
        """Bytes, as the host's cache asks for them."""
        return self.nbytes

    def with_model(self, model: Any) -> HostStore:
        """For a store from a file: take the edit's MODEL for the inversion's."""
        return self if self.patcher is not None else replace(self, patcher=model)


# --- the denoiser ---------------------------------------------------------------------


@dataclass
class _Branch:
    """What evaluates some roles: a hooked model, its options during the run, its conditions."""

    hooked: HookedModel
    options: dict[str, Any]
    conditions: dict[str, Any]


class ComfyDenoiser:
    """A MODEL inside a running `CFGGuider`, as the loops of `fatezero.diffusion` call it.

    edited: evaluates the positive and negative prompt. source: evaluates the source prompt;
    it may carry other weights (a LoRA before the edit only), and is then brought in and out.
    """

    def __init__(self, model: Any, edited: _Branch, source: _Branch) -> None:
        self._model = model
        self._edited = edited
        self._source = source
        self._control: Control | None = None
        self._clip_norm = False
        self._sampling = edited.hooked.patcher.get_model_object("model_sampling")
        self.clean: Tensor | None = None
        """The last prediction of the clean latents, for previews."""

    @property
    def dtype(self) -> torch.dtype:
        return self._model.manual_cast_dtype or self._model.get_dtype()

    def schedule(self, steps: int) -> Schedule:
        return schedule_of(self._sampling, steps)

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        return list(self._edited.hooked.sites(height, width).values())

    def identity(self) -> ModelIdentity:
        return identity_of(self._edited.hooked.patcher)

    @contextmanager
    def controlled(self, control: Control, clip_norm: bool = False) -> Iterator[None]:
        self._control, self._clip_norm = control, clip_norm
        try:
            yield
        finally:
            self._control, self._clip_norm = None, False

    def predict_noise(
        self, latents: Tensor, timestep: int, condition: Condition, guidance: Guidance | None = None
    ) -> Tensor:
        """Raises the host's InterruptProcessingException between UNet calls, and ValueError for one that never ran."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition) and self._control is not None
        branch = self._source if condition.role == "source" else self._edited
        sigma = self._sampling.sigma(torch.tensor(timestep)).to(latents)
        x = latents * (1 + sigma**2).sqrt()
        answers = {0: (self._control, condition.columns)}
        if guidance is not None:
            answers[1] = (guidance.control, guidance.negative.columns)
        with self._weights_of(branch), branch.hooked.answering(answers, self._clip_norm):
            clean = self._evaluate(branch, x, sigma.expand(len(x)), condition.role, guidance)
        self.clean = clean
        return (x - clean) / sigma

    def _evaluate(self, branch: _Branch, x: Tensor, sigma: Tensor, role: str, guidance: Guidance | None) -> Tensor:
        """The clean latents: of the source plainly, of the edit with the model's guidance functions."""
        wanted = branch.conditions[role]
        if role == "source":
            return comfy.samplers.calc_cond_batch(self._model, [wanted], x, sigma, branch.options)[0]
        negative = None if guidance is None else branch.conditions["negative"]
        scale = 1.0 if guidance is None else guidance.scale
        return comfy.samplers.sampling_function(self._model, x, sigma, negative, wanted, scale, branch.options)

    @contextmanager
    def _weights_of(self, branch: _Branch) -> Iterator[None]:
        """Bring in a branch's weights where they differ from the edit's."""
        main, other = self._edited.hooked.patcher, branch.hooked.patcher
        if main.is_clone(other) and _weights(main) == _weights(other):
            yield
            return
        comfy.model_management.load_models_gpu([other])
        other.pre_run()
        try:
            yield
        finally:
            comfy.model_management.load_models_gpu([main])
            main.pre_run()


def _weights(patcher: Any) -> tuple[Any, Any]:
    """What a MODEL changes of the weights and parts that its clones share."""
    return patcher.patches_uuid, patcher.object_patches


# --- running inside the host's sampling -----------------------------------------------


class _Guider(comfy.samplers.CFGGuider):
    """The host's guider with a loop of the library in the place of its sampler."""

    def __init__(self, model: Any, source_model: Any, run: Callable[[ComfyDenoiser, Tensor], Tensor]) -> None:
        self.edited = HookedModel(model)
        self.sourced = self.edited if source_model is model else HookedModel(source_model)
        self.run = run
        super().__init__(self.edited.patcher)

    def inner_sample(self, noise: Tensor, latent_image: Tensor, device: torch.device, *rest: Any, **more: Any) -> Any:
        # The source apart from the others: a ControlNet of the target may ask to be applied to
        # every other prompt of the run.
        source = self.conds.pop("source", None)
        self.source_conds = {}
        if source is not None:
            processed = comfy.samplers.process_conds(self.inner_model, noise, {"positive": source}, device)
            self.source_conds = {"source": processed["positive"]}
        try:
            return super().inner_sample(noise, latent_image, device, *rest, **more)
        finally:
            self.conds |= self.source_conds

    def source_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the source branch: those of the MODEL it was inverted with."""
        if self.sourced is self.edited:
            return options
        own = comfy.model_patcher.create_model_options_clone(self.sourced.patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(self.sourced.patcher, self.source_conds, own)
        own["transformer_options"]["sample_sigmas"] = options["transformer_options"]["sample_sigmas"]
        return own


class _Loop(comfy.samplers.Sampler):
    def sample(
        self,
        guider: _Guider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        options = extra_args["model_options"]
        denoiser = ComfyDenoiser(
            guider.inner_model,
            _Branch(guider.edited, options, guider.conds),
            _Branch(guider.sourced, guider.source_options(options), guider.source_conds),
        )
        return guider.run(denoiser, latent_image)


def run_in_host(
    model: Any,
    samples: Tensor,
    conditions: list[HostCondition],
    steps: int,
    run: Callable[[ComfyDenoiser, Tensor], Tensor],
    source_model: Any = None,
) -> tuple[Tensor, int]:
    """Call a loop of the library with a denoiser, inside the host's sampling.

    samples: LATENT samples (frames, 4, h, w) as the host scales them; the loop gets and
    returns them scaled as the UNet knows them, on its device. source_model: the MODEL that
    evaluates the source prompt, if not the same. Returns samples, and how many attention
    layers were reached.

    Raises ValueError for a MODEL that is no attention UNet, or that sees the clip in windows.
    """
    windows = model.model_options.get("context_handler")
    if windows is not None and len(samples) > windows.context_length:
        raise ValueError(
            f"model: context windows of {windows.context_length} frames are set for a clip of {len(samples)}; "
            "FateZero's frames see key frames of the whole clip, so remove the context windows"
        )
    guider = _Guider(model, source_model or model, run)
    guider.inner_set_conds({c.role: c.conditioning for c in conditions})
    sampling = model.get_model_object("model_sampling")
    schedule = schedule_of(sampling, steps)
    sigmas = torch.cat([sampling.sigma(torch.tensor(schedule.timesteps)), sampling.sigmas[:1].cpu()])
    result = guider.sample(torch.zeros_like(samples), samples, _Loop(), sigmas, disable_pbar=True, seed=0)
    reached = len(guider.edited.reached | guider.sourced.reached)
    return result.to(comfy.model_management.intermediate_device()), reached


def progress_with_preview(model: Any, denoiser: ComfyDenoiser, steps: int) -> Callable[[int, int], None]:
    """The host's progress bar, with its preview of the clean latents so far."""
    show = latent_preview.prepare_callback(model, steps)
    return lambda done, of: show(done - 1, denoiser.clean, denoiser.clean, of)


def invert_clip(
    model: Any,
    samples: Tensor,
    source: HostCondition,
    steps: int,
    key_frames: KeyFrames,
    clip_norm: bool,
    memory: str,
    prompt: str | None,
) -> tuple[Tensor, HostStore]:
    """DDIM inversion of LATENT samples: (noise, as a KSampler without added noise takes it; store)."""
    kept: list[AttentionStore] = []

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        progress = progress_with_preview(model, denoiser, steps)
        inversion = invert(
            denoiser,
            latents,
            source,
            steps,
            key_frames,
            clip_norm,
            memory,
            prompt=prompt,
            store_device=comfy.model_management.intermediate_device(),
            progress=progress,
        )
        kept.append(inversion.store)
        return inversion.latents[-1] / denoiser.schedule(steps).alphas[-1] ** 0.5

    noise, _ = run_in_host(model, samples, [source], steps, run)
    store = HostStore(**vars(kept[0]), patcher=model).to(comfy.model_management.intermediate_device())
    store.extra = {"conditioning": plain_options(source.conditioning)}
    return noise, store


def edit_clip(
    model: Any,
    store: HostStore,
    positive: HostCondition,
    negative: HostCondition | None,
    guidance_scale: float,
    prompt: PromptEdit | None,
    fusion: FusionSettings,
    mask: GivenMask | None = None,
) -> tuple[Tensor, int]:
    """The edit of a store: (LATENT samples, attention layers reached)."""

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        return edit(
            denoiser, Inversion(store.to(latents.device)), positive, negative, guidance_scale, prompt, fusion,
            mask=mask, progress=progress_with_preview(model, denoiser, store.steps),
        )  # fmt: skip

    conditions = [c for c in (source_of(store), positive, negative) if c is not None]
    return run_in_host(model, clean_samples(model, store), conditions, store.steps, run, store.patcher)


def heat_of_words(
    model: Any, store: HostStore, prompt: PromptEdit, words: Sequence[str], steps: Sequence[int]
) -> dict[str, Tensor]:
    """The source's attention to each word, averaged over some edit steps: (frames, y, x)."""
    width = store.source.columns
    columns = {word: prompt.columns(prompt.source, word, width, "blend_words") for word in words}
    heats: dict[str, list[Tensor]] = {word: [] for word in words}
    bar = comfy.utils.ProgressBar(len(steps))

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        inversion = Inversion(store.to(latents.device))
        check_store(inversion.store, denoiser, denoiser.schedule(store.steps), prompt)
        for step in steps:
            source, sites = mask_source(denoiser, inversion, step)  # once for all words
            for word in words:
                heats[word].append(heat_of(source, sites, columns[word]).float().cpu())
            bar.update(1)
        return latents

    samples = clean_samples(model, store)
    run_in_host(model, samples, [source_of(store)], store.steps, run, store.patcher)
    return {word: torch.stack(found).mean(0) for word, found in heats.items()}


def fitting_memory(
    model: Any, samples: Tensor, source: HostCondition, steps: int, key_frames: KeyFrames, memory: str, budget: float
) -> tuple[str, int]:
    """(memory, its bytes) that a budget of bytes allows; 0 sets no limit, "auto" takes the fastest.

    Raises MemoryError, with the bytes of each memory, where the one asked for does not fit.
    """
    sites = list(HookedModel(model).sites(*samples.shape[-2:]).values())
    size = (model.model.manual_cast_dtype or model.model.get_dtype()).itemsize
    needed = {
        kind: store_bytes(kind, sites, tuple(samples.shape), steps, source, key_frames, 4, size) for kind in MEMORIES
    }
    order: tuple[Memory, ...] = ("queries_keys", "recompute") if memory == "auto" else (check_memory(memory),)
    for kind in order:
        if not budget or needed[kind] <= budget:
            return kind, needed[kind]
    sizes = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in needed.items())
    raise MemoryError(f"budget_gb: {format_bytes(round(budget))} do not hold memory {memory!r}; needed: {sizes}")


def source_of(store: AttentionStore) -> HostCondition:
    assert isinstance(store.source, HostCondition)
    return store.source


def clean_samples(model: Any, store: AttentionStore) -> Tensor:
    """The clip's own latents as LATENT samples."""
    return model.model.process_latent_out(store.latents[0].float().cpu())


def plain_options(conditioning: Conditioning) -> dict[str, Any]:
    """What of a conditioning's options a file can hold: SDXL's sizes and the like."""
    return {k: v for k, v in conditioning[0][1].items() if isinstance(v, (int, float, str))}


def unsaveable(conditioning: Conditioning) -> list[str]:
    """The options that a file cannot hold and that change what the source branch computes."""
    return [k for k, v in conditioning[0][1].items() if k in ("control", "gligen", "hooks", "model_conds") and v]
