"""What the denoisers of all families share: hooked attention layers, the branches of a call, and their weights."""

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
from ...store.records import Beside
from ..held import IN_USE, Stranger, held

_IDENTITIES = IdentityCache()
Branch = tuple[Tensor, Condition, Control]
"""The latents, text and control of one branch of a call."""
Wrap = Callable[[Callable[..., Tensor], Stranger], Callable[..., Tensor]]
"""Wraps a module's forward for the time of a run."""


class ControlledProcessor(ABC):
    """diffusers' attention with the softmax product computed by a control; `before`, in calls of other threads."""

    def __init__(self, denoiser: Any, name: str, before: Any, stranger: Stranger) -> None:
        self.denoiser, self.name, self.kernel = denoiser, name, self.kernel_of(before)
        self.before, self.stranger = before, stranger

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
    """The call that brings these back."""
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
        with held(self.networks, self.family.network) as stranger, ExitStack() as stack:
            self.check_processors()
            stack.callback(self.forget)
            stack.enter_context(self._processors(stranger))
            self.hook_more(stack, stranger, clip_norm)
            yield

    @contextmanager
    def _processors(self, stranger: Stranger) -> Iterator[None]:
        before = [(layer, layer.processor) for _, layer in self.attention]
        try:
            for name, layer in self.attention:
                layer.processor = self.processor(self, name, layer.processor, stranger)
            yield
        finally:
            for layer, processor in before:
                layer.processor = processor

    @abstractmethod
    def hook_more(self, stack: ExitStack, stranger: Stranger, clip_norm: bool) -> None:
        """Hook what is not attention, until the stack closes."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what a run leaves on the denoiser."""

    def check_processors(self) -> None:
        """Raise ValueError for attention processors that ours cannot stand in for."""
        for name, layer in self.attention:
            kind = type(layer.processor)
            if issubclass(kind, ControlledProcessor):
                raise ValueError(IN_USE.format(what=self.family.network))
            if kind not in self.plain:
                raise ValueError(
                    f"{name} has a {kind.__name__}, which FateZero cannot reproduce: remove it first ({self.reset})"
                )

    # --- calls --------------------------------------------------------------------------

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        """Raises ValueError for latents or a condition that do not fit the model."""
        branches = [(latents, condition, control)]
        if beside is None:
            (prediction,) = self.predicted(branches, timestep)
        else:
            assert self.pairs, "the branches of this model run one after another"
            before = beside.latents, beside.condition, beside.control
            beside.control.captured.prediction, prediction = self.predicted([before, *branches], timestep)
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
def wrapped(modules: Mapping[nn.Module, Wrap], stranger: Stranger) -> Iterator[None]:
    """Wrap the forward of modules for the time of the block."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module, wrap in modules.items():
            module.forward = wrap(module.forward, stranger)
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


# --- weights and where they are ---------------------------------------------------------------


def base_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights without the LoRA layers around them; from RAM, where accelerate keeps them there."""
    weights = network.state_dict()
    for prefix, module, hook in _offloads(network):
        kept = getattr(hook, "weights_map", None)
        for name, _ in module.named_parameters(recurse=bool(kept) and hook.place_submodules):
            key = f"{prefix}.{name}".lstrip(".")
            if kept is not None and weights[key].is_meta:
                weights[key] = kept[name]
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
