"""LTX-2 on diffusers: its video, without its sound. Gemma's text goes through the pipeline's connectors.

A block makes six attention calls. The video's self-attention (`attn1`) and the one to its text (`attn2`) are
controlled; the sound's calls are the model's own, and those between video and sound do not run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
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
from torch.nn import functional as F

from ...attention.condition import FIRST, Condition
from ...models.ltx import LTX2, NATIVE_SIZE, TEXT_TOKENS, Words
from .blocks import BlockDenoiser, kernel_of
from .clips import WholeClip
from .flow import FlowModel
from .hook import ControlledProcessor
from .lora import lora_files
from .lora_files import reference_downscale
from .ltx2_frames import CONTROL, GUIDES, NUMBERS, STRENGTH, Call, extras_of, led_to_picture
from .model import ClipFacts, LoadOptions
from .model_files import CheckpointError
from .network import Branch

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
        named = [type(self.networks[0]).__name__, *(f"{name}={config[name]}" for name in shown)]
        return " ".join([*named, self.model.controlled]).strip()

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
        extras, text = extras_of(conditions), torch.cat([condition.embeddings for condition in conditions])
        if not (self.all_plain or extras["mask"].all()):
            raise ValueError(f"{self.family.title}: attention control needs a text connector with learned registers")
        return self.model.called(clips, timestep, text, extras, self._rows[0].chunk.frame_indices)

    def predicted(self, branches: Sequence[Branch], timestep: float) -> list[Tensor]:
        return [
            self.model.led(velocity, z, condition, timestep, control.chunk.frame_indices)
            for velocity, (z, condition, control) in zip(super().predicted(branches, timestep), branches, strict=True)
        ]


@dataclass(frozen=True)
class Ltx2(FlowModel, WholeClip):
    """An LTX-2 model. Video and sound are isolated, as in the pipeline's modality guidance, so that the video's
    prediction does not depend on a sound.

    A prompt has its embeddings for the video, and in `extras` those for the sound, their mask, and the frames that
    condition the calls. control: uint8 frames (f, h, w, 3) of an IC-LoRA's reference video. strength: how clean the
    model gets them, from 0 (not at all) to 1. downscale: how much smaller than the clip they are.
    """

    family = LTX2
    pipelines = ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline", "LTX2InContextPipeline")
    kinds = (LTX2VideoTransformer3DModel,)
    unused = ("audio_vae", "vocoder", "processor", "prompt_enhancer", "duration_head")
    text_dim = ""
    frames_meet = True
    takes_control = takes_first_frame = takes_guide_frames = True

    control: Tensor | None = field(default=None, kw_only=True)
    strength: float = field(default=1.0, kw_only=True)
    downscale: int = field(default=1, kw_only=True)

    @classmethod
    def opened(cls, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Self:
        downscale = reference_downscale(lora_files(options.lora))
        return replace(super().opened(name, device, dtype, options), downscale=downscale)

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
        return Condition(video, {"sound": sound, "mask": mask, **self.inputs})

    # --- frames that condition the calls --------------------------------------------------

    @cached_property
    @torch.no_grad()
    def inputs(self) -> dict[str, Tensor]:
        """The extras of every prompt: the clip's guide frames, and a control video.

        Raises ValueError without the clip's frames, and for frames of another size.
        """
        found, latents = dict[str, Tensor](), {at: self._encoded(frame[None]) for at, frame in self._guides()}
        if 0 in latents:
            found[FIRST] = latents.pop(0)
        if latents:
            found[GUIDES] = rearrange(torch.cat(list(latents.values())), "k c y x -> 1 c k y x")
            found[NUMBERS] = torch.tensor([list(latents)], device=self.device)
        if self.control is not None:
            count = (self.facts.shape[0] - 1) * self.frames_per_latent + 1
            at = torch.arange(count).clamp(max=len(self.control) - 1)
            found[CONTROL] = rearrange(self._encoded(self.control[at], self.downscale), "f c y x -> 1 c f y x")
            found[STRENGTH] = torch.tensor([self.strength], device=self.device)
        return found

    def _guides(self) -> Iterator[tuple[int, Tensor]]:
        """The clip's frames that condition the calls, uint8 (h, w, 3), by their numbers."""
        wanted = self.clip.guide_frames if self.clip is not None else ()
        if not wanted:
            return
        if self.facts.frames is None:
            raise ValueError(f"{self.family.title} needs the frames of the clip for guide frames")
        at = -1
        for at, frame in enumerate(islice(self.facts.frames(), max(wanted) + 1)):
            if at in wanted:
                yield at, frame
        if at < max(wanted):
            raise ValueError(f"guide_frames: frame {max(wanted)} is outside the clip, which has {at + 1} frames")

    def _encoded(self, frames: Tensor, factor: int = 1) -> Tensor:
        """The latents of uint8 frames (f, h, w, 3) of the clip's size, scaled down by a factor.

        Raises ValueError for frames of another size.
        """
        height, width = (side * self.factor for side in self.facts.shape[-2:])
        if frames.shape[1:3] != (height, width):
            raise ValueError(
                f"frames are {frames.shape[2]}x{frames.shape[1]}; they must be {width}x{height}, as the clip"
            )
        pixels = rearrange(frames.float() / 255, "f y x c -> f c y x")
        if factor > 1:
            size = height // factor, width // factor
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        return self.encode_clip(pixels)

    @classmethod
    def check_control(cls, strength: float = 1.0, start: float = 0.0, end: float = 1.0, memory: str = "auto") -> None:
        super().check_control(strength, start, end, memory)
        if strength > 1:
            raise CheckpointError(f"controlnet_strength is {strength:g}; {cls.family.title} takes at most 1")
        if memory == "maps":
            raise CheckpointError("memory: maps cannot include the tokens of a control video: use recompute")

    def with_control(
        self, name: str, frames: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
        variant: str | None = None,
    ) -> Self:  # fmt: skip
        """The model with the reference video of an IC-LoRA, uint8 (f, h, w, 3)."""
        self.check_control(strength, start, end)
        return replace(self, control=frames if strength else None, strength=strength)

    def control_steps(self, steps: int) -> int:
        return 0 if self.control is None else steps

    @cached_property
    def controlled(self) -> str:
        """Identifies the control video, "" without one."""
        if self.control is None:
            return ""
        pictures = hashlib.sha256(self.control.contiguous().numpy().data).hexdigest()[:16]
        return f"control of {pictures} x{self.strength:g} / {self.downscale}"

    # --- calls ----------------------------------------------------------------------------

    @property
    def _patches(self) -> tuple[int, int]:
        """Places of a token along each side, and its latent frames."""
        return self.transformer.config["patch_size"], self.transformer.config["patch_size_t"]

    @property
    def tokens(self) -> int:
        side, long = self._patches
        frames, _, height, width = self.facts.shape
        frames = min(frames, self.family.trained_frames or frames)  # longer clips run in windows
        of_frame = (height // side) * (width // side)
        behind = 0 if self.control is None else of_frame // self.downscale**2
        return frames // long * (of_frame + behind) + of_frame * sum(number > 0 for number in self.facts.guide_frames)

    def velocity(self, z: Tensor, timestep: float, condition: Condition, frames: Sequence[int]) -> Tensor:
        clip = rearrange(z, "f c y x -> 1 c f y x")
        found = self.called(clip, timestep, condition.embeddings, condition.extras, frames)
        return self.led(rearrange(found, "1 c f y x -> f c y x"), z, condition, timestep, frames)

    def led(self, velocity: Tensor, z: Tensor, condition: Condition, timestep: float, frames: Sequence[int]) -> Tensor:
        """See `led_to_picture`."""
        return led_to_picture(velocity, z, condition, self._sigma(timestep), frames)

    def _sigma(self, timestep: float) -> float:
        return timestep / float(self.scheduler.config["num_train_timesteps"])

    def called(
        self, clips: Tensor, timestep: float, text: Tensor, extras: Mapping[str, Tensor], frames: Sequence[int]
    ) -> Tensor:
        """The transformer's output for clips (rows, channels, f, h, w), each with its text, without sound. extras: of
        the rows. frames: the clips' indices.
        """
        rows, _, count, height, width = clips.shape
        time = torch.full((rows,), timestep, device=clips.device)
        call = Call(
            clips, frames, extras, self._sigma(timestep), self.facts.fps, self.frames_per_latent, self._packed,
            self.transformer.rope,
        )  # fmt: skip
        tokens, times, places = call.inputs(time)
        text, sound, mask = (one.to(clips) for one in (text, extras["sound"], extras["mask"]))
        no_sound = clips.new_zeros(rows, 1, self.transformer.config["audio_in_channels"])
        output, _ = self.transformer(
            tokens, no_sound, text, sound, times, time, time, encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask, num_frames=count, height=height, width=width, fps=self.facts.fps,
            audio_num_frames=1, video_coords=places, isolate_modalities=True, use_cross_timestep=True,
            return_dict=False,
        )  # fmt: skip
        side, long = self._patches
        own = output[:, : count // long * (height // side) * (width // side)]
        found: Tensor = self.pipeline._unpack_latents(own, count, height, width, *self._patches)
        return found

    def _packed(self, clips: Tensor) -> Tensor:
        tokens: Tensor = self.pipeline._pack_latents(clips, *self._patches)
        return tokens

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
        return self.factor * self._patches[0] * self.downscale

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
