"""Hooked attention layers, for the denoisers of all families whose attention can be controlled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from ...attention.control import Attend
from ...diffusion.denoiser import refuse_clip_norm
from ..exclusive import IN_USE, OtherThread, exclusively
from .network import NetworkDenoiser

Wrap = Callable[[Callable[..., Tensor], OtherThread], Callable[..., Tensor]]
"""What goes around a module's forward during a run."""


class ControlledProcessor(ABC):
    """diffusers' attention, with the softmax product computed by a control; in other threads the original, `before`."""

    def __init__(self, denoiser: Any, name: str, before: Any, other_thread: OtherThread) -> None:
        self.denoiser, self.name, self.kernel = denoiser, name, self.kernel_of(before)
        self.before, self.other_thread = before, other_thread

    @staticmethod
    @abstractmethod
    def kernel_of(processor: Any) -> Attend:
        """The attention kernel that a processor was set to use, else torch's."""


class HookedDenoiser(NetworkDenoiser):
    """Networks of one family whose attention a control computes."""

    processor: ClassVar[type[ControlledProcessor]]
    plain: ClassVar[tuple[type, ...]]
    """Processors whose attention ours computes."""
    reset: ClassVar[str]
    """The call that restores these."""

    def __init__(self, networks: Sequence[Any], scheduler: Any) -> None:
        super().__init__(networks, scheduler)
        self.check_processors()

    @property
    @abstractmethod
    def attention(self) -> list[tuple[str, Any]]:
        """The attention layers that a control computes, with their names."""

    # --- hooks --------------------------------------------------------------------------

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        """Raises ValueError for clip norm on a network without GroupNorms, for a network that another run uses, and for
        attention processors that compute something else.
        """
        if not self.family.group_norms:
            refuse_clip_norm(clip_norm)
        with exclusively(self.networks, self.family.network) as other_thread, ExitStack() as stack:
            self.check_processors()
            stack.callback(self.forget)
            stack.enter_context(self._processors(other_thread))
            self.hook_more(stack, other_thread, clip_norm)
            yield

    @contextmanager
    def _processors(self, other_thread: OtherThread) -> Iterator[None]:
        before = [(layer, layer.processor) for _, layer in self.attention]
        try:
            for name, layer in self.attention:
                layer.processor = self.processor(self, name, layer.processor, other_thread)
            yield
        finally:
            for layer, processor in before:
                layer.processor = processor

    @abstractmethod
    def hook_more(self, stack: ExitStack, other_thread: OtherThread, clip_norm: bool) -> None:
        """Hook what is not attention, until the stack closes."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the state of a run."""

    def check_processors(self) -> None:
        """Raise ValueError for attention processors that ours cannot replace."""
        for name, layer in self.attention:
            kind = type(layer.processor)
            if issubclass(kind, ControlledProcessor):
                raise ValueError(IN_USE.format(what=self.family.network))
            if kind not in self.plain:
                raise ValueError(
                    f"{name} has a {kind.__name__}, which FateZero cannot replace: remove it first ({self.reset})"
                )


@contextmanager
def wrapped(modules: Mapping[nn.Module, Wrap], other_thread: OtherThread) -> Iterator[None]:
    """Wrap the forward of modules inside the `with` block."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module, wrap in modules.items():
            module.forward = wrap(module.forward, other_thread)
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
