"""Shared code of all families' denoisers: hooked attention layers, branches of a call, weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...attention.condition import Condition
from ...attention.control import Attend, Control
from ...diffusion.ddim import guide
from ...diffusion.denoiser import Guidance, refuse_clip_norm
from ...models.family import Family
from ...store.identity import IdentityCache, ModelIdentity
from ...store.records import PairedBranch
from ..exclusive import IN_USE, OtherThread, exclusively

_IDENTITIES = IdentityCache()
Branch = tuple[Tensor, Condition, Control]
"""The latents, text and control of one branch of a call."""
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


class HookedDenoiser(ABC):
    """Networks of one family and their schedule, as the loops of `fatezero.diffusion` call them."""

    family: ClassVar[Family]
    processor: ClassVar[type[ControlledProcessor]]
    plain: ClassVar[tuple[type, ...]]
    """Processors whose attention ours computes."""
    reset: ClassVar[str]
    """The call that restores these."""
    text_dim: ClassVar[str]
    """The configuration's key of the text embeddings' width."""
    pairs: ClassVar[bool] = False

    def __init__(self, networks: Sequence[Any], scheduler: Any) -> None:
        self.networks, self.scheduler = list(networks), scheduler
        self.check_processors()

    @property
    @abstractmethod
    def attention(self) -> list[tuple[str, Any]]:
        """The attention layers that a control computes, with their names."""

    @abstractmethod
    def predicted(self, branches: Sequence[Branch], timestep: float) -> list[Tensor]:
        """The network's prediction of each branch of a call, on the same frames."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """The network's class, width and layers, and what it predicts."""

    @property
    def spans_clip(self) -> bool:
        return self.family.spans_clip

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.networks[0].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the network computes; with accelerate's offloading its weights wait elsewhere."""
        places = (hook.execution_device for _, _, hook in _offloads(self.networks[0]))
        return torch.device(next((place for place in places if place is not None), self.networks[0].device))

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, LoRA layers excepted: these may be added after an inversion."""
        return base_weights(self.networks[0])

    def identity(self) -> ModelIdentity:
        return _IDENTITIES.of(self.networks[0], self.layout, self.dtype, self.weights())

    def windows(self, latents: Tensor, timestep: float) -> None:
        return None

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

    # --- calls --------------------------------------------------------------------------

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        paired: PairedBranch | None = None,
    ) -> Tensor:
        """Raises ValueError for latents or a condition that do not fit the model."""
        branches = [(latents, condition, control)]
        if paired is None:
            (prediction,) = self.predicted(branches, timestep)
        else:
            assert self.pairs, "the branches of this model run one after another"
            before = paired.latents, paired.condition, paired.control
            paired.control.captured.prediction, prediction = self.predicted([before, *branches], timestep)
        if guidance is None:
            return prediction
        (negative,) = self.predicted([(latents, guidance.negative, guidance.control)], timestep)
        return guide(negative, prediction, guidance.scale)

    def check(self, latents: Tensor, condition: Condition) -> None:
        """Raise ValueError for latents or a condition that do not fit the network."""
        config, what = self.networks[0].config, self.family.network
        channels, width = config["in_channels"], config[self.text_dim]
        if latents.shape[1] != channels:
            raise ValueError(f"latents have {latents.shape[1]} channels; this {what} takes {channels}")
        if isinstance(width, int) and condition.embeddings.shape[-1] != width:
            raise ValueError(f"embeddings are {condition.embeddings.shape[-1]} wide; this {what} takes {width}")


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


# --- weights --------------------------------------------------------------------------------


def base_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights without LoRA layers; offloaded ones from RAM, where accelerate keeps them."""
    weights = network.state_dict()
    for prefix, module, hook in _offloads(network):
        offloaded = getattr(hook, "weights_map", None)
        for name, _ in module.named_parameters(recurse=bool(offloaded) and hook.place_submodules):
            key = f"{prefix}.{name}".lstrip(".")
            if offloaded is not None and weights[key].is_meta:
                weights[key] = offloaded[name]
    return {name.replace(".base_layer", ""): weight for name, weight in weights.items() if ".lora_" not in name}


def _offloads(network: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """accelerate's hooks, which bring weights to a device when a module is called: (module's name, module, hook)."""
    if not hasattr(network, "_hf_hook"):
        return
    for name, module in network.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if one is not None:
                yield name, module, one
