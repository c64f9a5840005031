"""Encoding and decoding of clips frame by frame, by an image model's autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ...diffusion.denoiser import check_finite
from .model import Model


class FrameByFrame(Model):
    """A model with an `AutoencoderKL`: one latent per frame."""

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def frames_per_latent(self) -> int:
        return 1

    def frames_at_once(self, height: int, width: int) -> int:
        """One on a CPU; on a GPU as many pixels as eight frames of 512x512 in half precision."""
        pixels = 16 * 512 * 512 // self.vae.dtype.itemsize
        return 1 if self.device.type == "cpu" else max(1, pixels // (height * width))

    def coding_bytes(self, height: int, width: int) -> int:
        return int(6 * self.vae.config["block_out_channels"][0] * self.vae.dtype.itemsize * height * width)

    @torch.no_grad()
    def encode_posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of frames (f, 3, h, w) in 0..1."""
        means, deviations = [], []

        def encoded(frame: Tensor) -> Tensor:
            return torch.stack(self._posterior((2 * frame - 1).to(self.device, self.vae.dtype)))

        for frame in frames.split(self.frames_at_once(*frames.shape[-2:])):
            mean, deviation = self._finite(encoded, frame, "the encoded frames")
            shift, scale = self._statistics(mean)
            means.append((mean - shift) * scale)
            deviations.append(deviation * scale)
        return torch.cat(means), torch.cat(deviations)

    def _posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents of pictures in -1..1."""
        posterior = self.vae.encode(pictures).latent_dist
        return posterior.mean, posterior.std

    def _pictures(self, latents: Tensor) -> Tensor:
        """The pictures, in -1..1, of the autoencoder's latents."""
        pictures: Tensor = self.vae.decode(latents).sample
        return pictures

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames (f, 3, h, w) in 0..1 to scaled latents (f, channels, h / factor, w / factor) in the model's dtype."""
        return self.encode_posterior(frames)[0]

    def encode_clip(self, frames: Tensor) -> Tensor:
        return self.encode_frames(frames).float()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to frames in 0..1 on the CPU."""
        parts = []

        def decoded(latent: Tensor) -> Tensor:
            latent = latent.to(self.device, self.vae.dtype)
            shift, scale = self._statistics(latent)
            return self._pictures(latent / scale + shift)

        for latent in latents.split(self.frames_at_once(*(side * self.factor for side in latents.shape[-2:]))):
            pixels = self._finite(decoded, latent, "the decoded pictures")
            parts.append((pixels.float() / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(parts)

    def encode_parts(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.encode_clip(part) for part in parts])

    def decode_clip(self, latents: Tensor, frames: int) -> Tensor:
        return self.decode_latents(latents[:frames])

    def decode_parts(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        at_once = self.frames_at_once(*(side * self.factor for side in latents.shape[-2:]))
        for part in latents[:frames].split(at_once):
            yield self.decode_clip(part, len(part))

    def _finite(self, code: Callable[[Tensor], Tensor], x: Tensor, what: str) -> Tensor:
        """code(x); if half precision overflows, switch to single precision."""
        y = code(x)
        if self.vae.dtype == torch.float16 and not torch.isfinite(y).all():
            self.vae.to(torch.float32)
            y = code(x)
        check_finite(y, what)
        return y

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale): scaled latents are (latents - shift) * scale."""
        config = self.vae.config
        scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
        if not config.get("latents_mean") or not config.get("latents_std"):
            return shift, scale
        mean, deviation = (torch.tensor(config[f"latents_{name}"]).to(like).view(-1, 1, 1) for name in ("mean", "std"))
        return mean + shift, scale / deviation
