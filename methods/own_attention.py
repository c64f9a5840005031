"""Targets of a new clip made from the attention that the model has by itself: moved, scaled or swapped.

The clip is first generated without guidance, and its attention to the objects is recorded in every step; guidance then
compares the attention with the changed record of the same step (arXiv 2404.05519, and self-guidance, arXiv 2306.00986).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from einops import rearrange

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control, wide_map
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames
from ..diffusion.denoiser import Denoiser
from ..imports import F, torch
from .layout_guidance import MAPS, LayoutGuidance, LayoutSettings, ObjectTarget, feature_of, guided, shape_of

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Shift


class Target(Protocol):
    """Where an object should be. columns: of its words. feature: its mean to keep (frames, channels), or None."""

    @property
    def columns(self) -> Sequence[int]: ...

    @property
    def feature(self) -> Tensor | None: ...

    def on(self, site: AttentionSite, frames: Sequence[int]) -> Tensor:
        """The target of some frames on a layer's grid, (frames, tokens) or (frames, heads, tokens) in 0..1."""


@dataclass(frozen=True)
class OwnTarget:
    """An object, and how its attention should differ from the unguided clip's.

    columns: of its words. change: a shift with growth, or the columns of the object whose place it takes.
    """

    columns: Sequence[int]
    change: Shift | Sequence[int]

    @property
    def source(self) -> Sequence[int]:
        """The columns whose attention makes the target."""
        return self.change if isinstance(self.change, Sequence) else self.columns


@dataclass(frozen=True, kw_only=True)
class OwnLayout(LayoutSettings):
    """Guidance of objects relative to the unguided clip: for `generate(..., layout=...)`.

    own: these objects. fixed: others with targets of their own. recorded: the unguided clip's attention, set by
    `generate`. Raises ValueError for forward guidance, and for no objects.
    """

    own: Sequence[OwnTarget]
    fixed: Sequence[ObjectTarget] = ()
    recorded: OwnAttention | None = None

    moves_latents = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "forward":
            raise ValueError("mode is forward; a shift or swap of a new clip needs backward")
        if not self.own:
            raise ValueError("own is empty: give at least one object")

    def recorder(self) -> OwnAttention:
        """Records an unguided clip."""
        sources, columns = ([getattr(one, name) for one in self.own] for name in ("source", "columns"))
        return OwnAttention(sources, columns, keeps_features=self.appearance > 0)

    def following(self, recorded: OwnAttention) -> OwnLayout:
        """The guidance against a recorded clip."""
        return replace(self, recorded=recorded)

    def check_fits(self, frames: int, text_tokens: int) -> None:
        """Raise ValueError for a wrong number of frames, or columns that the text does not have."""
        most = max(column for one in self.own for column in (*one.columns, *one.source))
        if most >= text_tokens:
            raise ValueError(f"columns contain token {most}; the text has {text_tokens} tokens")
        for one in self.fixed:
            if len(one.target) != frames:
                raise ValueError(f"target has {len(one.target)} frames; the clip has {frames}")

    def control(self, key_frames: KeyFrames, chunk: Chunk) -> Control:
        """The control of the conditional branch in a guided step."""
        return Control(key_frames, chunk)

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
        return guided(denoiser, latents, timestep, alpha, condition, self.at(timestep), calls)

    def at(self, timestep: float) -> LayoutGuidance:
        """The guidance of a step, from the record of its timestep."""
        assert self.recorded is not None
        step = self.recorded.steps[timestep]
        own: list[Target] = [
            _StepTarget(one.columns, one.change, step.heats, number, step.features[number])
            for number, one in enumerate(self.own)
        ]
        return self.as_guidance([*own, *self.fixed])

    def like(self, frames: int) -> LayoutGuidance:
        """Guidance of the same cost, for estimates of memory."""
        blank = torch.ones(frames, 1, 1)
        return self.as_guidance([*(ObjectTarget(blank, one.columns) for one in self.own), *self.fixed])

    def as_guidance(self, targets: Sequence[Target]) -> LayoutGuidance:
        """These settings with other targets."""
        return LayoutGuidance(None, (), more=targets, **self.values())


@dataclass(frozen=True)
class _StepTarget:
    """The target of an object in one step: see `Target`."""

    columns: Sequence[int]
    change: Shift | Sequence[int]
    heats: Mapping[str, Tensor]
    number: int
    feature: Tensor | None

    def on(self, site: AttentionSite, frames: Sequence[int]) -> Tensor:
        shape = shape_of(self.heats[site.name][self.number])
        if not isinstance(self.change, Sequence):
            shape = shifted(rearrange(shape, "f h (y x) -> f h y x", x=site.width), self.change).flatten(2)
        return shape[list(frames)]


def shifted(shape: Tensor, shift: Shift) -> Tensor:
    """Shapes (frames, heads, y, x) in 0..1, moved and scaled about each frame's centre, with zeros from outside."""
    frames, _, height, width = shape.shape
    whole = shape.mean(1)
    total = whole.sum((1, 2)).clamp(min=1e-6)
    across = ((torch.arange(width) + 0.5) / width).to(shape)
    down = ((torch.arange(height) + 0.5) / height).to(shape)
    centre = torch.stack([(whole.sum(1) * across).sum(1), (whole.sum(2) * down).sum(1)], 1) / total[:, None]
    moves = [shift.at(frame) for frame in range(frames)]
    by = torch.tensor([(one.x, one.y) for one in moves]).to(shape)
    zoom = 1 / torch.tensor([one.growth for one in moves]).to(shape)
    begin, end = 2 * centre - 1, 2 * (centre + by) - 1
    theta = torch.zeros(frames, 2, 3).to(shape)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = begin - zoom[:, None] * end
    grid = F.affine_grid(theta, [frames, 1, height, width], align_corners=False)
    return F.grid_sample(shape, grid, align_corners=False).clamp(0, 1)


# --- the record -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """heats: by layer, (objects, frames, heads, tokens). features: of each object, (frames, channels), if any."""

    heats: dict[str, Tensor]
    features: list[Tensor | None]


class OwnAttention:
    """The attention of an unguided clip to some objects, in every step: for `generate(..., attention=...)`."""

    def __init__(
        self, sources: Sequence[Sequence[int]], columns: Sequence[Sequence[int]], keeps_features: bool = False
    ) -> None:
        """sources: the columns of each object whose attention is changed; columns: whose features are kept."""
        self.sources, self.columns, self.keeps_features = sources, columns, keeps_features
        self.steps: dict[float, _Step] = {}

    def recorder(self, keys: KeyFrames, chunk: Chunk, sites: Sequence[AttentionSite], tokens: int) -> OwnRecorder:
        """The control of the conditional branch in a step."""
        return OwnRecorder(keys, chunk, [*self.sources, *self.columns])

    def record(self, recorder: OwnRecorder, timestep: float) -> None:
        """Add a step."""
        if not recorder.heats:
            raise ValueError(f"a shift or swap needs cross-attention layers of {MAPS[0]} to {MAPS[1]} tokens")
        if self.keeps_features and recorder.kept is None:
            raise ValueError("appearance needs the decoder feature of Plug-and-Play, which this UNet does not have")
        count = len(self.sources)
        finest = max(recorder.sites.values(), key=lambda site: site.tokens)
        features = [
            None if recorder.kept is None else feature_of(heat.mean(1), finest, recorder.kept).cpu()
            for heat in recorder.heats[finest.name][count:]
        ]
        heats = {name: heat[:count].cpu() for name, heat in recorder.heats.items()}
        self.steps[timestep] = _Step(heats, features)


class OwnRecorder(Control):
    """The model's attention, with a record of that to some objects and of Plug-and-Play's feature."""

    def __init__(self, key_frames: KeyFrames, chunk: Chunk, objects: Sequence[Sequence[int]]) -> None:
        super().__init__(key_frames, chunk)
        self.objects = objects
        self.heats: dict[str, Tensor] = {}
        self.sites: dict[str, AttentionSite] = {}
        self.kept: Tensor | None = None

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if MAPS[0] <= site.tokens <= MAPS[1]:
            maps = wide_map(q, k)
            self.sites[site.name] = site
            self.heats[site.name] = torch.stack([maps[..., list(own)].mean(-1) for own in self.objects])
        return super().cross_attention(q, k, v, site)

    def feature(self, x: Tensor, name: str) -> Tensor:
        self.kept = x
        return x
