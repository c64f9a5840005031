"""Noise levels of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ...diffusion.schedule import FlowSchedule, Schedule
from ...files.lora import Timesteps

_PREDICTED = ("epsilon", "v_prediction", "sample")


class LCMTimesteps(DDIMScheduler):
    """A DDIM scheduler with the timesteps of LCM (arXiv 2310.04378), which TCD has too: an even choice from 50."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Raises ValueError for more than 50 steps."""
        if num_inference_steps > 50:
            raise ValueError(f"steps is {num_inference_steps}; LCM and TCD have at most 50")
        total: int = self.config["num_train_timesteps"]
        chosen = [i * 50 // num_inference_steps for i in range(num_inference_steps)]
        self.timesteps = torch.tensor([total - 1 - i * (total // 50) for i in chosen], device=device)


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """A DDIM scheduler with the noise levels and prediction type of a scheduler.

    Raises TypeError for noise levels of flows and EDM.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    alphas, predicted = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type", "epsilon")
    flow = config.get("use_flow_sigmas") or predicted not in _PREDICTED
    if alphas is not None and not flow:
        if isinstance(scheduler, DDIMScheduler):
            return scheduler
        try:
            found = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False)
        except NotImplementedError:  # unsupported betas
            found = None
        if found is not None and _same_levels(found.alphas_cumprod, alphas):
            return with_timesteps(found, "lcm" if kind in ("LCMScheduler", "TCDScheduler") else "auto")
    raise TypeError(f"scheduler is a {kind}, whose noise levels are not DDIM's: use a DDIMScheduler or similar")


def _same_levels(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs.to(ours), atol=1e-6)


def with_signal(scheduler: DDIMScheduler) -> DDIMScheduler:
    """A scheduler whose first step has some signal, since a step at zero signal cannot be inverted."""
    if not scheduler.config["rescale_betas_zero_snr"] or scheduler.config["timestep_spacing"] == "leading":
        return scheduler
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading", steps_offset=1)


def with_timesteps(scheduler: DDIMScheduler, timesteps: Timesteps) -> DDIMScheduler:
    """A scheduler with other timesteps. lcm: those of LCM and TCD. auto: its own. Few steps end at clean latents."""
    if timesteps == "auto":
        return scheduler
    kind, spacing = (LCMTimesteps, "leading") if timesteps == "lcm" else (DDIMScheduler, timesteps)
    ends_clean = timesteps != "leading"
    return kind.from_config(scheduler.config, timestep_spacing=spacing, set_alpha_to_one=ends_clean)


def is_flow(scheduler: Any, shifted: bool = False) -> bool:
    """Whether a scheduler has a flow's sigmas. shifted: accept those that are shifted by the number of tokens."""
    config = getattr(scheduler, "config", {})
    flows = type(scheduler).__name__.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    return flows and hasattr(scheduler, "sigmas") and (shifted or not config.get("use_dynamic_shifting"))


def ddim_schedule(scheduler: DDIMScheduler, steps: int) -> Schedule:
    """Raises ValueError for a number of steps or a schedule that DDIM cannot invert."""
    total = _check_steps(scheduler, steps)
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    if timesteps[0] >= total:  # the scheduler's offset shifts all steps
        raise ValueError(f"steps is {steps}; with this schedule's steps_offset it must be below {total}")
    alphas = torch.cat([scheduler.final_alpha_cumprod.view(1), scheduler.alphas_cumprod[list(timesteps[::-1])]])
    if alphas.min() < 1e-6:
        raise ValueError(
            f"steps is {steps}; the first would be at zero signal, which cannot be inverted: use fewer steps, or a "
            "scheduler with timestep_spacing='leading'"
        )
    return Schedule(timesteps, alphas.double())


def flow_schedule(scheduler: Any, steps: int, tokens: int | None = None) -> FlowSchedule:
    """The schedule of a flow. tokens: of a call, for pipelines whose sigmas are even steps from 1, shifted by them.

    Raises ValueError for a number of steps that the scheduler does not support.
    """
    total = _check_steps(scheduler, steps)
    scheduler = type(scheduler).from_config(scheduler.config)
    if tokens is None:
        scheduler.set_timesteps(steps)
    else:
        even = np.linspace(1.0, 1 / steps, steps)
        given = {"num_inference_steps": steps} if scheduler.config.get("use_flow_sigmas") else {"sigmas": even}
        scheduler.set_timesteps(**given, mu=_shift_of(scheduler.config, tokens))
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    decreases = bool((sigmas[:-1] > sigmas[1:]).all())
    if len(sigmas) != steps + 1 or not decreases or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(f"the scheduler's sigmas do not decrease from at most 1 to 0 in {steps} steps")
    return FlowSchedule.of(tuple((total * sigmas[:-1]).tolist()), sigmas.flip(0))


def _shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """The shift mu for a number of tokens: a line through two points of the configuration."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - least) / (most - least))


def _check_steps(scheduler: Any, steps: int) -> int:
    """The number of training timesteps; ValueError for more steps, or none."""
    total = int(scheduler.config["num_train_timesteps"])
    if not 1 <= steps <= total:
        raise ValueError(f"steps is {steps}; it must be between 1 and {total}")
    return total
