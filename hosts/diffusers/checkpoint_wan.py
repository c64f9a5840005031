"""A Wan checkpoint by path or name: its transformers with their text and video coding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import T5Tokenizer, UMT5EncoderModel

from ...attention.condition import Condition
from ...diffusion.denoiser import check_finite
from ...files.bundled import DEMO
from ...files.safetensors import format_bytes
from ...models.wan import WAN
from ...store.budget import available_bytes
from ...store.identity import ModelIdentity
from .checkpoint import fused, lora_files
from .model_files import CheckpointError, check_weights, check_whole, opened
from .wan import VideoTransformerDenoiser

NAME = "demo-wan"
TEXT_TOKENS = 512
"""Of Wan's prompts, padding included; longer ones have as many as they need."""
NATIVE_SIZE = 480
"""The short side that Wan 2.1 was trained on."""


@dataclass(frozen=True)
class WanCheckpoint:
    """The parts of a Wan 2.1 or 2.2 text-to-video model.

    low_noise, boundary: 2.2's second transformer, and the sigma below which it takes over. device: where it runs; its
    parts may wait elsewhere. notes: what was added to it, a line each.
    """

    name: str
    transformer: WanTransformer3DModel
    vae: Any
    scheduler: Any
    tokenizer: Any
    text_encoder: Any
    device: torch.device
    low_noise: WanTransformer3DModel | None = None
    boundary: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        lora: str | Sequence[str] | None = None,
        lora_scale: float = 1.0,
        variant: str | None = None,
    ) -> WanCheckpoint:
        """Load "demo-wan", a diffusers folder or a hub name; only the last uses the network.

        lora: LoRA files, as `Checkpoint.load` takes them. Both transformers of 2.2 take one, or that which its name
        says: high_noise or low_noise. variant: of the weights in its folders, as "fp16".
        Where a GPU has no room for all parts at once, each waits in RAM until it is called (model offloading).
        Raises CheckpointError, saying what was looked for.
        """
        device = torch.device(device)
        loras = lora_files(lora, lora_scale)
        if name == NAME:
            demo = cls.of_demo(device, dtype)
            return replace(demo, notes=fused(demo, loras))

        def read(where: Any, **local: Any) -> Any:
            if isinstance(where, Path):
                check_weights(where, DiffusionPipeline.load_config(where, **local), variant)
            return DiffusionPipeline.from_pretrained(where, torch_dtype=dtype, variant=variant or None, **local)

        pipeline: Any = opened(name, read)
        if not isinstance(getattr(pipeline, "transformer", None), WanTransformer3DModel):
            raise CheckpointError(f"{name} is a {type(pipeline).__name__} without a Wan transformer for text to video")
        check_whole(name, pipeline)
        notes = fused(pipeline, loras)
        if dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # whose numbers leave half precision's range
        low_noise = getattr(pipeline, "transformer_2", None)
        parts = [pipeline.transformer, low_noise, pipeline.vae, pipeline.text_encoder]
        for part in parts:
            if part is not None:
                part.eval().requires_grad_(False)
        weights = sum(p.nbytes for part in parts if part is not None for p in part.parameters())
        free = available_bytes(device)
        if device.type == "cuda" and free is not None and weights > 0.7 * free:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        return cls(
            name, pipeline.transformer, pipeline.vae, pipeline.scheduler, pipeline.tokenizer, pipeline.text_encoder,
            device, low_noise, pipeline.config.get("boundary_ratio") if low_noise is not None else None, notes,
        )  # fmt: skip

    @classmethod
    def of_demo(
        cls, device: torch.device, dtype: torch.dtype = torch.float32, folder: Path | None = None
    ) -> WanCheckpoint:
        """The demo world's, whose autoencoder is that of its image model; `folder` in the place of the bundled one."""
        folder = folder or WAN.demo_folder
        if not folder.is_dir():
            raise CheckpointError(f"no model at {folder}")
        local: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        parts = [
            WanTransformer3DModel.from_pretrained(folder / "transformer", **local),
            AutoencoderKL.from_pretrained(DEMO / "vae", **local),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True),
        ]
        transformer, vae, text_encoder = (part.to(device).eval().requires_grad_(False) for part in parts)
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        return cls(NAME, transformer, vae, scheduler, tokenizer, text_encoder, device)

    @cached_property
    def denoiser(self) -> VideoTransformerDenoiser:
        return VideoTransformerDenoiser(self.transformer, self.scheduler, self.low_noise, self.boundary)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @property
    def parts(self) -> list[Any]:
        """Its networks."""
        return [p for p in (self.transformer, self.low_noise, self.vae, self.text_encoder) if p is not None]

    @property
    def channels(self) -> int:
        """Of its latents."""
        return int(self.transformer.config["in_channels"])

    @cached_property
    def vae_identity(self) -> ModelIdentity:
        """What tells this autoencoder from another."""
        layout = f"{type(self.vae).__name__} factor={self.factor} frames={self.frames_of_latent}"
        return ModelIdentity.of(layout, self.vae.dtype, self.vae.state_dict().items())

    # --- sizes ------------------------------------------------------------------------

    @property
    def _of_pictures(self) -> bool:
        """Whether the autoencoder knows single pictures alone."""
        return isinstance(self.vae, AutoencoderKL)

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        if self._of_pictures:
            return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))
        return int(self.vae.config["scale_factor_spatial"])

    @property
    def frames_of_latent(self) -> int:
        """Frames of each latent but the first, which has one."""
        return 1 if self._of_pictures else int(self.vae.config["scale_factor_temporal"])

    @property
    def multiple(self) -> int:
        """What both sides of a frame must be multiples of."""
        return self.factor * int(max(self.transformer.config["patch_size"][1:]))

    @property
    def native_size(self) -> int:
        """The side in pixels the model was trained on, the shorter one."""
        return 64 if self.name == NAME else NATIVE_SIZE

    def latent_frames(self, frames: int) -> int:
        """How many latents a clip of so many frames has."""
        return 1 + -(-(frames - 1) // self.frames_of_latent)

    # --- text -------------------------------------------------------------------------

    def encode_negative(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """`encode_prompt`: an empty negative prompt has embeddings too."""
        return self.encode_prompt(prompt, width, height, blocks)

    def blocks(self, *prompts: str) -> int:
        """One: a prompt of any length is a single block."""
        return 1

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Embeddings of a prompt of any length, padded with zeros."""
        most = min(TEXT_TOKENS, self.tokenizer.model_max_length)
        content = len(self.tokenizer(prompt, truncation=False).input_ids)
        text = self.tokenizer(prompt, padding="max_length", max_length=max(most, content), return_tensors="pt")
        mask = text.attention_mask.to(self.device)
        states = self.text_encoder(text.input_ids.to(self.device), mask).last_hidden_state
        return Condition(states * mask[..., None].to(states))

    # --- frames -----------------------------------------------------------------------

    @torch.no_grad()
    def encode_clip(self, frames: Tensor) -> Tensor:
        """Frames (f, 3, h, w) in 0..1 to scaled latents (`latent_frames`, channels, h / factor, w / factor).

        The last frame is repeated where the autoencoder wants more.
        """
        missing = (self.latent_frames(len(frames)) - 1) * self.frames_of_latent + 1 - len(frames)
        pixels = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) * 2 - 1
        if self._of_pictures:
            singles = (x.to(self.device, self.vae.dtype) for x in pixels.split(1))
            mean = torch.cat([self.vae.encode(x).latent_dist.mean for x in singles])
            return (mean * self.vae.config["scaling_factor"]).float()
        self._tile(*frames.shape[-2:])
        clip = pixels.to(self.device, self.vae.dtype).transpose(0, 1)[None]
        mean = self.vae.encode(clip).latent_dist.mean[0].float()
        shift, deviation = self._statistics(mean)
        return ((mean - shift) / deviation).transpose(0, 1).contiguous()

    @torch.no_grad()
    def decode_clip(self, latents: Tensor, frames: int) -> Tensor:
        """The first so many frames of scaled latents, in 0..1 on the CPU: (frames, 3, h, w)."""
        if self._of_pictures:
            scale = self.vae.config["scaling_factor"]
            parts = [self.vae.decode(z.to(self.device, self.vae.dtype) / scale).sample for z in latents.split(1)]
            pixels = torch.cat(parts)
        else:
            self._tile(*(side * self.factor for side in latents.shape[-2:]))
            clip = latents.float().transpose(0, 1)
            shift, deviation = self._statistics(clip)
            clip = (clip * deviation + shift)[None].to(self.device, self.vae.dtype)
            pixels = self.vae.decode(clip, return_dict=False)[0][0].transpose(0, 1)
        check_finite(pixels, "the decoded pictures")
        return (pixels[:frames].float() / 2 + 0.5).clamp(0, 1).cpu()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's channels, for (channels, f, h, w)."""
        values: list[Sequence[float]] = [self.vae.config["latents_mean"], self.vae.config["latents_std"]]
        mean, deviation = (torch.tensor(of).to(like).view(-1, 1, 1, 1) for of in values)
        return mean, deviation

    def _tile(self, height: int, width: int) -> None:
        """Have the autoencoder work in tiles where memory is short for whole frames."""
        free, needed = available_bytes(self.device), decoder_bytes(self.vae, height, width)
        if free is not None and needed > 0.5 * free:
            self.vae.enable_tiling()

    def coding(self, height: int, width: int) -> str:
        """How frames of a size are coded, in a few words."""
        if self._of_pictures:
            return "frame by frame"
        self._tile(height, width)
        how = "in tiles" if self.vae.use_tiling else "whole"
        return f"frames {how}, some {format_bytes(decoder_bytes(self.vae, height, width))} beside the weights"


def decoder_bytes(vae: Any, height: int, width: int) -> int:
    """About what the last level of Wan's decoder holds: a chunk of frames in its widest channels, three times, and the
    frames kept for the causal convolutions of each of its layers.
    """
    widest = int(vae.config["base_dim"]) * 2
    frames = int(vae.config["scale_factor_temporal"])
    layers = 2 * (int(vae.config["num_res_blocks"]) + 1)
    size: int = vae.dtype.itemsize
    return widest * height * width * size * (3 * frames + 2 * layers)
