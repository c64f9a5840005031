"""MiniMax H3 on diffusers: its transformer's joint attention, with a source's branch beside the edit's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.models.transformers.transformer_minimax_h3 import MiniMaxH3AttnProcessor, _apply_rotary_emb
from einops import rearrange
from torch import Tensor

from ...attention.condition import Condition
from ...attention.control import Attend, AttentionSite, Control, Streams
from ...attention.packed import PackedChunk, Packing
from ...diffusion.schedule import FlowSchedule
from ...models.h3 import H3, packing, places, sound_sigma
from ..beside import Beside
from ..exclusive import OtherThread
from .blocks import kernel_of
from .hook import ControlledProcessor, HookedDenoiser, wrapped
from .network import Branch

STEPS_SCALE = 1000.0
"""Timesteps of the loops are sigmas times this; the transformer takes 1 - sigma."""
TEXT, SOUND, VIDEO = 1, 2, 0
"""The transformer's tags of rows."""


class _Processor(ControlledProcessor):
    kernel_of = staticmethod(kernel_of)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if self.other_thread():
            done: Tensor = self.before(attn, hidden_states, rotary_emb, attention_mask)
            return done
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        assert rotary_emb is not None, "only the text's refiner has none"
        q, k = (_apply_rotary_emb(norm(x), *rotary_emb) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        output = self.denoiser._attend(self.name, q, k, v, self.kernel).to(hidden_states.dtype)
        for layer in attn.to_out:
            output = layer(output)
        return output


@dataclass(frozen=True)
class _Call:
    """A call on one branch: its control, and where the streams' rows are."""

    control: Control
    streams: Streams


class JointDenoiser(HookedDenoiser):
    """A MiniMax H3 transformer, as the loops of `fatezero.diffusion` call it.

    transformer: a `MiniMaxH3Transformer3DModel`. scheduler: a `MiniMaxH3Scheduler`, of which only the shift is used.
    shapes: of the latents of the video, (1, 24, frames, h, w), and of the sound, (1, 32, 2, n). sound_shift: of the
    sound's flow.

    The latents of the loops are video and sound in one tensor, (1, 1, 1, n), the sound scaled onto the video's
    schedule: `packed` and `unpacked`. A prompt has one row of embeddings for each token; `extras["tags"]` may have the
    transformer's tag of each, (1, tokens). Of two paired branches, the first runs each block just before the second.

    Raises TypeError for another kind of model or scheduler, and ValueError for attention processors that compute
    something else, and for latents that are not divisible into patches.
    """

    family = H3
    processor = _Processor
    plain = (MiniMaxH3AttnProcessor,)
    reset = "transformer.set_attn_processor(MiniMaxH3AttnProcessor())"
    text_dim = "text_dim"
    pairs = True
    frames_meet = True
    trained_with = (("self",), False)

    def __init__(
        self,
        transformer: MiniMaxH3Transformer3DModel,
        scheduler: MiniMaxH3Scheduler,
        shapes: Sequence[Sequence[int]],
        sound_shift: float = 3.0,
    ) -> None:
        if not isinstance(transformer, MiniMaxH3Transformer3DModel):
            raise TypeError(f"transformer is a {type(transformer).__name__}; it must be a MiniMaxH3Transformer3DModel")
        if not isinstance(scheduler, MiniMaxH3Scheduler):
            raise TypeError(f"scheduler is a {type(scheduler).__name__}; it must be a MiniMaxH3Scheduler")
        self.transformer, self.shapes = transformer, tuple(map(tuple, shapes))
        self.shifts = scheduler.shift, sound_shift
        self._patch = tuple(transformer.config["patch_size"])
        if any(side % patch for side, patch in zip(self.shapes[0][2:], self._patch, strict=True)):
            raise ValueError(
                f"latents of the video are {self.shapes[0]}; their sides must be multiples of the patch {self._patch}"
            )
        self._beside = Beside(len(transformer.transformer_blocks))
        self._calls: tuple[_Call, ...] = ()
        """The call of the current branch, and that of the branch beside it."""
        self._at_beside = False
        super().__init__([transformer], scheduler)

    @property
    def attention(self) -> list[tuple[str, Any]]:
        return [(f"block.{i}.joint", block.attn) for i, block in enumerate(self.transformer.transformer_blocks)]

    def schedule(self, steps: int) -> FlowSchedule:
        """The scheduler's, of so many calls. Raises ValueError for a number that it does not support."""
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")
        scheduler = type(self.scheduler)(self.shifts[0])
        scheduler.set_timesteps(steps + 1)
        sigmas = scheduler.sigmas.double()
        if len(sigmas) != steps + 1:
            raise ValueError(f"steps is {steps}; the scheduler has {len(sigmas) - 1} at most")
        return FlowSchedule.of(tuple((STEPS_SCALE * sigmas[:-1]).tolist()), sigmas.flip(0))

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        """Of the video's grid, whatever the size."""
        config, (_, rows, columns) = self.transformer.config, self._grid(self.shapes)
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return [AttentionSite("block", i, "joint", heads, head_dim, rows, columns) for i in range(config["num_layers"])]

    @property
    def layout(self) -> str:
        config = self.transformer.config
        return (
            f"MiniMaxH3Transformer3DModel in={config['in_channels']} blocks={config['num_layers']} "
            f"heads={config['num_attention_heads']}x{config['attention_head_dim']} text={config['text_dim']}"
        )

    def hook_more(self, stack: ExitStack, other_thread: OtherThread, clip_norm: bool) -> None:
        blocks = self.transformer.transformer_blocks
        wraps = {block: partial(self._in_turn, index) for index, block in enumerate(blocks)}
        stack.enter_context(wrapped(wraps, other_thread))

    def forget(self) -> None:
        self._calls = ()
        self._beside.forget()

    # --- latents ------------------------------------------------------------------------

    def packed(self, video: Tensor, sound: Tensor) -> Tensor:
        """Clean latents for the loops, (1, 1, 1, n)."""
        return torch.cat([video.reshape(-1), self._scale * sound.reshape(-1)])[None, None, None]

    def unpacked(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `packed`."""
        video, sound = _streams(latents, self.shapes)
        return video, sound / self._scale

    @property
    def packing(self) -> Packing:  # type: ignore[override]
        return packing(self.shapes)

    def _grid(self, shapes: Sequence[Sequence[int]]) -> list[int]:
        """Frames, rows and columns of the video's tokens."""
        return [side // patch for side, patch in zip(shapes[0][2:], self._patch, strict=True)]

    @property
    def _scale(self) -> float:
        return self.shifts[0] / self.shifts[1]

    # --- calls --------------------------------------------------------------------------

    def predicted(self, branches: Sequence[Branch], timestep: float) -> list[Tensor]:
        """The velocities of one branch, or of two of which the first runs beside the second."""
        for branch in branches:
            self._check(branch)
        *beside, own = branches
        if not beside:
            return [self._called(own, timestep)]
        (source,) = beside
        try:
            with self._beside.phase("enter"):
                self._called(source, timestep)
            (call,) = self._calls
            with self._beside.phase("run"):
                velocity = self._called(own, timestep, call)
            with self._beside.phase("leave"):
                return [self._called(source, timestep), velocity]
        finally:
            self._beside.forget()

    def _shapes_of(self, control: Control) -> Sequence[tuple[int, ...]]:
        """The shapes of video and sound in a call."""
        return control.chunk.shapes if isinstance(control.chunk, PackedChunk) else self.shapes

    def _check(self, branch: Branch) -> None:
        """Raise ValueError for latents or a condition that do not fit."""
        latents, condition, control = branch
        shapes, width = self._shapes_of(control), self.transformer.config["text_dim"]
        size = sum(map(math.prod, shapes))
        if latents.numel() != size:
            raise ValueError(f"latents have {latents.numel()} numbers; those of {shapes} have {size}")
        if condition.embeddings.shape[-1] != width:
            raise ValueError(f"embeddings are {condition.embeddings.shape[-1]} wide; this model takes {width}")

    def _called(self, branch: Branch, timestep: float, *beside: _Call) -> Tensor:
        """The velocity of a branch, the negative of the transformer's output; the sound's on the video's schedule."""
        latents, condition, control = branch
        shapes = self._shapes_of(control)
        grid, of_sounds = self._grid(shapes), shapes[1][-2:]
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        (video, carried), sigma = _streams(wide, shapes), max(timestep / STEPS_SCALE, 1e-6)
        of_sound = float(sound_sigma(torch.tensor(sigma, dtype=torch.float64), *self.shifts))
        sound = carried * (of_sound / sigma)
        device, patch = latents.device, dict(zip("lda", self._patch, strict=True))
        tags, indices, streams = _rows(condition, math.prod(of_sounds), math.prod(grid))
        self._calls = (_Call(control, streams), *beside)
        output, of_output = self.transformer(
            rearrange(video, "1 c (f l) (y d) (x a) -> 1 (f y x) (c l d a)", **patch),
            rearrange(sound, "1 c s n -> 1 (s n) c"), condition.embeddings,
            torch.tensor([1 - sigma, 1 - of_sound], device=device), (tags == SOUND).long().to(device), tags.to(device),
            places(condition.text_tokens, grid, of_sounds).float().to(device),
            *(rows.to(device) for rows in indices), return_dict=False,
        )  # fmt: skip
        sides = dict(zip("fyx", grid, strict=True))
        v = -rearrange(output, "1 (f y x) (c l d a) -> 1 c (f l) (y d) (x a)", **sides, **patch)
        v_sound = -rearrange(of_output, "1 (s n) c -> 1 c s n", s=of_sounds[0])
        v_sound = (1 - self._scale) * sound + (1 + (self._scale - 1) * of_sound) * v_sound
        return torch.cat([v.reshape(-1).to(latents), v_sound.reshape(-1).to(latents)]).view_as(latents)

    def _in_turn(self, index: int, forward: Callable[..., Tensor], other_thread: OtherThread) -> Callable[..., Tensor]:
        """A block that runs on the branch beside first."""

        def run(rows: Tensor, others: Any, beside: bool) -> Tensor:
            self._at_beside = beside
            return forward(rows, *others)

        def in_turn(rows: Tensor, *others: Any) -> Tensor:
            return forward(rows, *others) if other_thread() else self._beside.block(index, rows, others, run)

        return in_turn

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, kernel: Attend) -> Tensor:
        """One layer of one branch, (1, rows, heads, channels), computed by its control."""
        call = self._calls[self._at_beside]
        call.control.attend = kernel
        site = replace(self.sites(0, 0)[int(name.split(".")[1])], streams=call.streams)
        q, k, v = (rearrange(x, "1 n h d -> 1 h n d") for x in (q, k, v))
        output = call.control.layer(q, k, v, site)
        if not self._at_beside and len(self._calls) > 1:
            self._calls[1].control.forget(name)
        return rearrange(output, "1 h n d -> 1 n (h d)")


def _streams(latents: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = latents.reshape(-1).split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _rows(condition: Condition, sound: int, video: int) -> tuple[Tensor, list[Tensor], Streams]:
    """The tag of each row, the indices of the video's, the sound's and the text's rows, and the streams. sound, video:
    the number of their rows.
    """
    own, text = condition.extras.get("tags"), condition.text_tokens
    sizes = {"text": text, "audio": sound, "video": video}
    ends = accumulate(sizes.values())
    streams = tuple((name, end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True))
    tags = [torch.full((size,), tag) for size, tag in zip(sizes.values(), (TEXT, SOUND, VIDEO), strict=True)]
    tags[0] = tags[0] if own is None else own[0].long().cpu()
    indices = [torch.arange(start, stop) for _, start, stop in reversed(streams)]
    return torch.cat(tags), indices, streams
