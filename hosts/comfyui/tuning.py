"""Tune-A-Video in the host: trains temporal layers inside the host's sampling, on a copy of the UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy, deepcopy
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_sampling import V_PREDICTION
from torch import Tensor, nn

from ...attention.condition import Condition
from ...attention.control import Control
from ...attention.key_frames import Chunk, KeyFrames
from ...attention.temporal_kind import Kind
from ...attention.temporal_layers import CastLinear, TemporalLayers, trained_of, trains
from ...diffusion.clip_norm import share_statistics
from ...diffusion.ddim import guide
from ...diffusion.denoiser import Guidance
from ...diffusion.schedule import Schedule
from ...diffusion.training import noised
from ..recompute import recomputed
from .conditions import HostCondition
from .noise import HostNoise, noise_of, prediction_of
from .temporal import attach, fresh_layers, hooked_layers, host_names, places_in, temporal_layers
from .unet import HookedUNet, check_unet
from .unet_layers import BLOCKS, norms_of_clip

Train = Callable[["HostTunable", Tensor], list[float]]
"""Trains a model on latents; returns the loss of each step."""


def tune_model(
    model: Any,
    samples: Tensor,
    prompts: Sequence[HostCondition],
    train: Train,
    key_frames: KeyFrames,
    kind: Kind = "official",
    rank: int | None = None,
    seed: int = 0,
) -> tuple[Any, list[float]]:
    """A MODEL with temporal layers tuned on LATENT samples (frames, 4, h, w), and the loss of each step.

    Starts from the MODEL's layers and LoRA, if any. prompts: those that `train` uses, in roles of their own. seed: of
    new layers. Raises ValueError for a MODEL that is not an attention UNet, and the host's InterruptProcessingException
    between steps.
    """
    check_unet(model)
    noise_of(model).check_inverts()
    before = temporal_layers(model)
    with torch.inference_mode(False):
        layers = deepcopy(before.layers) if before else fresh_layers(model, kind, rank, seed)
        own = _copied(model)
        hooked = HookedUNet(own, default_control=lambda frames: Control(key_frames, Chunk.whole(frames)))
        guider = comfy.samplers.CFGGuider(hooked.patcher)
        guider.inner_set_conds({prompt.role: prompt.conditioning for prompt in prompts})
        sampler = _TuneSampler(layers.float(), train)
        latents = samples.clone()  # inference tensors cannot be trained on
        guider.sample(torch.zeros_like(latents), latents, sampler, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
        known = before.queries if before else {}
        queries = {name: known.get(name, 0) + change for name, change in sampler.changes.items()}
    comfy.model_management.soft_empty_cache()
    return attach(model, layers, queries), sampler.losses


def _copied(model: Any) -> Any:
    """A MODEL with its own copy of the UNet, since a shared one must not be trained, and the same LoRA and settings."""
    comfy.model_management.unload_all_models()  # restores the checkpoint's weights
    inner = copy(model.model)
    inner._modules = dict(inner._modules)
    inner.diffusion_model = deepcopy(model.model.diffusion_model)
    own = comfy.model_patcher.ModelPatcher(inner, model.load_device, model.offload_device)
    own.patches = {key: list(patches) for key, patches in model.patches.items()}
    own.patches_uuid = model.patches_uuid
    own.object_patches = dict(model.object_patches)
    own.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
    for name, key in host_names(model).items():
        if trains(name):
            _replace(own.model, key.removesuffix(".weight"))
    return own


def _replace(model: nn.Module, name: str) -> None:
    """Convert a query's layer to single precision."""
    old: Any = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    new = CastLinear(old.weight.shape[1], old.weight.shape[0], bias=False, device=old.weight.device)
    new.weight.data.copy_(old.weight.data)
    setattr(model.get_submodule(parent), leaf, new.requires_grad_(False))


class _TuneSampler(comfy.samplers.Sampler):
    """A SAMPLER that trains instead of sampling, so that the host loads the model and prepares its conditions."""

    def __init__(self, layers: TemporalLayers, train: Train) -> None:
        self.layers, self.train = layers, train
        self.losses: list[float] = []
        self.changes: dict[str, Tensor] = {}
        """The changes of the queries, by diffusers' names."""

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
        latent_image: Tensor, *rest: Any, **more: Any,
    ) -> Tensor:  # fmt: skip
        denoiser = HostTunable(guider, extra_args["model_options"], self.layers, latent_image)
        before = {name: weight.detach().clone() for name, weight in denoiser.queries.items()}
        self.losses = self.train(denoiser, latent_image)
        self.changes = {name: (w.detach() - before[name]).cpu() for name, w in denoiser.queries.items()}
        self.layers.cpu()
        return latent_image


class HostTunable:
    """The host's UNet for `tune`. Its hooks stay for the whole training, since activations are recomputed."""

    def __init__(self, guider: Any, options: dict[str, Any], layers: TemporalLayers, latents: Tensor) -> None:
        self._model, self._conditions, self._options = guider.inner_model, guider.conds, options
        self._unet = self._model.diffusion_model
        self._names = host_names(guider.model_patcher)
        self._layers = layers.to(latents.device)
        self._sampling = guider.model_patcher.get_model_object("model_sampling")
        self._sigmas = self._sampling.sigmas.clone().cpu()  # inference tensors cannot be trained through
        weights = dict(self._model.named_parameters())
        self.queries = {name: weights[key] for name, key in self._names.items() if trains(name)}

    @property
    def predicts_v(self) -> bool:
        return prediction_of(self._sampling) is V_PREDICTION

    def trained(self, convolutions: bool = False) -> dict[str, nn.Parameter]:
        return self.queries | trained_of(self._layers, convolutions)

    def bypassed(self) -> AbstractContextManager[None]:
        return self._layers.bypassed()

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        handles = [h for norm in norms_of_clip(self._unet) for h in share_statistics(norm)] if clip_norm else []
        try:
            with hooked_layers(places_in(self._unet, self._layers, self._names), 1):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def training(self, convolutions: bool = False) -> Iterator[None]:
        self._model.requires_grad_(False)
        self._layers.requires_grad_(False)
        for weight in self.trained(convolutions).values():
            weight.requires_grad_(True)
        try:
            with recomputed(self._unet, BLOCKS):
                yield
        finally:
            self._layers.requires_grad_(False)

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        alpha = 1 / (1 + self._sigmas[timestep].cpu().double() ** 2)
        return noised(latents, noise, alpha), alpha

    def schedule(self, steps: int) -> Schedule:
        """Raises ValueError for a number of steps that DDIM cannot invert."""
        return HostNoise(self._sampling).schedule(steps)

    def from_host(self, samples: Tensor) -> Tensor:
        """LATENT samples in the model's scale."""
        latents: Tensor = self._model.process_latent_in(samples.clone())
        return latents.to(next(self._layers.parameters()).device)

    def to_host(self, latents: Tensor) -> Tensor:
        """The inverse of `from_host`."""
        samples: Tensor = self._model.process_latent_out(latents)
        return samples.cpu()

    def preview(self, latents: Tensor) -> Any:
        """A preview of a clip's first frame for the host's progress bar; None if previews are off."""
        previewer = latent_preview.get_previewer(latents.device, self._model.latent_format)
        return previewer and previewer.decode_latent_to_preview_image("JPEG", latents[:1])

    def predict_noise(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, guidance: Guidance | None = None
    ) -> Tensor:
        positive = self._predicted(latents, timestep, condition)
        if guidance is None:
            return positive
        return guide(self._predicted(latents, timestep, guidance.negative), positive, guidance.scale)

    def _predicted(self, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        assert isinstance(condition, HostCondition)
        sigma = self._sigmas[int(timestep)].to(latents)
        x = latents * (1 + sigma**2).sqrt()
        (clean,) = comfy.samplers.calc_cond_batch(
            self._model, [self._conditions[condition.role]], x, sigma.expand(len(x)), self._options
        )
        return (x - clean) / sigma
