"""Wan on diffusers: its transformers' attention, with branches interleaved block by block, its text and its clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5EncoderModel

from ...attention.condition import Condition
from ...files.bundled import DEMO
from ...models.wan import NATIVE_SIZE, TEXT_TOKENS, WAN
from .blocks import BlockDenoiser, kernel_of
from .clips import TimeTiled
from .hook import ControlledProcessor
from .lora import add_loras, lora_files
from .model import LoadOptions
from .model_files import CheckpointError
from .pictures import FrameByFrame
from .schedulers import is_flow
from .transformer import TransformerModel

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["VideoTransformer", "VideoTransformerDenoiser", "WanCheckpoint"]

VideoTransformer = WanTransformer3DModel
"""The class of the demo's video transformer."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on (1, tokens, heads, channels), with adjacent channels paired, like Wan."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    output = torch.empty_like(x)
    output[..., 0::2] = even * cos - odd * sin
    output[..., 1::2] = even * sin + odd * cos
    return output


class _Processor(ControlledProcessor):
    kernel_of = staticmethod(kernel_of)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.other_thread():
            done: Tensor = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return done
        of = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        picture, of = of.tensor_split([0 if attn.add_k_proj is None else of.shape[1] - self.denoiser.text_columns], 1)
        if not attn.fused_projections:
            q, k, v = attn.to_q(hidden_states), attn.to_k(of), attn.to_v(of)
        elif encoder_hidden_states is None:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            q, (k, v) = attn.to_q(hidden_states), attn.to_kv(of).chunk(2, -1)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = (rotated(x, *rotary_emb) for x in (q, k))
        output = self.denoiser._attend(self.name, q, k, v, self.kernel).to(hidden_states.dtype)
        if attn.add_k_proj is not None:
            output = output + self._of_picture(attn, q, picture).to(output)
        for layer in attn.to_out:
            output = layer(output)
        return output

    def _of_picture(self, attn: Any, q: Tensor, picture: Tensor) -> Tensor:
        """Attention to the embedding of a picture, the model's own: (1, tokens, channels)."""
        fused = attn.fused_projections
        k, v = attn.to_added_kv(picture).chunk(2, -1) if fused else (attn.add_k_proj(picture), attn.add_v_proj(picture))
        k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.norm_added_k(k), v))
        return self.kernel(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)


class VideoTransformerDenoiser(BlockDenoiser):
    """A Wan transformer and the schedule of its flow, as the loops of `fatezero.diffusion` call them.

    transformer: a `WanTransformer3DModel` for text to video, of any width; its LoRA layers stay active.
    scheduler: one of diffusers' with a flow's sigmas, of which only the noise levels are used:
    `FlowMatchEulerDiscreteScheduler`, or `UniPCMultistepScheduler` with `use_flow_sigmas`. low_noise: Wan 2.2's second
    transformer, used below sigma `boundary`.

    Raises TypeError for another kind of model or scheduler, and ValueError for a model with picture inputs, or with
    attention processors that compute something else.
    """

    family = WAN
    processor = _Processor
    plain = (WanAttnProcessor,)
    reset = "transformer.set_attn_processor(WanAttnProcessor())"
    text_dim = "text_dim"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: Any,
        low_noise: WanTransformer3DModel | None = None,
        boundary: float | None = None,
    ) -> None:
        self.transformers: list[Any] = [transformer, *([] if low_noise is None else [low_noise])]
        for model in self.transformers:
            _check_model(model)
        if (low_noise is None) != (boundary is None):
            raise ValueError("low_noise and boundary belong together: Wan 2.2's second transformer, and its sigma")
        if not is_flow(scheduler):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__} without a flow's sigmas: use a "
                "FlowMatchEulerDiscreteScheduler, or a UniPCMultistepScheduler with use_flow_sigmas=True"
            )
        self.boundary = boundary
        super().__init__(self.transformers, scheduler)

    def blocks(self, network: Any) -> Sequence[Any]:
        return list(network.blocks)

    @staticmethod
    def feed_forward(block: Any) -> nn.Module:
        ffn: nn.Module = block.ffn
        return ffn

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        _, down, across = self.transformers[0].config["patch_size"]
        if height % down or width % across:
            raise ValueError(
                f"latents are {width}x{height}; their sides must be multiples of {across} and {down}, its patches"
            )
        return height // down, width // across

    def with_tokens(self, inputs: Sequence[Any], tokens: Tensor) -> Sequence[Any]:
        hidden, text, times, rotary = inputs
        times = times[:, tokens] if times.ndim == 4 else times  # a timestep of each token
        return hidden[:, tokens], text, times, tuple(x[:, tokens] for x in rotary)

    @property
    def layout(self) -> str:
        config = self.transformers[0].config
        return (
            f"WanTransformer3DModel in={config['in_channels']} blocks={config['num_layers']} "
            f"heads={config['num_attention_heads']}x{config['attention_head_dim']} text={config['text_dim']}"
            + (f" and another below sigma {self.boundary:g}" if self.boundary else "")
        )

    def velocities(self, clips: Tensor, conditions: Sequence[Condition], timestep: float) -> Tensor:
        texts = self.texts(conditions).to(clips)
        times = torch.full(
            (len(clips),), timestep, device=clips.device, dtype=torch.promote_types(self.dtype, torch.float32)
        )
        output: Tensor = self._model_at(timestep)(clips, times, texts, return_dict=False)[0]
        return output

    def texts(self, conditions: Sequence[Condition]) -> Tensor:
        """The texts of a call's rows, padded to one length."""
        return torch.cat([_padded(condition.embeddings, self.text_columns) for condition in conditions])

    @property
    def text_columns(self) -> int:
        """The columns of each text of a call."""
        return max(self._texts)

    def _model_at(self, timestep: float) -> Any:
        return network_at(self.transformers, self.boundary, self.scheduler, timestep)


def network_at(networks: Sequence[Any], boundary: float | None, scheduler: Any, timestep: float) -> Any:
    """Wan 2.2's transformer for a timestep."""
    low = boundary is not None and timestep < boundary * scheduler.config["num_train_timesteps"]
    return networks[int(low)]


def _padded(text: Tensor, tokens: int) -> Tensor:
    return nn.functional.pad(text, (0, 0, 0, tokens - text.shape[1]))


def _check_model(model: Any) -> None:
    if not isinstance(model, WanTransformer3DModel):
        raise TypeError(
            f"transformer is a {type(model).__name__}; it must be a WanTransformer3DModel (Wan 2.1 and 2.2, text to "
            "video)"
        )
    if model.config["image_dim"] or model.config["in_channels"] != model.config["out_channels"]:
        raise ValueError("transformer takes a picture as input (Wan I2V): use one for text to video")


# --- the model with its text and clips ------------------------------------------------------


@dataclass(frozen=True)
class WanModel(TransformerModel, TimeTiled):
    """A Wan model with its text and clips.

    low_noise, boundary: 2.2's second transformer, and the sigma below which it is used. A LoRA is fused into both
    transformers, or into the one in its name: high_noise or low_noise.
    """

    low_noise: Any = field(default=None, kw_only=True)
    boundary: float | None = field(default=None, kw_only=True)

    @classmethod
    def of_pipeline(cls, name: str, pipeline: Any, device: torch.device, notes: tuple[str, ...], **more: Any) -> Self:
        low_noise = getattr(pipeline, "transformer_2", None)
        boundary = pipeline.config.get("boundary_ratio") if low_noise is not None else None
        return super().of_pipeline(name, pipeline, device, notes, low_noise=low_noise, boundary=boundary, **more)

    @property
    def networks(self) -> list[Any]:
        return [self.transformer, *([] if self.low_noise is None else [self.low_noise])]

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Embeddings of a prompt of any length, padded with zeros."""
        most = min(TEXT_TOKENS, self.tokenizer.model_max_length)
        content = len(self.tokenizer(prompt, truncation=False).input_ids)
        text = self.tokenizer(prompt, padding="max_length", max_length=max(most, content), return_tensors="pt")
        mask = text.attention_mask.to(self.device)
        states = self.text_encoders[0](text.input_ids.to(self.device), mask).last_hidden_state
        return Condition(states * mask[..., None].to(states))

    @property
    def multiple(self) -> int:
        return self.factor * int(max(self.transformer.config["patch_size"][1:]))

    @property
    def native_size(self) -> int:
        return NATIVE_SIZE


@dataclass(frozen=True)
class WanCheckpoint(WanModel):
    """A Wan 2.1 or 2.2 text-to-video model."""

    family = WAN
    pipelines = ("WanPipeline", "WanVideoToVideoPipeline")
    kinds = (WanTransformer3DModel,)

    @classmethod
    def opened(cls, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Self:
        if name != WAN.demo:
            return super().opened(name, device, dtype, options)
        if options.temporal:
            raise CheckpointError(f"{name} is a {WAN.network}: --temporal is for image models with a UNet")
        demo = SmallWan.of_folder(WAN.demo_folder, device, dtype)
        return replace(demo, notes=add_loras(demo, lora_files(options.lora)))  # type: ignore[return-value]

    @cached_property
    def denoiser(self) -> VideoTransformerDenoiser:
        return VideoTransformerDenoiser(self.transformer, self.scheduler, self.low_noise, self.boundary)


class SmallWan(FrameByFrame, WanCheckpoint):
    """A demo world's Wan transformer, on the latents of its image model."""

    @classmethod
    def of_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> SmallWan:
        """The transformer, text and schedule of a folder, with its image model's autoencoder: its own, that of the UNet
        next to it, or the demo's.

        Raises CheckpointError for a folder that is missing.
        """
        if not folder.is_dir():
            raise CheckpointError(f"no model at {folder}")
        local: dict[str, Any] = {"local_files_only": True}
        coder = next(filter(Path.is_dir, (folder / "vae", folder.parent / "unet" / "vae", DEMO / "vae")))
        parts = [
            AutoencoderKL.from_pretrained(coder, torch_dtype=dtype, **local),
            WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype, **local),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, **local),
        ]
        vae, transformer, text_encoder = (part.to(device).eval().requires_grad_(False) for part in parts)
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", **local)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **local)
        return cls(WAN.demo, vae, scheduler, device, (tokenizer,), (text_encoder,), transformer)

    @property
    def native_size(self) -> int:
        return int(self.vae.config["sample_size"])

    def encode_clip(self, frames: Tensor) -> Tensor:
        return super().encode_clip(frames.contiguous())  # convolutions round differently on other memory layouts

    def coding(self, height: int, width: int) -> str:
        return "frame by frame"
