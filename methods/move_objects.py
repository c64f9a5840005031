"""Objects of a real clip, sent elsewhere: what cross-attention guidance (arXiv 2404.05519) leaves open.

An object's inverted noise is carried to where it shall be, and the hole it leaves is filled with noise; backward
guidance holds the words' attention there; what is taken of the source (FateZero) keeps all the rest. Where the object
is in the clip, the source's attention to its words says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.masks import GivenMask, grown, mask_sites, over_maximum
from ..diffusion.denoiser import Denoiser
from ..diffusion.edit import EditContext
from ..diffusion.prompt_mask import source_tokens_heat
from ..imports import F, torch
from ..settings import setting, setting_like, whole_steps
from .layout import Layout, Path, Shift
from .layout_guidance import GROUP, Energy, LayoutGuidance, LayoutSettings, Placed

if TYPE_CHECKING:
    from torch import Tensor

SAME = 1.15
"""A growth up to this, or its inverse, is none: attention does not tell an object's size better."""


@dataclass(frozen=True, kw_only=True)
class MoveSettings(LayoutSettings):
    """How objects of a clip are moved; the guidance is what moved most in our world. Raises ValueError out of range."""

    energy: Energy = setting_like(LayoutSettings, "energy", "inside")
    scale: float = setting_like(LayoutSettings, "scale", 60.0)
    most_change: float = setting_like(LayoutSettings, "most_change", 0.1)
    carry: float = setting(
        0.7,
        "Of edits: the share of steps in which a moved object has the source's latents, carried along. More keeps its "
        "looks, less leaves it free to change.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    object_threshold: float = setting(
        0.4, "Of edits: how much of a frame's strongest attention to its words counts as the object, where no mask "
        "tells it.", least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """An object of a clip, and where it shall be.

    where: a path, a shift, or a mask (frames or 1, height, width) in 0..1. columns: of its words among the target
    text's tokens. source_columns: among the source text's, whose attention shows where it is; or source, a mask of
    that, (frames or 1, height, width).
    Raises ValueError for an object whose place in the clip nothing tells.
    """

    where: Path | Shift | Tensor
    columns: Sequence[int]
    source_columns: Sequence[int] = ()
    source: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.source_columns and self.source is None:
            raise ValueError("an object to move must have words in the source prompt, or a mask of where it is")


@dataclass(frozen=True)
class MoveObjects(MoveSettings):
    """Objects of an edited clip, moved: for `edit(..., layout=...)`.

    Raises ValueError for forward guidance, which a moved object has no use for.
    """

    objects: Sequence[Moved]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "forward":
            raise ValueError("mode is forward; an edit moves objects by backward guidance alone")
        if not self.objects:
            raise ValueError("objects is empty; an edit's layout needs one")

    keeps_rest = True

    def prepared(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> Rearranged:
        """Called while the denoiser is hooked. Raises ValueError for masks or a text that do not fit."""
        sources = self._sources(context, chunks)
        ways = [_way(source, one.where) for source, one in zip(sources, self.objects, strict=True)]
        there = [source[:, None].float() for source in sources]
        moved = [way.carried(mask) for way, mask in zip(ways, there, strict=True)]
        placed = [Placed(mask[:, 0], one.columns) for mask, one in zip(moved, self.objects, strict=True)]
        guidance = LayoutGuidance.of(placed, self)
        guidance.check_fits(context.store.frames, context.target.text_tokens)
        like = context.latents_like
        area = grown(torch.stack([*there, *moved]).amax(0)[:, 0]).to(like)
        holes = torch.stack(there).amax(0).to(like)
        return Rearranged(self, context, guidance, ways, [mask.to(like) for mask in moved], holes, area)

    def _sources(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> list[Tensor]:
        """Where each object is, on the latents' grid: bool (frames, height, width)."""
        store = context.store
        frames, _, height, width = store.levels.shape[1:]
        heat = None
        if any(one.source is None for one in self.objects):
            heat = source_tokens_heat(context.denoiser, store, mask_sites(context.sites, 256), chunks)
        found = []
        for one in self.objects:
            if one.source is not None:
                found.append(_taken(one.source, frames, height, width))
                continue
            assert heat is not None
            own = over_maximum(heat[:, list(one.source_columns)].sum(1))[:, None]
            fine = F.interpolate(own, (height, width), mode="bilinear", align_corners=False)[:, 0]
            found.append((fine > self.object_threshold).cpu())
        return found

    def summary(self, steps: int) -> str:
        """What it does in so many steps, in a line."""
        return (
            f"moved {len(self.objects)} object(s): carried in {whole_steps(self.carry, steps)} of {steps} steps, "
            f"guided by {self.guided_calls(steps)} gradients"
        )


def moves_of(layout: Layout, source: str, source_tokens: int, target_tokens: int) -> MoveObjects:
    """A layout for the edit of a clip; source: the prompt of that, and how many tokens its text and the target's have.

    Raises ValueError for an object that neither a mask nor the source prompt tells of.
    """
    moved = []
    for one in layout.objects:
        found = layout.columns(one.words, target_tokens)
        known = [] if one.source is not None else layout.columns(one.words, source_tokens, source)
        moved.append(Moved(one.where, found, known, one.source))
    return MoveObjects(objects=moved, **vars(layout.settings))


# --- the way of an object ---------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Where an object is carried, frame by frame: centres (frames, 2) as (x, y) in shares of the picture, growth."""

    begin: Tensor
    end: Tensor
    growth: Tensor

    def carried(self, x: Tensor) -> Tensor:
        """(frames, c, h, w) as it is when all of it goes this way, by the nearest place; zeros come in."""
        frames, _, height, width = x.shape
        columns, rows = (self._from(axis, size) for axis, size in ((0, width), (1, height)))
        known = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        at = torch.arange(frames)[:, None, None]
        moved = x[at, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
        return moved.permute(0, 3, 1, 2) * known[:, None].to(x)

    def _from(self, axis: int, size: int) -> Tensor:
        """The index of the place that comes to each place along an axis: (frames, size)."""
        here = torch.arange(size) + 0.5
        away = here - self.end[:, axis, None] * size
        # A little more than nothing, so that rounding does not tear a shift by half a place apart.
        return torch.floor(self.begin[:, axis, None] * size + away / self.growth[:, None] + 1e-4).long()


def _way(source: Tensor, where: Path | Shift | Tensor) -> Way:
    """From where an object is, bool (frames, h, w), to where it shall be."""
    frames, height, width = source.shape
    begin, extent = bounds(source)
    if isinstance(where, Shift):
        stops = [where.at(frame) for frame in range(frames)]
        end = begin + torch.tensor([(stop.x, stop.y) for stop in stops])
        return Way(begin, end, torch.tensor([stop.growth for stop in stops]))
    if isinstance(where, Path):
        places = [where.at(frame) for frame in range(frames)]
        end = torch.tensor([(place.x, place.y) for place in places])
        size = torch.tensor([(place.width, place.height) for place in places])
    else:
        end, size = bounds(_taken(where, frames, height, width))
    growth = (size.prod(1) / extent.prod(1).clamp(min=1e-6)).sqrt()
    # One growth for the whole clip where all frames ask for about the same: attention trembles.
    middle = growth[source.flatten(1).any(1)].median() if source.any() else torch.ones(())
    growth = torch.where((growth / middle).log().abs() < torch.tensor(SAME).log(), middle, growth)
    same = growth.log().abs() < torch.tensor(SAME).log()
    return Way(begin, end, torch.where(same, torch.ones_like(growth), growth).clamp(0.05, 20))


def _taken(mask: Tensor, frames: int, height: int, width: int) -> Tensor:
    """The places that a mask takes by half: bool (frames, height, width)."""
    return (GivenMask(mask).at((height, width), frames) > 0.5).cpu()


def bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and extent of the box around a bool mask (frames, h, w), (frames, 2) each as (x, y) in shares.

    A frame without the object has its middle and all of it.
    """
    centres, extents = [], []
    for axis in (1, 2):  # what is left is x, then y
        along = mask.any(axis).float()
        size = along.shape[1]
        places = torch.arange(size)
        first = torch.where(along > 0, places, size).amin(1)
        last = torch.where(along > 0, places, -1).amax(1) + 1
        there = last > first
        centres.append(torch.where(there, (first + last) / (2 * size), 0.5))
        extents.append(torch.where(there, (last - first) / size, 1.0))
    return torch.stack(centres, 1), torch.stack(extents, 1)


# --- in one edit --------------------------------------------------------------------------------


class Rearranged:
    """Moved objects in one edit.

    area: (frames, h, w), where the clip changes: around where objects are, and where they shall be.
    """

    def __init__(
        self,
        settings: MoveObjects,
        context: EditContext,
        guidance: LayoutGuidance,
        ways: Sequence[Way],
        own: Sequence[Tensor],
        holes: Tensor,
        area: Tensor,
    ) -> None:
        """own: where each object shall be, holes: where any is, (frames, 1, h, w)."""
        self.guidance, self.area = guidance, area
        self._context, self._ways, self._own, self._holes = context, ways, own, holes
        self._carried_steps = whole_steps(settings.carry, context.steps)

    def started(self, z: Tensor, noisy: float) -> Tensor:
        """The latents of the first step: the holes filled with noise, of that deviation, the objects carried."""
        fill = torch.randn(1, *z.shape[1:], generator=torch.Generator().manual_seed(0)).to(z)
        return self._laid(z + self._holes * (noisy * fill - z), z)

    def carried(self, z: Tensor, level: int, step: int) -> Tensor:
        """The latents after a step, with the source's of that level carried to where objects shall be."""
        if step >= self._carried_steps:
            return z
        return self._laid(z, self._context.store.level(level).to(z.device, non_blocking=True))

    def _laid(self, z: Tensor, source: Tensor) -> Tensor:
        for way, own in zip(self._ways, self._own, strict=True):
            z = z + own * (way.carried(source) - z)
        return z

    def guides(self, step: int, steps: int) -> bool:
        return self.guidance.guides(step, steps)

    def moved(
        self, denoiser: Denoiser, latents: Tensor, timestep: float, alpha: Tensor, condition: Condition,
        key_frames: KeyFrames, clip_norm: bool, chunk_frames: int | None,
    ) -> Tensor:  # fmt: skip
        return self.guidance.moved(denoiser, latents, timestep, alpha, condition, key_frames, clip_norm, chunk_frames)
