"""LTX-2 on diffusers: its video, without its sound. Gemma's text goes through the pipeline's connectors.

A block makes six attention calls. The video's self-attention (`attn1`) and the one to its text (`attn2`) are
controlled; the sound's calls are the model's own, and those between video and sound do not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from einops import rearrange
from torch import Tensor, nn

from ...attention.condition import Condition
from ...models.ltx import LTX2, NATIVE_SIZE, TEXT_TOKENS, Words
from .blocks import BlockDenoiser, kernel_of
from .clips import WholeClip
from .flow import FlowModel
from .hook import ControlledProcessor
from .model import ClipFacts

if TYPE_CHECKING:
    from typing_extensions import Self

LEAST = 2
"""The least latents along each side."""


class _Processor(ControlledProcessor):
    kernel_of = staticmethod(kernel_of)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        off = {} if perturbation_mask is None else {"perturbation_mask": perturbation_mask}
        if off or self.other_thread() or self.denoiser.is_plain:
            own: Tensor = self.before(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb, **off
            )
            return own
        of = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(of)), attn.to_v(of)
        if query_rotary_emb is not None:
            rotated = apply_split_rotary_emb if attn.rope_type == "split" else apply_interleaved_rotary_emb
            q, k = rotated(q, query_rotary_emb), rotated(k, query_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        output = self.denoiser._attend(self.name, q, k, v, self.kernel).to(q.dtype)
        if attn.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(attn.to_gate_logits(hidden_states))  # 1 for weights of 0
            output = (output.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2, 3)
        for layer in attn.to_out:
            output = layer(output)
        return output


class Ltx2Denoiser(BlockDenoiser):
    """An LTX-2 transformer for one clip, as the loops of `fatezero.diffusion` call it.

    Raises ValueError for attention processors that compute something else, and for text without registers.
    """

    family = LTX2
    processor = _Processor
    plain = (LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor)
    reset = "transformer.set_attn_processor(LTX2AudioVideoAttnProcessor())"
    text_dim = ""

    def __init__(self, model: Ltx2) -> None:
        self.model = model
        super().__init__(model.networks, model.scheduler)

    @property
    def tokens(self) -> int:
        return self.model.tokens

    @property
    def layout(self) -> str:
        config = self.networks[0].config
        shown = ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
        return " ".join([type(self.networks[0]).__name__, *(f"{name}={config[name]}" for name in shown)])

    def blocks(self, network: Any) -> Sequence[Any]:
        return list(network.transformer_blocks)

    @staticmethod
    def feed_forward(block: Any) -> nn.Module:
        ff: nn.Module = block.ff
        return ff

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        side = self.networks[0].config["patch_size"]
        if height % side or width % side:
            raise ValueError(f"latents are {width}x{height}; their sides must be multiples of {side}, its patches")
        return height // side, width // side

    def velocities(self, clips: Tensor, conditions: Sequence[Condition], timestep: float) -> Tensor:
        extras = [condition.extras for condition in conditions]
        text = torch.cat([condition.embeddings for condition in conditions]).to(clips)
        sound, mask = (torch.cat([one[name] for one in extras]) for name in ("sound", "mask"))
        if not (self.all_plain or mask.all()):
            raise ValueError(f"{self.family.title}: attention control needs a text connector with learned registers")
        return self.model.called(clips, timestep, text, sound.to(clips), mask.to(clips))


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
        tokenizer = self.tokenizers[0]
        self.check_length(len(tokenizer(prompt).input_ids), TEXT_TOKENS)
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=self.device
        )
        side = tokenizer.padding_side
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
        clip, extras = rearrange(z, "f c y x -> 1 c f y x"), condition.extras
        found = self.called(clip, timestep, condition.embeddings, extras["sound"], extras["mask"])
        return rearrange(found, "1 c f y x -> f c y x")

    def called(self, clips: Tensor, timestep: float, text: Tensor, sound: Tensor, mask: Tensor) -> Tensor:
        """The transformer's output for clips (rows, channels, f, h, w), each with its text, without sound."""
        rows, _, count, height, width = clips.shape
        time = torch.full((rows,), timestep, device=clips.device)
        no_sound = clips.new_zeros(rows, 1, self.transformer.config["audio_in_channels"])
        output, _ = self.transformer(
            self.pipeline._pack_latents(clips, *self._patches), no_sound, text, sound, time, sigma=time,
            encoder_attention_mask=mask, audio_encoder_attention_mask=mask, num_frames=count, height=height,
            width=width, fps=self.facts.fps, audio_num_frames=1, isolate_modalities=True, use_cross_timestep=True,
            return_dict=False,
        )  # fmt: skip
        found: Tensor = self.pipeline._unpack_latents(output, count, height, width, *self._patches)
        return found

    @cached_property
    def denoiser(self) -> Ltx2Denoiser:  # type: ignore[override]
        return Ltx2Denoiser(self)

    @property
    def tokenizer(self) -> Words:
        return Words(lambda text: self.tokenizers[0](text.strip(), add_special_tokens=False).input_ids)

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
        return NATIVE_SIZE

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
