"""Wan in ComfyUI: the attention of its video transformer, hooked on a clone by the host's public hooks.

`patches_replace["dit"]` wraps each block, which runs the branches of a call one after another, the source's first.
During a call, hooks of the modules `self_attn` and `cross_attn` pass our `optimized_attention_override` to each, around
any existing one. Overrides and block patches of other packs stay active: overrides as the kernel, block patches around
the block's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.wan.model import WanModel
from einops import rearrange
from torch import Tensor, nn

from ...attention.control import SEPARATE, AttentionSite, Control, Kind
from ...models.wan import WAN
from ...store.identity import IdentityCache, ModelIdentity
from .hook import ALL_KINDS, OVERRIDE, Hook, HostFamily, check_kinds, hook_below, unpatched
from .noise import FlowNoise, noise_of
from .pair import join_pair
from .sameness import ROOM, same_forward

WrappersMP = comfy.patcher_extension.WrappersMP

MODELS = "Wan 2.1 and 2.2 for text to video"
_IDENTITIES = IdentityCache()
_BRANCH = "fatezero_branch"
"""The transformer option with the branch that a block computes."""


def is_text_to_video(model: Any) -> bool:
    """Whether a MODEL is a Wan for text to video."""
    unet = model.model.diffusion_model
    plain = type(unet) is WanModel and unet.model_type == "t2v" and unet.in_dim == unet.out_dim
    return plain and getattr(unet, "ref_conv", None) is None


def check_wan(model: Any) -> None:
    """Raise ValueError for a Wan that is not sampled as a flow."""
    if not isinstance(noise_of(model), FlowNoise):
        raise ValueError("model: is not sampled as a flow: remove the Model Sampling node")


class HookedWan(Hook):
    """A clone of a Wan MODEL whose attention layers run through controls."""

    family = WAN
    pairs = True

    def __init__(self, model: Any, kinds: Sequence[Kind] = ALL_KINDS) -> None:
        """Raises ValueError for a MODEL that is not Wan for text to video, and for a subset of kinds."""
        check_wan(model)
        check_kinds(model, kinds)
        super().__init__(model)
        join_pair(self, model)
        self._unet = model.model.diffusion_model
        self._sites: dict[tuple[int, int], dict[str, AttentionSite]] = {}
        self._options: dict[str, Any] | None = None
        """The options of the call that the source ran in."""
        self._source = -1
        """The branch of the source in the current call; -1 without one."""
        replaced = self.patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
        blocks = [hook_below(replaced.get(("double_block", i))) for i in range(len(self._unet.blocks))]
        for i, theirs in enumerate(blocks):
            self.patcher.set_model_patch_replace(self._block(i, theirs), "dit", "double_block", i)
        around = {WrappersMP.DIFFUSION_MODEL: self._around(), WrappersMP.CALC_COND_BATCH: self._joined()}
        for kind, wrapper in around.items():
            self.patcher.remove_wrappers_with_key(kind, "fatezero")
            self.patcher.add_wrapper_with_key(kind, "fatezero", wrapper)
        self.patcher.add_object_patch(ROOM, self._room(model.get_model_object(ROOM)))

    def identity(self) -> ModelIdentity:
        model, unet = self.patcher.model, self._unet
        layout = (
            f"{type(model).__name__} in={unet.in_dim} {len(unet.blocks)} blocks of {unet.num_heads} heads, {unet.dim}"
        )
        keys = [key for key in model.state_dict() if key.startswith("diffusion_model.")]
        found = _IDENTITIES.of(model, layout, model.get_dtype(), {key: unpatched(self.patcher, key) for key in keys})
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
        if (height, width) not in self._sites:
            _, down, across = self._unet.patch_size  # the host pads latents to whole patches
            grid = -(-height // down), -(-width // across)
            heads, kinds = self._unet.num_heads, ("self", "cross")
            found = [
                AttentionSite("block", i, kind, heads, self._unet.dim // heads, *grid)  # type: ignore[arg-type]
                for i in range(len(self._unet.blocks))
                for kind in kinds
            ]
            self._sites[height, width] = {site.name: site for site in found}
        return self._sites[height, width]

    def joins(self, source: Hook) -> bool:
        if not isinstance(source, HookedWan) or "model_function_wrapper" in self.patcher.model_options:
            return False  # such a wrapper may call branches one by one
        return self is source or same_forward(self.given, source.given)

    def _forget(self) -> None:
        self._source, self._options = -1, None

    # Plain closures, because the host copies what it finds in a model's options.

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

        def joined(executor: Any, model: Any, conds: list[Any], x: Tensor, sigma: Tensor, options: Any) -> Any:
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
            predicted = (x - clean) / sigma.view(-1, 1, 1, 1, 1)
            paired.control.captured.prediction = rearrange(predicted, "1 c f y x -> f c y x")
            return results

        return joined

    def _around(self) -> Callable[..., Tensor]:
        def around(executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
            if not self._controls:
                return executor(x, *rest, **more)
            self._grid = x.shape[-2], x.shape[-1]
            # of the host's (x, t, context, clip_fea, time_dim_concat, transformer_options)
            options = more["transformer_options"] if "transformer_options" in more else rest[4]
            branches = options["cond_or_uncond"]
            if len(x) != len(branches):
                raise ValueError(f"latent: has {len(x) // len(branches)} clips, but FateZero edits one at a time")
            if self._paired is not None and self._source in branches:
                x = x.clone()
                x[branches.index(self._source)] = rearrange(self._paired.latents, "f c y x -> c f y x").to(x)
            self._replacement = self._replacements(options)
            handles = [
                getattr(block, f"{kind}_attn").register_forward_pre_hook(self._entering(i, kind), with_kwargs=True)
                for i, block in enumerate(self._unet.blocks)
                for kind in SEPARATE
            ]
            try:
                return executor(x, *rest, **more)
            finally:
                for handle in handles:
                    handle.remove()

        return around

    def _replacements(self, options: dict[str, Any]) -> Callable[[AttentionSite], Any]:
        """Other nodes' replacements of attention layers in a call."""
        blocks = options.get("patches_replace", {}).get("dit", {})

        def replacing(site: AttentionSite) -> Any:
            place = f"diffusion_model.blocks.{site.index}."
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
            done: list[Tensor | None] = [None] * len(branches)
            for row in order:
                of_row = {**options, "cond_or_uncond": [branches[row]], _BRANCH: roles[row]}
                own = {name: _row_of(value, row, len(branches)) for name, value in args.items()}
                done[row] = forward({**own, "transformer_options": of_row})["img"]
            return {"img": done[0] if len(done) == 1 else torch.cat(done)}  # type: ignore[arg-type]

        block.previous = theirs  # type: ignore[attr-defined]  # so that hooking again replaces ours
        return block

    def _entering(self, index: int, kind: Kind) -> Callable[..., Any]:
        """A hook of an attention module that passes it our override for this call."""

        def entering(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
            options = named.get("transformer_options") or {}
            if _BRANCH not in options:
                return None
            override = self._override(f"block.{index}.{kind}", options[_BRANCH], options)
            return args, {**named, "transformer_options": {**options, OVERRIDE: override}}

        return entering

    def _override(self, name: str, branch: int, options: dict[str, Any]) -> Callable[..., Tensor]:
        """The attention of a layer on a branch. options: the module's, with the override of another node."""
        theirs, taken = options.get(OVERRIDE), False

        def override(
            func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **more: Any
        ) -> Tensor:
            nonlocal taken
            kernel = func if theirs is None else lambda *given, **named: theirs(func, *given, **named)
            more = {**more, "transformer_options": options}
            control = self._control(branch)[0]
            if taken or control.is_plain:  # other packs' own, or attention as the model has it
                self._mark_run(name, branch == 0)
                return kernel(q, k, v, heads, *rest, **more)
            taken = True
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
        attend: Callable[..., Tensor],
        override: Any,
    ) -> Tensor:
        """One layer of one branch, (1, tokens, channels), through its control. override: another node's kernel."""
        q, k, v = qkv
        site = self.sites(*self._grid)[name]
        frames, rest = divmod(q.shape[1], site.tokens)
        control, text_tokens = self._control(branch)
        if rest or frames != len(control.chunk.frame_indices):
            raise ValueError(
                f"{site.name} has {q.shape[1]} tokens where {len(control.chunk.frame_indices)} frames of "
                f"{site.height}x{site.width} are expected: another node on the model adds or merges tokens: remove it"
            )
        control.attend = attend
        q4 = rearrange(q, "1 (f t) (h d) -> f h t d", f=frames, h=heads)
        if site.kind == "cross":
            k4, v4 = (rearrange(x[:, :text_tokens], "1 s (h d) -> 1 h s d", h=heads) for x in (k, v))
        else:
            k4, v4 = (rearrange(x, "1 (f t) (h d) -> f h t d", f=frames, h=heads) for x in (k, v))
        self._check_kernel(control, q4, k4, v4, site, override)
        output = control.layer(q4, k4, v4, site)
        if self._paired is not None and branch == 0 and self._source >= 0:
            self._paired.control.forget(site.name)
        self._mark_run(name, branch == 0)
        return rearrange(output, "f h t d -> 1 (f t) (h d)").to(q)

    def _control(self, branch: int) -> tuple[Control, int | None]:
        """The control of a branch and its text tokens; branches of guidance nodes use the negative's."""
        if self._paired is not None and branch == self._source:
            return self._paired.control, self._paired.condition.text_tokens
        return self._controls.get(branch) or self._controls[1]


def _row_of(value: Any, row: int, rows: int) -> Any:
    """A branch's row of a block's input; shared inputs are returned unchanged."""
    return value[row : row + 1] if isinstance(value, Tensor) and len(value) == rows else value


@dataclass(frozen=True)
class _Sentences:
    """The host's sentencepiece tokenizer with a CLIP tokenizer's interface: content tokens only."""

    host_tokenizer: Any
    bos_token_id: None = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=self.host_tokenizer.tokenizer.encode(text, add_bos=False, add_eos=False))


def _tokenizer(clip: Any) -> _Sentences | None:
    own = getattr(clip.tokenizer, "clip_umt5xxl", None)
    return None if own is None else _Sentences(own.tokenizer)


FAMILY = HostFamily(
    models=MODELS,
    text_encoder="UMT5 of Wan",
    hook=HookedWan,
    matches=is_text_to_video,
    check=check_wan,
    count_layers=lambda model: 2 * len(model.model.diffusion_model.blocks),
    tokenizer=_tokenizer,
    frame_dim=2,
)
