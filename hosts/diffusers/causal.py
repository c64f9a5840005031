"""Wan's autoencoder over the parts of a clip, in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, cat

Sides = tuple[int, ...]
"""Rows and columns."""
Code = Callable[[Sides, Tensor], Tensor]
"""Codes a tile at an origin."""


class TimeTiles:
    """Codes a clip in parts with an `AutoencoderKLWan`, whose causal convolutions carry their state from part to part.

    The result is that of the whole clip in one call. Large frames are coded in tiles if the autoencoder tiles.
    """

    def __init__(self, vae: Any) -> None:
        self._vae, self._patch = vae, int(vae.config["patch_size"] or 1)
        self._ratio = int(vae.spatial_compression_ratio)
        self._tile = vae.tile_sample_min_height, vae.tile_sample_min_width
        self._stride = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        self._states: dict[Sides, list[Any]] = {}
        """The state of the convolutions, by the origin of a tile."""

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the next latent, (1, c, 1, h / factor, w / factor), of frames (1, 3, f, h, w) in -1..1: one frame
        at first, then as many as a latent codes.
        """
        vae, count = self._vae, self._vae._cached_conv_counts["encoder"]

        def code(at: Sides, tile: Tensor) -> Tensor:
            state = self._states.setdefault(at, [None] * count)
            coded: Tensor = vae.quant_conv(vae.encoder(tile, feat_cache=state, feat_idx=[0]))
            return coded

        patches = patchify(pixels, self._patch)
        if not self._exceeds(pixels, self._tile):
            return code((0, 0), patches).chunk(2, 1)[0]
        scale = self._ratio // self._patch
        stride, tile = _over(self._stride, scale), _over(self._tile, scale)
        coded = self._tiled(patches, code, self._tile, self._stride, stride, tile)
        height, width = _over(patches.shape[-2:], scale)
        return coded[..., :height, :width].chunk(2, 1)[0]

    def decode(self, latent: Tensor) -> Tensor:
        """The frames, in -1..1, of the next latent (1, c, 1, h, w) in the autoencoder's scale."""
        vae, count, first = self._vae, self._vae._cached_conv_counts["decoder"], not self._states

        def code(at: Sides, tile: Tensor) -> Tensor:
            state = self._states.setdefault(at, [None] * count)
            decoded: Tensor = vae.decoder(vae.post_quant_conv(tile), feat_cache=state, feat_idx=[0], first_chunk=first)
            return decoded

        tile, stride = _over(self._tile, self._ratio), _over(self._stride, self._ratio)
        if self._exceeds(latent, tile):
            out = _over(self._stride, self._patch), _over(self._tile, self._patch)
            height, width = (side * self._ratio // self._patch for side in latent.shape[-2:])
            frames = self._tiled(latent, code, tile, stride, *out)[..., :height, :width]
        else:
            frames = code((0, 0), latent)
        pixels: Tensor = unpatchify(frames, self._patch).clamp(-1, 1)
        return pixels

    def _exceeds(self, frames: Tensor, tile: Sides) -> bool:
        return self._vae.use_tiling and any(side > most for side, most in zip(frames.shape[-2:], tile, strict=True))

    def _tiled(
        self, x: Tensor, code: Code, tile: Sides, stride: Sides, coded_stride: Sides, coded_tile: Sides
    ) -> Tensor:
        """The coded tiles, blended as in the autoencoder's own tiling."""
        blend = [of_tile - of_stride for of_tile, of_stride in zip(coded_tile, coded_stride, strict=True)]
        (height, width), above, rows = x.shape[-2:], list[Tensor](), list[Tensor]()
        for top in range(0, height, stride[0]):
            row: list[Tensor] = []
            for left in range(0, width, stride[1]):
                coded = code((top, left), x[..., top : top + tile[0], left : left + tile[1]])
                if above:
                    coded = self._vae.blend_v(above[len(row)], coded, blend[0])
                row.append(self._vae.blend_h(row[-1], coded, blend[1]) if row else coded)
            rows.append(cat([one[..., : coded_stride[0], : coded_stride[1]] for one in row], -1))
            above = row
        return cat(rows, -2)


def _over(sides: Sides, by: int) -> Sides:
    return tuple(side // by for side in sides)
