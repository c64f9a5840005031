"""The loop of every training of the demo world: an optimiser, a running average, and a state that a stopped run
resumes from.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files.whole import whole_file

Report = Callable[[str], None]
WARM, TRIAL = 10, 40
"""The steps, from a start, from which to which the time of a step is measured."""


@dataclass(frozen=True)
class Plan:
    """What a training is called, its file, and for how long it runs.

    minutes: time after which to end instead, measured on the first steps and kept when the training resumes.
    rate: peak learning rate. average: decay of the running average. save_every, report_every: in steps.
    """

    name: str
    state: Path
    steps: int
    rate: float
    average: float
    save_every: int
    report_every: int = 50
    minutes: float | None = None


def train_weights(
    weights: Mapping[str, nn.Parameter], plan: Plan, error_of: Callable[[int], Tensor | float], report: Report
) -> None:
    """Train weights with AdamW and set them to their running average; resumes from the plan's state.

    error_of: computes the gradients of a step and returns its error.
    """
    live, optimiser = list(weights.values()), optimiser_of(list(weights.values()), plan.rate)
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    (done, steps), running, begun = _resume(plan, weights, average, optimiser), 0.0, time.monotonic()
    for step in count(done):
        if step == done + WARM:
            begun = time.monotonic()
        if steps is None and step == done + TRIAL:
            steps = max(done + int(60 * (plan.minutes or 0) * (TRIAL - WARM) / (time.monotonic() - begun)), step + 1)
        if steps is not None and step >= steps:
            break
        set_rate(optimiser, plan.rate * rate_at(step, steps or plan.steps))
        optimiser.zero_grad()
        error = torch.as_tensor(error_of(step)).item()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimiser.step()
        decay = min(plan.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [weight.detach() for weight in live], 1 - decay)
        running = error if step == done else 0.98 * running + 0.02 * error
        if (step + 1) % plan.report_every == 0:
            report(f"{plan.name} {step + 1}/{steps or '?'}: error {running:.4f}")
        if (step + 1) % plan.save_every == 0 or step + 1 == steps:
            _save(plan.state, weights, average, optimiser, (step + 1, steps))
    for name, weight in weights.items():
        weight.data = average[name]


def rate_at(step: int, steps: int, warmup: int = 200, tail: float = 0.3) -> float:
    """Warm up, stay constant, then decay to zero by a cosine over the last `tail` of the steps."""
    fall = max(0.0, (step - (1 - tail) * steps) / (tail * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))


def optimiser_of(parameters: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _save(
    path: Path,
    live: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    done: tuple[int, int | None],
) -> None:
    tensors = {f"live.{name}": weight for name, weight in live.items()}
    tensors |= {f"average.{name}": weight for name, weight in average.items()}
    tensors |= {f"adam.{name}.{key}": optimiser.state[w][key] for name, w in live.items() for key in _MOMENTS}
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(kept, partial, {"step": str(done[0]), "steps": str(done[1] or 0)})


def _resume(
    plan: Plan, live: Mapping[str, Tensor], average: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> tuple[int, int | None]:
    """Load a saved state; returns the number of steps done, and of all, None if it is to be measured."""
    if not plan.state.exists():
        return 0, None if plan.minutes else plan.steps
    tensors, step = load_file(plan.state), saved_step(plan.state)
    for name, weight in live.items():
        weight.data.copy_(tensors[f"live.{name}"])
        average[name].copy_(tensors[f"average.{name}"])
        moments = {key: tensors[f"adam.{name}.{key}"].to(weight.device) for key in _MOMENTS}
        optimiser.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step, (int(_header(plan.state).get("steps", 0)) or None) if plan.minutes else plan.steps


def saved_step(path: Path) -> int:
    return int(_header(path)["step"])


def _header(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        found: dict[str, str] = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    return found
