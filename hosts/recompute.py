"""Activations that are computed again for their gradients, in place of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have the forward of each block run again in the backward pass, with the dicts it was given as they were then."""
    held = list(blocks)
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
