"""Video transformers in ComfyUI: their attention, hooked on a clone by the host's public hooks.

`patches_replace["dit"]` wraps each block, which runs the branches of a call one after another, the source's first.
During a call, hooks of the blocks' attention modules pass our `optimized_attention_override` to each, around any
existing one. Overrides and block patches of other packs stay active: overrides as the kernel, block patches around the
block's own forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import comfy.patcher_extension
import torch
from einops import rearrange
from torch import Tensor, nn

from ...attention.control import Attend, AttentionSite, Control, Kind, also_to
from ...store.identity import IdentityCache, ModelIdentity
from ...store.records import kept_as_map
from .hook import ALL_KINDS, OVERRIDE, Hook, check_kinds, hook_below, node_of, unpatched
from .latents import unpacked_parts
from .noise import FlowNoise, noise_of
from .pair import join_pair
from .sameness import ROOM

WrappersMP = comfy.patcher_extension.WrappersMP

_IDENTITIES = IdentityCache()
_BRANCH = "fatezero_branch"
"""The transformer option with the branch that a block computes."""


def check_sampled_as_flow(model: Any) -> None:
    """Raise ValueError for a video transformer that is not sampled as a flow."""
    if not isinstance(noise_of(model), FlowNoise):
        raise ValueError("model: is not sampled as a flow: remove the Model Sampling node")


class HookedBlocks(Hook):
    """A clone of a video transformer's MODEL whose attention layers run through controls."""

    pairs = True
    container: ClassVar[str]
    """The attribute of the network with its blocks."""
    attention: ClassVar[dict[Kind, str]]
    """The attribute of a block with each kind of attention layer."""

    def __init__(self, model: Any, kinds: Sequence[Kind] = ALL_KINDS) -> None:
        """Raises ValueError for a MODEL of another family, and for a subset of kinds."""
        check_sampled_as_flow(model)
        check_kinds(model, kinds)
        super().__init__(model)
        join_pair(self, model)
        self._unet, self._noise = model.model.diffusion_model, noise_of(model)
        self._blocks: list[nn.Module] = list(getattr(self._unet, self.container))
        self._sites: dict[tuple[int, ...], dict[str, AttentionSite]] = {}
        self._options: dict[str, Any] | None = None
        """The options of the call that the source ran in."""
        self._source = -1
        """The branch of the source in the current call; -1 without one."""
        self._last = False
        """Whether no later branch of the call reads the source's records of the block."""
        self._others = (0, 0)
        """The tokens before and after the clip's own in the current call."""
        self._frames = 0
        """The frames of the latents of the current call."""
        self._guides = 0
        """The frames of guides behind the clip in the latents of the current call."""
        around = {WrappersMP.DIFFUSION_MODEL: self._around(), WrappersMP.CALC_COND_BATCH: self._joined()}
        self._place(len(self._blocks), self._block, around)
        self.patcher.add_object_patch(ROOM, self._room(model.get_model_object(ROOM)))

    # --- of a family --------------------------------------------------------------------

    @property
    @abstractmethod
    def layout(self) -> str:
        """The MODEL's class, width and layers."""

    @property
    @abstractmethod
    def heads(self) -> tuple[int, int]:
        """The heads of an attention layer, and their channels."""

    @abstractmethod
    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of a frame's tokens, on latents of this size."""

    def other_tokens(self, clip: Tensor, rest: Sequence[Any], named: dict[str, Any]) -> tuple[int, int]:
        """The tokens of references before and after the clip's own. clip: the latents of a call; then its others."""
        return 0, 0

    @staticmethod
    def calls_before(module: nn.Module, inputs: dict[str, Any]) -> int:
        """The attention calls of a module before the controlled one, such as to a picture."""
        return 0

    def with_tokens(self, args: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """A block's inputs for some tokens of a branch, in families with a `subset_patch`."""
        raise NotImplementedError

    def row_of(self, value: Any, row: int, rows: int) -> Any:
        """A branch's row of a block's input; shared inputs are returned unchanged."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.row_of(part, row, rows) for part in value)
        return value[row : row + 1] if isinstance(value, Tensor) and len(value) == rows else value

    # --- facts --------------------------------------------------------------------------

    def identity(self) -> ModelIdentity:
        model = self.patcher.model
        keys = [key for key in tensors_of(model) if key.startswith("diffusion_model.")]
        found = _IDENTITIES.of(
            model, self.layout, model.get_dtype(), {key: unpatched(self.patcher, key) for key in keys}
        )
        if self.low is None:
            return found
        low = self.low.identity()
        return replace(
            found,
            layout=f"{found.layout}, and below sigma {self.boundary:g} {low.layout}",
            digest=f"{found.digest} {low.digest}",
            traces=(*found.traces, *low.traces),
        )

    def sites(self, height: int, width: int) -> dict[str, AttentionSite]:
        grid = self.token_grid(*(self._video[-2:] or (height, width)))
        if grid not in self._sites:
            found = [
                AttentionSite("block", i, kind, *self.heads, *grid)
                for i in range(len(self._blocks))
                for kind in self.attention
            ]
            self._sites[grid] = {site.name: site for site in found}
        return self._sites[grid]

    @property
    def _video(self) -> tuple[int, ...]:
        """The shape of a video that is packed with its sound, in the current run; empty for other latents."""
        shapes: Any = getattr(self.patcher.model, "latent_shapes", None) or ()
        return tuple(shapes[0]) if len(shapes) > 1 else ()

    def _forget(self) -> None:
        self._source, self._options = -1, None

    # --- calls: plain closures, because the host copies what it finds in a model's options ---

    def _room(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The host's memory estimate for calling branches together; 0 with a source.

        Branches run one after another, so separate calls would save nothing, but store the source's attention of all
        blocks.
        """
        original = hook_below(original)

        def room(*args: Any, **more: Any) -> Any:
            return 0 if self._source >= 0 else original(*args, **more)

        room.previous = original  # type: ignore[attr-defined]
        return room

    def _joined(self) -> Callable[..., Any]:
        """Adds the source's conditions to those of a call; `_around` puts in its latents."""

        def joined(executor: Any, model: Any, conds: list[Any], *call: Any) -> Any:
            results = together(executor, model, conds, *call)
            some = next((control for control, _ in self._controls.values() if control.rows is not None), None)
            if some is None:
                return results
            return [
                clean if cond is None else self._noise.to_host(some.completed(self._noise.from_host(clean)))
                for cond, clean in zip(conds, results, strict=True)
            ]

        def together(executor: Any, model: Any, conds: list[Any], x: Tensor, sigma: Tensor, options: Any) -> Any:
            paired = self._paired
            if paired is None or not self._controls or not self._positive.among(conds):
                return executor(model, conds, x, sigma, options)
            again = self._options is not None
            try:
                if again:  # a guidance node calls again with skipped layers, which the source has
                    self._source = 1
                    executor(model, [None, self._conditions], x, sigma, self._options)
                    self._source = -1
                    return executor(model, conds, x, sigma, options)
                self._source, self._options = len(conds), options
                *results, clean = executor(model, [*conds, self._conditions], x, sigma, options)
            finally:
                self._source = -1
                if again:
                    paired.control.captured.records.clear()
            paired.control.captured.prediction = self._noise.predicted(x, clean, sigma)
            return results

        return joined

    def _around(self) -> Callable[..., Any]:
        def around(executor: Any, x: Any, *rest: Any, **more: Any) -> Any:
            if not self._controls:
                return executor(x, *rest, **more)
            # of the host's (x, t, context, 2 of the family, transformer_options)
            options = more["transformer_options"] if "transformer_options" in more else rest[4]
            branches = options["cond_or_uncond"]
            streams = [x] if isinstance(x, Tensor) else list(x)
            self._frames, height, width = streams[0].shape[-3:]
            self._grid = height, width
            self._others = self.other_tokens(streams[0], rest, more)
            if len(streams[0]) != len(branches):
                clips = len(streams[0]) // len(branches)
                raise ValueError(f"latent: has {clips} clips, but FateZero edits one at a time")
            if self._paired is not None and self._source in branches:
                streams = self._with_source(streams, branches.index(self._source))
            self._replacement = self._replacements(options)
            handles = [
                getattr(block, name).register_forward_pre_hook(self._entering(i, kind), with_kwargs=True)
                for i, block in enumerate(self._blocks)
                for kind, name in self.attention.items()
            ]
            try:
                return executor(streams[0] if isinstance(x, Tensor) else streams, *rest, **more)
            finally:
                for handle in handles:
                    handle.remove()

        return around

    def _with_source(self, streams: list[Tensor], row: int) -> list[Tensor]:
        """The streams of a call with the source's latents in a row."""
        assert self._paired is not None
        own = unpacked_parts(self._noise.to_host(self._paired.latents), [(1, *part.shape[1:]) for part in streams])
        streams = [part.clone() for part in streams]
        for part, values in zip(streams, own, strict=True):
            part[row, : values.shape[1]] = values[0].to(part)  # other channels are a picture's
        return streams

    def _replacements(self, options: dict[str, Any]) -> Callable[[AttentionSite], Any]:
        """Other nodes' replacements of attention layers in a call."""
        blocks = options.get("patches_replace", {}).get("dit", {})

        def replacing(site: AttentionSite) -> Any:
            place = f"diffusion_model.{self.container}.{site.index}."
            parts = [part for name, part in self.patcher.object_patches.items() if name.startswith(place)]
            block = blocks.get(("double_block", site.index))
            return next((part for part in [hook_below(block), *parts] if part is not None), None)

        return replacing

    def _block(self, index: int, theirs: Callable[..., Any] | None) -> Callable[..., Any]:
        """A block that runs its branches one after another."""

        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            forward = extra["original_block"] if theirs is None else lambda own: theirs(own, extra)
            if not self._controls:
                return forward(args)
            options = args["transformer_options"]
            branches, roles = options["cond_or_uncond"], self._positive.roles(options)
            order = sorted(range(len(branches)), key=lambda row: branches[row] != self._source)
            controls = [self._control(role)[0] for role in roles]
            readers = [row for row in order if branches[row] != self._source and not controls[row].is_plain]
            done: list[Any] = [None] * len(branches)
            before: Any = None
            for row in order:
                of_row = {**options, "cond_or_uncond": [branches[row]], _BRANCH: roles[row]}
                of_row["uuids"] = options["uuids"][row : row + 1]
                own = {name: self.row_of(value, row, len(branches)) for name, value in args.items()}
                own["transformer_options"], self._last = of_row, row in readers[-1:]
                tokens = controls[row].rows
                if tokens is None:
                    before = forward(own)["img"]
                else:
                    check_alone(theirs, options)
                    before = self._with_some(index, forward, own, own["img"] if before is None else before, tokens)
                done[row] = before
            if readers and self._source in branches and self._paired is not None:  # also where none had tokens
                self._paired.control.captured.records.clear()
            return {"img": _stacked(done)}

        block.previous = theirs  # type: ignore[attr-defined]  # so that hooking again replaces ours
        return block

    def _with_some(
        self, index: int, forward: Callable[..., Any], own: dict[str, Any], whole: Tensor, tokens: Tensor
    ) -> Tensor:
        """The output of a block for a branch that has some tokens only; the others are those of `whole`."""
        if len(tokens):
            before, after = (torch.arange(count, device=tokens.device) for count in self._others)
            tokens = torch.cat([before, tokens + len(before), after + whole.shape[1] - len(after)])
            return whole.index_copy(1, tokens, forward(self.with_tokens(own, tokens))["img"])
        for kind in self.attention:
            self._mark_run(f"block.{index}.{kind}", own["transformer_options"][_BRANCH] == 0)
        return whole

    # --- attention ----------------------------------------------------------------------

    def _entering(self, index: int, kind: Kind) -> Callable[..., Any]:
        """A hook of an attention module that passes it our override for this call."""

        def entering(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
            options = named.get("transformer_options") or {}
            if _BRANCH not in options:
                return None
            calls = self.calls_before(module, named)
            override = self._override(f"block.{index}.{kind}", options[_BRANCH], options, calls)
            return args, {**named, "transformer_options": {**options, OVERRIDE: override}}

        return entering

    def _override(self, name: str, branch: int, options: dict[str, Any], before: int) -> Callable[..., Tensor]:
        """The attention of a layer on a branch. options: the module's, with the override of another node. before: calls
        that are left to the model.
        """
        theirs = options.get(OVERRIDE)

        def override(
            func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **more: Any
        ) -> Tensor:
            nonlocal before
            before -= 1
            kernel = func if theirs is None else lambda *given, **named: theirs(func, *given, **named)
            more = {**more, "transformer_options": options}
            if self._control(branch)[0].is_plain:
                self._mark_run(name, branch == 0)
            if before != -1 or self._control(branch)[0].is_plain:  # other packs' own, or as the model has it
                return kernel(q, k, v, heads, *rest, **more)
            more = {name: value for name, value in more.items() if name not in ("skip_reshape", "skip_output_reshape")}

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
                q, k, v = (t.contiguous() for t in (q, k, v))
                return kernel(q, k, v, heads, *rest, **more, skip_reshape=True, skip_output_reshape=True)

            return self._attend(name, branch, (q, k, v), heads, attend, theirs)

        return override

    def _attend(
        self,
        name: str,
        branch: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        heads: int,
        attend: Attend,
        override: Any,
    ) -> Tensor:
        """One layer of one branch, (1, tokens, channels), through its control. override: another node's kernel.

        The control has the clip's tokens. Those of references attend as in the model, and the clip's also attend to
        their branch's own references.
        """
        site = self.sites(*self._grid)[name]
        control, text_tokens = self._control(branch)
        q, k, v = (rearrange(x, "1 n (h d) -> 1 h n d", h=heads) for x in qkv)
        own = self._own_tokens(control, site, q.shape[2])
        frames = 1 if control.rows is not None or self._video else len(control.chunk.frame_indices)
        if site.kind == "cross":
            k, v = (x[:, :, :text_tokens] for x in (k, v))
        of_frames = (q, k, v) if site.kind == "self" else (q,)
        in_frames = [rearrange(x[:, :, own], "1 h (f t) d -> f h t d", f=frames) for x in of_frames]
        q4, k4, v4 = [*in_frames, k, v][:3]
        control.attend = attend
        if site.kind == "self" and any(self._others):
            if kept_as_map(self.memory, site, k.shape[2], q.dtype):
                raise ValueError("memory: maps cannot include the model's reference tokens: use recompute")
            control.attend = also_to(attend, [(x[:, :, : own.start], x[:, :, own.stop :]) for x in (k, v)])
        self._check_kernel(control, q4, k4, v4, site, override)
        output = rearrange(control.layer(q4, k4, v4, site), "f h t d -> 1 h (f t) d")
        if self._paired is not None and self._last and self._source >= 0:
            self._paired.control.forget(site.name)
        self._mark_run(name, branch == 0)
        if q.shape[2] > output.shape[2]:
            others = (q[:, :, : own.start], q[:, :, own.stop :])
            before, after = (attend(x, k, v).to(output) if x.shape[2] else x.to(output) for x in others)
            output = torch.cat([before, output, after], 2)
        return rearrange(output, "1 h n d -> 1 n (h d)").to(q)

    def _own_tokens(self, control: Control, site: AttentionSite, tokens: int) -> slice:
        """The clip's tokens in a layer of a branch. tokens: the layer's queries: of the clip, or of references too."""
        clip = self._frames - self._guides
        own = clip * site.tokens if control.rows is None else len(control.rows)
        before, after = self._others
        if tokens not in (own, before + own + after):
            raise ValueError(
                f"{site.name} has {tokens} tokens where {before + own + after} of {clip} frames of "
                f"{site.height}x{site.width} are expected: another node on the model adds or merges tokens: remove it"
            )
        return slice(before, before + own)

    def _control(self, branch: int) -> tuple[Control, int | None]:
        """The control of a branch and its text tokens; branches of guidance nodes use the negative's."""
        if self._paired is not None and branch == self._source:
            return self._paired.control, self._paired.condition.text_tokens
        return self._controls.get(branch) or self._controls[1]


def tensors_of(model: nn.Module) -> list[str]:
    """The names of a model's weights, without the formats of quantized layers that its state dict adds."""
    given = (kind(remove_duplicate=False) for kind in (model.named_parameters, model.named_buffers))
    known = {name for name, _ in chain.from_iterable(given)}
    return [name for name in model.state_dict() if name in known]


def check_alone(block: Any, options: dict[str, Any]) -> None:
    """Raise ValueError for another node's replacement of a block, or patch of its attention: it may need all tokens."""
    patches = options.get("patches", {})
    theirs = [block, *(part for name in ("attn1_patch", "attn2_patch") for part in patches.get(name, []))]
    found = next((name for name in map(node_of, theirs) if name), None)
    if found is not None:
        raise ValueError(
            f"model: {found} replaces parts of blocks, which may need all tokens, but only those inside the edit mask "
            "are computed: remove that node, or set tokens to all"
        )


def _stacked(rows: Sequence[Any]) -> Any:
    """The outputs of a block for single branches as one batch; each is a tensor, or one for each stream."""
    if len(rows) == 1:
        return rows[0]
    if isinstance(rows[0], Tensor):
        return torch.cat(list(rows))
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
