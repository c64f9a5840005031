"""Motion in a clip, and averages over time along it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..imports import F, torch
from .flow import Estimator

if TYPE_CHECKING:
    from torch import Tensor


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Sample (n, c, h, w) at x + flow(x), flow (n, 2, h, w) in pixels (dx, dy); zero outside."""
    n, _, h, w = frames.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    grid_x = (x.to(flow) + flow[:, 0] + 0.5) * 2 / w - 1
    grid_y = (y.to(flow) + flow[:, 1] + 0.5) * 2 / h - 1
    grid = torch.stack([grid_x, grid_y], -1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def inside(flow: Tensor) -> Tensor:
    """Where the flow ends inside the frame: boolean (n, h, w)."""
    n, _, h, w = flow.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at_x, at_y = x.to(flow) + flow[:, 0], y.to(flow) + flow[:, 1]
    return (at_x >= 0) & (at_x <= w - 1) & (at_y >= 0) & (at_y <= h - 1)


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels not occluded, after Lai et al.: boolean (n, h, w) from flows (n, 2, h, w).

    Occluded where |w~b + wf|^2 > 0.01 (|w~b|^2 + |wf|^2) + 0.5, w~b being the backward flow warped to frame t, or at
    motion boundaries, |grad wf|^2 > 0.01 |wf|^2 + 0.002. The paper defines it for the pixels of frame t + 1, with the
    flows swapped.
    """
    back = warp(backward, forward)
    size = (forward**2).sum(1) + (back**2).sum(1)
    consistent = ((forward + back) ** 2).sum(1) <= 0.01 * size + 0.5
    dx = F.pad(forward.diff(dim=-1), (0, 1))
    dy = F.pad(forward.diff(dim=-2), (0, 0, 0, 1))
    smooth = (dx**2 + dy**2).sum(1) <= 0.01 * (forward**2).sum(1) + 0.002
    return consistent & smooth & inside(forward)


@dataclass(frozen=True)
class Motion:
    """The optical flow between the frames of a clip, both ways.

    forward: from each frame to the next, backward: from each but the first to the previous one, (dx, dy) in cells:
    (frames - 1, 2, h, w). visible, visible_before: where the forward or backward flow is not occluded, 0 to 1:
    (frames - 1, h, w).
    """

    forward: Tensor
    backward: Tensor
    visible: Tensor
    visible_before: Tensor

    @classmethod
    def of(cls, frames: Iterable[Tensor], estimate: Estimator, reduce: int = 1) -> Motion:
        """Estimated from frames (3, h, w) in 0..1, two at a time. reduce: pixels per cell side."""
        parts = [_between(a, b, estimate, reduce) for a, b in pairwise(frames)]
        if not parts:
            raise ValueError("motion needs at least two frames")
        return cls(*(torch.stack(part) for part in zip(*parts, strict=True)))

    @property
    def frames(self) -> int:
        return len(self.forward) + 1

    def between(self, frames: Sequence[int]) -> Motion:
        """The motion between some frames, in order: the flow followed through the frames between them."""
        parts = [self._across(first, last) for first, last in pairwise(frames)]
        return Motion(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _across(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps = range(first, last)
        forward, shown = _followed(self.forward, self.visible, steps)
        backward, before = _followed(self.backward, self.visible_before, steps[::-1])
        return forward, backward, shown, before

    def of_latents(self, count: int) -> Motion:
        """The motion between the latents of a causal autoencoder: the first codes one frame, the others several each,
        whose middle they represent.
        """
        each = (self.frames - 1) / max(count - 1, 1)
        return self.between([0, *(round(i * each - (each - 1) / 2) for i in range(1, count))])

    def at(self, size: tuple[int, int]) -> Motion:
        """The motion on another grid: area interpolation to a coarser one, bilinear to a finer one."""
        height, width = self.forward.shape[-2:]
        if size == (height, width):
            return self
        scale = torch.tensor([size[1] / width, size[0] / height]).view(2, 1, 1).to(self.forward)

        def resized(x: Tensor) -> Tensor:
            finer = size[0] > height
            return F.interpolate(
                x, size=size, mode="bilinear" if finer else "area", align_corners=False if finer else None
            )

        flows = [resized(flow) * scale for flow in (self.forward, self.backward)]
        shown = [resized(s[:, None])[:, 0] for s in (self.visible, self.visible_before)]
        return Motion(*flows, *shown)

    def to(self, like: Tensor) -> Motion:
        """The motion on the device and in the dtype of a tensor."""
        return Motion(*(t.to(like) for t in (self.forward, self.backward, self.visible, self.visible_before)))


def _followed(flows: Tensor, shown: Tensor, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The sum of flows along a path, (1, 2, h, w), and where all of it is visible, (1, h, w)."""
    first, *rest = steps
    flow, seen = flows[first][None], shown[first][None]
    for step in rest:
        seen = seen * warp(shown[step][None, None], flow)[:, 0]
        flow = flow + warp(flows[step][None], flow)
    return flow, seen


def _between(a: Tensor, b: Tensor, estimate: Estimator, reduce: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward, backward = estimate(a, b)[None], estimate(b, a)[None]
    shown, before = visible(forward, backward).float(), visible(backward, forward).float()
    flows = [F.avg_pool2d(flow, reduce)[0] / reduce for flow in (forward, backward)]
    return (*flows, *(F.avg_pool2d(s[:, None], reduce)[0, 0] for s in (shown, before)))  # type: ignore[return-value]


def averaged_along(values: Tensor, motion: Motion, amount: float) -> Tensor:
    """Values (frames, c, h, w) on the motion's grid, averaged over time along it.

    A recursive average: each frame takes the share `amount` of the previous result where that is visible. The mean of
    a forward and a backward pass; 0 changes nothing.
    """
    onwards = _recursive_mean(values, motion.backward, amount * motion.visible_before)
    back = _recursive_mean(values.flip(0), motion.forward.flip(0), amount * motion.visible.flip(0)).flip(0)
    return (onwards + back) / 2


def _recursive_mean(values: Tensor, flow: Tensor, weights: Tensor) -> Tensor:
    """Each frame mixed with the previous result, warped by the flow to it."""
    done = [values[0]]
    for value, to_before, weight in zip(values[1:], flow, weights, strict=True):
        before = warp(done[-1][None], to_before[None])[0]
        done.append(value + weight * (before - value))
    return torch.stack(done)


BETTER = 1.3
"""The least ratio of the squared errors at which a neighbour's motion replaces a place's own."""


def motion_of_edit(edited: Tensor, motion: Motion) -> Motion:
    """The motion of an edit (frames, c, h, w) on its grid, chosen at each place from the source's motions nearby.

    Where an outline changes, the source's motion is wrong: ground that the edit reveals does not move with the object
    that it replaces. Each place takes its own motion, or that of a place at most a sixteenth of the frame away which
    explains the edit's next frame better.
    """
    before = _explained(edited, motion.backward, motion.visible_before)
    after = _explained(edited.flip(0), motion.forward.flip(0), motion.visible.flip(0))
    return Motion(after[0].flip(0), before[0], after[1].flip(0), before[1])


def _explained(frames: Tensor, flow: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """The flow from each frame but the first to the previous one, and where it is not occluded."""
    reach = max(1, min(frames.shape[-2:]) // 16)
    steps = [(0, 0), *((y, x) for y in (-reach, 0, reach) for x in (-reach, 0, reach) if y or x)]
    own = torch.cat([flow, shown[:, None]], 1)
    found, least = own, torch.zeros(0)
    for y, x in steps:
        there = _shifted(own, y, x, reach)
        error = _blurred(((warp(frames[:-1], there[:, :2]) - frames[1:]) ** 2).mean(1, keepdim=True))
        if not (y or x):
            least = error / BETTER
            continue
        better = error < least
        found, least = torch.where(better, there, found), torch.where(better, error, least)
    return found[:, :2], found[:, 2]


def _shifted(x: Tensor, down: int, right: int, reach: int) -> Tensor:
    """The values `down` and `right` of each place, at most `reach`; at the rim those of the nearest place."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    return padded[..., reach + down : reach + down + height, reach + right : reach + right + width]


def smooth_along(source: Tensor, edited: Tensor, motion: Motion, amount: float) -> Tensor:
    """An edit (frames, c, h, w) averaged over time along the motion of its source, where the edit moves likewise.

    Averages the difference to the source, which is mostly smooth, so that errors of the flow lose little detail; and
    the edit itself, which is smoother where the edit removes a texture. At each place, the average that changes the
    edit less has the larger weight.
    """
    along = motion_of_edit(edited, motion.at((source.shape[-2], source.shape[-1])).to(edited))
    by_difference = source + averaged_along(edited - source, along, amount)
    by_itself = averaged_along(edited, along, amount)
    changes = [_blurred(((found - edited) ** 2).mean(1, keepdim=True)) for found in (by_difference, by_itself)]
    share = changes[1] / (changes[0] + changes[1]).clamp(min=torch.finfo(edited.dtype).tiny)
    return by_itself + share * (by_difference - by_itself)


def _blurred(x: Tensor) -> Tensor:
    """The mean over each place and its neighbours (3x3)."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
