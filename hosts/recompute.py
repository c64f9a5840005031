"""Activations that are computed again for their gradients, in place of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[None]:
    """Have the forward of each block of some kinds run again in the backward pass, with the dicts it was given as they
    were then.
    """
    held = [module for module in model.modules() if isinstance(module, kinds)]
    for block in held:
        block.forward = _again(block.forward)
    try:
        yield
    finally:
        for block in held:
            del block.forward


def _again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def again(*args: Any, **named: Any) -> Tensor:
        def kept(value: Any) -> Any:
            return dict(value) if isinstance(value, dict) else value

        args, named = tuple(map(kept, args)), {name: kept(value) for name, value in named.items()}
        done: Tensor = checkpoint(forward, *args, use_reentrant=False, **named)
        return done

    return again


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's own weights; those that had them have them again afterwards."""
    free = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in free:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in free:
            weight.requires_grad_(True)


def gradient_of(
    call: Callable[[Tensor], Any], at: Tensor, value: Callable[[], Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a value is after a call, and its gradient in the call's argument. dtype: what the model computes in."""
    loud = 1024.0 if dtype == torch.float16 else 1.0  # half precision has no room for gradients this small
    with torch.enable_grad():
        x = at.detach().clone().requires_grad_(True)
        call(x)
        found = value()
        (gradient,) = torch.autograd.grad(loud * found, x)
    return found.detach(), (gradient.float() if loud != 1 else gradient) / loud


DIFFERENTIABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_differentiable(model: nn.Module, what: str) -> None:
    """Raise ValueError, saying of what, for weights that no gradient passes through: fp8, GGUF and the like."""
    for name, weight in model.named_parameters():
        plain = type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor
        if weight.dtype not in DIFFERENTIABLE or not plain:
            kind = str(weight.dtype).removeprefix("torch.") if plain else type(weight).__name__
            raise ValueError(f"{what} has weights in {kind} ({name}), through which no gradient passes")
