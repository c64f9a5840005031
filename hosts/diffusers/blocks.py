"""Video transformers on diffusers: their attention, with the branches of a call interleaved block by block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from ...attention.condition import Condition
from ...attention.control import Attend, AttentionSite, Control, also_to, attention
from ...diffusion.schedule import FlowSchedule
from ...store.records import Recorder
from ..exclusive import OtherThread
from .hook import HookedDenoiser, wrapped
from .network import Branch, numbered_weights
from .schedulers import flow_schedule


def kernel_of(processor: Any) -> Attend:
    """The attention kernel of a transformer (`set_attention_backend`), else torch's."""
    backend = processor._attention_backend
    if backend is None:
        return attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.expand(len(q), -1, -1, -1).transpose(1, 2) for x in (q, k, v))
        done: Tensor = dispatch_attention_fn(q, k, v, backend=backend)
        return done.transpose(1, 2)

    return attend


class BlockDenoiser(HookedDenoiser):
    """A video transformer whose blocks run the branches of a call one after another.

    Latents are (latent frames, channels, h, w). Of paired branches, the first runs each block just before the others,
    so that its records for these exist for one block only.
    """

    pairs = True
    frames_meet = True
    trained_with = (("self",), False)

    def __init__(self, networks: Sequence[Any], scheduler: Any) -> None:
        self._rows: Sequence[Control] = ()
        """The control of each row of the current batch."""
        self._row = 0
        self._sites: dict[str, AttentionSite] = {}
        self._texts: Sequence[int] = ()
        """The text tokens of each row."""
        super().__init__(networks, scheduler)

    # --- of a family --------------------------------------------------------------------

    @abstractmethod
    def blocks(self, network: Any) -> Sequence[Any]:
        """The blocks of a network, each with `attn1` (self), `attn2` (cross) and a feed-forward `ff`."""

    @staticmethod
    @abstractmethod
    def feed_forward(block: Any) -> nn.Module:
        """The feed-forward of a block for the video's tokens."""

    @abstractmethod
    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of a frame's tokens. Raises ValueError for latents that are not whole patches."""

    def with_tokens(self, inputs: Sequence[Any], tokens: Tensor) -> Sequence[Any]:
        """A block's inputs for some tokens of a row, in families with a `subset_patch`."""
        raise NotImplementedError

    @abstractmethod
    def velocities(self, clips: Tensor, conditions: Sequence[Condition], timestep: float) -> Tensor:
        """The network's output for clips (rows, c, f, h, w), one for each condition."""

    # --- facts --------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        return numbered_weights(self.networks)

    def schedule(self, steps: int) -> FlowSchedule:
        """Raises ValueError for a number of steps that the scheduler does not support."""
        return flow_schedule(self.scheduler, steps, self.tokens)

    @property
    def tokens(self) -> int | None:
        """The tokens of a call, by which the schedule is shifted; None for a schedule that is not."""
        return None

    @property
    def is_plain(self) -> bool:
        """Whether the current row's attention is the network's own."""
        return self._rows[self._row].is_plain

    @property
    def all_plain(self) -> bool:
        """Whether that of all rows is."""
        return all(control.is_plain for control in self._rows)

    @property
    def attention(self) -> list[tuple[str, Any]]:
        return [
            (f"block.{i}.{kind}", layer)
            for network in self.networks
            for i, block in enumerate(self.blocks(network))
            for kind, layer in (("self", block.attn1), ("cross", block.attn2))
        ]

    def sites(self, height: int, width: int) -> list[AttentionSite]:
        """Raises ValueError for latents that are not divisible into patches."""
        network, kinds = self.networks[0], ("self", "cross")
        heads, grid = network.config["num_attention_heads"], self.token_grid(height, width)
        return [
            AttentionSite("block", i, kind, heads, network.config["attention_head_dim"], *grid)  # type: ignore[arg-type]
            for i in range(len(self.blocks(network)))
            for kind in kinds
        ]

    # --- calls --------------------------------------------------------------------------

    def hook_more(self, stack: ExitStack, other_thread: OtherThread, clip_norm: bool) -> None:
        blocks = [block for network in self.networks for block in self.blocks(network)]
        parts = {self.feed_forward(block): self._in_parts for block in blocks}
        stack.enter_context(wrapped(dict.fromkeys(blocks, self._by_row) | parts, other_thread))

    def forget(self) -> None:
        self._rows = ()

    def predicted(self, branches: Sequence[Branch], timestep: float) -> list[Tensor]:
        """The velocities of branches on the same frames, evaluated in one call."""
        for latents, condition, _ in branches:
            self.check(latents, condition)
        first, conditions = branches[0][0], [condition for _, condition, _ in branches]
        clips = torch.stack([rearrange(latents, "f c y x -> c f y x") for latents, *_ in branches]).to(self.dtype)
        self._sites = {site.name: site for site in self.sites(*first.shape[-2:])}
        self._rows, self._texts = [control for *_, control in branches], [c.text_tokens for c in conditions]
        output = self.velocities(clips, conditions, timestep).to(first.dtype)
        return [rearrange(velocity, "c f y x -> f c y x") for velocity in output]

    def _by_row(self, forward: Callable[..., Any], other_thread: OtherThread) -> Callable[..., Any]:
        """A block that runs the rows of a batch one after another, so that each can use the records of the first. A row
        with some tokens only has the others from the row before it.
        """

        def by_row(*inputs: Any, **named: Any) -> Any:
            count = len(self._rows)
            if other_thread():
                return forward(*inputs, **named)
            done: list[Any] = []
            for self._row in range(count):
                tokens = self._rows[self._row].rows
                own = [row_of(value, self._row, count) for value in inputs]
                named_of_row = {name: row_of(value, self._row, count) for name, value in named.items()}
                if tokens is None:
                    done.append(forward(*own, **named_of_row))
                    continue
                whole = done[-1] if done else own[0]
                if len(tokens):
                    some = forward(*self.with_tokens(own, tokens), **named_of_row)
                    whole = whole.index_copy(1, tokens, some)
                done.append(whole)
            if len(done) > 1:  # also where no row after the source's had tokens
                self._rows[0].captured.records.clear()
            return stacked(done)

        return by_row

    def _in_parts(self, forward: Callable[..., Tensor], other_thread: OtherThread) -> Callable[..., Tensor]:
        """A feed-forward that takes half of the tokens at a time where there are several branches, since it dominates a
        block's memory, to which the branches' records add.
        """

        def in_parts(tokens: Tensor, *rest: Any, **more: Any) -> Tensor:
            if other_thread() or len(self._rows) == 1:
                return forward(tokens, *rest, **more)
            control, site = self._rows[self._row], next(iter(self._sites.values()))
            whole = tokens.shape[1] if control.rows is None else len(control.chunk.frame_indices) * site.tokens
            return torch.cat([forward(part, *rest, **more) for part in tokens.split(-(-whole // 2), 1)], 1)

        return in_parts

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, kernel: Attend) -> Tensor:
        """One layer of one row, (1, tokens, heads, channels), computed by its control.

        The control has the clip's tokens. Those behind it attend as in the model, and the clip's attend to them too.
        """
        control, site = self._rows[self._row], self._sites[name]
        control.attend = kernel
        frames = 1 if control.rows is not None else len(control.chunk.frame_indices)
        own = q.shape[1] if control.rows is not None else frames * site.tokens
        q, k, v = (rearrange(x, "1 n h d -> 1 h n d") for x in (q, k, v))
        if site.kind == "cross":
            k, v = (x[:, :, : self._texts[self._row]] for x in (k, v))
        elif q.shape[2] > own:
            check_no_map(control, site)
            control.attend = also_to(kernel, [(x[:, :, :0], x[:, :, own:]) for x in (k, v)])

        def in_frames(x: Tensor) -> Tensor:
            return rearrange(x[:, :, :own], "1 h (f t) d -> f h t d", f=frames)

        keys = (k, v) if site.kind == "cross" else (in_frames(k), in_frames(v))
        output = rearrange(control.layer(in_frames(q), *keys, site), "f h t d -> 1 (f t) (h d)")
        if 0 < self._row == len(self._rows) - 1:  # the source's record of this layer is no longer needed
            self._rows[0].forget(name)
        if q.shape[2] == own:
            return output
        return torch.cat([output, rearrange(kernel(q[:, :, own:], k, v), "1 h n d -> 1 n (h d)")], 1)


def check_no_map(control: Control, site: AttentionSite) -> None:
    """Raise ValueError for a store of maps, which hold the clip's own tokens only."""
    if isinstance(control, Recorder) and control.memory == "maps" and site.name in control.layers:
        raise ValueError("memory: maps cannot include the tokens of a control video or guide frames: use recompute")


def row_of(value: Any, row: int, rows: int) -> Any:
    """A row of a block's input; inputs that all rows share are returned unchanged."""
    if isinstance(value, (tuple, list)):
        return type(value)(row_of(part, row, rows) for part in value)
    return value[row : row + 1] if isinstance(value, Tensor) and len(value) == rows else value


def stacked(rows: Sequence[Any]) -> Any:
    """A block's outputs for single rows as one batch; each is a tensor, or one for each stream."""
    if len(rows) == 1:
        return rows[0]
    if isinstance(rows[0], Tensor):
        return torch.cat(list(rows))
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
