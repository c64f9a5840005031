"""Encoding and decoding of whole clips by a causal video autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...diffusion.denoiser import check_finite
from ...files.safetensors import format_bytes
from ...store.budget import available_bytes
from .model import Model


class WholeClip(Model):
    """A model whose autoencoder encodes a clip's frames together; the first frame has its own latent."""

    @property
    def factor(self) -> int:
        return int(self.vae.config["scale_factor_spatial"])

    @property
    def frames_per_latent(self) -> int:
        return int(self.vae.config["scale_factor_temporal"])

    def frames_at_once(self, height: int, width: int) -> int | None:
        return None

    @torch.no_grad()
    def encode_clip(self, frames: Tensor) -> Tensor:
        """Repeats the last frame to complete the last latent."""
        missing = (self.latent_frames(len(frames)) - 1) * self.frames_per_latent + 1 - len(frames)
        pixels = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) * 2 - 1
        self._tile(*frames.shape[-2:])
        clip = pixels.to(self.device, self.vae.dtype).transpose(0, 1)[None]
        mean = self.vae.encode(clip).latent_dist.mean[0].float()
        shift, deviation = self._deviations(mean)
        return ((mean - shift) / deviation).transpose(0, 1).contiguous()

    @torch.no_grad()
    def decode_clip(self, latents: Tensor, frames: int) -> Tensor:
        self._tile(*(side * self.factor for side in latents.shape[-2:]))
        clip = latents.float().transpose(0, 1)
        shift, deviation = self._deviations(clip)
        clip = (clip * deviation + shift)[None].to(self.device, self.vae.dtype)
        pixels = self._decoded(clip)[0].transpose(0, 1)
        check_finite(pixels, "the decoded pictures")
        return (pixels[:frames].float() / 2 + 0.5).clamp(0, 1).cpu()

    def _decoded(self, clip: Tensor) -> Tensor:
        """The autoencoder's frames of unscaled latents (1, channels, f, h, w)."""
        decoded: Tensor = self.vae.decode(clip, return_dict=False)[0]
        return decoded

    def _deviations(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's channels, for (channels, f, h, w)."""
        values: list[Sequence[float]] = [self.vae.config["latents_mean"], self.vae.config["latents_std"]]
        mean, deviation = (torch.tensor(of).to(like).view(-1, 1, 1, 1) for of in values)
        return mean, deviation

    def _tile(self, height: int, width: int) -> None:
        """Enable tiling if memory is too small for whole frames."""
        free, needed = available_bytes(self.device), self._decoder_bytes(height, width)
        if free is not None and needed > 0.5 * free:
            self.vae.enable_tiling()

    def coding(self, height: int, width: int) -> str:
        self._tile(height, width)
        how = "in tiles" if self.vae.use_tiling else "whole"
        return f"frames {how}, about {format_bytes(self._decoder_bytes(height, width))} besides the weights"

    def _decoder_bytes(self, height: int, width: int) -> int:
        """Approximate bytes of the decoder's last level: three tensors of a chunk of frames in the widest channels, and
        the frames cached by the causal convolutions of each layer.
        """
        config, size = self.vae.config, int(self.vae.dtype.itemsize)
        layers = 2 * (int(config["num_res_blocks"]) + 1)
        return 2 * int(config["base_dim"]) * height * width * size * (3 * self.frames_per_latent + 2 * layers)
