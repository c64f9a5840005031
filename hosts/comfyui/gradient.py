"""The gradient of a value in the latents of a UNet call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..recompute import check_differentiable, frozen, gradient_of, recomputed
from .unet_layers import BLOCKS


class Derivative:
    """A value after a UNet call, and its gradient in the call's latents, which are DDIM's z.

    Computed inside the call, with all hooks of other nodes in place, and outside the host's inference mode.
    """

    def __init__(self, value: Callable[[], Tensor], parts: Sequence[nn.Module]) -> None:
        """Raises ValueError for weights without gradients."""
        for part in parts:
            check_differentiable(part, "model:")
        self.value, self.parts = value, parts
        self.found: tuple[Tensor, Tensor] | None = None

    def of(self, call: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
        """Replaces a call with these inputs; the returned zeros are not used."""
        with torch.inference_mode(False), ExitStack() as opened:
            for part in self.parts:
                opened.enter_context(_visible_to_autograd(part))
                opened.enter_context(frozen(part))
                opened.enter_context(recomputed(part, BLOCKS))
            opened.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())  # FreeU overwrites features
            plain = [other if other is None else other.clone() for other in others]  # no inference tensors
            self.found = gradient_of(lambda z: call(z, *plain), x, self.value, x.dtype)
        return torch.zeros_like(x)


@contextmanager
def _visible_to_autograd(model: nn.Module) -> Iterator[None]:
    """Replace weights made in inference mode, which autograd rejects, by plain tensors of the same memory."""
    inference_weights = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.is_inference()
    ]
    try:
        for weights, name, weight in inference_weights:
            plain = torch.empty(0, dtype=weight.dtype, device=weight.device)
            plain.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())
            weights[name] = nn.Parameter(plain, requires_grad=False)
        yield
    finally:
        for weights, name, weight in inference_weights:
            weights[name] = weight
