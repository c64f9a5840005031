"""LATENT samples in a MODEL's scale; those of video with sound packed into one tensor, as in the host's samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...attention.key_frames import Windows
from ...attention.masks import GivenMask, mask_by_latent
from ...diffusion.invert import InversionSettings

Shapes = Sequence[Sequence[int]]
"""The shapes of the streams of a LATENT: a video or picture, and its sound if any."""

BLOCKS = {"MiniMaxH3Video": 17, "MiniMaxH3AV": 17}
"""The frames that an autoencoder encodes apart from the next ones, by latent format; others encode the whole clip."""
RATIOS = {"Wan21": 4, "HunyuanVideo": 4, "Mochi": 6, "LTXV": 8, "Cosmos1CV8x8x8": 8}
"""Frames in a latent frame by latent format, for hosts whose formats do not have them (such as 0.3.64)."""


def streams(samples: Any) -> list[Tensor]:
    """The streams of LATENT samples."""
    return list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]


def shapes_of(samples: Any) -> Shapes:
    return [tuple(stream.shape) for stream in streams(samples)]


def packed(samples: Any) -> Tensor:
    """The samples of one stream as they are; those of several as one tensor (1, 1, n)."""
    parts = streams(samples)
    flat: Tensor = parts[0] if len(parts) == 1 else comfy.utils.pack_latents(parts)[0]
    return flat


def nested(parts: Sequence[Tensor]) -> Any:
    """The samples of these streams, the inverse of `streams`."""
    if len(parts) == 1:
        return parts[0]
    from comfy.nested_tensor import NestedTensor  # hosts without it have no streams

    return NestedTensor(list(parts))


def unpacked(flat: Tensor, shapes: Shapes) -> Any:
    """The inverse of `packed`."""
    return nested(unpacked_parts(flat, shapes))


def unpacked_parts(flat: Tensor, shapes: Shapes) -> list[Tensor]:
    """The streams of packed samples."""
    return [flat] if len(shapes) < 2 else list(comfy.utils.unpack_latents(flat, shapes))


def zeros_like(samples: Any) -> Any:
    return unpacked(torch.zeros_like(packed(samples)), shapes_of(samples))


def into_model(model: Any, samples: Any) -> Tensor:
    """LATENT samples in a MODEL's scale, packed."""
    model.model.latent_shapes = shapes_of(samples)  # as the host's sampling sets it, for models that scale their sound
    scaled: Tensor = model.model.process_latent_in(packed(samples).float())
    return scaled


def out_of_model(model: Any, latents: Tensor, shapes: Shapes) -> Any:
    """The inverse of `into_model`. shapes: of the streams, if several."""
    model.model.latent_shapes = shapes or None
    return unpacked(model.model.process_latent_out(latents), shapes)


# --- masks ----------------------------------------------------------------------------------


def mask_of_latents(model: Any, mask: Tensor, latents: int) -> Tensor:
    """A mask of a clip's frames as one of its latents, each of which may hold several frames: their maximum.

    mask: (frames, height, width); one frame, or one for each latent, is returned as it is. The last one is repeated for
    latents that complete a block. Raises ValueError for another number of frames than the latents hold.
    """
    if len(mask) in (1, latents):
        return mask
    own = _latents_of(model, len(mask))
    missing = latents - 1 - own[-1]
    if not 0 <= missing < _latents_of_block(model):
        raise ValueError(
            f"mask: has {len(mask)} frames, but the clip has {latents} latent frames: give one, or one for each frame "
            "of the clip"
        )
    found = mask_by_latent(mask, own)
    return torch.cat([found, mask[-1:].expand(missing, -1, -1)])


def mask_of_frames(model: Any, mask: Tensor) -> Tensor:
    """A mask of a clip's latents (latents, h, w) as one of the most frames that they hold: (frames, h, w)."""
    own = _latents_of(model, len(mask) * _frames_per_latent(model))
    return mask[[latent for latent in own if latent < len(mask)]]


def windows_of_video(model: Any, frames: int, overlap: int) -> Windows | None:
    """The windows of so many frames of the video, 0 for the model's own; an overlap of 0 is half a window.

    Raises ValueError for an overlap without frames.
    """
    if overlap and not frames:
        raise ValueError(f"window_overlap is {overlap}, but window_frames is 0: give both, or leave both at 0")
    chosen = InversionSettings(window_frames=frames or None, window_overlap=overlap or None)
    ratio, block = _frames_per_latent(model), BLOCKS.get(type(model.model.latent_format).__name__)
    if block is None or not frames:
        return chosen.windows(ratio)
    latents, (blocks, rest) = _latents_of(model, frames)[-1] + 1, divmod(overlap, block)
    shared = min(blocks * _latents_of_block(model) - (-rest // ratio), latents - 1)
    return Windows(latents, shared if overlap else latents // 2)


def _frames_per_latent(model: Any) -> int:
    latent_format = model.model.latent_format
    older = next((RATIOS[kind.__name__] for kind in type(latent_format).__mro__ if kind.__name__ in RATIOS), 1)
    return int(getattr(latent_format, "temporal_downscale_ratio", older))


def _latents_of_block(model: Any) -> int:
    """The latents of a whole block; 1 in formats without blocks."""
    block = BLOCKS.get(type(model.model.latent_format).__name__, 1)
    return 1 + (block - 1) // _frames_per_latent(model)


def _latents_of(model: Any, frames: int) -> list[int]:
    """The latent of each frame: in each block the first frame has its own, and the others share each one by the
    format's ratio.
    """
    ratio, block = _frames_per_latent(model), BLOCKS.get(type(model.model.latent_format).__name__, frames)
    parts = (divmod(frame, block) for frame in range(frames))
    return [blocks * _latents_of_block(model) - (-within // ratio) for blocks, within in parts]


def packed_mask(model: Any, mask: Any, shapes: Shapes, sound: float) -> Tensor:
    """The mask of a LATENT of several streams, (1, 1, n) as `packed` has its samples.

    mask: (frames, height, width) of the video, the noise mask of the LATENT, or None for the whole video. sound: the
    mask of streams without their own, 0 to keep them and 1 to edit them.
    """
    own, parts = [] if mask is None else streams(mask), []
    for i, shape in enumerate(map(tuple, shapes)):
        if i >= len(own):
            parts.append(torch.full(shape, sound if i else 1.0))
        elif i:
            parts.append(own[i].float().expand(shape))
        else:
            frames, *grid = shape[-3:]
            video = mask_of_latents(model, own[0].float().reshape(-1, *own[0].shape[-2:]), frames)
            parts.append(GivenMask(video).at((grid[0], grid[1]), frames).expand(shape))
    flat: Tensor = comfy.utils.pack_latents([part.cpu() for part in parts])[0]
    return flat
