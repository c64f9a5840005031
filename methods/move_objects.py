"""Moving objects of an existing clip, which the paper of cross-attention guidance (arXiv 2404.05519) does not cover.

An object's inverted noise is copied to its new place, and the hole is filled with noise; backward guidance keeps the
words' attention there; the injection (FateZero) preserves the rest. The source's attention to the words locates the
object in the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.key_frames import Chunk, ClipCalls
from ..attention.masks import GivenMask, grown, mask_sites, over_maximum
from ..diffusion.denoiser import Denoiser
from ..diffusion.parts import Edit, EditContext, check_needs_unet
from ..diffusion.prompt_mask import source_tokens_heat
from ..imports import F, torch
from ..settings import setting, setting_like, whole_steps
from .layout import APPEARANCE, Layout, Path, Shift, Swap
from .layout_guidance import GROUP, Energy, LayoutGuidance, LayoutSettings, ObjectTarget

if TYPE_CHECKING:
    from torch import Tensor

SAME = 1.15
"""Growths below this factor or above its inverse count as 1: attention measures sizes no better."""


@dataclass(frozen=True, kw_only=True)
class MoveSettings(LayoutSettings):
    """How objects of a clip are moved; the guidance is what moved demo objects best. Raises ValueError out of range."""

    energy: Energy = setting_like(LayoutSettings, "energy", "inside")
    scale: float = setting_like(LayoutSettings, "scale", 60.0)
    most_change: float = setting_like(LayoutSettings, "most_change", 0.1)
    carry: float = setting(
        0.7,
        "In edits: share of steps in which the source's latents of a moved object are copied to its new place. Higher "
        "values preserve its looks, lower ones let it change.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    object_threshold: float = setting(
        0.4, "In edits: attention to its words, as a share of the frame's maximum, that counts as the object if it has "
        "no mask.", least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """An object of a clip, and where it should be.

    where: a path, a shift, or a mask (frames or 1, height, width) in 0..1. columns: of its words in the target text.
    source_columns: in the source text, whose attention locates it; or source, a mask of its place in the clip, (frames
    or 1, height, width). Raises ValueError without both.
    """

    where: Path | Shift | Tensor
    columns: Sequence[int]
    source_columns: Sequence[int] = ()
    source: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.source_columns and self.source is None:
            raise ValueError("an object to move needs words in the source prompt, or an object mask")


@dataclass(frozen=True)
class MoveObjects(MoveSettings):
    """Objects of an edited clip, moved: for `edit(..., layout=...)`.

    Raises ValueError for forward guidance, which cannot move objects.
    """

    objects: Sequence[Moved]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "forward":
            raise ValueError("mode is forward; edits need backward")
        if not self.objects:
            raise ValueError("objects is empty: give at least one")

    keeps_rest = True

    def check(self, edit: Edit, spans_clip: bool) -> None:
        check_needs_unet("A layout", spans_clip)

    def prepared(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> Rearranged:
        """The denoiser must be hooked. Raises ValueError for masks or a text that do not fit."""
        sources = self._sources(context, chunks)
        ways = [_way(source, one.where) for source, one in zip(sources, self.objects, strict=True)]
        before = [source[:, None].float() for source in sources]
        after = [way.applied(mask) for way, mask in zip(ways, before, strict=True)]
        targets = [ObjectTarget(mask[:, 0], one.columns) for mask, one in zip(after, self.objects, strict=True)]
        guidance = LayoutGuidance.of(targets, self)
        guidance.check_fits(context.store.frames, context.target.text_tokens)
        like = context.latents_like
        area = grown(torch.stack([*before, *after]).amax(0)[:, 0]).to(like)
        holes = torch.stack(before).amax(0).to(like)
        return Rearranged(self, context, guidance, ways, [mask.to(like) for mask in after], holes, area)

    def _sources(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> list[Tensor]:
        """The place of each object on the latents' grid: bool (frames, height, width)."""
        store = context.store
        frames, _, height, width = store.levels.shape[1:]
        heat = None
        if any(one.source is None for one in self.objects):
            heat = source_tokens_heat(context.denoiser, store, mask_sites(context.sites, 256), chunks)
        found = []
        for one in self.objects:
            if one.source is not None:
                found.append(_covered(one.source, frames, height, width))
                continue
            assert heat is not None
            own = over_maximum(heat[:, list(one.source_columns)].sum(1))[:, None]
            fine = F.interpolate(own, (height, width), mode="bilinear", align_corners=False)[:, 0]
            found.append((fine > self.object_threshold).cpu())
        return found

    def summary(self, steps: int) -> str:
        """One line of text about an edit of `steps` steps."""
        return (
            f"moved {len(self.objects)} object(s): copied in {whole_steps(self.carry, steps)} of {steps} steps, "
            f"guided by {self.guided_calls(steps)} gradients"
        )


def moves_of(layout: Layout, source: str, source_tokens: int, target_tokens: int) -> MoveObjects:
    """The moved objects of a layout. source: the clip's prompt; source_tokens, target_tokens: of the two texts.

    Raises ValueError for an object without a mask whose words are not in the source prompt.
    """
    if layout.settings.appearance:
        raise ValueError(APPEARANCE)
    moved = []
    for one in layout.objects:
        if isinstance(one.where, Swap):
            raise ValueError(f"{one.words!r}: swap works in new clips; in an edit use --shift or --box")
        found = layout.columns(one.words, target_tokens)
        known = [] if one.source is not None else layout.columns(one.words, source_tokens, source)
        moved.append(Moved(one.where, found, known, one.source))
    return MoveObjects(objects=moved, **vars(layout.settings))


# --- the movement of an object ----------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """An object's movement by frame: centres (frames, 2) as (x, y) in shares of the frame, and growth (frames,)."""

    begin: Tensor
    end: Tensor
    growth: Tensor

    def applied(self, x: Tensor) -> Tensor:
        """Move all of (frames, c, h, w) by nearest-neighbour sampling, with zeros from outside."""
        frames, _, height, width = x.shape
        columns, rows = (self._from(axis, size) for axis, size in ((0, width), (1, height)))
        known = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        at = torch.arange(frames)[:, None, None]
        moved = x[at, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
        return moved.permute(0, 3, 1, 2) * known[:, None].to(x)

    def _from(self, axis: int, size: int) -> Tensor:
        """The source index of each place along an axis: (frames, size)."""
        distance = torch.arange(size) + 0.5 - self.end[:, axis, None] * size
        # The epsilon keeps rounding from splitting a shift by half a place.
        return torch.floor(self.begin[:, axis, None] * size + distance / self.growth[:, None] + 1e-4).long()


def _way(source: Tensor, where: Path | Shift | Tensor) -> Way:
    """The movement of an object from its place, bool (frames, h, w)."""
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
        end, size = bounds(_covered(where, frames, height, width))
    growth = (size.prod(1) / extent.prod(1).clamp(min=1e-6)).sqrt()
    # Use one growth for the whole clip where frames nearly agree, since attention fluctuates.
    middle = growth[source.flatten(1).any(1)].median() if source.any() else torch.ones(())
    growth = torch.where((growth / middle).log().abs() < torch.tensor(SAME).log(), middle, growth)
    same = growth.log().abs() < torch.tensor(SAME).log()
    return Way(begin, end, torch.where(same, torch.ones_like(growth), growth).clamp(0.05, 20))


def _covered(mask: Tensor, frames: int, height: int, width: int) -> Tensor:
    """The places that a mask covers by more than half: bool (frames, height, width)."""
    return (GivenMask(mask).at((height, width), frames) > 0.5).cpu()


def bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and size of the bounding box of a bool mask (frames, h, w): (frames, 2) each, (x, y) as shares.

    For a frame without the object, the whole frame.
    """
    centres, extents = [], []
    for axis in (1, 2):  # leaves x, then y
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

    area: (frames, h, w), where the clip may change: around the objects' old and new places.
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
        """own: the new place of each object, holes: the old places, (frames, 1, h, w)."""
        self.guidance, self.area = guidance, area
        self._context, self._ways, self._own, self._holes = context, ways, own, holes
        self._copied_steps = whole_steps(settings.carry, context.steps)

    def initial(self, z: Tensor, noisy: float) -> Tensor:
        """The latents of the first step: holes filled with noise of this deviation, objects copied."""
        fill = torch.randn(1, *z.shape[1:], generator=torch.Generator().manual_seed(0)).to(z)
        return self._copied(z + self._holes * (noisy * fill - z), z)

    def after_step(self, z: Tensor, level: int, step: int) -> Tensor:
        """The latents after a step, with the source's latents of objects copied to their new places."""
        if step >= self._copied_steps:
            return z
        return self._copied(z, self._context.store.level(level).to(z.device, non_blocking=True))

    def _copied(self, z: Tensor, source: Tensor) -> Tensor:
        for way, own in zip(self._ways, self._own, strict=True):
            z = z + own * (way.applied(source) - z)
        return z

    def guides(self, step: int, steps: int) -> bool:
        return self.guidance.guides(step, steps)

    def moved(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        timestep: float,
        alpha: Tensor,
        condition: Condition,
        calls: ClipCalls,
    ) -> Tensor:
        return self.guidance.moved(denoiser, latents, timestep, alpha, condition, calls)
