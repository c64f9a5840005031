"""A MODEL's noise: converts sigmas and latents between the host and the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import comfy.samplers
import numpy as np
import torch
from comfy.model_sampling import (
    CONST,
    COSMOS_RFLOW,
    EDM,
    EPS,
    V_PREDICTION,
    ModelSamplingContinuousEDM,
    ModelSamplingDiscrete,
    ModelSamplingDiscreteFlow,
    ModelSamplingFlux,
    StableCascadeSampling,
)
from einops import rearrange
from torch import Tensor

from ...diffusion.schedule import FlowSchedule, Formulation, Schedule
from .latents import packed, streams

Timesteps = Literal["leading", "trailing"]
FLIPPED = 1.0001e-4
"""The value into which the host's Flip Sigmas turns a final 0, up to rounding."""


class HostNoise:
    """DDIM in a host that samples in variance-exploding space: x = z / sqrt(abar), LATENT samples (frames, 4, h, w)."""

    formulation: Formulation = "ddim"

    def __init__(self, sampling: Any) -> None:
        self._sampling = sampling
        self.table = sampling.sigmas.cpu()
        """The model's sigmas, on the CPU, since reading one from the device would synchronize it."""

    def check_inverts(self) -> None:
        """Raise ValueError for a model that cannot be inverted."""

    # --- schedules --------------------------------------------------------------------

    def schedule(self, steps: int, timesteps: Timesteps = "leading") -> Schedule:
        """FateZero's timesteps (leading, offset 1), or trailing ones as in the host's sgm_uniform, and their alphas.

        Raises ValueError for a number of steps or a schedule that DDIM cannot invert.
        """
        total = len(self.table)
        if not 1 <= steps < total:
            raise ValueError(f"steps is {steps}; it must be between 1 and {total - 1}")
        if timesteps == "trailing":
            return self.schedule_of(comfy.samplers.calculate_sigmas(self._sampling, "sgm_uniform", steps))
        leading = tuple(i * (total // steps) + 1 for i in reversed(range(steps)))
        return self._at(leading, 1 / (1 + self.table[0].double() ** 2))

    def _at(self, timesteps: Sequence[float], clean: Tensor) -> Schedule:
        """The schedule of some timesteps, noisy to clean, that ends at the cumulative alpha `clean`."""
        sigmas = torch.stack([self.sigma(t) for t in reversed(timesteps)]).double()
        alphas = torch.cat([clean[None], 1 / (1 + sigmas**2)])
        if alphas.min() < 1e-6:
            raise ValueError("model: a schedule that ends at zero signal (zsnr) cannot be inverted")
        return Schedule(tuple(timesteps), alphas)

    def schedule_of(self, sigmas: Tensor) -> Schedule:
        """The schedule of decreasing SIGMAS, with timesteps rounded if they are close to integers.

        Raises ValueError, naming `sigmas`, for others, and for sigmas outside the model's range.
        """
        sigmas = decreasing(sigmas)
        low, high = self.table[0].item(), self.table[-1].item()
        if sigmas[0] > high * 1.001 or sigmas[-2] < low * 0.999 or sigmas[-1] < 0:
            raise ValueError(
                f"sigmas: go from {sigmas[0]:.4g} to {sigmas[-2]:.4g} before the last, but the model's range is "
                f"{low:.4g} to {high:.4g}"
            )
        timesteps = [round(t) if abs(t - round(t)) < 2e-3 else t for t in self.timesteps(sigmas[:-1])]
        return self._at(timesteps, 1 / (1 + sigmas[-1].double() ** 2))

    def schedule_at(self, timesteps: Sequence[float], alphas: Sequence[float]) -> Schedule:
        """The model's schedule at a store's timesteps. alphas: the store's."""
        if timesteps[0] >= len(self.table):
            raise ValueError(f"model: has {len(self.table)} timesteps (LCM), but the store was made with more")
        return self._at(timesteps, torch.tensor(alphas[0], dtype=torch.float64))

    def timesteps(self, sigmas: Tensor) -> list[float]:
        """The timesteps of sigmas, by the host's interpolation of the model's table."""
        places = np.arange(len(self.table))
        found = np.interp(sigmas.double().log().numpy(), self.table.double().log().numpy(), places)
        return [float(t) for t in found]

    def sigma(self, timestep: float) -> Tensor:
        """The sigma of a timestep, which may be fractional, by the host's interpolation of the model's table."""
        low = int(timestep)
        if low == timestep:
            return self.table[low]
        share = timestep - low
        return ((1 - share) * self.table[low].log() + share * self.table[low + 1].log()).exp()

    def sigmas(self, schedule: Schedule) -> Tensor:
        """A schedule as the host's SIGMAS, noisy to clean."""
        return (1 / schedule.alphas - 1).sqrt().flip(0).float()

    # --- latents ----------------------------------------------------------------------

    def scale(self, sigma: Tensor) -> Tensor | float:
        """The ratio of the host's to the library's latents at a sigma."""
        return (1 + sigma**2).sqrt()

    def rescaled(self, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """The host's latents at a sigma, rescaled to another."""
        return x * ((1 + there**2) / (1 + here**2)).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The host's noisy latents at a sigma."""
        return clean + noise * sigma

    def predicted(self, x: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """The library's prediction for clean latents, both in the host's space."""
        return self.from_host((x - clean) / sigma)

    def clean(self, x: Tensor, predicted: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of `predicted`: clean latents."""
        return x - sigma * self.to_host(predicted)

    def initial(self, model: Any, samples: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(noise, latent_image) that make the host's samplers start from these noisy LATENT samples."""
        return torch.zeros_like(samples), samples

    def noisy_end(self, latents: Tensor, alpha: float) -> Tensor:
        """The library's latents at the noisy end of a run, in the host's scale. alpha: there."""
        return latents / alpha**0.5

    def from_host(self, samples: Tensor) -> Tensor:
        """LATENT samples as the library's latents (frames, c, h, w); ValueError for other shapes."""
        if samples.ndim != 4:
            raise ValueError(f"latent: has shape {tuple(samples.shape)}; it must be one picture latent per frame")
        return samples

    def to_host(self, latents: Tensor) -> Tensor:
        """The inverse of `from_host`."""
        return latents

    def mask_from_host(self, mask: Tensor) -> Tensor:
        """A noise mask of the host's samplers as (frames or 1, h, w)."""
        return mask.reshape(-1, *mask.shape[-2:])


class LCMNoise(HostNoise):
    """A model that the host samples as LCM (arXiv 2310.04378), at 50 of the model's timesteps, here 0 to 49."""

    def check_inverts(self) -> None:
        raise ValueError(
            "model: ModelSamplingDiscrete (LCM) is sampled with new noise in each step, so that it cannot be inverted: "
            "use the FlowEdit node with preset few_steps"
        )

    def schedule(self, steps: int, timesteps: Timesteps = "leading") -> Schedule:
        """LCM's own timesteps, the host's "simple" schedule."""
        total = len(self.table)
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}; with LCM it must be between 1 and {total}")
        return self.schedule_of(comfy.samplers.calculate_sigmas(self._sampling, "simple", steps))


class FlowNoise(HostNoise):
    """A rectified flow, with the host's latents.

    LATENT samples are clips (1, c, frames, h, w), pictures (frames, c, h, w), or (1, c, n): sound, and several streams
    packed into one.
    """

    formulation: Formulation = "flow"

    def __init__(self, sampling: Any, dimensions: int = 3) -> None:
        """dimensions: of the latents: 3 for clips, 2 for pictures, 1 for sound."""
        super().__init__(sampling)
        self._dimensions = dimensions

    def schedule(self, steps: int, timesteps: Timesteps = "leading") -> FlowSchedule:
        """The host's "simple" schedule, with the MODEL's shift."""
        if timesteps != "leading":
            raise ValueError(f"timesteps: {timesteps} has no effect on a flow, which has a shift (Model Sampling)")
        total = len(self.table)
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}; it must be between 1 and {total}")
        return self.schedule_of(comfy.samplers.calculate_sigmas(self._sampling, "simple", steps))

    def schedule_of(self, sigmas: Tensor) -> FlowSchedule:
        sigmas = decreasing(sigmas)
        if sigmas[-1] <= FLIPPED:
            sigmas[-1] = 0
        if sigmas[0] > 1 or sigmas[-1] < 0:
            raise ValueError(f"sigmas: go from {sigmas[0]:.4g} to {sigmas[-1]:.4g}; a flow's must be in 1 to 0")
        return FlowSchedule.of(tuple(self.timesteps(sigmas[:-1])), sigmas.flip(0))

    def schedule_at(self, timesteps: Sequence[float], alphas: Sequence[float]) -> FlowSchedule:
        return FlowSchedule(tuple(timesteps), torch.tensor(alphas, dtype=torch.float64))

    def timesteps(self, sigmas: Tensor) -> list[float]:
        return [float(t) for t in self._sampling.timestep(sigmas.double())]

    def sigma(self, timestep: float) -> Tensor:
        return torch.tensor(timestep / getattr(self._sampling, "multiplier", 1), dtype=torch.float32)

    def sigmas(self, schedule: Schedule) -> Tensor:
        return (1 - schedule.alphas).float().flip(0)

    def flow_sigmas(self, sigmas: Tensor) -> Tensor:
        """The flow's own sigmas, the shares of noise, of the host's."""
        return sigmas

    def scale(self, sigma: Tensor) -> Tensor | float:
        return 1.0

    def rescaled(self, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
        return x

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return (1 - sigma) * clean + sigma * noise

    def initial(self, model: Any, samples: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The host multiplies latents by 1 - sigma, which is 0 at pure noise."""
        return model.process_latent_in(samples) / sigma, torch.zeros_like(samples)

    def noisy_end(self, latents: Tensor, alpha: float) -> Tensor:
        return latents

    def from_host(self, samples: Tensor) -> Tensor:
        """Raises ValueError for several clips."""
        if samples.ndim == 3 and len(samples) == 1:
            return samples[None]
        if self._dimensions == 2:
            return super().from_host(samples)
        if samples.ndim != 5 or len(samples) != 1:
            raise ValueError(f"latent: has shape {tuple(samples.shape)}; it must be one clip, (1, c, frames, h, w)")
        return rearrange(samples, "1 c f y x -> f c y x")

    def to_host(self, latents: Tensor) -> Tensor:
        if self._dimensions == 1 or latents.shape[:3] == (1, 1, 1):
            return latents[0]
        return latents if self._dimensions == 2 else rearrange(latents, "f c y x -> 1 c f y x")

    def mask_from_host(self, mask: Tensor) -> Tensor:
        return mask.reshape(-1, *mask.shape[-3:])[0] if mask.ndim == 5 else super().mask_from_host(mask)


class CosmosNoise(FlowNoise):
    """A flow that the host samples in variance-exploding space: x = z / (1 - s) at the host's sigma s / (1 - s).

    s: the flow's sigma, which is also the timestep.
    """

    def schedule_of(self, sigmas: Tensor) -> FlowSchedule:
        sigmas = decreasing(sigmas)
        if sigmas[-1] < 0:
            raise ValueError(f"sigmas: end at {sigmas[-1]:.4g}, below 0")
        return FlowSchedule.of(tuple(self.timesteps(sigmas[:-1])), self.flow_sigmas(sigmas).flip(0))

    def flow_sigmas(self, sigmas: Tensor) -> Tensor:
        return sigmas / (1 + sigmas)

    def timesteps(self, sigmas: Tensor) -> list[float]:
        return [float(s) for s in self.flow_sigmas(sigmas.double())]

    def sigma(self, timestep: float) -> Tensor:
        return torch.tensor(timestep / (1 - timestep), dtype=torch.float32)

    def sigmas(self, schedule: Schedule) -> Tensor:
        return ((1 - schedule.alphas) / schedule.alphas).float().flip(0)

    def scale(self, sigma: Tensor) -> Tensor | float:
        return 1 + sigma

    def rescaled(self, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
        return x * (1 + there) / (1 + here)

    noised = HostNoise.noised
    initial = HostNoise.initial

    def predicted(self, x: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        return self.from_host((x - (1 + sigma) * clean) / sigma)

    def clean(self, x: Tensor, predicted: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * self.to_host(predicted)) / (1 + sigma)

    def noisy_end(self, latents: Tensor, alpha: float) -> Tensor:
        return latents / alpha


def decreasing(sigmas: Tensor) -> Tensor:
    """SIGMAS in double precision; ValueError if they do not decrease."""
    sigmas = sigmas.cpu().double()
    if len(sigmas) < 2 or not (sigmas[:-1] > sigmas[1:]).all():
        raise ValueError(
            f"sigmas: {[round(s, 4) for s in sigmas.tolist()]}; they must be strictly decreasing, or increasing"
        )
    return sigmas


def is_flow(model: Any) -> bool:
    """Whether a MODEL is sampled as a rectified flow, from noise to the latents."""
    sampling = model.get_model_object("model_sampling")
    scheduled = isinstance(sampling, (ModelSamplingDiscreteFlow, ModelSamplingFlux))
    return (scheduled and prediction_of(sampling, CONST) is CONST) or _is_cosmos(model, sampling)


def _is_cosmos(model: Any, sampling: Any) -> bool:
    """Whether a MODEL for video is sampled as Cosmos: a flow, or its equivalent with other scales, by large sigmas."""
    known = prediction_of(sampling, COSMOS_RFLOW) is COSMOS_RFLOW or prediction_of(sampling) is EDM
    of_video = model.model.latent_format.latent_dimensions == 3
    return of_video and known and isinstance(sampling, ModelSamplingContinuousEDM)


def prediction_name(sampling: Any) -> str:
    """The name of a UNet's prediction."""
    kind = prediction_of(sampling)
    lcm = kind is not None and kind.__name__ == "LCM" and hasattr(sampling, "skip_steps")
    return "LCM" if lcm else "v" if kind is V_PREDICTION else "epsilon"


def noise_of(model: Any, flows: bool = True) -> HostNoise:
    """A MODEL's noise; ValueError for a schedule that FateZero cannot invert. flows: whether it may be a flow."""
    sampling = model.get_model_object("model_sampling")
    if flows and is_flow(model):
        scale = getattr(sampling, "noise_scale", 1.0)
        if scale != 1:
            raise ValueError(f"model: scales a flow's noise by {scale:g} (Model Noise Scale): remove that node")
        kind = CosmosNoise if _is_cosmos(model, sampling) else FlowNoise
        return kind(sampling, model.model.latent_format.latent_dimensions)
    known = isinstance(sampling, ModelSamplingDiscrete) and not isinstance(sampling, StableCascadeSampling)
    if known and prediction_name(sampling) == "LCM":
        return LCMNoise(sampling)
    if not known or prediction_of(sampling) not in (EPS, V_PREDICTION):
        raise ValueError(
            f"model: DDIM cannot invert the schedule {_named(sampling)}: use a model that predicts epsilon, v or a "
            "flow, without a node that changes its schedule"
        )
    return HostNoise(sampling)


def check_samples(model: Any, samples: Any) -> None:
    """Raise ValueError for LATENT samples that do not fit a MODEL."""
    noise_of(model).from_host(packed(samples))
    channels = model.model.latent_format.latent_channels
    if len(streams(samples)) == 1 and samples.shape[1] != channels:
        raise ValueError(
            f"latent: has {samples.shape[1]} channels, but {type(model.model).__name__} has latents of {channels}: "
            "encode the clip with the model's own VAE"
        )


def prediction_of(sampling: Any, base: type = EPS) -> type | None:
    """The class that converts a model's output to clean latents, one that derives from `base`, as LCM and X0 from
    EPS.
    """
    schedules = (ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux, ModelSamplingContinuousEDM)
    kinds = (c for c in type(sampling).__mro__ if issubclass(c, base) and not issubclass(c, schedules))
    return next(kinds, None)


def _named(sampling: Any) -> str:
    """The node that made it, or its class if the host did, and its kind of prediction."""
    method, _, _ = type(sampling).__qualname__.partition(".<locals>")
    name = method.partition(".")[0] if "." in method else type(sampling).__name__
    kind = prediction_of(sampling)
    return name if kind in (None, type(sampling)) else f"{name} ({kind.__name__})"
