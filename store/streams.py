"""The streams of latents that a host packs into one tensor: a video and its sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from einops import rearrange

from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .store import AttentionStore

SHAPES = "shapes"
"""The key in a store's `extra` of the streams' shapes, (1, channels, frames, height, width) of the video first."""


def shapes_in(store: AttentionStore) -> Sequence[Sequence[int]]:
    """The shapes of the streams; none for a single one."""
    found: Any = store.extra.get(SHAPES, ())
    return found


def video_of(store: AttentionStore, latents: Tensor) -> Tensor:
    """The video of a store's latents: (frames, c, h, w)."""
    shapes = shapes_in(store)
    if not shapes:
        return latents
    flat = latents.reshape(-1)[: math.prod(shapes[0])]
    return rearrange(flat.reshape(tuple(shapes[0])), "1 c f h w -> f c h w")


def mask_of_all(store: AttentionStore, mask: Tensor) -> Tensor:
    """A mask (frames, h, w) of the video on a store's latents, 1 on the sound: (frames, h, w) on their grid."""
    shapes = shapes_in(store)
    if not shapes:
        return mask
    video = rearrange(mask, "f h w -> 1 1 f h w").expand(tuple(shapes[0]))
    sound = [torch.ones(math.prod(shape)).to(mask) for shape in shapes[1:]]
    return torch.cat([video.reshape(-1), *sound])[None, None]
