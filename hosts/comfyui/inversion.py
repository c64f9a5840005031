"""Inversion in ComfyUI, its store, and stores of random noise (FlowEdit)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...attention.key_frames import ClipCalls, KeyFrames, Windows
from ...diffusion.denoiser import clip_frames, in_parts, keys_on
from ...diffusion.invert import Progress, invert, training_windows
from ...diffusion.schedule import Schedule
from ...store.backends import FileBackend, FileLevels
from ...store.budget import Demand, StorePlan, StoreSettings, plan_store
from ...store.identity import ModelIdentity
from ...store.store import AttentionStore
from ...store.streams import KEEPS_SOUND, SHAPES, shapes_in, video_shape
from .chunks import windowing
from .conditions import HostCondition, plain_options
from .denoiser import ComfyDenoiser
from .families import hooked
from .guides import Guides, limits_frames, split_latent, with_guides
from .latents import Shapes, into_model, out_of_model, packed, packed_mask, shapes_of, streams, unpacked
from .noise import Timesteps, check_samples, noise_of
from .sampling import DDIMSampler, LoopGuider, check_quiet, run_in_host

NOISE_MASK = "noise_mask"
"""The key of a mask in a LATENT, and of its copy in the store."""


@dataclass
class HostStore(AttentionStore):
    """A store with its MODEL, for recomputing the source branch.

    patcher: the MODEL, None for a store from a file. clip: the LATENT samples, packed, to give back where an edit keeps
    them; None for a store that does not have them. guides: those of the LATENT, edit_guides: those of its edits; a file
    does not keep them.
    """

    patcher: Any = None
    clip: Tensor | None = None
    guides: Guides | None = None
    edit_guides: Guides | None = None

    def get_ram_usage(self) -> int:
        """Bytes in memory, for the host's cache; without what is on disk."""
        on_disk = [part.nbytes for part in (self.levels, self.backend) if isinstance(part, (FileLevels, FileBackend))]
        return self.nbytes - sum(on_disk)

    @property
    def shapes(self) -> Shapes:
        """The shapes of the streams of the LATENT, if it has several."""
        return shapes_in(self)

    def with_model(self, model: Any) -> HostStore:
        """The store with the edit's MODEL, if it has none because it is from a file."""
        return self if self.patcher is not None else replace(self, patcher=model)


@dataclass(frozen=True)
class InvertSettings:
    """Settings of an inversion, except its model, clip and condition; see `fatezero.invert`.

    prompt: the source's words, saved in the store. steps: of the edits, None for those of the sampling.
    inversion_steps: of the inversion, None for those of the edits. timesteps: of a UNet's schedule. keep_sound: whether
    edits keep the sound of a clip that has some.
    """

    key_frames: KeyFrames
    clip_norm: bool
    store: StoreSettings
    chunk_frames: int | None = None
    windows: Windows | None = None
    prompt: str | None = None
    order: int = 1
    reuse_midpoint: bool = False
    steps: int | None = None
    inversion_steps: int | None = None
    timesteps: Timesteps = "leading"
    keep_sound: bool = True

    @property
    def split(self) -> Windows | None:
        """The windows of the model's calls, if given."""
        return Windows.of(self.chunk_frames) or self.windows


class InvertGuider(LoopGuider):
    """A GUIDER that inverts a clip along rising sigmas, and stores what its edits need."""

    def __init__(
        self, model: Any, source: HostCondition, settings: InvertSettings, notify: Callable[[str], None] | None = None
    ) -> None:
        """notify: called with texts about the planned and the finished store."""
        noise_of(model).check_inverts()
        self.source, self.settings, self.notify = source, settings, notify or (lambda text: None)
        self._model = model
        self._made: AttentionStore | None = None
        self._mask: Tensor | None = None
        super().__init__(model, [source], windows=settings.split)

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, **more: Any) -> Any:
        """The noise, for a KSampler without added noise. Its store (`store_of`) has the mask of the latent, outside
        which edits do not change the clip.
        """
        if not isinstance(sampler, DDIMSampler):
            raise ValueError("sampler: Inversion Guider needs DDIM Sampler (FateZero)")
        check_quiet(noise, "an inversion adds no noise")
        check_samples(self._model, latent_image)
        mask = more.pop("denoise_mask", None)
        clip, self._mask, self.guides = split_latent(self._model, latent_image, mask, self.source)
        self.edit_guides = self.guides
        self._shapes = shapes_to_keep(clip, self.settings.keep_sound)
        if sigmas[0] > sigmas[-1]:
            raise ValueError("sigmas: are decreasing, as for an edit: flip them for an inversion (Flip Sigmas)")
        try:
            result = super().sample(noise, latent_image, sampler, sigmas, **more)
            assert self._made is not None
            _STORES[streams(result)[0]] = HostStore(
                **vars(self._made), patcher=self._model, guides=self.guides, edit_guides=self.guides
            )
            return result
        finally:
            self._made = self._mask = None

    def loop(self, denoiser: ComfyDenoiser, latents: Tensor, progress: Progress) -> Tensor:
        settings, schedule, mask = self.settings, denoiser.in_use, self._mask
        if settings.steps not in (None, schedule.steps):
            schedule = denoiser.of_edits = denoiser.noise.schedule(settings.steps, settings.timesteps)
        keys, timestep = keys_on(denoiser, settings.key_frames), schedule.timesteps[0]
        split = settings.split or training_windows(denoiser, clip_frames(denoiser, latents), settings.store.memory)
        parts = in_parts(denoiser, ClipCalls(keys, settings.clip_norm, split), latents, timestep)
        kept = settings.store
        if kept.memory == "auto" and self.guides is not None:
            kept = replace(kept, memory="recompute")  # others may keep maps, which have no guides
        plan = plan_in_host(self._model, latents, self.source, schedule.steps, keys, kept, parts)
        self.notify(str(plan))
        self.fills_or_reads(plan.memory)
        memory = replace(settings.store, memory=plan.memory, place=plan.place)
        inversion = invert(
            denoiser, latents, self.source, schedule.steps, settings.key_frames, settings.clip_norm, memory,
            settings.chunk_frames, windows=settings.windows, order=settings.order,
            reuse_midpoint=settings.reuse_midpoint, prompt=settings.prompt,
            extra={"conditioning": plain_options(self.source.conditioning), **self._shapes},
            inversion_steps=denoiser.in_use.steps,
            attachments={} if mask is None else {NOISE_MASK: mask_in_store(self._model, self._shapes, mask)},
            progress=progress,
        )  # fmt: skip
        self._made = store = inversion.store
        self.notify(f"{plan}\n{store.frames} frames, {store.steps} steps, attention stored for {store.kept_steps}")
        return denoiser.noise.noisy_end(store.level(schedule.steps).to(denoiser.device), store.alphas[-1])


_STORES = WeakTensorKeyDictionary()
"""The store of each inversion's noise, as long as the host has that noise."""


def store_of(samples: Tensor) -> HostStore:
    """The store of the inversion that returned these LATENT samples.

    Raises ValueError for other samples: of another sampling, copied, or from a file.
    """
    if streams(samples)[0] not in _STORES:
        raise ValueError(
            "noise: is not the direct output of a sampler with Inversion Guider: connect that output, without a node "
            "in between"
        )
    return _STORES[streams(samples)[0]]


def invert_clip(
    model: Any,
    samples: Any,
    source: HostCondition,
    steps: int,
    settings: InvertSettings,
    noise_mask: Any = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[Any, HostStore]:
    """DDIM inversion of LATENT samples: (noise for a KSampler without added noise, store).

    noise_mask: saved in the store; its edits do not change the clip outside of it.
    """
    guider = InvertGuider(model, source, replace(settings, steps=steps), notify)
    noisy = noise_of(model)
    sigmas = noisy.sigmas(noisy.schedule(settings.inversion_steps or steps, settings.timesteps))
    noise = run_in_host(guider, samples, sigmas.flip(0), noise_mask)
    return noise, store_of(noise)


class UncalledModel:
    """The schedule and identity of a MODEL that is not called, for random noise."""

    embeds_guidance = False

    def __init__(self, model: Any, timesteps: Timesteps) -> None:
        self._noise, self._hooked, self._timesteps = noise_of(model), hooked(model), timesteps
        self.spans_clip = self.frames_meet = self._hooked.family.spans_clip

    def schedule(self, steps: int) -> Schedule:
        return self._noise.schedule(steps, self._timesteps)

    def identity(self) -> ModelIdentity:
        return self._hooked.identity()


def draw_clip(
    model: Any,
    latent: Mapping[str, Any],
    source: HostCondition,
    draw: Callable[[Any, Tensor], AttentionStore],
    keep_sound: bool = False,
    timesteps: Timesteps = "leading",
) -> HostStore:
    """The store of a LATENT with random noise, instead of an inversion.

    draw: makes it from the model and the library's latents (frames, c, h, w). keep_sound: whether edits keep the sound
    of a clip that has some. timesteps: of a UNet's schedule.
    """
    check_samples(model, latent["samples"])
    samples, noise_mask, guides = split_latent(model, latent["samples"], latent.get(NOISE_MASK), source)
    store = draw(UncalledModel(model, timesteps), noise_of(model).from_host(into_model(model, samples)))
    store.extra.update({KEEPS_SOUND: False, **shapes_to_keep(samples, keep_sound)})
    made = HostStore(**vars(store), patcher=model, clip=packed(samples), guides=guides, edit_guides=guides)
    if noise_mask is not None or made.extra[KEEPS_SOUND]:
        made.attachments[NOISE_MASK] = mask_in_store(model, made.extra, noise_mask)
    return made


def guided_by(store: HostStore, latent: Mapping[str, Any]) -> HostStore:
    """The store with other guides and clean frames for its edits: those of a LATENT, with or without sound.

    Raises ValueError for guides of another number or size than the inversion's.
    """
    model, kept, mask = store.patcher, store.guides, latent.get(NOISE_MASK)
    if model is None:
        raise ValueError("store: is from a file, which has no guides: connect Invert Video or FlowEdit")
    video = streams(latent["samples"])[0]
    if mask is not None and limits_frames(mask, video_shape(store)[0]):
        raise ValueError(
            "latent: its noise mask has several values in a frame, but only whole frames can be clean: connect the "
            "mask to Edit Video"
        )
    _, _, own = split_latent(model, video, None if mask is None else streams(mask)[0], source_of(store))
    if kept is None:
        if own is None:
            raise ValueError(
                "latent: has neither guides nor clean frames: connect the LATENT of LTXV Add Guide or LTXV Img To "
                "Video Inplace"
            )
        kept = replace(own.without_clean_frames(), shapes=store.shapes or own.shapes)
    (frames, *grid), given = video_shape(store), list(video.shape[-3:])
    expected = [frames + kept.count, *grid]
    if given != expected:
        raise ValueError(
            f"latent: has {given[0]} latent frames of {given[2]}x{given[1]}, but the inverted one has {expected[0]} of "
            f"{expected[2]}x{expected[1]}: add as many guides of the same size to the same clip"
        )
    edit = replace(own or kept.without_clean_frames(), shapes=kept.shapes)
    if bool(((kept.mask < 0) != (edit.mask < 0)).any()):
        raise ValueError("latent: its guides have another grid than the inverted ones: use the same IC-LoRA parameters")
    return replace(store, guides=kept, edit_guides=edit)


def mask_in_store(model: Any, extra: Mapping[str, Any], mask: Any) -> Tensor:
    """A mask for all edits of a store, see `packed_mask` for several streams. extra: of the store."""
    if SHAPES in extra:
        return packed_mask(model, mask, extra[SHAPES], 0.0 if extra.get(KEEPS_SOUND) else 1.0)
    found: Tensor = mask.float().cpu()
    return found


def plan_in_host(
    model: Any,
    latents: Tensor,
    source: HostCondition,
    steps: int,
    key_frames: KeyFrames,
    settings: StoreSettings,
    in_parts: bool,
) -> StorePlan:
    """The plan of the store for latents (frames, c, h, w); in_parts: see `Demand`.

    "auto" leaves the device's memory to the host's models, unless the host keeps everything there. Raises MemoryError,
    with the bytes of each memory, if nothing fits.
    """
    with_sound = latents.shape[:3] == (1, 1, 1)  # packed
    if settings.memory == "auto" and (windowing(model.wrappers) or with_sound):
        settings = replace(settings, memory="recompute")  # the only one for context windows, and for several streams
    sites = list(hooked(model).sites(*latents.shape[-2:]).values())
    if with_sound and settings.memory != "recompute" and any(site.kind == "self" for site in sites):
        raise ValueError(f"memory: is {settings.memory}, but a clip with sound needs recompute")
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    shape = tuple(latents.shape)
    demand = Demand(sites, shape, 4, steps, key_frames, dtype, source.text_tokens, source.nbytes, in_parts)
    home = comfy.model_management.intermediate_device()
    return plan_store(settings, demand, model.load_device if settings.place == "device" else home)


def source_of(store: AttentionStore) -> HostCondition:
    assert isinstance(store.source, HostCondition)
    return store.source


def schedule_of_store(model: Any, store: AttentionStore) -> Schedule:
    """A MODEL's noise levels at a store's timesteps."""
    noisy = noise_of(model)
    if noisy.formulation != store.formulation:
        raise ValueError(f"store: its schedule is {store.formulation}, but the model's is {noisy.formulation}")
    source = getattr(store, "patcher", None)
    flows = [one for one in (model, source) if one and store.formulation == "flow"]
    shifts = [getattr(one.get_model_object("model_sampling"), "shift", 1.0) for one in flows]
    if len(set(shifts)) > 1:
        raise ValueError(
            f"model: its shift {shifts[0]:g} has no effect, since the inversion had {shifts[1]:g}: put Model Sampling "
            "before both"
        )
    return noisy.schedule_at(store.timesteps, store.alphas)


def shapes_to_keep(samples: Any, keep_sound: bool) -> dict[str, Any]:
    """What a store keeps of the shapes of LATENT samples. keep_sound: whether edits keep the sound."""
    shapes = shapes_of(samples)
    return {SHAPES: [list(shape) for shape in shapes], KEEPS_SOUND: keep_sound} if len(shapes) > 1 else {}


def edited_samples(model: Any, store: HostStore, z: Tensor) -> Any:
    """An edit's latents as LATENT samples; those of the clip bit for bit where the edit kept them."""
    latents = noise_of(model).to_host(z.float())
    samples = out_of_model(model, latents, store.shapes)
    if store.clip is not None:
        kept, changed = latents == noise_of(model).to_host(store.level(0)).to(latents), packed(samples)
        samples = unpacked(torch.where(kept, store.clip.to(changed), changed), store.shapes)
    return with_guides(store.edit_guides, samples)


def noise_samples(model: Any, store: HostStore) -> Any:
    """The inverted noise as LATENT samples."""
    noisy, noise = noise_of(model), store.level(store.steps).float().cpu()
    samples = out_of_model(model, noisy.to_host(noisy.noisy_end(noise, store.alphas[-1])), store.shapes)
    return with_guides(store.guides, samples)
