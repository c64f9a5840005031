"""The gradient of a value in the latents of a UNet call of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..recompute import check_differentiable, frozen, gradient_of, recomputed
from .unet_layers import BLOCKS


class Derivative:
    """A value after a UNet call, and its gradient in the call's latents, which are DDIM's z.

    Computed inside the call, with the hooks of other nodes in place; the host's inference mode is left.
    """

    def __init__(self, value: Callable[[], Tensor], parts: Sequence[nn.Module]) -> None:
        """Raises ValueError for weights that no gradient passes through."""
        for part in parts:
            check_differentiable(part, "model:")
        self.value, self.parts = value, parts
        self.found: tuple[Tensor, Tensor] | None = None

    def of(self, call: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
        """Runs in the place of a call with these; the latents that it returns are not used."""
        with torch.inference_mode(False), ExitStack() as opened:
            for part in self.parts:
                opened.enter_context(_known_to_autograd(part))
                opened.enter_context(frozen(part))
                opened.enter_context(recomputed(part, BLOCKS))
            opened.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())  # FreeU writes over features
            plain = [other if other is None else other.clone() for other in others]  # not of inference
            self.found = gradient_of(lambda z: call(z, *plain), x, self.value, x.dtype)
        return torch.zeros_like(x)


@contextmanager
def _known_to_autograd(model: nn.Module) -> Iterator[None]:
    """Show weights made in inference mode, which autograd refuses, as plain tensors of the same memory."""
    held = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.is_inference()
    ]
    try:
        for weights, name, weight in held:
            plain = torch.empty(0, dtype=weight.dtype, device=weight.device)
            plain.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())
            weights[name] = nn.Parameter(plain, requires_grad=False)
        yield
    finally:
        for weights, name, weight in held:
            weights[name] = weight
