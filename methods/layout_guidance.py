"""Cross-attention guidance (arXiv 2404.05519): control an object's place in each frame by its words' attention.

Backward guidance moves the latents along the gradient of an energy, so that attention to the words takes the target's
shape; forward guidance adds the target to the attention itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ..attention.condition import Condition
from ..attention.control import NO_WINDOWS, AttentionSite, Control, attention_map, wide_map
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames
from ..diffusion.denoiser import Denoiser, Differentiable, check_finite, chunks_of, frames_of, joined
from ..diffusion.parts import Edit, EditContext, check_needs_unet
from ..imports import F, torch
from ..settings import check, setting, shown

if TYPE_CHECKING:
    from torch import Tensor

    from .own_attention import Target

GROUP = "Layout"
Mode = Literal["backward", "forward"]
Energy = Literal["shape", "centroid", "size", "inside"]
MAPS = (64, 256)
"""Tokens of the layers used for the energy: 8x8 to 16x16, where a word's attention is localized."""
EPSILON = 1e-12
SHARPNESS = 20.0
"""Slope of the sigmoid that separates an object from the background (s of self-guidance, arXiv 2306.00986)."""


@dataclass(frozen=True)
class ObjectTarget:
    """An object and where it should be.

    target: (frames, h, w) in 0..1, 1 where the object should be. columns: of its words in the text. Raises ValueError
    for a wrong shape or no columns.
    """

    target: Tensor
    columns: Sequence[int]

    feature = None

    def __post_init__(self) -> None:
        if self.target.ndim != 3 or not 0 <= self.target.min() <= self.target.max() <= 1:
            raise ValueError("target must be (frames, height, width) with values from 0 to 1")
        if not self.columns or min(self.columns) < 0:
            raise ValueError(f"columns is {list(self.columns)}; it must list tokens of the text, counted from 0")

    def on(self, site: AttentionSite, frames: Sequence[int]) -> Tensor:
        """The target of some frames on a layer's grid, by area interpolation: (frames, tokens)."""
        chosen = self.target[list(frames)]
        return F.interpolate(chosen[:, None], (site.height, site.width), mode="area")[:, 0].flatten(1)


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """Strength and steps of the guidance. The defaults are the paper's. Raises ValueError out of range."""

    mode: Mode = setting(
        "backward",
        "backward moves the latents along the gradient of an energy of the words' attention; forward adds the target "
        "to the attention, which costs nothing and is considered weaker.",
        group=GROUP,
    )
    energy: Energy = setting(
        "shape",
        "Property of the attention to compare with the target: its shape (the paper), centroid, size, or its share "
        "inside the target.",
        group=GROUP,
    )
    scale: float = setting(15.0, "Step size along the gradient.", least=0, most=10_000, group=GROUP)
    weight: float = setting(4.0, "Weight of the energy.", least=0, most=10_000, group=GROUP)
    amount: float = setting(
        0.7,
        "Share of the target in the attention, for forward guidance.",
        least=0,
        most=1,
        symbol="lambda",
        group=GROUP,
    )
    repeats: int = setting(
        1, "Maximal number of guidance updates per step; the paper uses 1.", least=1, most=100, group=GROUP
    )
    enough: float = setting(
        0.0, "Stop guiding a step once the energy per frame (unweighted) is at most this.", least=0, group=GROUP
    )
    most_change: float = setting(
        0.0, "Maximal change of a frame's latents per update, as a root mean square. 0: no limit.", least=0,
        group=GROUP,
    )  # fmt: skip

    guided_steps: str = setting(
        "",
        "Guided steps, counted from 0: numbers and ranges, of which 22-44/2 is every second step.",
        shown="the paper's 33 of 50, in proportion", group=GROUP,
    )  # fmt: skip
    appearance: float = setting(
        0.0,
        "For a shift or swap in a new clip: weight of the appearance term, the change of the object's mean decoder "
        "feature against the clip without guidance. 0 leaves it out; on the demo clip it did not help.",
        least=0, most=10_000, group=GROUP,
    )  # fmt: skip

    steps: Sequence[int] | None = None
    """The same as numbers; None for those of `guided_steps`."""

    def __post_init__(self) -> None:
        check(self)
        if self.guided_steps and self.steps is None:
            object.__setattr__(self, "steps", parsed_steps(self.guided_steps))

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step of a run is guided."""
        if not (self.scale if self.mode == "backward" else self.amount):
            return False
        return in_schedule(step, steps) if self.steps is None else step in self.steps

    def values(self) -> dict[str, Any]:
        """These settings by name, without those of a subclass."""
        return {one.name: getattr(self, one.name) for one in fields(LayoutSettings)}

    def guided_calls(self, steps: int) -> int:
        """Maximal number of UNet calls with gradients."""
        return self.repeats * sum(self.guides(step, steps) for step in range(steps)) if self.mode == "backward" else 0


@dataclass(frozen=True)
class LayoutGuidance(LayoutSettings):
    """Guidance of one or more objects.

    target, columns: see `ObjectTarget`; a target of None for the objects of `more` only. more: further objects.
    """

    target: Tensor | None
    columns: Sequence[int]
    more: Sequence[Target] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objects  # noqa: B018  raises for invalid ones

    @classmethod
    def of(cls, targets: Sequence[ObjectTarget], settings: LayoutSettings) -> LayoutGuidance:
        """The guidance of some objects; ignores additional settings of `MoveSettings`."""
        first, *more = targets
        return cls(first.target, first.columns, more=more, **settings.values())

    @property
    def objects(self) -> tuple[Target, ...]:
        return (*(() if self.target is None else (ObjectTarget(self.target, self.columns),)), *self.more)

    @property
    def moves_latents(self) -> bool:
        return self.mode == "backward"

    def moved(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        timestep: float,
        alpha: Tensor,
        condition: Condition,
        calls: ClipCalls,
    ) -> Tensor:
        """The latents from which a guided step starts."""
        if self.mode == "forward":
            return latents
        return guided(denoiser, latents, timestep, alpha, condition, self, calls)

    def control(self, key_frames: KeyFrames, chunk: Chunk) -> Control:
        """The control of the conditional branch in a guided step."""
        return ForwardControl(key_frames, chunk, self) if self.mode == "forward" else Control(key_frames, chunk)

    # --- in an edit ---------------------------------------------------------------------

    keeps_rest = False
    area = None

    def check(self, edit: Edit, spans_clip: bool) -> None:
        check_needs_unet("A layout", spans_clip)

    def prepared(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> LayoutGuidance:
        """Raises ValueError for what does not fit, and for forward guidance, which conflicts with the edit's maps."""
        if self.mode == "forward":
            raise ValueError("mode is forward; edits need backward")
        self.check_fits(context.store.frames, context.target.text_tokens)
        return self

    def initial(self, z: Tensor, noisy: float) -> Tensor:
        return z

    def after_step(self, z: Tensor, level: int, step: int) -> Tensor:
        return z

    def summary(self, steps: int) -> str:
        return f"guided the layout of {len(self.objects)} object(s) in {self.guided_calls(steps)} gradients"

    def check_fits(self, frames: int, text_tokens: int) -> None:
        """Raise ValueError for a wrong number of frames, or columns that the text does not have."""
        for one in self.objects:
            if isinstance(one, ObjectTarget) and len(one.target) != frames:
                raise ValueError(f"target has {len(one.target)} frames; the clip has {frames}")
            if max(one.columns) >= text_tokens:
                raise ValueError(f"columns contain token {max(one.columns)}; the text has {text_tokens} tokens")


def parsed_steps(text: str) -> tuple[int, ...]:
    """The steps of "0-20, 22-44/2": numbers and ranges, both ends included, with a stride. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6})(?:/([1-9]\d{0,5}))?)?", part)
        steps = range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1)) if match else range(0)
        if not steps:
            raise ValueError(f"guided_steps is {shown(text)}; it must be numbers and ranges such as 0-20,22-44/2")
        found |= set(steps)
    return tuple(sorted(found))


def in_schedule(step: int, steps: int) -> bool:
    """Whether the paper guides a step: of 50, the first 21 and every second one up to 44; otherwise in proportion."""
    return 50 * step <= 20 * steps or (50 * step <= 44 * steps and step % 2 == 0)


# --- energies -------------------------------------------------------------------------------


def normalized(x: Tensor) -> Tensor:
    """N: min-max over the heads and places of each frame, (f h t) -> (f h t)."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low + EPSILON)


def shape_of(x: Tensor) -> Tensor:
    """N(sigmoid(s (N(x) - .5))): an object's outline, (f h t) -> (f h t) in 0..1."""
    return normalized(torch.sigmoid(SHARPNESS * (normalized(x) - 0.5)))


def _by_head(target: Tensor) -> Tensor:
    """A target (f t), or one of each head (f h t), as (f, 1 or h, t)."""
    return target if target.ndim == 3 else target[:, None]


def shape_energy(maps: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over heads and places of (shape(T) - shape(A))^2, of each frame."""
    return ((shape_of(_by_head(target)) - shape_of(maps)) ** 2).mean((1, 2))


def centroid_energy(maps: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squared distance of the centres, sum((x, y) A) / sum(A), in shares of the frame; mean over heads."""
    difference = _centroid(maps, grid) - _centroid(_by_head(target), grid)
    return (difference**2).sum(-1).mean(1)


def size_energy(maps: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squared difference of the covered shares of the frame, the map's by a soft threshold (s = 10)."""
    covered = torch.sigmoid(10 * (normalized(maps) - 0.5)).mean(-1)
    return ((covered - _by_head(target).mean(-1)) ** 2).mean(1)


def inside_energy(maps: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1 - sum(A m) / sum(A))^2, the squared share of attention outside the target; mean over heads."""
    share = (maps * _by_head(target)).sum(-1) / (maps.sum(-1) + EPSILON)
    return ((1 - share) ** 2).mean(1)


ENERGIES: dict[Energy, Callable[[Tensor, Tensor, tuple[int, int]], Tensor]] = {
    "shape": shape_energy,
    "centroid": centroid_energy,
    "size": size_energy,
    "inside": inside_energy,
}
"""Functions of maps (f h t) and a target (f t) or (f h t) on a grid (height, width): (f)."""


def _centroid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = grid
    y = ((torch.arange(height) + 0.5) / height).repeat_interleave(width).to(x)
    across = ((torch.arange(width) + 0.5) / width).repeat(height).to(x)
    total = x.sum(-1) + EPSILON
    return torch.stack([(x * across).sum(-1) / total, (x * y).sum(-1) / total], -1)


def feature_of(heat: Tensor, site: AttentionSite, feature: Tensor) -> Tensor:
    """An object's mean feature, weighted by its shape: sum(shape(A) Psi) / sum(shape(A)), (frames, channels).

    heat: (f, t) on a layer's grid. feature: (f, c, y, x).
    """
    shape = shape_of(heat[:, None]).unflatten(-1, (site.height, site.width))
    weights = F.interpolate(shape, feature.shape[-2:], mode="bilinear", align_corners=False).to(feature)
    return (weights * feature).sum((2, 3)) / weights.sum((2, 3)).clamp(min=1e-6)


def smooth_abs(x: Tensor, own: Tensor) -> Tensor:
    """|x - own|, smooth below 1 % of the mean |own|: where nothing has changed yet, its gradient is 0, not the sign of
    rounding errors.
    """
    width = 0.01 * own.abs().mean(1, keepdim=True)
    return ((x - own) ** 2 + width**2).sqrt() - width


# --- controls -------------------------------------------------------------------------------


class EnergyControl(Control):
    """The model's attention, with the energy of the words' maps."""

    def __init__(self, key_frames: KeyFrames, chunk: Chunk, layout: LayoutGuidance) -> None:
        super().__init__(key_frames, chunk)
        self.layout = layout
        self._found: dict[str, Tensor] = {}
        """Each layer's energy by frame; by name, since a layer may be computed twice."""
        self._heats: dict[AttentionSite, list[Tensor]] = {}
        """Each object's attention, for its mean feature, (frames, tokens)."""
        self._feature: Tensor | None = None

    def on(self, chunk: Chunk) -> NoReturn:
        raise ValueError(f"layout guidance needs a gradient of the whole clip, {NO_WINDOWS}")

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if MAPS[0] <= site.tokens <= MAPS[1]:
            maps = wide_map(q, k)
            energy, grid = ENERGIES[self.layout.energy], (site.height, site.width)
            parts = []
            for one in self.layout.objects:
                target = one.on(site, self.chunk.frame_indices).to(maps)
                of_words = [energy(maps[..., column], target, grid) for column in one.columns]
                parts.append(torch.stack(of_words).mean(0))
            if self.layout.appearance:
                heat = maps.detach().mean(1)
                self._heats[site] = [heat[..., list(one.columns)].mean(-1) for one in self.layout.objects]
            self._found[site.name] = torch.stack(parts).sum(0)
        return super().cross_attention(q, k, v, site)

    def energy(self) -> Tensor:
        """The mean over layers for each frame (f); ValueError if no layer has a suitable grid."""
        if not self._found:
            raise ValueError(
                f"layout guidance needs a cross-attention layer of {MAPS[0]} to {MAPS[1]} tokens, but latents of this "
                "size have none"
            )
        return torch.stack(list(self._found.values())).mean(0)

    def feature(self, x: Tensor, name: str) -> Tensor:
        self._feature = x
        return x

    def appearance(self) -> Tensor:
        """The change of each frame's objects, (f): the mean over channels of `smooth_abs`."""
        assert self._feature is not None, "the unguided clip had it"
        finest = max(self._heats, key=lambda site: site.tokens)
        frames = list(self.chunk.frame_indices)
        changes = [
            smooth_abs(feature_of(heat, finest, self._feature), one.feature[frames].to(heat)).mean(1)
            for heat, one in zip(self._heats[finest], self.layout.objects, strict=True)
            if one.feature is not None
        ]
        return torch.stack(changes).sum(0)

    def loss(self) -> Tensor:
        """The sum over frames, times the weight, and the appearance term."""
        shape = self.layout.weight * self.energy().sum()
        if not self.layout.appearance or all(one.feature is None for one in self.layout.objects):
            return shape
        return shape + self.layout.appearance * self.appearance().sum()


class ForwardControl(Control):
    """A <- (1 - lambda) A + lambda g sum(A) in the words' columns, g being the target with sum 1 in each frame."""

    def __init__(self, key_frames: KeyFrames, chunk: Chunk, layout: LayoutGuidance) -> None:
        super().__init__(key_frames, chunk)
        self.layout = layout

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        maps = attention_map(q, k)
        for one in self.layout.objects:
            target = one.on(site, self.chunk.frame_indices).to(maps)
            total = target.sum(-1, keepdim=True)
            share = (target / total.clamp(min=EPSILON))[:, None]
            there = (total > 0)[:, None]  # attention is unchanged in a frame without the object
            for column in one.columns:
                own = maps[..., column]
                mixed = (1 - self.layout.amount) * own + self.layout.amount * share * own.sum(-1, keepdim=True)
                maps[..., column] = torch.where(there, mixed, own)
        return maps @ v


# --- the guided step ------------------------------------------------------------------------


def guided(
    denoiser: Denoiser,
    latents: Tensor,
    timestep: float,
    alpha: Tensor,
    condition: Condition,
    layout: LayoutGuidance,
    calls: ClipCalls,
) -> Tensor:
    """z <- z - scale (1 - abar) grad E before a step, up to `repeats` times."""
    z = latents
    for _ in range(layout.repeats):
        energy, gradient = energy_gradient(denoiser, z, timestep, condition, layout, calls)
        if energy <= layout.enough * layout.weight * len(z):
            break
        change = layout.scale * (1 - alpha).to(z) * gradient
        if layout.most_change:
            size = change.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
            change = change * (layout.most_change / size.clamp(min=EPSILON)).clamp(max=1)
        z = z - change
        check_finite(z, "the guided latents")
    return z


def energy_gradient(
    denoiser: Denoiser,
    latents: Tensor,
    timestep: float,
    condition: Condition,
    layout: LayoutGuidance,
    calls: ClipCalls,
) -> tuple[float, Tensor]:
    """E and its gradient in the latents, for the conditional branch. Independent frames run in chunks.

    Raises TypeError for a denoiser without gradients.
    """
    if not isinstance(denoiser, Differentiable):
        raise TypeError(
            f"backward guidance needs gradients, and {type(denoiser).__name__} has none: set mode to forward"
        )
    independent = calls.key_frames.entries == ("self",) and not calls.clip_norm and not denoiser.frames_meet
    chunks = chunks_of(denoiser, calls if independent else replace(calls, windows=None), latents, timestep)
    energy, gradients = 0.0, []
    for chunk in chunks:
        control = EnergyControl(calls.key_frames, chunk, layout)
        found, gradient = denoiser.gradient(frames_of(latents, chunk), timestep, condition, control, control.loss)
        energy += found.item()
        gradients.append(gradient.to(latents))
    return energy, joined(chunks, gradients)
