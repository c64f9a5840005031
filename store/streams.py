"""The streams of latents that a host packs into one tensor: a video and its sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from einops import rearrange

from ..attention.key_frames import Chunk
from ..attention.masks import GivenMask
from ..attention.packed import PackedChunk
from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .store import AttentionStore

SHAPES = "shapes"
"""The key in a store's `extra` of the streams' shapes, (1, channels, frames, height, width) of the video first."""

KEEPS_SOUND = "keeps_sound"
"""The key in a store's `extra` for whether edits keep the sound."""


def shapes_in(store: AttentionStore) -> Sequence[Sequence[int]]:
    """The shapes of the streams; none for a single one."""
    found: Any = store.extra.get(SHAPES, ())
    return found


def with_shapes(extra: dict[str, Any] | None, denoiser: Any) -> dict[str, Any]:
    """A store's `extra`, with the shapes of the streams of a denoiser that packs its latents (`shapes`)."""
    shapes = [list(shape) for shape in getattr(denoiser, "shapes", ())]
    return ({SHAPES: shapes} if shapes else {}) | (extra or {})


def video_shape(store: AttentionStore) -> tuple[int, int, int]:
    """Frames, height and width of the video in a store's latents."""
    shapes = shapes_in(store)
    frames, height, width = shapes[0][-3:] if shapes else (store.frames, *store.levels.shape[-2:])
    return frames, height, width


def video_frames(store: AttentionStore, chunk: Chunk) -> list[int]:
    """The video's frames in a chunk of a store's latents."""
    packed = shapes_in(store) and not isinstance(chunk, PackedChunk)  # the whole clip is one row
    return list(range(video_shape(store)[0]) if packed else chunk.frame_indices)


def video_of(store: AttentionStore, latents: Tensor) -> Tensor:
    """The video of a store's latents: (frames, c, h, w)."""
    shapes = shapes_in(store)
    if not shapes:
        return latents
    flat = latents.reshape(-1)[: math.prod(shapes[0])]
    return rearrange(flat.reshape(tuple(shapes[0])), "1 c f h w -> f c h w")


def with_video(store: AttentionStore, latents: Tensor, video: Tensor) -> Tensor:
    """A store's latents with another video, (frames, c, h, w)."""
    if not shapes_in(store):
        return video
    flat = rearrange(video, "f c h w -> (c f h w)")
    return torch.cat([flat, latents.reshape(-1)[len(flat) :]]).view(latents.shape)


def mask_of_all(
    store: AttentionStore, mask: Tensor, given: GivenMask | None = None, chunk: Chunk | None = None
) -> Tensor:
    """A mask (frames, h, w) of the video on a store's latents, (frames, h, w) on their grid; on the sound that of a
    given mask of all streams, else 1. chunk: of the mask's frames.
    """
    shapes = chunk.shapes if isinstance(chunk, PackedChunk) else shapes_in(store)
    if not shapes:
        return mask
    video = rearrange(mask, "f h w -> 1 1 f h w").expand(tuple(shapes[0])).reshape(-1)
    if given is not None and _covers_all(store, given):
        of_all = given.mask[None] if chunk is None or chunk.is_whole else chunk.cut(given.mask[None])
        return torch.cat([video, of_all.reshape(-1)[len(video) :].to(mask)])[None, None]
    sound = [torch.ones(math.prod(shape)).to(mask) for shape in shapes[1:]]
    return torch.cat([video, *sound])[None, None]


def mask_of_video(store: AttentionStore, given: GivenMask) -> GivenMask:
    """The video's part of a given mask."""
    if not _covers_all(store, given):
        return given
    return replace(given, mask=video_of(store, given.mask).amax(1))


def mask_of_latents(store: AttentionStore, given: GivenMask) -> Tensor:
    """A given mask, of the video or of all streams, on a store's latents: (frames, h, w) on their grid."""
    if _covers_all(store, given):
        return given.at((store.levels.shape[-2], store.levels.shape[-1]), store.frames)
    frames, height, width = video_shape(store)
    return mask_of_all(store, given.at((height, width), frames))


def with_kept_sound(store: AttentionStore, z: Tensor, kept: Tensor) -> Tensor:
    """The latents z of an edit with the sound of `kept`, if edits of the store keep it."""
    if not store.extra.get(KEEPS_SOUND):
        return z
    video = math.prod(shapes_in(store)[0])
    return torch.cat([z[..., :video], kept[..., video:].to(z)], -1)


def _covers_all(store: AttentionStore, given: GivenMask) -> bool:
    """Whether a mask is packed as a store's latents are."""
    return bool(shapes_in(store)) and given.mask.shape[1:] == store.levels.shape[-2:]
