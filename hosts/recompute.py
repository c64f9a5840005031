"""Recomputation of activations for gradients, instead of storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[None]:
    """Recompute the forward of blocks of some kinds in the backward pass, with the same contents of dict arguments."""
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    for block in blocks:
        block.forward = _checkpointed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **named: Any) -> Tensor:
        def copied(value: Any) -> Any:
            return dict(value) if isinstance(value, dict) else value

        args, named = tuple(map(copied, args)), {name: copied(value) for name, value in named.items()}
        done: Tensor = checkpoint(forward, *args, use_reentrant=False, **named)
        return done

    return run


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients of the model's weights, and restore them afterwards."""
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
    """A value after a call, and its gradient in the call's argument. dtype: the model's precision."""
    scale = 1024.0 if dtype == torch.float16 else 1.0  # gradients this small underflow in half precision
    with torch.enable_grad():
        x = at.detach().clone().requires_grad_(True)
        call(x)
        found = value()
        (gradient,) = torch.autograd.grad(scale * found, x)
    return found.detach(), (gradient.float() if scale != 1 else gradient) / scale


DIFFERENTIABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_differentiable(model: nn.Module, what: str) -> None:
    """Raise ValueError, starting with `what`, for weights without gradients: fp8, GGUF and the like."""
    for name, weight in model.named_parameters():
        plain = type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor
        if weight.dtype not in DIFFERENTIABLE or not plain:
            kind = str(weight.dtype).removeprefix("torch.") if plain else type(weight).__name__
            raise ValueError(f"{what} has weights in {kind} ({name}), which have no gradients: use fp16, bf16 or fp32")
