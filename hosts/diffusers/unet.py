"""Stable Diffusion's UNets on diffusers: attention, Plug-and-Play's feature, clip norm, gradients and tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from einops import rearrange
from torch import Tensor, nn

from ...attention.condition import Condition
from ...attention.control import Attend, AttentionSite, Control, Place, attention
from ...attention.temporal_kind import TRAINED_KEYS
from ...attention.temporal_layers import CastLinear, TemporalLayers, trained_of
from ...diffusion.clip_norm import share_statistics
from ...diffusion.schedule import Schedule
from ...diffusion.training import noised
from ...models.unet import UNET, clip_norms, feature_level
from ...store.identity import ModelIdentity
from ..exclusive import OtherThread
from ..recompute import check_differentiable, frozen, gradient_of, recomputed
from .hook import ControlledProcessor, HookedDenoiser
from .network import Branch
from .schedulers import as_ddim, ddim_schedule
from .temporal import queries_of, temporal_layers, with_temporal_layers, without_temporal_layers

if TYPE_CHECKING:
    from .controlnet import ControlNet

__all__ = ["DiffusersDenoiser", "with_temporal_layers", "without_temporal_layers"]

_BLOCKS = (ResnetBlock2D, Transformer2DModel, TransformerTemporalModel, TemporalConvLayer)
"""Modules that are recomputed for gradients."""


def kernel_of(processor: object) -> Attend:
    """The attention kernel of a UNet: xformers if enabled, else torch's."""
    return xformers_attention if isinstance(processor, XFormersAttnProcessor) else attention


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` with xformers, which takes (f t h d)."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (rearrange(x.expand(len(q), -1, -1, -1), "f h t d -> f t h d").contiguous() for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v), "f t h d -> f h t d")


class _Processor(ControlledProcessor):
    kernel_of = staticmethod(kernel_of)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **more: object,
    ) -> Tensor:
        if self.other_thread():
            done: Tensor = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **more)
            return done
        control, site = self.denoiser._control, self.denoiser._sites[self.name]
        assert control is not None
        control.attend = self.kernel
        if attention_mask is not None:
            raise ValueError("attention masks are not supported while FateZero controls the UNet")
        residual, grid = hidden_states, hidden_states.shape[2:]
        if hidden_states.ndim == 4:
            hidden_states = rearrange(hidden_states, "f c y x -> f (y x) c")
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if site.kind == "self":
            control.input_tokens(hidden_states, site)
            if control.gather is not None:
                return control.gather(hidden_states, site)
        q = _heads(attn.to_q(hidden_states), attn)
        q = q if attn.norm_q is None else attn.norm_q(q)
        if encoder_hidden_states is None:
            k, v = _keys_values(attn, hidden_states)
        else:
            if self.name not in self.denoiser._text:
                self.denoiser._text[self.name] = _keys_values(attn, encoder_hidden_states[:1])
            k, v = self.denoiser._text[self.name]
        output = rearrange(control.layer(q, k, v, site), "f h t d -> f t (h d)").to(hidden_states.dtype)
        for layer in attn.to_out:
            output = layer(output)
        if control.captured.outputs is not None and site.kind == "self":
            control.captured.outputs[site.name] = output
        if residual.ndim == 4:
            output = rearrange(output, "f (y x) c -> f c y x", y=grid[0], x=grid[1])
        return (output + residual if attn.residual_connection else output) / attn.rescale_output_factor


class DiffusersDenoiser(HookedDenoiser):
    """A diffusers UNet and its DDIM schedule, as the loops of `fatezero.diffusion` call them.

    unet: a `UNet2DConditionModel` of any width that predicts epsilon, v or the sample; its LoRA layers stay active.
    scheduler: a `DDIMScheduler`, or another scheduler of diffusers, of which only the noise levels are used.
    controlnet: a `ControlNet` for every call.

    Raises TypeError for a model that is not an attention UNet, and ValueError for one whose attention processors
    compute something else.
    """

    family = UNET
    processor = _Processor
    plain = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
    reset = "unet.set_default_attn_processor(), or unload the adapter that set it"
    text_dim = "cross_attention_dim"
    kind: ClassVar[type] = UNet2DConditionModel
    """The supported class of UNet."""
    known: ClassVar[str] = "SD 1.x, SD 2.x, SDXL"

    def __init__(self, unet: Any, scheduler: DDIMScheduler, controlnet: ControlNet | None = None) -> None:
        if not isinstance(unet, self.kind):
            raise TypeError(f"unet is a {type(unet).__name__}; it must be a {self.kind.__name__} ({self.known})")
        self.unet: Any = unet
        self.controlnet = controlnet
        self._control: Control | None = None
        self._text: dict[str, tuple[Tensor, Tensor]] = {}
        self._texts: dict[int, tuple[Condition, dict[str, tuple[Tensor, Tensor]]]] = {}
        self._layers = _attention_layers(unet)
        scheduler = as_ddim(scheduler)
        if not self._layers:
            raise TypeError("this UNet has no attention layers")
        super().__init__([unet], scheduler)

    @property
    def attention(self) -> list[tuple[str, Any]]:
        return [(name, layer) for name, (layer, *_) in self._layers.items()]

    def schedule(self, steps: int) -> Schedule:
        """Raises ValueError for a number of steps or a schedule that DDIM cannot invert."""
        return ddim_schedule(self.scheduler, steps)

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        return list(self._sites_by_layer(height, width).values())

    @property
    def layout(self) -> str:
        config = self.unet.config
        return (
            f"{self.kind.__name__} in={config['in_channels']} width={tuple(config['block_out_channels'])} "
            f"text={config['cross_attention_dim']} attention={len(self._layers)} "
            f"predicts={self.scheduler.config['prediction_type']}"
        )

    def identity(self) -> ModelIdentity:
        found = super().identity()
        return found if self.controlnet is None else self.controlnet.with_identity(found)

    @property
    def frames_meet(self) -> bool:
        return temporal_layers(self.unet) is not None

    @property
    def trained_with(self) -> tuple[tuple[str | int, ...], bool]:
        return (TRAINED_KEYS, True) if temporal_layers(self.unet) is not None else (("self",), False)

    def gradient(
        self, latents: Tensor, timestep: float, condition: Condition, control: Control, value: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        check_differentiable(self.unet, "unet")
        with frozen(self.unet), recomputed(self.unet, _BLOCKS):
            return gradient_of(
                lambda z: self.predict_noise(z, timestep, condition, control), latents, value, self.dtype
            )

    # --- for tuning ---------------------------------------------------------------------

    @property
    def predicts_v(self) -> bool:
        return bool(self.scheduler.config["prediction_type"] == "v_prediction")

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError for a timestep outside the schedule."""
        alphas = self.scheduler.alphas_cumprod
        if not 0 <= timestep < len(alphas):
            raise ValueError(f"timestep is {timestep}; it must be from 0 to {len(alphas) - 1}")
        alpha = alphas[timestep].cpu().double()
        return noised(latents, noise, alpha), alpha

    def trained(self, convolutions: bool = False) -> dict[str, nn.Parameter]:
        """Raises ValueError for a UNet without temporal layers, or without the convolutions over frames to train."""
        return queries_of(self.unet) | trained_of(self._temporal(), convolutions)

    def bypassed(self) -> AbstractContextManager[None]:
        return self._temporal().bypassed()

    def _temporal(self) -> TemporalLayers:
        layers = temporal_layers(self.unet)
        if layers is None:
            raise ValueError("unet has no temporal layers to tune: attach some with with_temporal_layers(unet)")
        return layers

    @contextmanager
    def training(self, convolutions: bool = False) -> Iterator[None]:
        """Stores trained weights at least in single precision, and computes in the model's."""
        before = {name: weight.requires_grad for name, weight in self.unet.named_parameters()}
        recomputed, dtype = self.unet.is_gradient_checkpointing, self.unet.dtype
        trained = self.trained(convolutions)
        queries = [layer.to_q for layer, *_ in self._layers.values()]
        try:
            self.unet.requires_grad_(False)
            for weight in trained.values():
                weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
                weight.requires_grad_(True)
            for query in queries:
                query.forward = partial(CastLinear.forward, query)
            self.unet.enable_gradient_checkpointing()
            yield
        finally:
            for query in queries:
                del query.forward
            for weight in trained.values():
                weight.data = weight.data.to(dtype)
            for name, weight in self.unet.named_parameters():
                weight.requires_grad_(before[name])
                weight.grad = None
            if not recomputed:
                self.unet.disable_gradient_checkpointing()

    # --- calls --------------------------------------------------------------------------

    def hook_more(self, stack: ExitStack, other_thread: OtherThread, clip_norm: bool) -> None:
        if clip_norm:
            for norm in _clip_norms(self.unet):
                for handle in share_statistics(norm, other_thread=other_thread):
                    stack.callback(handle.remove)
        if feature := _feature_of(self.unet):
            name, conv = feature
            stack.callback(conv.register_forward_hook(self._featured(name, other_thread)).remove)

    def forget(self) -> None:
        self._control, self._text, self._texts = None, {}, {}

    def predicted(self, branches: Sequence[Branch], timestep: float) -> list[Tensor]:
        return [self._predict(latents, timestep, condition, control) for latents, condition, control in branches]

    def _predict(self, latents: Tensor, timestep: float, condition: Condition, control: Control) -> Tensor:
        self.check(latents, condition)
        frames, dtype = len(latents), self.unet.dtype
        self._control, self._sites = control, self._sites_by_layer(*latents.shape[-2:])
        # The text is the same for all frames and steps: one row, whose keys and values are cached for the run.
        _, self._text = self._texts.setdefault(id(condition), (condition, {}))
        extras = {k: v.to(latents.device, dtype).expand(frames, *v.shape[1:]) for k, v in condition.extras.items()}
        text, z = condition.embeddings.to(latents.device, dtype), latents.to(dtype)
        added: dict[str, Any] = {}
        if self.controlnet is not None and self.controlnet.acts(timestep, self.scheduler.config["num_train_timesteps"]):
            added = self.controlnet.residuals(z, timestep, text, extras, control.chunk.frame_indices)
        output = self._output(z, timestep, text, extras, added)
        return self._epsilon(output.to(latents.dtype), latents, timestep)

    def _output(
        self, latents: Tensor, timestep: float, text: Tensor, extras: dict[str, Tensor], added: dict[str, Any]
    ) -> Tensor:
        output: Tensor = self.unet(
            latents, timestep, encoder_hidden_states=text, added_cond_kwargs=extras or None, **added
        ).sample
        return output

    def _epsilon(self, output: Tensor, latents: Tensor, timestep: float) -> Tensor:
        """The model's output, converted to epsilon (v: arXiv 2202.00512, App. D)."""
        kind = self.scheduler.config["prediction_type"]
        signal = self.scheduler.alphas_cumprod[timestep].cpu().double()
        if kind == "epsilon":
            return output
        if kind == "v_prediction":
            return signal.sqrt() * output + (1 - signal).sqrt() * latents
        return (latents - signal.sqrt() * output) / (1 - signal).sqrt()

    def _featured(self, name: str, other_thread: OtherThread) -> Callable[..., Tensor]:
        def featured(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output if self._control is None or other_thread() else self._control.feature(output, name)

        return featured

    def check(self, latents: Tensor, condition: Condition) -> None:
        super().check(latents, condition)
        if self.unet.config.get("addition_embed_type") == "text_time":
            missing = {"text_embeds", "time_ids"} - set(condition.extras)
            if missing:
                raise ValueError(
                    f"an SDXL UNet needs {' and '.join(sorted(missing))}: pass "
                    "Condition(embeddings, {'text_embeds': ..., 'time_ids': ...})"
                )

    def _sites_by_layer(self, height: int, width: int) -> dict[str, AttentionSite]:
        def halved(size: int, times: int) -> int:
            return -(-size // 2**times)

        return {
            name: AttentionSite(
                place,
                index,
                "cross" if attn.is_cross_attention else "self",
                attn.heads,
                attn.inner_dim // attn.heads,
                halved(height, level),
                halved(width, level),
            )
            for name, (attn, place, index, level) in self._layers.items()
        }


def _heads(x: Tensor, attn: Attention) -> Tensor:
    return rearrange(x, "f t (h d) -> f h t d", h=attn.heads)


def _keys_values(attn: Attention, of: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of a text or the frames' own tokens: (f h t d) each."""
    if attn.is_cross_attention and attn.norm_cross:
        of = attn.norm_encoder_hidden_states(of)
    k, v = _heads(attn.to_k(of), attn), _heads(attn.to_v(of), attn)
    return (k if attn.norm_k is None else attn.norm_k(k)), v


def _attention_layers(unet: Any) -> dict[str, tuple[Attention, Place, int, int]]:
    """name -> (layer, place, index within place and kind, number of halvings of the picture)."""
    found: dict[str, tuple[Attention, Place, int, int]] = {}

    def add(block: nn.Module, prefix: str, place: Place, level: int) -> None:
        for name, module in block.named_modules():
            if isinstance(module, Attention) and not name.startswith("temp_"):  # temp_ layers attend over frames
                kind = module.is_cross_attention
                index = sum(p == place and a.is_cross_attention == kind for a, p, *_ in found.values())
                found[f"{prefix}.{name}"] = (module, place, index, level)

    level = 0
    for i, block in enumerate(unet.down_blocks):
        add(block, f"down_blocks.{i}", "down", level)
        level += getattr(block, "downsamplers", None) is not None
    if unet.mid_block is not None:
        add(unet.mid_block, "mid_block", "mid", level)
    for i, block in enumerate(unet.up_blocks):
        add(block, f"up_blocks.{i}", "up", level)
        level -= getattr(block, "upsamplers", None) is not None
    return found


def _feature_of(unet: Any) -> tuple[str, nn.Module] | None:
    """The name of Plug-and-Play's feature, and the convolution whose output it is."""
    i = feature_level((len(block.resnets), bool(getattr(block, "attentions", None))) for block in unet.up_blocks)
    return None if i is None else (f"up.{i}.1", unet.up_blocks[i].resnets[1].conv2)


def _clip_norms(unet: Any) -> list[nn.GroupNorm]:
    blocks = [(module.norm1, module.norm2) for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    return clip_norms(blocks, unet.conv_norm_out)
