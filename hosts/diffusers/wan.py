"""diffusers' video transformers as a host: Wan's, hooked by attention processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from einops import rearrange
from torch import Tensor, nn

from ...attention.condition import Condition
from ...attention.control import Attend, AttentionSite, Control, Kind, attention
from ...diffusion.ddim import guide
from ...diffusion.denoiser import Guidance, refuse_clip_norm
from ...diffusion.schedule import FlowSchedule
from ...store.identity import IdentityCache, ModelIdentity
from ...store.records import Beside
from ..held import IN_USE, Stranger, held

__all__ = ["VideoTransformerDenoiser"]

_IDENTITIES = IdentityCache()


class VideoTransformerDenoiser:
    """A Wan transformer and the schedule of its flow, as the loops of `fatezero.diffusion` call them.

    transformer: a `WanTransformer3DModel` for text to video, of any width; LoRA layers in it keep working.
    scheduler: one of diffusers' with a flow's sigmas: `FlowMatchEulerDiscreteScheduler`, or
    `UniPCMultistepScheduler` with `use_flow_sigmas`; it is read for its noise levels alone. low_noise: Wan 2.2's second
    transformer, which takes over where sigma falls below `boundary`.

    Latents are (frames, channels, h, w), frames of the latents. A branch beside another goes through each block just
    before it, so that what it leaves for the other is kept for one block.

    Raises TypeError for a model or scheduler of another kind, and ValueError for one that takes pictures too, or that
    already carries attention processors that compute something else.
    """

    spans_clip = True
    pairs = True
    frames_meet = True
    trained_with = (("self",), False)

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
                f"scheduler is a {type(scheduler).__name__} without a flow's sigmas; take a "
                "FlowMatchEulerDiscreteScheduler, or a UniPCMultistepScheduler with use_flow_sigmas=True"
            )
        self.scheduler, self.boundary = scheduler, boundary
        self._rows: Sequence[Control] = ()
        """Whose branch each row of the batch under way is."""
        self._row = 0
        self._grid = (0, 0)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.transformers[0].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        offloading = getattr(self.transformers[0], "_hf_hook", None)
        return torch.device(getattr(offloading, "execution_device", None) or self.transformers[0].device)

    def schedule(self, steps: int) -> FlowSchedule:
        """Raises ValueError for a number of steps that the scheduler does not take."""
        total = self.scheduler.config["num_train_timesteps"]
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}; it must be between 1 and {total}")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
        falls = bool((sigmas[:-1] > sigmas[1:]).all())
        if len(sigmas) != steps + 1 or not falls or sigmas[0] > 1 or sigmas[-1] < 0:
            raise ValueError(f"the scheduler's sigmas do not fall from at most 1 to 0 in {steps} steps")
        return FlowSchedule.of(tuple((total * sigmas[:-1]).tolist()), sigmas.flip(0))

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        """Raises ValueError for latents that its patches do not divide."""
        model = self.transformers[0]
        _, down, across = model.config["patch_size"]
        if height % down or width % across:
            raise ValueError(
                f"latents are {width}x{height}; their sides must be multiples of {across} and {down}, its patches"
            )
        heads, head_dim = model.config["num_attention_heads"], model.config["attention_head_dim"]
        grid = height // down, width // across
        kinds: tuple[Kind, ...] = ("self", "cross")
        return [
            AttentionSite("block", i, kind, heads, head_dim, *grid) for i in range(len(model.blocks)) for kind in kinds
        ]

    def identity(self) -> ModelIdentity:
        config = self.transformers[0].config
        layout = (
            f"WanTransformer3DModel in={config['in_channels']} blocks={config['num_layers']} "
            f"heads={config['num_attention_heads']}x{config['attention_head_dim']} text={config['text_dim']}"
            + (f" and another below sigma {self.boundary:g}" if self.boundary else "")
        )
        weights = {
            f"{n}.{name.replace('.base_layer', '')}": weight
            for n, model in enumerate(self.transformers)
            for name, weight in model.state_dict().items()
            if ".lora_" not in name
        }
        return _IDENTITIES.of(self.transformers[0], layout, self.dtype, weights)

    def windows(self, latents: Tensor, timestep: float) -> None:
        return None

    @contextmanager
    def hooked(self, clip_norm: bool = False) -> Iterator[None]:
        """Raises ValueError for clip norm, which is of UNets, where another run has a transformer, and for attention
        processors that were set meanwhile.
        """
        refuse_clip_norm(clip_norm)
        with held(self.transformers, "transformer") as stranger, self._hooked(stranger):
            yield

    @contextmanager
    def _hooked(self, stranger: Stranger) -> Iterator[None]:
        for model in self.transformers:
            _refuse_foreign_processors(model)
        layers = [layer for model in self.transformers for layer in _layers(model)]
        blocks = [block for model in self.transformers for block in model.blocks]
        wrapped = dict.fromkeys(blocks, self._by_row) | {block.ffn: self._in_parts for block in blocks}
        processors = [layer.attention.processor for layer in layers]
        forwards = {module: module.__dict__.get("forward") for module in wrapped}
        try:
            for layer in layers:
                layer.attention.processor = _ControlledProcessor(self, layer, layer.attention.processor, stranger)
            for module, wrap in wrapped.items():
                module.forward = wrap(module.forward, stranger)
            yield
        finally:
            for layer, processor in zip(layers, processors, strict=True):
                layer.attention.processor = processor
            for module, forward in forwards.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward
            self._rows = ()

    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        condition: Condition,
        control: Control,
        guidance: Guidance | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        """The velocity. Raises ValueError for latents or a condition that do not fit the model."""
        if beside is None:
            velocity = self._call([(latents, condition, control)], timestep)[0]
        else:
            pair = [(beside.latents, beside.condition, beside.control), (latents, condition, control)]
            beside.control.captured.prediction, velocity = self._call(pair, timestep)
        if guidance is None:
            return velocity
        negative = self._call([(latents, guidance.negative, guidance.control)], timestep)[0]
        return guide(negative, velocity, guidance.scale)

    def _call(self, rows: Sequence[tuple[Tensor, Condition, Control]], timestep: float) -> list[Tensor]:
        """The velocities of branches on the same frames, evaluated beside each other."""
        for latents, condition, _ in rows:
            self._check(latents, condition)
        model, first = self._model_at(timestep), rows[0][0]
        longest = max(condition.text_tokens for _, condition, _ in rows)
        clips = torch.stack([rearrange(latents, "f c y x -> c f y x") for latents, *_ in rows]).to(self.dtype)
        texts = torch.cat([_padded(condition.embeddings, longest) for _, condition, _ in rows]).to(clips)
        self._grid = first.shape[-2], first.shape[-1]
        self._sites = {site.name: site for site in self.sites(*self._grid)}
        self._rows, self._texts = [control for *_, control in rows], [c.text_tokens for _, c, _ in rows]
        times = torch.full(
            (len(rows),), timestep, device=clips.device, dtype=torch.promote_types(self.dtype, torch.float32)
        )
        output = model(clips, times, texts, return_dict=False)[0].to(first.dtype)
        return [rearrange(velocity, "c f y x -> f c y x") for velocity in output]

    def _model_at(self, timestep: float) -> Any:
        low = self.boundary is not None and timestep < self.boundary * self.scheduler.config["num_train_timesteps"]
        return self.transformers[int(low)]

    def _check(self, latents: Tensor, condition: Condition) -> None:
        config = self.transformers[0].config
        if latents.shape[1] != config["in_channels"]:
            raise ValueError(
                f"latents have {latents.shape[1]} channels; this transformer takes {config['in_channels']}"
            )
        if condition.embeddings.shape[-1] != config["text_dim"]:
            raise ValueError(
                f"embeddings are {condition.embeddings.shape[-1]} wide; this transformer takes {config['text_dim']}"
            )

    def _by_row(self, forward: Callable[..., Tensor], stranger: Stranger) -> Callable[..., Tensor]:
        """A block that takes the rows of a batch one after another, so that one leaves attention for the next."""

        def by_row(hidden: Tensor, text: Tensor, times: Tensor, rotary: Any) -> Tensor:
            if stranger():
                return forward(hidden, text, times, rotary)
            done = []
            for self._row in range(len(hidden)):
                own = slice(self._row, self._row + 1)
                done.append(forward(hidden[own], text[own], times[own], rotary))
            return done[0] if len(done) == 1 else torch.cat(done)

        return by_row

    def _in_parts(self, forward: Callable[..., Tensor], stranger: Stranger) -> Callable[..., Tensor]:
        """A feed-forward that takes a branch beside another by halves: it is what a block holds most of, and then
        there is what the branches hold for each other.
        """

        def in_parts(tokens: Tensor, *rest: Any, **more: Any) -> Tensor:
            if stranger() or len(self._rows) == 1:
                return forward(tokens, *rest, **more)
            return torch.cat([forward(part, *rest, **more) for part in tokens.chunk(2, 1)], 1)

        return in_parts

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, kernel: Attend) -> Tensor:
        """One layer of one row, (1, tokens, heads, channels), by its control."""
        control, site = self._rows[self._row], self._sites[name]
        control.attend = kernel
        q = rearrange(q, "1 (f t) h d -> f h t d", t=site.tokens)
        if site.kind == "cross":
            count = self._texts[self._row]
            k, v = (rearrange(x, "1 s h d -> 1 h s d")[:, :, :count] for x in (k, v))
            output = control.cross_attention(q, k, v, site)
        else:
            k, v = (rearrange(x, "1 (f t) h d -> f h t d", t=site.tokens) for x in (k, v))
            output = control.self_attention(q, k, v, site)
        if self._row:  # a layer that was recorded beside this one has served
            self._rows[self._row - 1].forget(name)
        return rearrange(output, "f h t d -> 1 (f t) (h d)")


@dataclass(frozen=True)
class _Layer:
    """An attention layer and the name of its site."""

    name: str
    attention: Any


def _layers(model: Any) -> list[_Layer]:
    return [
        _Layer(f"block.{i}.{kind}", layer)
        for i, block in enumerate(model.blocks)
        for kind, layer in (("self", block.attn1), ("cross", block.attn2))
    ]


class _ControlledProcessor:
    """Wan's attention, with the softmax product left to a control; `before`, where a stranger calls."""

    def __init__(self, denoiser: VideoTransformerDenoiser, layer: _Layer, before: Any, stranger: Stranger) -> None:
        self.denoiser, self.name, self.kernel = denoiser, layer.name, kernel_of(before)
        self.before, self.stranger = before, stranger

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.stranger():
            done: Tensor = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return done
        of = hidden_states if encoder_hidden_states is None else encoder_hidden_states
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
        for layer in attn.to_out:
            output = layer(output)
        return output


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on (1, tokens, heads, channels), neighbours in pairs, as Wan has them."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    output = torch.empty_like(x)
    output[..., 0::2] = even * cos - odd * sin
    output[..., 1::2] = even * sin + odd * cos
    return output


def kernel_of(processor: Any) -> Attend:
    """The attention kernel that a transformer was set to use (`set_attention_backend`), else torch's."""
    backend = processor._attention_backend
    if backend is None:
        return attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.expand(len(q), -1, -1, -1).transpose(1, 2) for x in (q, k, v))
        done: Tensor = dispatch_attention_fn(q, k, v, backend=backend)
        return done.transpose(1, 2)

    return attend


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers' has a flow's sigmas."""
    config = getattr(scheduler, "config", {})
    flows = type(scheduler).__name__.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    return flows and hasattr(scheduler, "sigmas") and not config.get("use_dynamic_shifting")


def _padded(text: Tensor, tokens: int) -> Tensor:
    return nn.functional.pad(text, (0, 0, 0, tokens - text.shape[1]))


def _check_model(model: Any) -> None:
    if not isinstance(model, WanTransformer3DModel):
        raise TypeError(
            f"transformer is a {type(model).__name__}; FateZero knows the attention of a WanTransformer3DModel "
            "(Wan 2.1 and 2.2, text to video)"
        )
    if model.config["image_dim"] or model.config["in_channels"] != model.config["out_channels"]:
        raise ValueError("transformer takes a picture beside the text (Wan I2V); take one for text to video")
    _refuse_foreign_processors(model)


def _refuse_foreign_processors(model: Any) -> None:
    for layer in _layers(model):
        if type(layer.attention.processor) is _ControlledProcessor:
            raise ValueError(IN_USE.format(what="transformer"))
        if type(layer.attention.processor) is not WanAttnProcessor:
            raise ValueError(
                f"{layer.name} has a {type(layer.attention.processor).__name__}, which FateZero cannot reproduce: "
                "remove it first (transformer.set_attn_processor(WanAttnProcessor()))"
            )
