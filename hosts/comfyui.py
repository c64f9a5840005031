"""ComfyUI as a host: a MODEL's UNet, hooked on a clone and called through the host's sampling.

The loops of `fatezero.diffusion` run inside the host's own `CFGGuider`, so that its memory
management, ControlNets, LoRA, wrappers and guidance functions work as under a KSampler. The
host samples in variance-exploding space, x = z / sqrt(abar); the loops stay in DDIM's z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from comfy.model_sampling import EPS, V_PREDICTION, ModelSamplingDiscrete
from einops import rearrange
from torch import Tensor, nn

from ..attention.control import AttentionSite, Control, Kind, Place
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
from ..diffusion.clip_norm import share_statistics
from ..diffusion.ddim import Schedule
from ..diffusion.denoiser import Guidance
from ..diffusion.edit import check_store, edit, source_heat
from ..diffusion.invert import Inversion, invert

Conditioning = list[tuple[Tensor, dict[str, Any]]]
"""The host's CONDITIONING: (embeddings, options) pairs."""

WORKING_MODELS = "SD 1.x, SD 2.x and SDXL models, and LCM-free fine-tunes of them"


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


# --- the model ------------------------------------------------------------------------


Layer = tuple[str, int, int, Kind]
"""Where the host has an attention layer: block name, block number, transformer index, kind."""


def check_model(model: Any) -> None:
    """Raise ValueError for a MODEL whose attention FateZero does not know."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel) or any(isinstance(m, SpatialVideoTransformer) for m in unet.modules()):
        raise ValueError(
            f"model: {type(model.model).__name__} with a {type(unet).__name__} is no attention UNet for pictures. "
            f"FateZero works with {WORKING_MODELS}; not with Flux, SD3, Wan and other transformers"
        )
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingDiscrete) or not isinstance(sampling, (EPS, V_PREDICTION)):
        raise ValueError(
            f"model: {type(sampling).__name__} is not a schedule that DDIM can invert. "
            f"FateZero works with {WORKING_MODELS}, predicting epsilon or v"
        )


@dataclass(frozen=True)
class LayerShape:
    """An attention layer of any size of picture: its site, and how often the picture was halved there."""

    place: Place
    index: int
    heads: int
    head_dim: int
    level: int

    def site(self, kind: Kind, height: int, width: int) -> AttentionSite:
        grid = (-(-height // 2**self.level), -(-width // 2**self.level))
        return AttentionSite(self.place, self.index, kind, self.heads, self.head_dim, *grid)


def attention_layers(unet: UNetModel) -> dict[Layer, LayerShape]:
    """The attention layers of a UNet, in the order of its blocks."""
    found: dict[Layer, LayerShape] = {}
    level = 0

    def add(block: nn.Module, name: str, number: int, place: Place) -> None:
        nonlocal level
        for module in block.children():
            if isinstance(module, SpatialTransformer):
                for i, transformer in enumerate(module.transformer_blocks):
                    index = sum(shape.place == place and at[3] == "self" for at, shape in found.items())
                    for kind in get_args(Kind):
                        attn = transformer.attn1 if kind == "self" else transformer.attn2
                        found[name, number, i, kind] = LayerShape(place, index, attn.heads, attn.dim_head, level)
            level += isinstance(module, Downsample) or (isinstance(module, ResBlock) and _resizes(module, Downsample))
            level -= isinstance(module, Upsample) or (isinstance(module, ResBlock) and _resizes(module, Upsample))

    for number, block in enumerate(unet.input_blocks):
        add(block, "input", number, "down")
    if unet.middle_block is not None:
        add(unet.middle_block, "middle", 0, "mid")
    for number, block in enumerate(unet.output_blocks):
        add(block, "output", number, "up")
    return found


def _resizes(block: ResBlock, kind: type) -> bool:
    return isinstance(getattr(block, "h_upd", None), kind)


class HookedModel:
    """A clone of a MODEL whose attention layers ask a control.

    `answers` says which control answers for which branch of a call, and how many columns its
    prompt has: 0 is the positive one, 1 the negative, as in the host's `cond_or_uncond`.
    Attention replacements that other packs set stay: what they add to plain attention is
    added to the control's.
    """

    def __init__(self, model: Any, standing: Callable[[int], Control] | None = None, clip_norm: bool = False) -> None:
        """standing: makes the control of so many frames, where no run of ours says it."""
        check_model(model)
        self.patcher = model.clone()
        self.answers: dict[int, tuple[Control, int]] = {}
        self.standing = standing
        self.clip_norm = clip_norm
        self.calls = 0
        self.reached: set[str] = set()
        self._layers = attention_layers(model.model.diffusion_model)
        self._grids: dict[tuple[int, int], dict[Layer, AttentionSite]] = {}
        replaced = model.model_options["transformer_options"].get("patches_replace", {})
        for name, kind in (("attn1", "self"), ("attn2", "cross")):
            theirs = replaced.get(name, {})
            for block, number, index, layer_kind in self._layers:
                if layer_kind != kind:
                    continue
                # At the block's own key unless another pack sits at the layer's, which the host
                # reads first: a node that replaces a block during the run (PAG) then still does.
                at = (block, number, index) if (block, number, index) in theirs else (block, number)
                found = theirs.get(at)
                patch = self._patch(layer_kind, getattr(found, "beneath", found))
                self.patcher.set_model_patch_replace(patch, name, *at)
        around = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        self.patcher.remove_wrappers_with_key(around, "fatezero")
        self.patcher.add_wrapper_with_key(around, "fatezero", self._around())

    def sites(self, height: int, width: int) -> dict[Layer, AttentionSite]:
        """The attention layers on latents of this size."""
        if (height, width) not in self._grids:
            self._grids[height, width] = {
                layer: shape.site(layer[3], height, width) for layer, shape in self._layers.items()
            }
        return self._grids[height, width]

    @contextmanager
    def answering(self, answers: dict[int, tuple[Control, int]], clip_norm: bool) -> Iterator[None]:
        self.answers, self.clip_norm = answers, clip_norm
        try:
            yield
        finally:
            self.answers, self.clip_norm = {}, False

    # Plain closures, because the host copies what it finds in a model's options.

    def _patch(self, kind: Kind, theirs: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **_: Any) -> Tensor:
            return self._attend(kind, theirs, q, k, v, extra_options)

        attend.beneath = theirs  # type: ignore[attr-defined]  # hooked again, ours gives way
        return attend

    def _around(self) -> Callable[..., Tensor]:
        def around(
            executor: Any,
            x: Tensor,
            t: Tensor,
            context: Any,
            y: Any,
            control: Any,
            options: dict[str, Any],
            **more: Any,
        ) -> Tensor:
            self.calls += 1
            if not self.clip_norm:
                return executor(x, t, context, y, control, options, **more)
            unet, frames = self.patcher.model.diffusion_model, len(x) // len(options["cond_or_uncond"])
            handles = [h for norm in clip_norms(unet) for h in share_statistics(norm, frames)]
            try:
                return executor(x, t, context, y, control, options, **more)
            finally:
                for handle in handles:
                    handle.remove()

        return around

    def _attend(
        self,
        kind: Kind,
        theirs: Callable[..., Tensor] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """One layer of one UNet call: every branch by its control. (branches*frames, tokens, channels)."""
        site = self.sites(*options["original_shape"][-2:])[(*options["block"], options["block_index"], kind)]
        if q.shape[1] != site.tokens:
            raise ValueError(
                f"{site.name} has {q.shape[1]} tokens where {site.height}x{site.width} are expected: another node "
                "on the model merges or rescales tokens (ToMe, HyperTile, Deep Shrink); remove it"
            )
        branches = options["cond_or_uncond"]
        parts = zip(branches, *(t.chunk(len(branches)) for t in (q, k, v)), strict=True)
        done = []
        for branch, q_part, k_part, v_part in parts:
            alone = {**options, "cond_or_uncond": [branch]}
            done.append(self._branch(branch, site, theirs, q_part, k_part, v_part, alone))
        self.reached.add(site.name)
        return torch.cat(done)

    def _branch(
        self,
        branch: int,
        site: AttentionSite,
        theirs: Callable[..., Tensor] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
            return host_attention.optimized_attention(
                q.contiguous(), k.contiguous(), v.contiguous(), site.heads, skip_reshape=True, skip_output_reshape=True,
                attn_precision=options.get("attn_precision"), transformer_options=options,
            )  # fmt: skip

        def split(t: Tensor) -> Tensor:
            return rearrange(t, "f t (h d) -> f h t d", h=site.heads)

        def joined(t: Tensor) -> Tensor:
            return rearrange(t, "f h t d -> f t (h d)")

        control, columns = self._answer(branch, len(q), k.shape[1])
        control.attend = attend
        columns = columns if site.kind == "cross" else k.shape[1]
        own = control.cross_attention if site.kind == "cross" else control.self_attention
        # The host repeats a shorter prompt beside a longer one; the repetition changes nothing.
        q4, k4, v4 = split(q), split(k[:, :columns]), split(v[:, :columns])
        output = joined(own(q4, k4, v4, site)).to(q)
        if theirs is None:
            return output
        if site.kind == "self":
            k4, v4 = (control.seen(t, site).expand(len(q), -1, -1, -1) for t in (k4, v4))
        added = theirs(q, joined(k4), joined(v4), options) - joined(attend(q4, k4, v4))
        return output + added

    def _answer(self, branch: int, frames: int, columns: int) -> tuple[Control, int]:
        """The control of a branch; a branch that a guidance node adds goes as the negative one does."""
        if self.standing is not None:
            return self.standing(frames), columns
        return self.answers.get(branch) or self.answers.get(1, self.answers[0])


def clip_norms(unet: UNetModel) -> list[nn.GroupNorm]:
    """The GroupNorms that see the whole clip in the authors' 5-D UNet."""
    norms = [n for m in unet.modules() if isinstance(m, ResBlock) for n in (m.in_layers[0], m.out_layers[0])]
    return [n for n in (*norms, unet.out[0]) if isinstance(n, nn.GroupNorm)]


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
        """Raises the host's InterruptProcessingException between UNet calls."""
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
        if other is main or main.clone_has_same_weights(other):
            yield
            return
        comfy.model_management.load_models_gpu([other])
        other.pre_run()
        try:
            yield
        finally:
            comfy.model_management.load_models_gpu([main])
            main.pre_run()


def schedule_of(sampling: Any, steps: int) -> Schedule:
    """FateZero's timesteps (leading, offset 1) and the cumulative alphas of a host's schedule.

    Raises ValueError for a number of steps or a schedule that DDIM cannot invert.
    """
    sigmas = sampling.sigmas.cpu()
    total = len(sigmas)
    if not 1 <= steps < total:
        raise ValueError(f"steps is {steps}; it must be between 1 and {total - 1}")
    timesteps = tuple(i * (total // steps) + 1 for i in reversed(range(steps)))
    alphas = 1 / (1 + sigmas[[0, *reversed(timesteps)]] ** 2)
    if alphas.min() < 1e-6:
        raise ValueError("a schedule that ends at zero signal (zsnr) cannot be inverted")
    return Schedule(timesteps, alphas)


def identity_of(patcher: Any) -> ModelIdentity:
    """What tells a MODEL from another, LoRA on it or not."""
    model = patcher.model
    config = model.model_config.unet_config
    layers = attention_layers(model.diffusion_model)
    layout = (
        f"{type(model).__name__} in={config['in_channels']} width={config['model_channels']}"
        f"x{tuple(config['channel_mult'])} text={config['context_dim']} attention={len(layers)}"
    )
    keys = ["diffusion_model.input_blocks.0.0.weight", "diffusion_model.out.2.weight"]
    keys += [k for k in model.state_dict() if k.endswith(".to_k.weight")]
    weights = [_unpatched(patcher, key) for key in keys]
    picked = torch.cat([w.detach().flatten()[:: max(1, w.numel() // 8)][:8].float().cpu() for w in weights])
    return ModelIdentity(layout, tuple(picked.tolist()), str(model.get_dtype()))


def _unpatched(patcher: Any, key: str) -> Tensor:
    """A weight as the checkpoint has it; LoRA may have been written into the live one."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    return comfy.utils.get_attr(patcher.model, key)


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

    Raises ValueError for a MODEL that is no attention UNet or sees the clip in windows, and
    RuntimeError where no attention layer was reached.
    """
    check_model(model)
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
    if not reached and guider.edited.calls + guider.sourced.calls:
        raise RuntimeError(
            "model: none of its attention layers was reached, so nothing was edited: another node on the model "
            "replaces the whole UNet"
        )
    return result.to(comfy.model_management.intermediate_device()), reached


def share_key_frames(model: Any, key_frames: KeyFrames, clip_norm: bool) -> Any:
    """A MODEL whose frames see each other's key frames, for anyone's sampler."""
    return HookedModel(model, lambda frames: Control(key_frames, frames), clip_norm).patcher


def count_layers(model: Any) -> int:
    """How many attention layers a MODEL has."""
    return len(attention_layers(model.model.diffusion_model))


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
            denoiser, latents, source, steps, key_frames, clip_norm, memory, prompt=prompt, progress=progress
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
    heats: dict[str, list[Tensor]] = {word: [] for word in words}
    bar = comfy.utils.ProgressBar(len(words) * len(steps))

    def run(denoiser: ComfyDenoiser, latents: Tensor) -> Tensor:
        inversion = Inversion(store.to(latents.device))
        check_store(inversion.store, denoiser, denoiser.schedule(store.steps), prompt)
        for word in words:
            pair = replace(prompt, blend_words=([word], []), reweight={})
            for step in steps:
                heats[word].append(source_heat(denoiser, inversion, pair, step).float().cpu())
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
    check_model(model)
    hooked = HookedModel(model)
    sites = list(hooked.sites(*samples.shape[-2:]).values())
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
