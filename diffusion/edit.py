"""The FateZero edit: denoise with the target prompt, fused with the inversion's attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.control import AttentionSite, Control
from ..attention.fusion import Fuser, FusionSettings, StepPlan
from ..attention.masks import GivenMask, mask_sites, threshold_mask, word_heat
from ..attention.prompt import Alignment, PromptEdit
from ..attention.records import Recorder, SourceStep
from ..attention.store import AttentionStore, Condition, StoreError
from .ddim import Schedule, ddim_move
from .denoiser import Denoiser, Guidance, predict_clip
from .invert import Inversion, Progress


@torch.no_grad()
def edit(
    denoiser: Denoiser,
    inversion: Inversion,
    target_embeddings: Tensor | Condition,
    negative_embeddings: Tensor | Condition | None = None,
    guidance_scale: float = 7.5,
    prompt: PromptEdit | None = None,
    fusion: FusionSettings | None = None,
    chunk_frames: int | None = None,
    *,
    mask: GivenMask | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Edit an inverted clip (FateZero Sec. 3.2 and 3.3); (frames, 4, h, w).

    target_embeddings, negative_embeddings: (1, tokens, dim), or `Condition`s; the negative
    ones may be None at guidance 1. prompt: how source and target words meet; without it
    there is no fusion, and the edit is plain DDIM from the inverted noise. mask: replaces or
    joins the blend mask of self-attention and latents. Fusion touches the conditional branch
    alone. UNet calls: two a step (one at guidance 1), and with memory "recompute" one more in
    every step that reads the source.

    Raises StoreError for a store of another model, schedule or prompt, and ValueError for
    options that do not fit each other, before the first step.
    """
    return _Edit.prepared(
        denoiser,
        inversion.store,
        target_embeddings,
        negative_embeddings,
        guidance_scale,
        prompt,
        fusion or FusionSettings(),
        chunk_frames,
        mask,
    ).run(progress)


@dataclass
class _Edit:
    """One run of `edit`, with its inputs checked."""

    denoiser: Denoiser
    store: AttentionStore
    schedule: Schedule
    target: Condition
    negative: Condition | None
    guidance_scale: float
    prompt: PromptEdit | None
    fusion: FusionSettings
    alignment: Alignment | None
    sites: list[AttentionSite]
    mask_sites: list[AttentionSite]
    chunk_frames: int | None
    given: GivenMask | None

    @classmethod
    def prepared(
        cls,
        denoiser: Denoiser,
        store: AttentionStore,
        target_embeddings: Tensor | Condition,
        negative_embeddings: Tensor | Condition | None,
        guidance_scale: float,
        prompt: PromptEdit | None,
        fusion: FusionSettings,
        chunk_frames: int | None,
        given: GivenMask | None,
    ) -> _Edit:
        schedule = denoiser.schedule(store.steps)
        check_store(store, denoiser, schedule, prompt)
        target = Condition.of(target_embeddings, "target_embeddings").to(store.latents)
        negative = None
        if guidance_scale != 1:
            if negative_embeddings is None:
                raise ValueError(f"guidance_scale={guidance_scale} needs negative_embeddings")
            negative = Condition.of(negative_embeddings, "negative_embeddings").to(store.latents)
        store.key_frames.windows(store.frames, chunk_frames)
        height, width = store.latents.shape[-2:]
        sites = denoiser.sites(height, width)
        alignment, masking = None, []
        if prompt is not None:
            alignment = prompt.align(store.source.columns, target.columns)
            if given is not None:
                if not fusion.blends:
                    raise ValueError("a mask needs blend_self_attention or blend_latents: nothing else uses one")
                given.at((height, width), store.frames)
            if fusion.blends and not (given is not None and given.alone):
                columns = prompt.blend_columns(store.source.columns, target.columns)
                if fusion.blend_latents and not columns[1]:
                    raise ValueError("blend_latents needs blend_words of the target prompt too")
                masking = mask_sites(sites, fusion.mask_tokens)
        elif fusion.blends:
            raise ValueError("blend_self_attention and blend_latents need prompt=PromptEdit(..., blend_words=...)")
        return cls(
            denoiser, store, schedule, target, negative, guidance_scale,
            prompt, fusion, alignment, sites, masking, chunk_frames, given,
        )  # fmt: skip

    def run(self, progress: Progress | None) -> Tensor:
        z, steps = self.store.latents[-1], self.schedule.steps
        for step in range(steps):
            z = self.step(z, step)
            if progress:
                progress(step + 1, steps)
        return z

    def step(self, z: Tensor, step: int) -> Tensor:
        """One DDIM step from level steps - step to the cleaner one."""
        level = self.schedule.steps - step
        timestep = self.schedule.timesteps[step]
        plan = self.plan(step)
        source = self.source(step, plan)
        control = self.control(source, plan)
        noise = predict_clip(
            self.denoiser, control, z, timestep, self.target, self.store.clip_norm, self.chunk_frames, self.guidance
        )
        z = ddim_move(z, noise, self.schedule.alphas[level], self.schedule.alphas[level - 1])
        if plan.blend_latents and isinstance(control, Fuser):
            kept = self.store.latents[level - 1]
            z = kept + self.latent_mask(source, control) * (z - kept)
        return z

    def plan(self, step: int) -> StepPlan:
        if self.prompt is None:
            return StepPlan(False, False, False, False)
        return StepPlan.of(self.fusion, step, self.schedule.steps)

    @property
    def guidance(self) -> Guidance | None:
        """Fusion touches the conditional branch alone; the negative one only shares key frames."""
        if self.negative is None:
            return None
        return Guidance(self.negative, Control(self.store.key_frames, self.store.frames), self.guidance_scale)

    def source(self, step: int, plan: StepPlan) -> SourceStep:
        wanted = plan.wanted(self.fusion, self.sites, self.mask_sites)
        return read_source(self.denoiser, self.store, step, wanted, self.chunk_frames)

    def control(self, source: SourceStep, plan: StepPlan) -> Control:
        frames, keys = self.store.frames, self.store.key_frames
        if self.alignment is None or not (plan.fuse_cross or plan.fuse_self or plan.blend_latents):
            return Control(keys, frames)
        masks = None
        if plan.fuse_self and self.fusion.blend_self_attention:
            grids = {(s.height, s.width) for s in self.sites if s.kind == "self" and self.fusion.fuses(s)}
            masks = self.masks(grids, [self.source_heat(source)] if self.mask_sites else [])
        keep = frozenset(s.name for s in self.mask_sites) if plan.blend_latents else frozenset()
        return Fuser(keys, frames, source, self.alignment, self.fusion, plan, masks, keep)

    def latent_mask(self, source: SourceStep, control: Fuser) -> Tensor:
        """Where source or target show a blend word: (f, 1, h, w)."""
        heats = []
        if self.mask_sites:
            maps = [(site, torch.cat([*control.maps[site.name].values()])) for site in self.mask_sites]
            heats = [self.source_heat(source), word_heat(maps, self.blend_columns[1])]
        height, width = self.store.latents.shape[-2:]
        return self.masks({(height, width)}, heats)[height, width][:, None]

    def source_heat(self, source: SourceStep) -> Tensor:
        return heat_of(source, self.mask_sites, self.blend_columns[0])

    def masks(self, grids: set[tuple[int, int]], heats: list[Tensor]) -> dict[tuple[int, int], Tensor]:
        """The blend mask on some grids: the union of the heats' masks, with the mask given."""
        found = {}
        for grid in grids:
            if self.given is not None and self.given.alone:
                found[grid] = self.given.at(grid, self.store.frames).to(self.store.latents)
                continue
            masks = [threshold_mask(heat, grid, self.fusion.blend_threshold) for heat in heats]
            union = torch.stack(masks).amax(0)
            found[grid] = union if self.given is None else self.given.joined(union)
        return found

    @property
    def blend_columns(self) -> tuple[list[int], list[int]]:
        assert self.prompt is not None
        return self.prompt.blend_columns(self.store.source.columns, self.target.columns)


def read_source(
    denoiser: Denoiser, store: AttentionStore, step: int, wanted: set[str], chunk_frames: int | None = None
) -> SourceStep:
    """The inversion's attention at an edit step (0 the noisiest): read, or computed again."""
    if not wanted:
        return SourceStep({}, store.key_frames, store.frames)
    if store.memory != "recompute":
        return store.source_step(step, wanted)
    recorder = Recorder(store.key_frames, store.frames, wanted)
    z, timestep = store.latents[store.steps - step - 1], store.timesteps[step]
    predict_clip(denoiser, recorder, z, timestep, store.source, store.clip_norm, chunk_frames)
    return SourceStep(recorder.records, store.key_frames, store.frames)


@torch.no_grad()
def mask_source(
    denoiser: Denoiser, inversion: Inversion, step: int, mask_tokens: int = 256
) -> tuple[SourceStep, list[AttentionSite]]:
    """The source's attention at an edit step in the layers that masks come from, and these layers."""
    store = inversion.store
    sites = mask_sites(denoiser.sites(*store.latents.shape[-2:]), mask_tokens)
    return read_source(denoiser, store, step, {s.name for s in sites}), sites


def source_heat(
    denoiser: Denoiser, inversion: Inversion, prompt: PromptEdit, step: int, mask_tokens: int = 256
) -> Tensor:
    """Where the source attends to the source's blend words at an edit step: (frames, y, x)."""
    columns = inversion.store.source.columns
    return heat_of(*mask_source(denoiser, inversion, step, mask_tokens), prompt.blend_columns(columns, columns)[0])


def heat_of(source: SourceStep, sites: list[AttentionSite], columns: list[int]) -> Tensor:
    """Attention of the source to some columns, on the grid of these layers: (frames, y, x)."""
    everyone = list(range(source.clip_length))
    return word_heat([(site, source.cross_map(site, everyone)) for site in sites], columns)


def check_store(
    store: AttentionStore, denoiser: Denoiser, schedule: Schedule, prompt: PromptEdit | None = None
) -> None:
    """Raise StoreError where a store does not belong to this model, schedule or prompt."""
    if not store.model.matches(denoiser.identity()):
        raise StoreError(
            "the store was made by another model: invert again with this one "
            f"(store: {store.model.layout}; model: {denoiser.identity().layout})"
        )
    same = len(store.alphas) == len(schedule.alphas) and torch.allclose(torch.tensor(store.alphas), schedule.alphas)
    if store.timesteps != schedule.timesteps or not same:
        raise StoreError(
            f"the store was made on another schedule: its timesteps start {store.timesteps[:3]}, "
            f"this scheduler's {schedule.timesteps[:3]}"
        )
    if len(store.latents) != store.steps + 1:
        raise StoreError(f"the store holds {len(store.latents)} latents for {store.steps} steps; it is damaged")
    if prompt is not None and store.prompt is not None and store.prompt != prompt.source:
        raise StoreError(f"the store was made with the prompt {store.prompt!r}, not {prompt.source!r}")


def unet_calls(steps: int, guidance_scale: float, memory: str, fusion: FusionSettings) -> tuple[int, int]:
    """UNet calls on the whole clip: (of the inversion, of the edit)."""
    plans = [StepPlan.of(fusion, step, steps) for step in range(steps)]
    reading = sum(p.fuse_cross or p.fuse_self or p.mask for p in plans) if memory == "recompute" else 0
    return steps, steps * (1 if guidance_scale == 1 else 2) + reading
