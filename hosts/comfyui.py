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

import comfy.context_windows
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..attention.budget import Demand, StorePlan, StoreSettings, plan_store
from ..attention.control import AttentionSite, Control
from ..attention.identity import ModelIdentity
from ..attention.key_frames import KeyFrames, Piece
from ..attention.prompt import PromptEdit
from ..attention.shelves import FileLevels, FileShelf
from ..attention.store import AttentionStore, Condition
from ..diffusion.ddim import Schedule
from ..diffusion.denoiser import Guidance, Windows
from ..diffusion.edit import Edit, check_store, edit_many, source_heats
from ..diffusion.invert import Inversion, invert
from .comfyui_unet import HookedModel, identity_of, schedule_of

NOISE_MASK = "noise_mask"
"""What the host calls the mask of a LATENT, and the store its copy."""

Conditioning = list[tuple[Tensor, dict[str, Any]]]
"""The host's CONDITIONING: (embeddings, options) pairs."""


# --- conditions -----------------------------------------------------------------------


@dataclass(frozen=True)
class HostCondition(Condition):
    """One CONDITIONING and the name it goes by in the run.

    role: "source", "positive" or "negative", with ".1", ".2", ... for further edits of one pass.
    """

    role: str = "source"
    conditioning: Conditioning = field(default_factory=list)

    @classmethod
    def of_socket(cls, conditioning: Conditioning, role: str, socket: str) -> HostCondition:
        """Wrap what a socket got.

        Raises ValueError where there is more than one prompt, or one for a part of the picture or of the steps
        alone: the attention of such parts does not line up with the clip's, and steps without a prompt are none.
        """
        entries = [(embeddings, options) for embeddings, options in conditioning if embeddings is not None]
        if socket != "negative" and len(entries) != 1:
            raise ValueError(f"{socket}: got {len(entries)} prompts combined; FateZero needs a single one")
        if socket != "negative":
            _check_whole(entries[0][1], socket)
        embeddings, options = entries[0]
        pooled = options.get("pooled_output")
        return cls(embeddings[:1], {} if pooled is None else {"pooled_output": pooled}, role, conditioning)

    @classmethod
    def restored(cls, condition: Condition, options: dict[str, Any]) -> HostCondition:
        """The source's conditioning again, from a store that was saved."""
        conditioning = [(condition.embeddings, {**condition.extras, **options})]
        return cls(condition.embeddings, condition.extras, "source", conditioning)


_OF_A_PART = {
    "area": "an area of the picture is set",
    "mask": "a mask of the picture is set",
    "concat_latent_image": "a picture to paint into is set",
    "reference_latents": "reference pictures are set",
    "unclip_conditioning": "pictures for unCLIP are set",
}
"""Options of a CONDITIONING that a source or positive prompt must not have."""


def _check_whole(options: dict[str, Any], socket: str) -> None:
    """Raise ValueError, naming the option, for a prompt that is not for the whole clip in every step."""
    for name, what in _OF_A_PART.items():
        if options.get(name) is not None:
            raise ValueError(f"{socket}: {what} ({name}); FateZero needs a prompt for all of the clip")
    start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
    if start > 0 or end < 1:
        raise ValueError(
            f"{socket}: it is for {start:.0%} to {end:.0%} of the steps (Conditioning Set Timestep Range); FateZero "
            "needs a prompt for all of them"
        )


# --- the store ------------------------------------------------------------------------


@dataclass
class HostStore(AttentionStore):
    """A store that remembers the MODEL it was made with, for the recomputed source branch.

    patcher: the MODEL, None for a store read from a file.
    """

    patcher: Any = None

    def get_ram_usage(self) -> int:
        """Bytes of memory, as the host's cache asks for them; what is on disk takes none."""
        on_disk = [part.nbytes for part in (self.levels, self.shelf) if isinstance(part, (FileLevels, FileShelf))]
        return self.nbytes - sum(on_disk)

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

    def __init__(self, model: Any, device: torch.device, edited: _Branch, source: _Branch, handler: Any = None) -> None:
        """device: where the host runs the model. handler: the host's context windows."""
        self.device = device
        self._model = model
        self._edited = edited
        self._source = source
        self._handler = handler
        self._clip_norm = False
        self._sampling = edited.hooked.patcher.get_model_object("model_sampling")
        # All at once and on the CPU, for to read one from the device is to wait for its queue.
        self._sigmas = self._sampling.sigma(torch.arange(len(self._sampling.sigmas))).cpu()
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

    def windows(self, latents: Tensor, timestep: int) -> Windows | None:
        """The context windows that a node set on the MODEL, with the weights of its fuse method."""
        handler = self._handler
        if handler is None or len(latents) <= handler.context_length:
            return None
        sigma, options = self._sigmas[timestep, None], self._edited.options
        handler.set_step(sigma.to(options["transformer_options"]["sample_sigmas"]), options)
        found = []
        for window in handler.get_context_windows(self._model, latents, options):
            frames = window.index_list
            weights = comfy.context_windows.get_context_weights(len(frames), len(latents), frames, handler, sigma=sigma)
            found.append((frames, weights))
        return found

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        self._clip_norm = clip_norm
        try:
            yield
        finally:
            self._clip_norm = False

    def predict_noise(
        self, latents: Tensor, timestep: int, condition: Condition, control: Control, guidance: Guidance | None = None
    ) -> Tensor:
        """Raises the host's InterruptProcessingException between UNet calls, and ValueError for one that never ran."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition)
        branch = self._source if condition.role == "source" else self._edited
        sigma = self._sigmas[timestep].to(latents)
        x = latents * (1 + sigma**2).sqrt()
        answers = {0: (control, condition.columns)}
        if guidance is not None:
            answers[1] = (guidance.control, guidance.negative.columns)
        with self._weights_of(branch), branch.hooked.answering(answers, self._clip_norm):
            clean = self._evaluate(branch, x, sigma.expand(len(x)), condition, control.piece, guidance)
        self.clean = clean
        return (x - clean) / sigma

    def _evaluate(
        self,
        branch: _Branch,
        x: Tensor,
        sigma: Tensor,
        condition: HostCondition,
        piece: Piece,
        guidance: Guidance | None,
    ) -> Tensor:
        """The clean latents: of the source plainly, of the edit with the model's guidance functions."""
        wanted, negative, scale = branch.conditions[condition.role], None, 1.0
        if guidance is not None:
            assert isinstance(guidance.negative, HostCondition)
            negative, scale = branch.conditions[guidance.negative.role], guidance.scale
        with _of_piece([wanted, negative], piece) as (wanted, negative):
            if condition.role == "source":
                return comfy.samplers.calc_cond_batch(self._model, [wanted], x, sigma, branch.options)[0]
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


@contextmanager
def _of_piece(conditions: list[Any], piece: Piece) -> Iterator[list[Any]]:
    """The host's conditions with what they hold for each frame cut to a piece's frames, ControlNet hints too."""
    if piece.is_whole:
        yield conditions
        return
    frames = list(piece.held)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == piece.clip:
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
        # The source and further edits apart from the first: a ControlNet of one target may ask to be
        # applied to every other prompt it is processed with.
        apart = {role: self.conds.pop(role) for role in [*self.conds] if role not in ("positive", "negative")}
        self.apart: dict[str, Any] = {}
        for group in {role.partition(".")[2] if role != "source" else role for role in apart}:
            ends = {"positive": group} if group == "source" else {n: f"{n}.{group}" for n in ("positive", "negative")}
            named = {name: apart[role] for name, role in ends.items() if role in apart}
            done = comfy.samplers.process_conds(self.inner_model, noise, named, device)
            self.apart |= {ends[name]: processed for name, processed in done.items()}
        try:
            return super().inner_sample(noise, latent_image, device, *rest, **more)
        finally:
            self.conds |= self.apart

    def source_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the source branch: those of the MODEL it was inverted with."""
        if self.sourced is self.edited:
            return options
        own = comfy.model_patcher.create_model_options_clone(self.sourced.patcher.model_options)
        source = {role: conds for role, conds in self.apart.items() if role == "source"}
        comfy.sampler_helpers.prepare_model_patcher(self.sourced.patcher, source, own)
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
        handler = options.pop("context_handler", None)  # the denoiser's own pieces follow its windows
        of_source = guider.source_options(options)
        of_source.pop("context_handler", None)
        denoiser = ComfyDenoiser(
            guider.inner_model,
            latent_image.device,
            _Branch(guider.edited, options, guider.conds | guider.apart),
            _Branch(guider.sourced, of_source, guider.apart),
            handler,
        )
        return guider.run(denoiser, latent_image)


def run_in_host(
    model: Any,
    samples: Tensor,
    conditions: list[HostCondition],
    steps: int,
    run: Callable[[ComfyDenoiser, Tensor], Tensor],
    source_model: Any = None,
    chunk_frames: int | None = None,
) -> tuple[Tensor, int]:
    """Call a loop of the library with a denoiser, inside the host's sampling.

    samples: LATENT samples (frames, 4, h, w) as the host scales them; the loop gets and
    returns them scaled as the UNet knows them, on its device. source_model: the MODEL that
    evaluates the source prompt, if not the same. chunk_frames: frames of one UNet call, for which
    the host then makes room. Returns samples, and how many attention layers were reached.

    Raises ValueError for a MODEL that is no attention UNet, or whose context windows do not go along frames.
    """
    handler = model.model_options.get("context_handler")
    if handler is not None and getattr(handler, "dim", None) != 0:
        raise ValueError(f"model: context windows along dim {getattr(handler, 'dim', None)}; frames lie along dim 0")
    guider = _Guider(model, source_model or model, run)
    one_text = all(len(text) == 1 for c in conditions for text, _ in c.conditioning if text is not None)
    guider.edited.one_text = guider.sourced.one_text = one_text
    if chunk_frames is not None:
        guider.edited.patcher.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, "fatezero", _room_for(chunk_frames)
        )
    guider.inner_set_conds({c.role: c.conditioning for c in conditions})
    sampling = model.get_model_object("model_sampling")
    schedule = schedule_of(sampling, steps)
    sigmas = torch.cat([sampling.sigma(torch.tensor(schedule.timesteps)), sampling.sigmas[:1].cpu()])
    result = guider.sample(torch.zeros_like(samples), samples, _Loop(), sigmas, disable_pbar=True, seed=0)
    reached = len(guider.edited.reached | guider.sourced.reached)
    return result.to(comfy.model_management.intermediate_device()), reached


def _room_for(frames: int) -> Callable[..., Any]:
    """A wrapper that has the host make room for so many frames and their key frames, not for the whole clip."""

    def prepare(executor: Any, model: Any, shape: Sequence[int], *rest: Any, **more: Any) -> Any:
        return executor(model, [min(shape[0], frames + 3), *shape[1:]], *rest, **more)

    return prepare


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
    settings: StoreSettings,
    chunk_frames: int | None = None,
    prompt: str | None = None,
    noise_mask: Tensor | None = None,
) -> tuple[Tensor, HostStore]:
    """DDIM inversion of LATENT samples: (noise, as a KSampler without added noise takes it; store).

    noise_mask: where alone edits of this store may change the clip; the store keeps it.
    """
    kept: list[AttentionStore] = []

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        inversion = invert(
            denoiser, latents, source, steps, key_frames, clip_norm, settings, chunk_frames, prompt=prompt,
            extra={"conditioning": plain_options(source.conditioning)},
            attachments={} if noise_mask is None else {NOISE_MASK: noise_mask.float().cpu()},
            progress=progress_with_preview(model, denoiser, steps),
        )  # fmt: skip
        kept.append(inversion.store)
        return inversion.store.level(steps).to(denoiser.device) / denoiser.schedule(steps).alphas[-1] ** 0.5

    noise, _ = run_in_host(model, samples, [source], steps, run, chunk_frames=chunk_frames)
    return noise, HostStore(**vars(kept[0]), patcher=model)


def edit_clip(
    model: Any, store: HostStore, edits: Sequence[Edit], chunk_frames: int | None = None
) -> tuple[list[Tensor], int]:
    """The edits of a store in one pass: (LATENT samples of each, attention layers reached).

    Their conditions are `HostCondition`s, whose roles tell the edits apart.
    """
    inversion, done = Inversion(store), list[Tensor]()

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        progress = progress_with_preview(model, denoiser, store.steps)
        done.extend(edit_many(denoiser, inversion, edits, chunk_frames, progress=progress))
        return done[0]

    prompts = [text for e in edits for text in (e.target_embeddings, e.negative_embeddings)]
    conditions = [source_of(store), *(c for c in prompts if isinstance(c, HostCondition))]
    samples = clean_samples(model, store)
    first, reached = run_in_host(model, samples, conditions, store.steps, run, store.patcher, chunk_frames)
    others = [model.model.process_latent_out(z.float()).to(first.device) for z in done[1:]]
    return [first, *others], reached


def heat_of_words(
    model: Any,
    store: HostStore,
    prompt: PromptEdit,
    words: Sequence[str],
    steps: Sequence[int],
    chunk_frames: int | None = None,
) -> dict[str, Tensor]:
    """The source's attention to each word, averaged over some edit steps: (frames, y, x)."""
    columns = [prompt.columns(prompt.source, word, store.source.columns, "blend_words") for word in words]
    heats: list[Tensor] = []
    bar = comfy.utils.ProgressBar(len(steps))

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        check_store(store, denoiser, denoiser.schedule(store.steps), prompt)
        for step in steps:
            found = source_heats(denoiser, Inversion(store), columns, step, chunk_frames=chunk_frames)
            heats.append(torch.stack(found).float().cpu())
            bar.update(1)
        return latents

    samples = clean_samples(model, store)
    run_in_host(model, samples, [source_of(store)], store.steps, run, store.patcher, chunk_frames)
    return dict(zip(words, torch.stack(heats).mean(0), strict=True))


def plan_in_host(
    model: Any,
    samples: Tensor,
    source: HostCondition,
    steps: int,
    key_frames: KeyFrames,
    settings: StoreSettings,
) -> StorePlan:
    """What store an inversion of LATENT samples will make.

    "auto" leaves the device's memory to the host's models, unless the host keeps everything there.
    Raises MemoryError, with the bytes of each memory, where nothing fits.
    """
    sites = list(HookedModel(model).sites(*samples.shape[-2:]).values())
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    demand = Demand(sites, tuple(samples.shape), 4, steps, key_frames, dtype, source.columns, source.nbytes)
    home = comfy.model_management.intermediate_device()
    return plan_store(settings, demand, model.load_device if settings.place == "device" else home)


def source_of(store: AttentionStore) -> HostCondition:
    assert isinstance(store.source, HostCondition)
    return store.source


def clean_samples(model: Any, store: AttentionStore) -> Tensor:
    """The clip's own latents as LATENT samples."""
    return model.model.process_latent_out(store.level(0).float().cpu())


def plain_options(conditioning: Conditioning) -> dict[str, Any]:
    """What of a conditioning's options a file can hold: SDXL's sizes and the like."""
    return {k: v for k, v in conditioning[0][1].items() if isinstance(v, (int, float, str))}


def unsaveable(conditioning: Conditioning) -> list[str]:
    """The options that a file cannot hold and that change what the source branch computes."""
    return [k for k, v in conditioning[0][1].items() if k in ("control", "gligen", "hooks", "model_conds") and v]
