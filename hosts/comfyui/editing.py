"""Edits of a store, and heat maps of its words, inside ComfyUI's sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import create_model_options_clone
from torch import Tensor

from ...attention.masks import GivenMask, MaskMode, changed_latents
from ...attention.prompt import PromptEdit
from ...diffusion.edit import EditPass, edit_many
from ...diffusion.invert import Inversion, Progress
from ...diffusion.parts import Edit, Injected, first_step
from ...diffusion.schedule import Schedule
from ...diffusion.source import check_store, source_heats
from ...diffusion.start import start_of
from ...store.streams import KEEPS_SOUND, video_of, video_shape, with_kept_sound
from .chunks import WrappersMP
from .conditions import HostCondition
from .denoiser import ComfyDenoiser
from .guides import check_guides, with_guides
from .inversion import NOISE_MASK, HostStore, edited_samples, mask_in_store, noise_samples, schedule_of_store, source_of
from .latents import mask_of_frames, mask_of_latents, packed, shapes_of, streams, unpacked, zeros_like
from .noise import FlowNoise, noise_of
from .sameness import WINDOWS
from .sampling import DDIMSampler, LoopGuider, check_quiet, run_in_host

SAME = 1e-3
"""The relative difference of sigmas of the same step."""


class EditGuider(LoopGuider):
    """A GUIDER for edits of a store: `DDIMSampler` runs the whole loop, the host's samplers get single predictions.

    The conditions are `HostCondition`s; their roles distinguish the edits.
    """

    def __init__(
        self,
        model: Any,
        store: HostStore,
        edits: Sequence[Edit],
        chunk_frames: int | None = None,
        notify: Callable[[int], None] | None = None,
    ) -> None:
        """notify: called at the end with the number of attention layers that ran.

        Raises ValueError for context windows with a propagation, which has its own batches.
        """
        if model.model_options.get(WINDOWS) is not None and any(e.propagation for e in edits):
            raise ValueError(
                "model: context windows conflict with TokenFlow, which has its own batches: remove one of them"
            )
        self.store, self.edits, self.chunk_frames = store, edits, chunk_frames
        self.guides, self.edit_guides = store.guides, store.edit_guides
        self.notify = notify or (lambda layers: None)
        self.done: list[Tensor] = []
        """The edited latents of the last run, in the UNet's scale."""
        self._masked_edits: Sequence[Edit] = edits
        self._running: EditPass | None = None
        self._levels = torch.empty(0)  # the sigmas of the running pass, one per step
        self._open = ExitStack()
        prompts = [text for e in edits for text in (e.target_embeddings, e.negative_embeddings)]
        conditions = [source_of(store), *(c for c in prompts if isinstance(c, HostCondition))]
        check_guides(store.guides, conditions)
        controls = any(edit.fusion is not None and edit.fusion.needs_attention for edit in edits)
        super().__init__(model, conditions, store.patcher, store.calls(chunk_frames).windows, controls=controls)
        self.fills_or_reads(store.memory)

    def schedule(self, sigmas: Tensor) -> Schedule:
        """The store's schedule, which must match the sigmas."""
        own = schedule_of_store(self.model_patcher, self.store)
        of_store, given = noise_of(self.model_patcher).sigmas(own), sigmas.cpu()
        if given.shape != of_store.shape or not torch.allclose(given, of_store, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"sigmas: {len(given) - 1} steps from {given[0]:.4g} to {given[-1]:.4g}, but the inversion has "
                f"{self.store.steps} from {of_store[0]:.4g} to {of_store[-1]:.4g}: use the same for both"
            )
        return own

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, **more: Any) -> Tensor:
        """Raises ValueError for noise, latents or sigmas that do not match the store."""
        check_quiet(noise, "an edit starts from the inverted noise")
        self.schedule(sigmas)
        self._check_start(latent_image)
        self._check_guidance()
        mask = more.pop("denoise_mask", None)
        if self.guides is not None:
            mask = self.guides.edit_mask(mask)
        check_masking(self.model_patcher, mask if self.guides is None else self.guides.mask)
        self._masked_edits = self.edits if mask is None else [self.inside(edit, mask) for edit in self.edits]
        self.done = []
        if not isinstance(sampler, DDIMSampler):
            noise, latent_image, sigmas = self._start_of_host(sampler, latent_image, sigmas)
        result = super().sample(noise, latent_image, sampler, sigmas, **more)
        self.notify(self.layers_run)
        return result

    def _check_guidance(self) -> None:
        """Raise ValueError for a step without guidance where another node changes guidance."""
        steps, models = self.store.steps, filter(None, (self.edited, self.edited.low))
        unguided = (
            not edit.guides(step, steps)
            for edit in self.edits
            for step in range(first_step(edit.strength, steps), steps)
        )
        if any(model.patcher.get_all_wrappers(WrappersMP.PREDICT_NOISE) for model in models) and any(unguided):
            raise ValueError(
                "guidance: at 1, and after guidance_until, no negative prompt is evaluated, but a node on the model "
                "changes guidance (CFG Override, LazyCache): remove it, or guide all steps"
            )

    def _check_start(self, latent_image: Any) -> None:
        """Raise ValueError for a LATENT that the edit does not start from."""
        if not same_samples(latent_image, noise_samples(self.model_patcher, self.store)):
            raise ValueError("latent_image: is not the noise of this store: connect the inversion's output")

    def _start_of_host(self, sampler: Any, latent_image: Any, sigmas: Tensor) -> tuple[Any, Any, Tensor]:
        """The noise, LATENT and sigmas for a sampler of the host."""
        model, shapes = self.model_patcher.model, shapes_of(latent_image)
        model.latent_shapes = shapes  # which models that scale their sound read
        parts = noise_of(self.model_patcher).initial(model, packed(latent_image), sigmas[0])
        noise, latents = (unpacked(part, shapes) for part in parts)
        return noise, latents, sigmas

    def inside(self, edit: Edit, mask: Any) -> Edit:
        """An edit that changes the clip only inside the noise mask of its LATENT. It replaces the store's mask, but no
        other mask of the edit.
        """
        model, store = self.model_patcher, self.store
        of_store = store.attachments.get(NOISE_MASK)
        from_store = None if of_store is None else _limit(model, store, of_store).mask
        if edit.mask is not None and (from_store is None or not torch.equal(edit.mask.mask, from_store)):
            return edit
        return only_inside(model, store, edit, mask_in_store(model, store.extra, mask))

    def loop(self, denoiser: ComfyDenoiser, latents: Tensor, progress: Progress) -> Tensor:
        self.done = edit_many(denoiser, Inversion(self.store), self._masked_edits, self.chunk_frames, progress=progress)
        return self.done[0]

    # For the host's samplers, which request single predictions.

    def inner_sample(self, *args: Any, **more: Any) -> Any:
        with ExitStack() as self._open:
            try:
                return super().inner_sample(*args, **more)
            finally:
                self._running = None

    def outer_predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """The predicted clean latents of a step of the edit; x: in the host's space.

        Raises ValueError if the edit blends latents, which needs the whole step, and for a sigma between those of the
        store. Other nodes' wrappers around predictions run inside, once per UNet call.
        """
        assert model_options is not None
        if self._running is None:
            options = create_model_options_clone(model_options)
            sigmas = options["transformer_options"]["sample_sigmas"]
            denoiser = ComfyDenoiser(self, options, x.device, self._schedule_of_host(sigmas))
            self._levels = self._sigmas_of_host(denoiser.noise.sigmas(denoiser.in_use)[:-1])
            edits = EditPass(denoiser, Inversion(self.store), self._masked_edits, self.chunk_frames, in_order=False)
            self._check_for_host(edits)
            self._running = self._open.enter_context(edits)
        sigma = timestep[0].cpu()
        step = int((self._levels - sigma).abs().argmin())
        if abs(self._levels[step] - sigma) > SAME * self._levels[step]:
            raise ValueError(
                f"sampler: evaluates sigma {sigma:.4g}, between those of the inversion: use one with one call per step "
                "(euler, dpmpp_2m, ...), or DDIM Sampler (FateZero)"
            )
        guides = self.edit_guides
        clip = x if guides is None else guides.without_guides(x)
        clean = self._clean_of_host(self._running, clip, sigma.to(x), step)
        return clean if guides is None else guides.finished(clean)

    def _schedule_of_host(self, sigmas: Tensor) -> Schedule:
        """The schedule of the run, for the sigmas of a sampler of the host."""
        return self.schedule(sigmas)

    def _sigmas_of_host(self, sigmas: Tensor) -> Tensor:
        """The sigmas that a sampler of the host integrates along."""
        return sigmas

    def _check_for_host(self, edits: EditPass) -> None:
        """Raise ValueError for an edit that needs the whole step."""
        needs = "needs DDIM Sampler (FateZero)"
        if edits.blends_latents:
            raise ValueError(f"sampler: this edit blends latents (blend_latents, or a mask), which {needs}")
        if self.store.extra.get(KEEPS_SOUND):
            raise ValueError(
                f"sampler: this edit keeps the clip's sound, which {needs}, or sound edit at the inversion"
            )
        if edits.guides_layout:
            raise ValueError(f"sampler: this edit has a layout, which {needs}")
        if self.store.drawn is not None:
            raise ValueError(f"sampler: this edit's noise is drawn (FlowEdit) and its model no flow, which {needs}")
        if any(edit.strength < 1 for edit in self._masked_edits):
            raise ValueError(f"sampler: this edit has a strength below 1, which {needs}")

    def _clean_of_host(self, edits: EditPass, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        """The predicted clean latents for a sampler of the host, in its space."""
        noisy = noise_of(self.model_patcher)
        (predicted,) = edits.predict([noisy.from_host(x) / noisy.scale(sigma)], step)
        assert predicted is not None  # `_check_for_host` rejects lower strengths
        return noisy.clean(x, predicted.noise, sigma)


ADD_NOISE = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")
"""Words in the names of the host's samplers that add noise."""


class FlowEditGuider(EditGuider):
    """A GUIDER for an edit from sampled noise (FlowEdit) of a flow, along any sigmas.

    The host's samplers integrate the edit itself from the clip: dz = (v_edit - v_source) dsigma, times a mask. In plain
    steps (`n_min`) v_source is the velocity of the noised clip, so that the noised edit follows v_edit. A soft
    mask changes more there than with `DDIMSampler`, which applies it to the whole change after each step.
    """

    def schedule(self, sigmas: Tensor) -> Schedule:
        """That of the sigmas; the noise of the store follows them."""
        noisy, drawn = noise_of(self.model_patcher), self.store.drawn
        assert drawn is not None
        own, start = schedule_of_store(self.model_patcher, self.store), start_of(self.store)
        given = start.schedule(noisy.schedule_of(sigmas))
        if given.steps == own.steps and torch.allclose(noisy.sigmas(given), noisy.sigmas(own), rtol=SAME / 2, atol=0):
            return own
        self.store = replace(
            self.store, timesteps=given.timesteps, alphas=tuple(given.alphas.tolist()),
            levels=start.levels(drawn.clip, given),
        )  # fmt: skip
        return given

    def _check_start(self, latent_image: Any) -> None:
        starts = [noise_samples(self.model_patcher, self.store)]
        if self.store.clip is not None:
            starts.append(with_guides(self.guides, unpacked(self.store.clip, self.store.shapes)))
        if not any(same_samples(latent_image, start) for start in starts):
            raise ValueError("latent_image: is not the clip of this store: connect the latent of the FlowEdit node")

    def _start_of_host(self, sampler: Any, latent_image: Any, sigmas: Tensor) -> tuple[Any, Any, Tensor]:
        """The clip, from the first sigma of the edit's strength.

        Raises ValueError for a sampler that adds noise, and for sigmas that do not end at 0.
        """
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removeprefix("sample_")
        if any(word in name for word in ADD_NOISE):
            raise ValueError(f"sampler: {name} adds noise in each step, but FlowEdit's latents have none: use euler")
        if sigmas[-1] > 0:
            raise ValueError(f"sigmas: end at {sigmas[-1]:.4g}, but FlowEdit with this sampler ends at 0")
        steps = len(sigmas) - 1
        sigmas = self._sigmas_of_host(sigmas[first_step(self.edits[0].strength, steps) :])
        clip = noise_of(self.model_patcher).to_host(self.store.level(0)).float().cpu()
        clip = clip if self.edit_guides is None else self.edit_guides.with_guides(clip)
        return unpacked(clip / sigmas[0].cpu(), shapes_of(latent_image)), zeros_like(latent_image), sigmas

    def _schedule_of_host(self, sigmas: Tensor) -> Schedule:
        return schedule_of_store(self.model_patcher, self.store)

    def _sigmas_of_host(self, sigmas: Tensor) -> Tensor:
        """The flow's own, because the edit moves along them."""
        noisy = noise_of(self.model_patcher)
        assert isinstance(noisy, FlowNoise)
        return noisy.flow_sigmas(sigmas)

    def _check_for_host(self, edits: EditPass) -> None:
        if edits.blends_latents and any(edit.fusion is not None for edit in self._masked_edits):
            raise ValueError(
                "sampler: this edit blends latents with a mask that it computes, which needs DDIM Sampler (FateZero)"
            )

    def _clean_of_host(self, edits: EditPass, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        noisy, store = noise_of(self.model_patcher), self.store
        z = noisy.from_host(x)
        here, clip = (store.level(level).to(z) for level in (store.steps - step, 0))
        (predicted,) = edits.predict([here + (z - clip)], step)
        assert predicted is not None
        of_source = (here - clip) / sigma if predicted.source is None else predicted.source
        velocity = predicted.noise - of_source
        if predicted.mask is not None:
            velocity = predicted.mask * velocity
        velocity = with_kept_sound(store, velocity, torch.zeros_like(velocity))
        return x - sigma * noisy.to_host(velocity)


def guider_of(model: Any, store: HostStore, *more: Any) -> EditGuider:
    """The guider for edits of a store, with the further arguments of `EditGuider`."""
    follows = store.drawn is not None and store.formulation == "flow"
    return (FlowEditGuider if follows else EditGuider)(model, store, *more)


def same_samples(given: Any, own: Any) -> bool:
    """Whether LATENT samples are the same, up to rounding."""
    given, own = packed(given).cpu(), packed(own).cpu()
    return given.shape == own.shape and torch.allclose(given, own, rtol=1e-3, atol=1e-3)


def edit_clip(
    model: Any, store: HostStore, edits: Sequence[Edit], chunk_frames: int | None = None
) -> tuple[list[Any], int]:
    """The edits of a store in one pass: (LATENT samples of each, number of attention layers that ran).

    The conditions are `HostCondition`s; their roles distinguish the edits.
    """
    guider = guider_of(model, store, edits, chunk_frames)
    sigmas = noise_of(model).sigmas(schedule_of_store(model, store))
    first = run_in_host(guider, noise_samples(model, store), sigmas)
    done = guider.done if store.clip is not None else guider.done[1:]
    samples = [edited_samples(model, store, z).to(first.device) for z in done]
    return samples if store.clip is not None else [first, *samples], guider.layers_run


def changed_mask(model: Any, store: HostStore, samples: Any) -> Tensor:
    """Where an edit of a store changed the clip: (frames, h, w), 0 or 1 on the latents' grid. samples: of the edit."""
    of_clip = edited_samples(model, replace(store, edit_guides=store.guides), store.level(0))
    frames = video_shape(store)[0]
    edited, source = (_by_frame(streams(x)[0].float().cpu())[:frames] for x in (samples, of_clip))
    return mask_of_frames(model, changed_latents(edited, source).float())


def _by_frame(samples: Tensor) -> Tensor:
    """Samples (f, c, h, w), or of a video (1, c, f, h, w), as (f, c, h, w)."""
    return samples if samples.ndim == 4 else samples[0].movedim(1, 0)


def only_inside(model: Any, store: HostStore, edit: Edit, mask: Tensor) -> Edit:
    """The edit that changes the clip only inside the mask of its LATENT, as in the host's samplers."""
    fusion = None if edit.fusion is None else edit.fusion.inside()
    return replace(edit, fusion=fusion, mask=_limit(model, store, mask))


def _limit(model: Any, store: HostStore, mask: Tensor) -> GivenMask:
    """The mask of an edit from the noise mask of a LATENT or a store."""
    own = noise_of(model).mask_from_host(mask)
    return GivenMask(own if store.shapes else mask_of_latents(model, own, store.frames), "replace")


def limits_video(store: HostStore, mask: Tensor) -> bool:
    """Whether the noise mask of a store is one of the video, not only of the sound that edits keep."""
    return not store.shapes or not bool((video_of(store, mask) == 1).all())


def given_mask(model: Any, store: HostStore, mask: Tensor, how: MaskMode) -> GivenMask:
    """A MASK of the clip's frames for an edit of a store."""
    mask = mask.reshape(-1, *mask.shape[-2:])
    if store.shapes:
        return GivenMask(mask_in_store(model, store.extra, mask), how)
    return GivenMask(mask_of_latents(model, mask, store.frames), how)


def check_masking(model: Any, mask: Tensor | None) -> None:
    """Raise ValueError for a MODEL that changes a LATENT's mask from step to step."""
    if mask is not None and "denoise_mask_function" in model.model_options:
        raise ValueError(
            "model: changes the latent's noise mask step by step (Differential Diffusion), which edits do not support: "
            "remove it, or the mask"
        )


def heat_of_words(
    model: Any,
    store: HostStore,
    prompt: PromptEdit,
    words: Sequence[str],
    steps: Sequence[int],
    chunk_frames: int | None = None,
) -> dict[str, Tensor]:
    """The source's attention to each word, averaged over some edit steps: (frames, y, x)."""
    tokens = [prompt.token_indices(prompt.source, word, store.source.text_tokens, "blend_words") for word in words]
    heats: list[Tensor] = []
    bar = comfy.utils.ProgressBar(len(steps))

    def collect(denoiser: ComfyDenoiser, latents: Tensor, progress: Progress) -> Tensor:
        check_store(store, denoiser, denoiser.in_use, prompt)
        for step in steps:
            found = source_heats(denoiser, Inversion(store), tokens, step, chunk_frames=chunk_frames)
            heats.append(torch.stack(found).float().cpu())
            bar.update(1)
        return latents

    guider = LoopGuider(model, [source_of(store)], store.patcher, store.calls(chunk_frames).windows)
    guider.loop, guider.guides, guider.edit_guides = collect, store.guides, store.edit_guides
    run_in_host(guider, noise_samples(model, store), noise_of(model).sigmas(schedule_of_store(model, store)))
    return dict(zip(words, torch.stack(heats).mean(0), strict=True))


def prepared_injection(model: Any, store: HostStore, edit: Edit) -> Injected:
    """The injection of an edit, prepared as for its first step."""
    found: list[Injected] = []

    def collect(denoiser: ComfyDenoiser, latents: Tensor, progress: Progress) -> Tensor:
        with EditPass(denoiser, Inversion(store), [edit]) as run:
            found.extend(run.injections)
        return latents

    guider = guider_of(model, store, [edit])
    guider.loop = collect  # type: ignore[method-assign]
    run_in_host(guider, noise_samples(model, store), noise_of(model).sigmas(schedule_of_store(model, store)))
    return found[0]
