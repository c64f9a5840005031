"""Shared code of all denoisers on diffusers: their networks' weights, and the branches of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...attention.condition import Condition
from ...attention.control import Control
from ...diffusion.ddim import guide
from ...diffusion.denoiser import Guidance
from ...models.family import Family
from ...store.identity import IdentityCache, ModelIdentity
from ...store.records import PairedBranch

_IDENTITIES = IdentityCache()
Branch = tuple[Tensor, Condition, Control]
"""The latents, text and control of one branch of a call."""


class NetworkDenoiser(ABC):
    """Networks of one family and their schedule, as the loops of `fatezero.diffusion` call them."""

    family: ClassVar[Family]
    text_dim: ClassVar[str]
    """The configuration's key of the text embeddings' width; "" if it has none."""
    pairs: ClassVar[bool] = False
    embeds_guidance: bool = False

    def __init__(self, networks: Sequence[Any], scheduler: Any) -> None:
        self.networks, self.scheduler = list(networks), scheduler

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
    def trained_frames(self) -> int | None:
        return self.family.trained_frames

    def subset_grid(self, height: int, width: int) -> tuple[int, int] | None:
        return self.family.subset_grid(height, width)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.networks[0].config["in_channels"])

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

    packing = None

    def windows(self, latents: Tensor, timestep: float) -> None:
        return None

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
        assert paired is None or self.pairs, "the branches of this model run one after another"
        source = [] if paired is None else [(paired.latents, paired.condition, paired.control)]
        away = [] if guidance is None else [(latents, guidance.negative, guidance.control)]
        together = guidance is not None and guidance.control.rows is not None  # the source runs once for both
        found = self.predicted([*source, (latents, condition, control), *(away if together else [])], timestep)
        if paired is not None:
            paired.control.captured.prediction = found.pop(0)
        if guidance is None:
            return found[0]
        prediction, negative = found if together else [*found, *self.predicted(away, timestep)]
        return guide(negative, prediction, guidance.scale)

    def check(self, latents: Tensor, condition: Condition) -> None:
        """Raise ValueError for latents or a condition that do not fit the network."""
        width, what = self.networks[0].config.get(self.text_dim), self.family.network
        if latents.shape[1] != self.channels:
            raise ValueError(f"latents have {latents.shape[1]} channels; this {what} takes {self.channels}")
        if isinstance(width, int) and condition.embeddings.shape[-1] != width:
            raise ValueError(f"embeddings are {condition.embeddings.shape[-1]} wide; this {what} takes {width}")


def numbered_weights(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The weights of several networks, each name behind the number of its network."""
    named = ((n, base_weights(network)) for n, network in enumerate(networks))
    return {f"{n}.{name}": weight for n, weights in named for name, weight in weights.items()}


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
