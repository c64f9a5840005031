"""How a model's attention layers compute under the control of an edit.

Shapes are given as einops strings: f frames, h heads, t tokens of a frame, s source
text tokens, c target text tokens, n key frames, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from einops import rearrange

from ..imports import F, torch
from .capture import Captured, TokenHeat
from .key_frames import Chunk, KeyFrames, as_one

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

Place = Literal["down", "mid", "up", "block"]
"""Of a UNet; a transformer has blocks only."""
Kind = Literal["self", "cross", "joint"]
"""joint: one softmax over the tokens of several streams, such as video and text."""
Streams = tuple[tuple[str, int, int], ...]
"""The name, first token and end of each stream in a joint layer's sequence."""
SEPARATE: tuple[Kind, ...] = ("self", "cross")
"""The kinds of layers whose queries are the tokens of frames only."""
WITH_TEXT: tuple[Kind, ...] = ("cross", "joint")
"""The kinds of layers whose keys are, or contain, the tokens of the text."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer for one picture size.

    place, index: where it is; index counts the layers of its kind within its place.
    heads, head_dim: its attention heads and their channels.
    height, width: the grid of a frame's tokens.
    streams: of a joint layer, text and video among them: ("video", 0, 512).
    """

    place: Place
    index: int
    kind: Kind
    heads: int
    head_dim: int
    height: int
    width: int
    streams: Streams = ()

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def name(self) -> str:
        return f"{self.place}.{self.index}.{self.kind}"

    def rows(self, stream: str) -> slice:
        """The tokens of a stream in a joint layer; the last of several of its name."""
        return next(slice(start, stop) for name, start, stop in reversed(self.streams) if name == stream)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's fused kernel: (f h t d) -> (f h t d)."""
    return F.scaled_dot_product_attention(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))


Attend: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""`attention` with the host's preferred kernel."""


NO_WINDOWS = "but a node on the model splits it into context windows (AnimateDiff-Evolved): remove one of them"
"""The end of errors of methods that need all frames in one call."""

Gather: TypeAlias = "Callable[[Tensor, AttentionSite], Tensor]"
"""A self-attention layer's output (f t c) from its input tokens (f t c)."""


def attend_as_one(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every frame of q (f h t d) attends to the same keys and values, (1 h n d), without copies of these."""
    return rearrange(attend(as_one(q), k, v), "1 h (f t) d -> f h t d", f=len(q))


def also_to(attend: Attend, others: Sequence[tuple[Tensor, Tensor]]) -> Attend:
    """An attention kernel with more keys and values. others: these before and after the given ones, (1 h n d)."""

    def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (
            torch.cat([before.expand(len(x), -1, -1, -1), x, after.expand(len(x), -1, -1, -1)], 2)
            for x, (before, after) in zip((k, v), others, strict=True)
        )
        return attend(q, k, v)

    return joined


def token_shares(q: Tensor, k: Tensor, tokens: Sequence[int], attend: Attend = attention) -> Tensor:
    """The attention of each position to some text tokens, averaged over heads, without a map: (f t n).

    Attention with one-hot values for these tokens, in groups of as many as a head has channels.
    """
    parts = []
    for at in range(0, len(tokens), q.shape[-1]):
        own = list(tokens[at : at + q.shape[-1]])
        ones = torch.zeros(1, *k.shape[1:], dtype=k.dtype, device=k.device)
        ones[:, :, own, range(len(own))] = 1
        parts.append(attend(q, k, ones).mean(1)[..., : len(own)])
    return torch.cat(parts, -1)


def over_windows(windows: Mapping[tuple[int, ...], Tensor], frames: Sequence[int]) -> Tensor:
    """For each of some frames, the mean over the windows that contain it."""
    found: dict[int, list[Tensor]] = {frame: [] for frame in frames}
    for members, rows in windows.items():
        for frame, row in zip(members, rows, strict=True):
            found[frame].append(row)
    return torch.stack([torch.stack(rows).mean(0) for rows in found.values()])


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), in at least single precision: (f h t d), (f h c d) -> (f h t c)."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(scores.dtype)


def wide_map(q: Tensor, k: Tensor) -> Tensor:
    """The attention map in at least single precision."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return attention_map(q.to(wide), k.to(wide))


class Control:
    """The model's attention with keys and values from the clip's key frames.

    A host calls `layer` once for every layer of a UNet call on the frames of a `chunk`, with
    tensors (frames, heads, tokens, head_dim) of one branch; the text's keys and values may have
    one row for all frames. `attend` is the kernel, which a host may set.
    """

    def __init__(self, key_frames: KeyFrames, chunk: Chunk) -> None:
        self.key_frames = key_frames
        self.chunk = chunk
        self.attend: Attend = attention
        self.extended = False
        """Whether every frame attends to all frames of the call instead of the key frames."""
        self.captured = Captured()
        """Tensors recorded in the call; a host fills in the outputs of self-attention layers."""
        self.gather: Gather | None = None
        """Computes a self-attention layer's output in place of attention."""
        self.windows: dict[tuple[int, ...], Self] = {}
        """The controls of calls on only some frames of the chunk, by these frames."""
        self.rows: Tensor | None = None
        """The tokens that the branch has, (n,), in the order of all frames' tokens; None for all. A layer's q, k and v
        then are (1 h n d), and its prediction is undefined for the other tokens."""

    def window(self, frames: tuple[int, ...]) -> Self:
        """The control of a call on some frames of the chunk, for context windows of another node.

        Raises ValueError for a control that does not support them.
        """
        if frames == self.chunk.frame_indices:
            return self
        if frames not in self.windows:
            self.windows[frames] = self.on(Chunk.of(frames, self.chunk.clip))
        return self.windows[frames]

    def on(self, chunk: Chunk) -> Self:
        """A copy for some frames of its chunk."""
        if self.gather is not None or self.captured.outputs is not None or self.extended:
            raise ValueError(f"TokenFlow runs a clip in its own batches, {NO_WINDOWS}")
        copied = copy(self)
        copied.chunk, copied.windows, copied.captured = chunk, {}, self.captured.emptied()
        return copied

    def feature(self, x: Tensor, name: str) -> Tensor:
        """The feature (f c y x) of a ResNet block to use, after its last convolution and before its shortcut."""
        return x

    def input_tokens(self, x: Tensor, site: AttentionSite) -> None:
        """Called with the input tokens (f t c) of a self-attention layer."""

    @property
    def wants_tokens(self) -> bool:
        """Whether the control needs `input_tokens`, which may cost time."""
        return self.gather is not None

    def forget(self, layer: str) -> None:
        """Called by a layer's name when its records are no longer needed."""

    @property
    def is_plain(self) -> bool:
        """Whether it only computes the model's attention, with keys and values from key frames."""
        return type(self) is Control and self.captured.heat is None

    def watch(self, layers: AbstractSet[str], tokens: Sequence[int]) -> None:
        """Record the attention to some text tokens in some cross-attention layers of one grid."""
        self.captured.heat = TokenHeat(layers, tokens)

    def heat(self, text_tokens: int) -> Tensor:
        """The recorded attention, averaged over heads and layers: (f s y x), 0 for tokens that are not watched."""
        if self.windows:
            windows = {frames: control.heat(text_tokens) for frames, control in self.windows.items()}
            return over_windows(windows, self.chunk.frame_indices)
        assert self.captured.heat is not None
        return self.captured.heat.of_all(text_tokens)

    def layer(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        """The output of a layer: (f h t d), of a joint one (1 h n d)."""
        if site.kind == "self":
            return self.self_attention(q, k, v, site)
        heat = self.captured.heat
        if heat is not None and site.name in heat.layers and site.name not in heat.shares:
            frames_of, tokens = q, list(heat.tokens)
            if site.kind == "joint":
                frames_of, first = q[:, :, site.rows("video")], site.rows("text").start
                tokens = [first + token for token in tokens]
            shares = self.on_grid(token_shares(frames_of, k, tokens, self.attend), site).flatten(0, 1)
            shares = rearrange(shares, "(f y x) n -> f n y x", y=site.height, x=site.width)
            heat.shares[site.name] = shares.to(torch.promote_types(shares.dtype, torch.float32))
        return self.joint_attention(q, k, v, site) if site.kind == "joint" else self.cross_attention(q, k, v, site)

    def on_grid(self, x: Tensor, site: AttentionSite) -> Tensor:
        """Values of the branch's tokens on all tokens of its frames, (f t c); 0 for those that it does not have."""
        if self.rows is None:
            return x
        frames = len(self.chunk.frame_indices)
        whole = x.new_zeros(1, frames * site.tokens, x.shape[-1]).index_copy(1, self.rows, x)
        return rearrange(whole, "1 (f t) c -> f t c", f=frames)

    def completed(self, clean: Tensor) -> Tensor:
        """Predicted clean latents (f c y x), with the source's where the prediction is undefined."""
        return clean

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if self.extended or self.key_frames.everyone:
            return attend_as_one(self.attend, q, as_one(k), as_one(v))
        return self.attend(q, self.of_key_frames(k, site), self.of_key_frames(v, site))

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        return self.attend(q, k, v)

    def joint_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        """A layer over the tokens of several streams (`site.streams`) of one clip: (1 h n d)."""
        return self.attend(q, k, v)

    def of_key_frames(self, k: Tensor, site: AttentionSite) -> Tensor:
        """The key frames of each frame: (f h t d) -> (f h (n t) d), or one row for all."""
        frames = self.chunk.frame_indices
        return self.key_frames.at(site.channels).gather(k, frames, frames, self.chunk.clip)
