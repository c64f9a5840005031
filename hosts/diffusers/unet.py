"""diffusers as a host: a `UNet2DConditionModel` hooked by attention processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ...attention.temporal_layers import CastLinear, trained_of
from ...diffusion.clip_norm import share_statistics
from ...diffusion.ddim import guide
from ...diffusion.denoiser import Guidance
from ...diffusion.schedule import Schedule
from ...methods.tune_a_video import TRAINED_KEYS, noised
from ...store.identity import IdentityCache, ModelIdentity
from ...store.records import Beside
from ..held import IN_USE, Stranger, held
from ..recompute import check_differentiable, frozen, gradient_of, recomputed
from .temporal import queries_of, temporal_layers, with_temporal_layers, without_temporal_layers

if TYPE_CHECKING:
    from .controlnet import ControlNet

__all__ = ["DiffusersDenoiser", "with_temporal_layers", "without_temporal_layers"]

_IDENTITIES = IdentityCache()
_BLOCKS = (ResnetBlock2D, Transformer2DModel, TransformerTemporalModel, TemporalConvLayer)
"""What is computed twice where gradients are asked for."""
_PLAIN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


_PREDICTED = ("epsilon", "v_prediction", "sample")


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """The DDIM schedule of a scheduler's noise levels and of what its model predicts.

    Raises TypeError for levels that DDIM has not: those of flows and of EDM.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    alphas, predicted = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type", "epsilon")
    flow = config.get("use_flow_sigmas") or predicted not in _PREDICTED
    if alphas is not None and not flow:
        if isinstance(scheduler, DDIMScheduler):
            return scheduler
        try:
            found = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False)
        except NotImplementedError:  # betas that DDIM has not
            found = None
        if found is not None and _same_levels(found.alphas_cumprod, alphas):
            return found
    raise TypeError(f"scheduler is a {kind}, whose noise levels are not DDIM's: a DDIMScheduler or its like is needed")


def _same_levels(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs.to(ours), atol=1e-6)


def with_signal(scheduler: DDIMScheduler) -> DDIMScheduler:
    """A schedule whose steps begin where there is signal: one that ends at none cannot be inverted from its end."""
    if not scheduler.config["rescale_betas_zero_snr"] or scheduler.config["timestep_spacing"] == "leading":
        return scheduler
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading", steps_offset=1)


class DiffusersDenoiser:
    """A diffusers UNet and its DDIM schedule, as the loops of `fatezero.diffusion` call them.

    unet: a `UNet2DConditionModel` of any width, predicting epsilon, v or the sample; LoRA
    layers in it keep working. scheduler: a `DDIMScheduler`; another of diffusers' schedulers
    is read for its noise levels. controlnet: a `ControlNet`, whose output is added in every call.

    Raises TypeError for a model that is no attention UNet, and ValueError for one that already
    carries attention processors that compute something else.
    """

    kind: ClassVar[type] = UNet2DConditionModel
    """What UNet it takes."""
    known: ClassVar[str] = "SD 1.x, SD 2.x, SDXL"
    spans_clip = False
    pairs = False

    def __init__(self, unet: Any, scheduler: DDIMScheduler, controlnet: ControlNet | None = None) -> None:
        if not isinstance(unet, self.kind):
            raise TypeError(
                f"unet is a {type(unet).__name__}; FateZero works through the attention of a {self.kind.__name__} "
                f"({self.known})"
            )
        self.unet: Any = unet
        self.scheduler = as_ddim(scheduler)
        self.controlnet = controlnet
        self._control: Control | None = None
        self._text: dict[str, tuple[Tensor, Tensor]] = {}
        self._texts: dict[int, tuple[Condition, dict[str, tuple[Tensor, Tensor]]]] = {}
        self._layers = _attention_layers(unet)
        if not self._layers:
            raise TypeError("this UNet has no attention layers")
        _refuse_foreign_processors(unet)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        # Under accelerate's offloading the weights wait elsewhere.
        offloading = getattr(self.unet, "_hf_hook", None)
        return torch.device(getattr(offloading, "execution_device", None) or self.unet.device)

    def schedule(self, steps: int) -> Schedule:
        """Raises ValueError for a number of steps or a schedule that DDIM cannot invert."""
        total = self.scheduler.config["num_train_timesteps"]
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}; it must be between 1 and {total}")
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        timesteps = tuple(int(t) for t in scheduler.timesteps)
        if timesteps[0] >= total:  # the scheduler's offset moves all steps up
            raise ValueError(f"steps is {steps}; with this schedule's steps_offset it must be below {total}")
        alphas = torch.cat([scheduler.final_alpha_cumprod.view(1), scheduler.alphas_cumprod[list(timesteps[::-1])]])
        if alphas.min() < 1e-6:
            raise ValueError(
                f"steps is {steps}; the first would be at zero signal, which no inversion reaches: give fewer steps, "
                "or a scheduler with timestep_spacing='leading'"
            )
        return Schedule(timesteps, alphas.double())

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        return list(self._sites_by_layer(height, width).values())

    def identity(self) -> ModelIdentity:
        config = self.unet.config
        layout = (
            f"{self.kind.__name__} in={config['in_channels']} width={tuple(config['block_out_channels'])} "
            f"text={config['cross_attention_dim']} attention={len(self._layers)} "
            f"predicts={self.scheduler.config['prediction_type']}"
        )
        found = _IDENTITIES.of(self.unet, layout, self.unet.dtype, _base_weights(self.unet))
        return found if self.controlnet is None else self.controlnet.with_identity(found)

    def windows(self, latents: Tensor, timestep: float) -> None:
        return None

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

    def trained(self) -> dict[str, nn.Parameter]:
        """Raises ValueError for a UNet without temporal layers."""
        layers = temporal_layers(self.unet)
        if layers is None:
            raise ValueError("unet has no temporal layers to tune: attach some with with_temporal_layers(unet)")
        return queries_of(self.unet) | trained_of(layers)

    @contextmanager
    def training(self) -> Iterator[None]:
        """What is trained is kept in single precision at least, and computed in the model's."""
        before = {name: weight.requires_grad for name, weight in self.unet.named_parameters()}
        recomputed, dtype, trained = self.unet.is_gradient_checkpointing, self.unet.dtype, self.trained()
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

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        """Raises ValueError where another run has the UNet, or another attention processor was set meanwhile."""
        with held([self.unet], "UNet") as stranger, self._hooked(clip_norm, stranger):
            yield

    @contextmanager
    def _hooked(self, clip_norm: bool, stranger: Stranger) -> Iterator[None]:
        _refuse_foreign_processors(self.unet)
        before = {name: attn.processor for name, (attn, *_) in self._layers.items()}
        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for name, (attn, *_) in self._layers.items():
                attn.processor = _ControlledProcessor(self, name, attn.processor, stranger)
            if clip_norm:
                handles = [h for norm in _clip_norms(self.unet) for h in share_statistics(norm, stranger=stranger)]
            for name, conv in _features(self.unet).items():
                handles.append(conv.register_forward_hook(self._featured(name, stranger)))
            yield
        finally:
            for name, (attn, *_) in self._layers.items():
                attn.processor = before[name]
            for handle in handles:
                handle.remove()
            self._control, self._text, self._texts = None, {}, {}

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        """Raises ValueError for latents or a condition that do not fit the model."""
        assert beside is None, "a UNet's branches run one after another"
        noise = self._predict(latents, timestep, condition, control)
        if guidance is None:
            return noise
        return guide(self._predict(latents, timestep, guidance.negative, guidance.control), noise, guidance.scale)

    def _predict(self, latents: Tensor, timestep: float, condition: Condition, control: Control) -> Tensor:
        self._check(latents, condition)
        frames, dtype = len(latents), self.unet.dtype
        self._control, self._sites = control, self._sites_by_layer(*latents.shape[-2:])
        # The text is the same for all frames and steps: one row, whose keys and values are kept for the run.
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
        """The model's output as epsilon (v: arXiv 2202.00512, App. D)."""
        kind = self.scheduler.config["prediction_type"]
        signal = self.scheduler.alphas_cumprod[timestep].cpu().double()
        if kind == "epsilon":
            return output
        if kind == "v_prediction":
            return signal.sqrt() * output + (1 - signal).sqrt() * latents
        return (latents - signal.sqrt() * output) / (1 - signal).sqrt()

    def _featured(self, name: str, stranger: Stranger) -> Callable[..., Tensor]:
        def featured(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output if self._control is None or stranger() else self._control.feature(output, name)

        return featured

    def _check(self, latents: Tensor, condition: Condition) -> None:
        channels, width = self.unet.config["in_channels"], self.unet.config["cross_attention_dim"]
        if latents.shape[1] != channels:
            raise ValueError(f"latents have {latents.shape[1]} channels; this UNet takes {channels}")
        if isinstance(width, int) and condition.embeddings.shape[-1] != width:
            raise ValueError(f"embeddings are {condition.embeddings.shape[-1]} wide; this UNet takes {width}")
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


def kernel_of(processor: object) -> Attend:
    """The attention kernel a UNet was set to use: xformers where it was enabled, else torch's."""
    return xformers_attention if isinstance(processor, XFormersAttnProcessor) else attention


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by xformers, which takes (f t h d)."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (rearrange(x.expand(len(q), -1, -1, -1), "f h t d -> f t h d").contiguous() for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v), "f t h d -> f h t d")


class _ControlledProcessor:
    """diffusers' plain attention, with the softmax product left to a control; `before`, where a stranger calls."""

    def __init__(self, denoiser: DiffusersDenoiser, name: str, before: Any, stranger: Stranger) -> None:
        self.denoiser = denoiser
        self.name = name
        self.kernel = kernel_of(before)
        self.before, self.stranger = before, stranger

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **more: object,
    ) -> Tensor:
        if self.stranger():
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
        attend = control.cross_attention if site.kind == "cross" else control.self_attention
        output = rearrange(attend(q, k, v, site), "f h t d -> f t (h d)").to(hidden_states.dtype)
        for layer in attn.to_out:
            output = layer(output)
        if control.captured.outputs is not None and site.kind == "self":
            control.captured.outputs[site.name] = output
        if residual.ndim == 4:
            output = rearrange(output, "f (y x) c -> f c y x", y=grid[0], x=grid[1])
        return (output + residual if attn.residual_connection else output) / attn.rescale_output_factor


def _heads(x: Tensor, attn: Attention) -> Tensor:
    return rearrange(x, "f t (h d) -> f h t d", h=attn.heads)


def _keys_values(attn: Attention, of: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of a text or of the frames' own tokens: (f h t d) each."""
    if attn.is_cross_attention and attn.norm_cross:
        of = attn.norm_encoder_hidden_states(of)
    k, v = _heads(attn.to_k(of), attn), _heads(attn.to_v(of), attn)
    return (k if attn.norm_k is None else attn.norm_k(k)), v


def _attention_layers(unet: Any) -> dict[str, tuple[Attention, Place, int, int]]:
    """name -> (layer, place, index within place and kind, times the picture was halved)."""
    found: dict[str, tuple[Attention, Place, int, int]] = {}

    def add(block: nn.Module, prefix: str, place: Place, level: int) -> None:
        for name, module in block.named_modules():
            if isinstance(module, Attention) and not name.startswith("temp_"):  # those attend over frames
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


def _features(unet: Any) -> dict[str, nn.Module]:
    """The last convolution of the ResNet block whose feature Plug-and-Play takes: the second of the first decoder
    block with attention.
    """
    for i, block in enumerate(unet.up_blocks):
        if getattr(block, "attentions", None) and len(block.resnets) > 1:
            return {f"up.{i}.1": block.resnets[1].conv2}
    return {}


def _refuse_foreign_processors(unet: Any) -> None:
    for name, processor in unet.attn_processors.items():
        if type(processor) is _ControlledProcessor:
            raise ValueError(IN_USE.format(what="UNet"))
        if type(processor) not in _PLAIN:
            raise ValueError(
                f"{name} is a {type(processor).__name__}, which FateZero cannot reproduce: remove it first "
                "(unet.set_default_attn_processor(), or unload the adapter that set it)"
            )


def _base_weights(unet: nn.Module) -> dict[str, Tensor]:
    """A model's weights without the LoRA layers wrapped around them: these may come after the inversion."""
    return {name.replace(".base_layer", ""): w for name, w in unet.state_dict().items() if ".lora_" not in name}


def _clip_norms(unet: Any) -> list[nn.GroupNorm]:
    """The GroupNorms that see the whole clip in the authors' 5-D UNet."""
    norms = [n for m in unet.modules() if isinstance(m, ResnetBlock2D) for n in (m.norm1, m.norm2)]
    return [n for n in (*norms, unet.conv_norm_out) if isinstance(n, nn.GroupNorm)]
