"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): temporal layers in an image model, tuned on one clip.

At the end of each transformer block every place attends over the frames; FateZero's variant also convolves over them
after each 3x3 convolution. The layers are modules of their own, which a host attaches to its UNet and takes off again.
A fresh set changes nothing: its output weights are zero, and its biases too (both official codes leave these random).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, KeyFrames
from ..diffusion.ddim import root
from ..diffusion.denoiser import Denoiser, check_finite
from ..settings import check, setting

Kind = Literal["official", "fatezero"]
NAMES: dict[Kind, tuple[str, str]] = {
    "official": ("attn_temp", "norm_temp"),
    "fatezero": ("attn_temporal", "norm_temporal"),
}
"""What each code calls the attention over frames, and its norm."""
CONV = "conv_temporal"
OTHERS = {
    "temp_convs.": "ModelScope's",
    "temp_attentions.": "ModelScope's",
    "motion_modules.": "AnimateDiff's",
    "temporal_transformer.": "AnimateDiff's",
}
"""Parts of names that tell other temporal layers."""
GROUP = "Tuning"


# --- the layers ---------------------------------------------------------------------------


class TemporalAttention(nn.Module):
    """Every place attends over the frames, without a mask or positions: (f t c) -> (f t c)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        places = rearrange(self.norm(x), "f t c -> t f c")
        q, k, v = (
            rearrange(to(places), "t f (h d) -> t h f d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v)
        )
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "t h f d -> t f (h d)")
        return x + rearrange(self.to_out(seen), "t f c -> f t c")


class TemporalConv(nn.Module):
    """A convolution over three frames, (f c y x) -> (f c y x): of low rank and added, or full.

    rank: None for a full one, which starts as the identity.
    """

    def __init__(self, channels: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.full = nn.Conv1d(channels, channels, 3, padding=1)
            nn.init.dirac_(self.full.weight)
            nn.init.zeros_(self.full.bias)  # type: ignore[arg-type]
        else:
            self.down = nn.Conv1d(channels, rank, 3, padding=1, bias=False)
            self.up = nn.Conv1d(rank, channels, 3, padding=1, bias=False)
            nn.init.normal_(self.down.weight, std=1 / rank)
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        places = rearrange(x, "f c y x -> (y x) c f")
        done = self.full(places) if self.rank is None else places + self.up(self.down(places))
        return rearrange(done, "(y x) c f -> f c y x", y=x.shape[2])


class TemporalLayers(nn.Module):
    """The temporal layers of a UNet, by the names of the modules they follow.

    attentions: of transformer blocks, convolutions: of 3x3 ones. kind: whose names they have in a file.
    """

    def __init__(
        self, attentions: Mapping[str, TemporalAttention], convolutions: Mapping[str, TemporalConv], kind: Kind
    ) -> None:
        super().__init__()
        self.kind = kind
        self._names = {_key(name): name for name in (*attentions, *convolutions)}
        self.attentions = nn.ModuleDict({_key(name): layer for name, layer in attentions.items()})
        self.convolutions = nn.ModuleDict({_key(name): layer for name, layer in convolutions.items()})

    @classmethod
    def fresh(cls, blocks: Mapping[str, tuple[int, int]]) -> TemporalLayers:
        """The official set, which changes nothing yet. blocks: channels and heads of each transformer block."""
        return cls({name: TemporalAttention(*shape) for name, shape in blocks.items()}, {}, "official")

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], blocks: Mapping[str, tuple[int, int]]) -> TemporalLayers:
        """From a checkpoint's weights, told by their names; what is not temporal among them is left alone.

        Raises ValueError for another model's layers, or where one is missing or does not fit.
        """
        kind = kind_of(weights)
        convolutions = {}
        for name, tensor in weights.items():
            module, found, part = name.partition(f".{CONV}.")
            if found and part in ("weight", "down.weight"):
                rank = None if part == "weight" else tensor.shape[0]
                convolutions[module] = TemporalConv(tensor.shape[1], rank)
        layers = cls({name: TemporalAttention(*shape) for name, shape in blocks.items()}, convolutions, kind)
        layers.load(weights)
        return layers

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter by its name in a file."""
        attention, norm = NAMES[self.kind]
        found: dict[str, nn.Parameter] = {}
        for key, layer in self.attentions.items():
            for name, parameter in layer.named_parameters():
                part, _, leaf = name.partition(".")
                home = norm if part == "norm" else f"{attention}.{'to_out.0' if part == 'to_out' else part}"
                found[f"{self._names[key]}.{home}.{leaf}"] = parameter
        for key, layer in self.convolutions.items():
            for name, parameter in layer.named_parameters():
                found[f"{self._names[key]}.{CONV}.{name.removeprefix('full.')}"] = parameter
        return found

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a file; ValueError naming one that is missing, that fits nothing, or of another shape."""
        own = self.named()
        given = {name: tensor for name, tensor in weights.items() if is_temporal(name)}
        for problem, names in (("lacks", own.keys() - given.keys()), ("should not have", given.keys() - own.keys())):
            if names:
                raise ValueError(f"the checkpoint {problem} {min(names)} ({len(names)} such weights)")
        for name, parameter in own.items():
            if parameter.shape != given[name].shape:
                raise ValueError(f"{name} is {tuple(given[name].shape)}; this model needs {tuple(parameter.shape)}")
            parameter.data = given[name].clone()

    def after(self, name: str) -> nn.Module:
        """The layer that follows a module."""
        key = _key(name)
        return self.attentions[key] if key in self.attentions else self.convolutions[key]

    @property
    def places(self) -> list[str]:
        """The names of the modules that layers follow."""
        return list(self._names.values())


def _key(name: str) -> str:
    """A module's name as a ModuleDict takes it."""
    return name.replace(".", "/")


def kind_of(weights: Iterable[str]) -> Kind:
    """Whose temporal layers a checkpoint holds; ValueError for others, or none."""
    names = list(weights)
    for kind, (attention, _) in NAMES.items():
        if any(f".{attention}." in name for name in names):
            return kind
    for part, whose in OTHERS.items():
        if any(part in name for name in names):
            raise ValueError(f"the checkpoint holds {whose} temporal layers; Tune-A-Video's and FateZero's are read")
    raise ValueError("the checkpoint holds no temporal layers (attn_temp, attn_temporal)")


def is_temporal(name: str) -> bool:
    """Whether a weight of a checkpoint is of a temporal layer."""
    parts = {part for names in NAMES.values() for part in names} | {CONV}
    return not parts.isdisjoint(name.split("."))


# --- tuning -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneSettings:
    """How temporal layers are tuned on a clip; the defaults are the authors'. Raises ValueError out of range."""

    steps: int = setting(300, "Steps of training; the authors take 300 to 500.", least=1, group=GROUP)
    learning_rate: float = setting(3e-5, "Of AdamW, the same in all steps.", least=0, most=1, group=GROUP)
    weight_decay: float = setting(1e-2, "Of AdamW.", least=0, most=1, group=GROUP)
    clip_gradients: float = setting(1.0, "The largest norm of all gradients together.", least=0, group=GROUP)
    seed: int = setting(0, "Of the draws of timesteps and noise.", least=0, most=2**63 - 1, group=GROUP)

    def __post_init__(self) -> None:
        check(self)


class Tunable(Denoiser, Protocol):
    """A denoiser whose weights can be trained."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What Tune-A-Video trains: queries of self- and cross-attention, and the attention over frames."""

    def training(self) -> AbstractContextManager[None]:
        """Gradients for what is trained alone, activations recomputed; all as it was after the `with` block."""

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Latents at a timestep, and the cumulative alpha there."""

    @property
    def predicts_v(self) -> bool:
        """Whether the model predicts v, on which it then is trained, in place of the noise."""


Told = Callable[[int, int, float, float], None]
"""Called after each step with (steps done, steps in all, loss, norm of the gradients before it is clipped)."""


def tune(
    denoiser: Tunable,
    latents: Tensor,
    embeddings: Tensor | Condition,
    settings: TuneSettings | None = None,
    draws: Iterable[tuple[int, Tensor]] | None = None,
    key_frames: KeyFrames | Iterable[str | int] | str | int = ("first", "previous"),
    clip_norm: bool = True,
    *,
    progress: Told | None = None,
) -> list[float]:
    """Train a model's temporal layers on one clip (paper Sec. 3.3); the loss of each step.

    latents: (frames, 4, h, w). embeddings: of the clip's prompt. draws: (timestep, noise (frames, 4, h, w)) of each
    step, in place of random ones. The loss is the mean squared error of the noise, or of v where a model predicts it.
    Raises ValueError for a model without temporal layers, and ArithmeticError where numbers leave their range.
    """
    settings = settings or TuneSettings()
    keys, condition = KeyFrames.of(key_frames), Condition.of(embeddings, "embeddings").to(latents)
    trained = denoiser.trained()
    optimizer = torch.optim.AdamW(trained.values(), settings.learning_rate, (0.9, 0.999), 1e-8, settings.weight_decay)
    losses: list[float] = []
    with torch.enable_grad(), denoiser.hooked(clip_norm), denoiser.training():
        for timestep, noise in draws or random_draws(latents, settings):
            z, alpha = denoiser.noised(latents, noise.to(latents), timestep)
            control = Control(keys, Chunk.whole(len(latents)))
            predicted = denoiser.predict_noise(z, timestep, condition, control)
            loss = F.mse_loss(predicted, noise.to(latents)) / (alpha if denoiser.predicts_v else 1.0)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained.values(), settings.clip_gradients)
            check_finite(norm, f"the gradients of step {len(losses) + 1}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if progress:
                progress(len(losses), settings.steps, losses[-1], norm.item())
    return losses


def random_draws(latents: Tensor, settings: TuneSettings) -> Iterable[tuple[int, Tensor]]:
    """A timestep for the clip and noise of its own for each frame, for every step; the same for a seed."""
    random = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        timestep = int(torch.randint(1000, (1,), generator=random))
        yield timestep, torch.randn(latents.shape, generator=random, dtype=torch.float32)


def noised(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """sqrt(abar) z + sqrt(1 - abar) eps."""
    return root(alpha) * latents + root(1 - alpha) * noise


def trains(name: str) -> bool:
    """Whether Tune-A-Video trains a weight of a UNet itself: queries of self- and cross-attention."""
    return name.endswith((".attn1.to_q.weight", ".attn2.to_q.weight"))


def trained_of(layers: TemporalLayers) -> dict[str, nn.Parameter]:
    """The temporal weights that are trained: all of the attention over frames; norms and convolutions stay."""
    attention, _ = NAMES[layers.kind]
    return {name: weight for name, weight in layers.named().items() if f".{attention}." in name}
