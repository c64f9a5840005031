"""Encoding and decoding of whole clips by a causal video autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from ...diffusion.denoiser import check_finite
from ...files.safetensors import format_bytes
from ...store.budget import available_bytes
from .causal import TimeTiles
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
        return self._scaled(self.vae.encode(clip).latent_dist.mean[0].float())

    def encode_parts(self, parts: Iterable[Tensor]) -> Tensor:
        return self.encode_clip(torch.cat(list(parts)))

    @torch.no_grad()
    def decode_clip(self, latents: Tensor, frames: int) -> Tensor:
        self._tile(*(side * self.factor for side in latents.shape[-2:]))
        return self._frames(self._decoded(self._unscaled(latents)))[:frames]

    def decode_parts(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        yield self.decode_clip(latents, frames)

    def _scaled(self, mean: Tensor) -> Tensor:
        """The model's latents (f, channels, h, w) of the autoencoder's (channels, f, h, w)."""
        shift, deviation = self._deviations(mean)
        return ((mean - shift) / deviation).transpose(0, 1).contiguous()

    def _unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents (1, channels, f, h, w) of the model's (f, channels, h, w)."""
        clip = latents.float().transpose(0, 1)
        shift, deviation = self._deviations(clip)
        return (clip * deviation + shift)[None].to(self.device, self.vae.dtype)

    def _frames(self, decoded: Tensor) -> Tensor:
        """Frames (f, 3, h, w) in 0..1 on the CPU, of the autoencoder's (1, 3, f, h, w) in -1..1."""
        pixels = decoded[0].transpose(0, 1)
        check_finite(pixels, "the decoded pictures")
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

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


class TimeTiled(WholeClip):
    """A model with Wan's autoencoder, which codes a clip in parts: memory does not grow with the clip."""

    def frames_at_once(self, height: int, width: int) -> int | None:
        return self.frames_per_latent

    @torch.no_grad()
    def encode_parts(self, parts: Iterable[Tensor]) -> Tensor:
        """Repeats the last frame to complete the last latent."""
        frames, tiles, means, count = chain.from_iterable(parts), TimeTiles(self.vae), list[Tensor](), 1
        while part := list(islice(frames, count)):
            part += [part[-1]] * (count - len(part))
            self._tile(*part[0].shape[-2:])
            pixels = (torch.stack(part, 1)[None] * 2 - 1).to(self.device, self.vae.dtype)
            means.append(tiles.encode(pixels)[0].float())
            count = self.frames_per_latent
        return self._scaled(torch.cat(means, 1))

    @torch.no_grad()
    def decode_parts(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        self._tile(*(side * self.factor for side in latents.shape[-2:]))
        tiles, done = TimeTiles(self.vae), 0
        for latent in latents:
            pictures = self._frames(tiles.decode(self._unscaled(latent[None])))[: frames - done]
            done += len(pictures)
            yield pictures
