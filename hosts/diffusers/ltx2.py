"""LTX-2 on diffusers: its video, without its sound. Gemma's text goes through the pipeline's connectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import LTX2VideoTransformer3DModel
from einops import rearrange
from torch import Tensor

from ...attention.condition import Condition
from ...models.flow import LTX2
from .clips import WholeClip
from .flow import FlowModel
from .model import ClipFacts

if TYPE_CHECKING:
    from typing_extensions import Self

TEXT_TOKENS = 1024
"""Text columns of a prompt, padding included, and the most that are read."""
LEAST = 2
"""The least latents along each side."""


@dataclass(frozen=True)
class Ltx2(FlowModel, WholeClip):
    """An LTX-2 model. Video and sound are isolated, as in the pipeline's modality guidance, so that the video's
    prediction does not depend on a sound.

    A prompt has its embeddings for the video, and in `extras` those for the sound, and their mask.
    """

    family = LTX2
    pipelines = ("LTX2Pipeline", "LTX2ImageToVideoPipeline")
    kinds = (LTX2VideoTransformer3DModel,)
    unused = ("audio_vae", "vocoder", "processor", "prompt_enhancer", "duration_head")
    text_dim = ""
    frames_meet = True

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Raises ValueError for a prompt that the pipeline would cut."""
        self.check_length(len(self.tokenizer(prompt).input_ids), TEXT_TOKENS)
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=self.device
        )
        side = self.tokenizer.padding_side
        video, sound, mask = self.pipeline.connectors(states, mask, padding_side=side)
        return Condition(video, {"sound": sound, "mask": mask})

    @property
    def _patches(self) -> tuple[int, int]:
        """Places of a token along each side, and its latent frames."""
        return self.transformer.config["patch_size"], self.transformer.config["patch_size_t"]

    @property
    def tokens(self) -> int:
        side, long = self._patches
        frames, _, height, width = self.facts.shape
        return frames // long * (height // side) * (width // side)

    def velocity(self, z: Tensor, timestep: float, condition: Condition, frames: Sequence[int]) -> Tensor:
        (count, _, height, width), extras = z.shape, condition.extras
        time = torch.tensor([timestep], device=z.device)
        no_sound = z.new_zeros(1, 1, self.transformer.config["audio_in_channels"])
        output, _ = self.transformer(
            self.pipeline._pack_latents(rearrange(z, "f c y x -> 1 c f y x"), *self._patches), no_sound,
            condition.embeddings, extras["sound"], time, sigma=time, encoder_attention_mask=extras["mask"],
            audio_encoder_attention_mask=extras["mask"], num_frames=count, height=height, width=width,
            fps=self.facts.fps, audio_num_frames=1, isolate_modalities=True, use_cross_timestep=True, return_dict=False,
        )  # fmt: skip
        clip: Tensor = self.pipeline._unpack_latents(output, count, height, width, *self._patches)
        return rearrange(clip, "1 c f y x -> f c y x")

    def for_clip(self, clip: ClipFacts) -> Self:
        """Raises ValueError for frames of one latent's width or height, whose borders the decoder cannot mirror."""
        if min(clip.shape[-2:]) < LEAST:
            least = LEAST * self.factor
            raise ValueError(f"{self.family.title} needs frames of at least {least}x{least}: choose a larger --size")
        return super().for_clip(clip)

    # --- frames -------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        return int(self.vae.spatial_compression_ratio)

    @property
    def frames_per_latent(self) -> int:
        return int(self.vae.temporal_compression_ratio)

    @property
    def multiple(self) -> int:
        return self.factor * self._patches[0]

    @property
    def native_size(self) -> int:
        return 512

    def _deviations(self, like: Tensor) -> tuple[Tensor, Tensor]:
        values = self.vae.latents_mean, self.vae.latents_std / self.vae.config["scaling_factor"]
        mean, deviation = (of.to(like).view(-1, 1, 1, 1) for of in values)
        return mean, deviation

    def _decoded(self, clip: Tensor) -> Tensor:
        time = clip.new_zeros(1) if self.vae.config["timestep_conditioning"] else None
        decoded: Tensor = self.vae.decode(clip, time, return_dict=False)[0]
        return decoded

    def _decoder_bytes(self, height: int, width: int) -> int:
        """Three tensors of the clip, or of one latent's frames, in the last level's channels."""
        config, latents = self.vae.config, 1 if self.clip is None else self.facts.shape[0]
        places = latents * self.frames_per_latent * height * width // config["patch_size"] ** 2
        return int(3 * config["decoder_block_out_channels"][0] * places * self.vae.dtype.itemsize)
