"""A ComfyUI MODEL's UNet: where its attention is, and how it is hooked on a clone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from comfy.model_sampling import V_PREDICTION
from einops import rearrange
from torch import Tensor, nn

from ...attention.control import SEPARATE, AttentionSite, Control, Kind, Place
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.clip_norm import share_statistics
from ...store.identity import IdentityCache, ModelIdentity
from ..recompute import check_differentiable, frozen, gradient_of, recomputed
from .noise import WORKING_MODELS, noise_of, prediction_of

_IDENTITIES = IdentityCache()
BLOCKS = (ResBlock, SpatialTransformer)
"""What is computed twice where gradients are asked for."""
OWN_LAYERS = (ResBlock, SpatialTransformer, Downsample, Upsample, nn.Conv2d)
"""What a UNet's blocks are made of."""

Layer = tuple[str, int, int, Kind]
"""Where the host has an attention layer: block name, block number, transformer index, kind."""


def check_model(model: Any) -> None:
    """Raise ValueError for a MODEL that is no attention UNet, or whose noise FateZero cannot invert."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel) or any(isinstance(m, SpatialVideoTransformer) for m in unet.modules()):
        raise ValueError(
            f"model: {type(model.model).__name__} with a {type(unet).__name__} is no attention UNet for pictures. "
            f"FateZero works with {WORKING_MODELS}; not with Flux, SD3, LTX, Hunyuan and other transformers"
        )
    noise_of(model, flows=False)


@dataclass(frozen=True)
class LayerShape:
    """An attention layer of any size of picture: its site, and how often the picture was halved there."""

    place: Place
    index: int
    heads: int
    head_dim: int
    level: int

    def site(self, kind: Kind, height: int, width: int) -> AttentionSite:
        grid = (-(-height // 2**self.level), -(-width // 2**self.level))
        return AttentionSite(self.place, self.index, kind, self.heads, self.head_dim, *grid)


def attention_layers(unet: UNetModel) -> dict[Layer, LayerShape]:
    """The attention layers of a UNet, in the order of its blocks."""
    found: dict[Layer, LayerShape] = {}
    level = 0

    def add(block: nn.Module, name: str, number: int, place: Place) -> None:
        nonlocal level
        for module in block.children():
            if isinstance(module, SpatialTransformer):
                for i, transformer in enumerate(module.transformer_blocks):
                    index = sum(shape.place == place and at[3] == "self" for at, shape in found.items())
                    for kind in SEPARATE:
                        attn = transformer.attn1 if kind == "self" else transformer.attn2
                        found[name, number, i, kind] = LayerShape(place, index, attn.heads, attn.dim_head, level)
            level += isinstance(module, Downsample) or (isinstance(module, ResBlock) and _resizes(module, Downsample))
            level -= isinstance(module, Upsample) or (isinstance(module, ResBlock) and _resizes(module, Upsample))

    for number, block in enumerate(unet.input_blocks):
        add(block, "input", number, "down")
    if unet.middle_block is not None:
        add(unet.middle_block, "middle", 0, "mid")
    for number, block in enumerate(unet.output_blocks):
        add(block, "output", number, "up")
    return found


def _resizes(block: ResBlock, kind: type) -> bool:
    return isinstance(getattr(block, "h_upd", None), kind)


def beneath(hook: Any) -> Any:
    """What another node hung there, where the hook is ours and calls it."""
    return getattr(hook, "previous", hook)


class Positive:
    """The positive branch of the calls of a step: which it is, and the attention layers that it reached.

    The host's own calls list it as branch 0; those of guidance nodes list whatever they evaluate from 0 on, and only
    the condition's uuid says what it is.
    """

    def __init__(self, conditions: Sequence[dict[str, Any]] | None) -> None:
        """conditions: the host's, of the positive prompt; None where branch 0 is it in any call."""
        self._uuids = None if conditions is None else {condition["uuid"] for condition in conditions}
        self.reached: set[str] = set()

    def among(self, conds: Sequence[Any]) -> bool:
        """Whether a call of these conditions, a list for each branch, has it."""
        if self._uuids is None:
            return conds[0] is not None
        return any(condition["uuid"] in self._uuids for entries in conds for condition in entries or [])

    def roles(self, options: dict[str, Any]) -> list[int]:
        """The branches of a call, 0 where they are of this prompt alone."""
        branches: list[int] = options["cond_or_uncond"]
        if self._uuids is None:
            return branches
        named = zip(branches, options["uuids"], strict=True)
        return [0 if uuid in self._uuids else branch or 1 for branch, uuid in named]

    def check(self, sites: Mapping[Any, AttentionSite], replacing: Callable[[AttentionSite], Any]) -> None:
        """Raise ValueError where it did not reach every layer; replacing: what another node has in a layer's place."""
        missed = [site for site in sites.values() if site.name not in self.reached]
        if len(missed) == len(sites):
            raise ValueError(
                "model: a call reached none of its attention layers: another node on the model skips calls "
                "(EasyCache, LazyCache, TeaCache) or replaces the model; remove it"
            )
        if missed:
            found = next((name for name in map(node_of, map(replacing, missed)) if name), None)
            raise ValueError(
                f"model: a step did not reach {len(missed)} of {len(sites)} attention layers ({missed[0].name}, ...): "
                f"{found or 'another node on the model'} skips or replaces them; remove it"
            )


def node_of(hook: Any) -> str | None:
    """The node, or the pack, that a function is from, as its code is called; None for none."""
    hook = getattr(hook, "func", hook)
    if hook is None:
        return None
    name = getattr(hook, "__qualname__", type(hook).__qualname__).partition(".<locals>")[0]
    return f"{name.partition('.')[0]} ({module_of_node(hook)})"


def module_of_node(hook: Any) -> str:
    """The last name of the module that a function is from, which the host calls by its path where it is a node's."""
    found: str = getattr(hook, "__module__", None) or type(hook).__module__
    return re.split(r"[./\\]", found)[-1]


class HookedModel:
    """A clone of a MODEL whose attention layers ask a control.

    `answers` says which control answers for which branch of a call, and how many text_tokens its
    prompt has, None for all that come: 0 is the positive one, 1 the negative, as in the host's `cond_or_uncond`.
    Attention replacements that other packs set stay: what they add to plain attention is
    added to the control's.
    """

    low: HookedModel | None = None
    """What takes over below a sigma: of a UNet none."""

    def __init__(
        self,
        model: Any,
        standing: Callable[[int], Control] | None = None,
        clip_norm: bool = False,
        kinds: Sequence[Kind] = SEPARATE,
    ) -> None:
        """standing: makes the control of so many frames, where no run of ours says it. kinds: of the layers that ask;
        those of self-attention stay as the MODEL has them where cross-attention alone does.
        """
        check_model(model)
        self.patcher = model.clone()
        self.answers: dict[int, tuple[Control, int | None]] = {}
        self.standing = standing
        self.clip_norm = clip_norm
        self.one_text = False
        """Whether each branch's text is the same for all its frames."""
        self._kinds = kinds
        self._positive = Positive(None)
        self._grid = (0, 0)
        self._replacing: Callable[[AttentionSite], Any] = lambda site: None
        self.reached: set[str] = set()
        self._one_row = False
        self._layers = attention_layers(model.model.diffusion_model)
        self._grids: dict[tuple[int, int], dict[Layer, AttentionSite]] = {}
        replaced = model.model_options["transformer_options"].get("patches_replace", {})
        for name, kind in (("attn1", "self"), ("attn2", "cross")):
            theirs = replaced.get(name, {})
            for block, number, index, layer_kind in self._layers:
                if layer_kind != kind or kind not in kinds:
                    continue
                # At the block's own key unless another pack sits at the layer's, which the host
                # reads first: a node that replaces a block during the run (PAG) then still does.
                at = (block, number, index) if (block, number, index) in theirs else (block, number)
                patch = self._patch(layer_kind, beneath(theirs.get(at)))
                self.patcher.set_model_patch_replace(patch, name, *at)
        self._norms = clip_norms(model.model.diffusion_model)
        self._feature = feature_of(model.model.diffusion_model)
        self._derived: Derived | None = None
        """What is to be known of the UNet call under way, where its gradient is asked for."""
        self._tokens: Tensor | None = None
        """The input tokens of the self-attention layer under way, where a control has a use for them."""
        self._window: tuple[int, ...] | None = None
        """The clip's frames that the call under way holds, where another node splits the clip."""
        self._ours: set[Layer] = set()
        """The self-attention layers that ask us in this call."""
        self._text_rows = self._one_row_a_branch()
        if standing is None and "self" in kinds:
            self.patcher.set_model_attn2_patch(self._text_rows)
            self.patcher.set_model_attn1_patch(self._told_tokens())
        around, key = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "fatezero"
        if "self" not in kinds:  # beside key frames that stand
            key = "fatezero words"
        self.patcher.remove_wrappers_with_key(around, key)
        self.patcher.add_wrapper_with_key(around, key, self._around())

    def identity(self) -> ModelIdentity:
        """What tells the MODEL from another, LoRA on it or not."""
        return identity_of(self.patcher)

    def sites(self, height: int, width: int) -> dict[Layer, AttentionSite]:
        """The attention layers on latents of this size."""
        if (height, width) not in self._grids:
            self._grids[height, width] = {
                layer: shape.site(layer[3], height, width) for layer, shape in self._layers.items()
            }
        return self._grids[height, width]

    @property
    def _idle(self) -> bool:
        """Whether nobody answers: then the MODEL is as it was without us."""
        return self.standing is None and not self.answers

    @contextmanager
    def answering(
        self,
        answers: dict[int, tuple[Control, int | None]],
        clip_norm: bool,
        beside: Any = None,
        conditions: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[None]:
        """conditions: the host's, of the positive branch.

        Raises ValueError where the UNet calls inside did not reach all attention layers of the positive branch.
        """
        self.answers, self.clip_norm, self.reached = answers, clip_norm, set()
        self._positive = Positive(conditions)
        try:
            yield
            asked = {layer: site for layer, site in self.sites(*self._grid).items() if layer[3] in self._kinds}
            self._positive.check(asked, self._replacing)
        finally:
            self.answers, self.clip_norm = {}, False

    @contextmanager
    def deriving(self, value: Callable[[], Tensor], parts: Sequence[nn.Module]) -> Iterator[Derived]:
        """Have the next UNet call tell a value that its controls have after it, and its gradient; inside `answering`.

        parts: the models that the call runs through.
        """
        self._derived = Derived(value, parts)
        try:
            yield self._derived
        finally:
            self._derived = None

    # Plain closures, because the host copies what it finds in a model's options.

    def _patch(self, kind: Kind, theirs: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **_: Any) -> Tensor:
            return self._attend(kind, theirs, q, k, v, extra_options)

        attend.previous = theirs  # type: ignore[attr-defined]  # hooked again, ours gives way
        return attend

    def _one_row_a_branch(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def one_row(
            n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
        ) -> tuple[Tensor, Tensor, Tensor]:
            if not self._one_row:
                return n, context, value
            frames = len(n) // len(options["cond_or_uncond"])
            return n, context[::frames], value[::frames]

        return one_row

    def _told_tokens(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def told(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            layer: Layer = (*options["block"], options["block_index"], "self")
            branches = self._positive.roles(options)
            controls = [self._answer(branch, len(n) // len(branches))[0] for branch in branches]
            if layer not in self._ours or not any(control.wants_tokens for control in controls):
                return n, context, value
            site = self.sites(*options["original_shape"][-2:])[layer]
            self._check_tokens(site, n)
            gathers = all(control.gather is not None for control in controls)
            for control, part in zip(controls, n.chunk(len(branches)), strict=True):
                control.input_tokens(part, site)
            if not gathers:
                return n, context, value
            # Nothing is projected but one token, and the layer's replacement answers for all.
            self._tokens = n
            return n[:, :1], context[:, :1], value[:, :1]

        return told

    def _around(self) -> Callable[..., Tensor]:
        def around(
            executor: Any,
            x: Tensor,
            t: Tensor,
            context: Any,
            y: Any,
            control: Any,
            options: dict[str, Any],
            **more: Any,
        ) -> Tensor:
            if self._idle:
                return executor(x, t, context, y, control, options, **more)
            # Where all that sees the text's keys is ours, one row of it serves all frames.
            patches = options.get("patches", {}).get("attn2_patch", [None])
            replacements = options.get("patches_replace", {}).get("attn2", {}).values()
            self._one_row = (
                self.one_text
                and patches[-1] is self._text_rows
                and all(hasattr(patch, "previous") for patch in replacements)
            )
            of_self = options.get("patches_replace", {}).get("attn1", {})
            self._ours = {
                (name, number, i, kind)
                for name, number, i, kind in self._layers
                if kind == "self" and hasattr(of_self.get((name, number, i), of_self.get((name, number))), "previous")
            }
            self._replacing = self._replacements(options)
            branches = self._positive.roles(options)
            if 0 in branches:
                self._grid = x.shape[-2], x.shape[-1]
            frames = len(x) // len(branches)
            self._window = window_of(options)
            held = {len(self._answer(branch, frames)[0].chunk.frame_indices) for branch in branches}
            if self.answers and held != {frames}:
                raise ValueError(
                    f"model: a node on it calls the UNet with {frames} frames of {max(held)} and does not say which; "
                    "remove it"
                )
            handles = [h for norm in self._norms for h in share_statistics(norm, frames)] if self.clip_norm else []
            if self._feature is not None and self.answers:
                handles.append(self._feature.conv.register_forward_hook(self._featured(branches)))
            try:
                if self._derived is not None:
                    return self._derived.of(lambda z, *of: executor(z, *of, control, options, **more), x, t, context, y)
                return executor(x, t, context, y, control, options, **more)
            finally:
                self._tokens = self._window = None
                for handle in handles:
                    handle.remove()

        return around

    def _featured(self, branches: Sequence[int]) -> Callable[..., Tensor]:
        def featured(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            assert self._feature is not None
            parts = output.chunk(len(branches))
            named = zip(branches, parts, strict=True)
            done = [self._answer(b, len(part))[0].feature(part, self._feature.name) for b, part in named]
            unchanged = all(new is old for new, old in zip(done, parts, strict=True))
            return output if unchanged else torch.cat(done)

        return featured

    def _attend(
        self,
        kind: Kind,
        theirs: Callable[..., Tensor] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """One layer of one UNet call: every branch by its control. (branches*frames, tokens, channels)."""
        if self._idle:
            return _as_host(theirs, q, k, v, options)
        site = self.sites(*options["original_shape"][-2:])[(*options["block"], options["block_index"], kind)]
        branches, roles = options["cond_or_uncond"], self._positive.roles(options)
        if kind == "self" and self._tokens is not None:
            tokens, self._tokens = self._tokens, None
            self._reach(site, roles)
            return self._gather(site, tokens, roles, theirs)
        self._check_tokens(site, q)
        parts = zip(branches, roles, *(t.chunk(len(branches)) for t in (q, k, v)), strict=True)
        done = []
        for branch, role, q_part, k_part, v_part in parts:
            of_branch = {**options, "cond_or_uncond": [branch]}
            done.append(self._branch(role, site, theirs, q_part, k_part, v_part, of_branch))
        self._reach(site, roles)
        return torch.cat(done)

    def _reach(self, site: AttentionSite, roles: Sequence[int]) -> None:
        self.reached.add(site.name)
        if 0 in roles:
            self._positive.reached.add(site.name)

    def _replacements(self, options: dict[str, Any]) -> Callable[[AttentionSite], Any]:
        """What other nodes have in the place of an attention layer in a call."""
        replaced, names = options.get("patches_replace", {}), {"self": "attn1", "cross": "attn2"}
        places = {site.name: layer for layer, site in self.sites(*self._grid).items()}

        def replacing(site: AttentionSite) -> Any:
            block, number, index, kind = places[site.name]
            held = replaced.get(names[kind], {})
            return beneath(held.get((block, number, index), held.get((block, number))))

        return replacing

    def _gather(
        self, site: AttentionSite, tokens: Tensor, branches: Sequence[int], theirs: Callable[..., Tensor] | None
    ) -> Tensor:
        """One self-attention layer whose output is taken from elsewhere: of (branches*frames, tokens, channels)."""
        if theirs is not None:
            raise ValueError(
                f"model: another node replaces self-attention ({site.name}), which TokenFlow does not compute; "
                "remove it"
            )
        done = []
        for branch, part in zip(branches, tokens.chunk(len(branches)), strict=True):
            gather = self._answer(branch, len(part))[0].gather
            assert gather is not None
            done.append(gather(part, site))
        return torch.cat(done).to(tokens)

    @staticmethod
    def _check_tokens(site: AttentionSite, x: Tensor) -> None:
        if x.shape[1] != site.tokens:
            raise ValueError(
                f"{site.name} has {x.shape[1]} tokens where {site.height}x{site.width} are expected: another node "
                "on the model merges or rescales tokens (ToMe, HyperTile, Deep Shrink); remove it"
            )

    def _branch(
        self,
        branch: int,
        site: AttentionSite,
        theirs: Callable[..., Tensor] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
            return host_attention.optimized_attention(
                q.contiguous(), k.contiguous(), v.contiguous(), site.heads, skip_reshape=True, skip_output_reshape=True,
                attn_precision=options.get("attn_precision"), transformer_options=options,
            )  # fmt: skip

        def split(t: Tensor) -> Tensor:
            return rearrange(t, "f t (h d) -> f h t d", h=site.heads)

        def joined(t: Tensor) -> Tensor:
            return rearrange(t, "f h t d -> f t (h d)")

        control, text_tokens = self._answer(branch, len(q))
        control.attend = attend
        text_tokens = text_tokens if site.kind == "cross" else None
        own = control.cross_attention if site.kind == "cross" else control.self_attention
        # The host repeats a shorter prompt beside a longer one; the repetition changes nothing.
        q4, k4, v4 = split(q), split(k[:, :text_tokens]), split(v[:, :text_tokens])
        output = joined(own(q4, k4, v4, site)).to(q)
        if theirs is not None:
            if site.kind == "self":
                k4, v4 = control.of_key_frames(k4, site), control.of_key_frames(v4, site)
            k4, v4 = (t.expand(len(q), -1, -1, -1) for t in (k4, v4))
            output = output + theirs(q, joined(k4), joined(v4), options) - joined(attend(q4, k4, v4))
        if control.captured.outputs is not None and site.kind == "self":
            control.captured.outputs[site.name] = output
        return output

    def _answer(self, branch: int, frames: int) -> tuple[Control, int | None]:
        """The control of a branch; a branch that a guidance node adds goes as the negative one does."""
        if self.standing is not None:
            return self.standing(frames), None
        control, text_tokens = self.answers.get(branch) or self.answers[1]
        return control if self._window is None else control.window(self._window), text_tokens


def window_of(options: dict[str, Any]) -> tuple[int, ...] | None:
    """The clip's frames that a call holds, of a model's transformer options; None for all.

    Other packs' context windows say so under the name that AnimateDiff-Evolved gave it.
    """
    frames = options.get("ad_params", {}).get("sub_idxs")
    return None if frames is None else tuple(int(frame) for frame in frames)


def _as_host(theirs: Callable[..., Tensor] | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """A layer as it is without us."""
    if theirs is not None:
        return theirs(q, k, v, options)
    output: Tensor = host_attention.optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), transformer_options=options
    )
    return output


class Derived:
    """What a value is after a UNet call, and its gradient in the call's latents, which are DDIM's z.

    Taken inside the call, where all that other nodes hook for its time is in place; the host's inference mode is left.
    """

    def __init__(self, value: Callable[[], Tensor], parts: Sequence[nn.Module]) -> None:
        """Raises ValueError for weights that no gradient passes through."""
        for part in parts:
            check_differentiable(part, "model:")
        self.value, self.parts = value, parts
        self.found: tuple[Tensor, Tensor] | None = None

    def of(self, call: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
        """In the place of a call with these: what the host goes on with is of no use to anyone."""
        with torch.inference_mode(False), ExitStack() as opened:
            for part in self.parts:
                opened.enter_context(_known_to_autograd(part))
                opened.enter_context(frozen(part))
                opened.enter_context(recomputed(part, BLOCKS))
            opened.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())  # FreeU writes over features
            plain = [other if other is None else other.clone() for other in others]  # not of inference
            self.found = gradient_of(lambda z: call(z, *plain), x, self.value, x.dtype)
        return torch.zeros_like(x)


@contextmanager
def _known_to_autograd(model: nn.Module) -> Iterator[None]:
    """Show weights made in inference mode, which autograd refuses, as plain tensors of the same memory."""
    held = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.is_inference()
    ]
    try:
        for weights, name, weight in held:
            plain = torch.empty(0, dtype=weight.dtype, device=weight.device)
            plain.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())
            weights[name] = nn.Parameter(plain, requires_grad=False)
        yield
    finally:
        for weights, name, weight in held:
            weights[name] = weight


@dataclass(frozen=True)
class Feature:
    """The convolution whose output Plug-and-Play takes, and the name it has."""

    name: str
    conv: nn.Module


def feature_of(unet: UNetModel) -> Feature | None:
    """The last convolution of the second ResNet block in the first level of the decoder that has attention."""
    levels: list[list[nn.Module]] = [[]]
    for block in unet.output_blocks:
        levels[-1].append(block)
        if any(
            isinstance(m, Upsample) or (isinstance(m, ResBlock) and _resizes(m, Upsample)) for m in block.children()
        ):
            levels.append([])
    for i, level in enumerate(levels):
        if len(level) > 1 and any(isinstance(m, SpatialTransformer) for block in level for m in block.children()):
            resnet = next(m for m in level[1].children() if isinstance(m, ResBlock))
            return Feature(f"up.{i}.1", resnet.out_layers[-1])
    return None


def clip_norms(unet: UNetModel) -> list[nn.GroupNorm]:
    """The GroupNorms that see the whole clip in the authors' 5-D UNet."""
    norms = [n for m in unet.modules() if isinstance(m, ResBlock) for n in (m.in_layers[0], m.out_layers[0])]
    return [n for n in (*norms, unet.out[0]) if isinstance(n, nn.GroupNorm)]


def share_key_frames(model: Any, key_frames: KeyFrames, clip_norm: bool) -> Any:
    """A MODEL whose frames see each other's key frames, for anyone's sampler; in context windows, the window's."""
    return HookedModel(model, lambda frames: Control(key_frames, Chunk.whole(frames)), clip_norm).patcher


def identity_of(patcher: Any) -> ModelIdentity:
    """What tells a MODEL from another, LoRA on it or not."""
    model = patcher.model
    config = model.model_config.unet_config
    layers = attention_layers(model.diffusion_model)
    layout = (
        f"{type(model).__name__} in={config['in_channels']} width={config['model_channels']}"
        f"x{tuple(config['channel_mult'])} text={config['context_dim']} attention={len(layers)} "
        f"predicts={'v' if prediction_of(patcher.get_model_object('model_sampling')) is V_PREDICTION else 'epsilon'}"
    )
    return _IDENTITIES.of(model, layout, model.get_dtype(), own_weights(patcher))


def own_weights(patcher: Any) -> dict[str, Tensor]:
    """The weights of a MODEL's UNet as its checkpoint has them, by the host's keys.

    Layers that another node puts into the blocks while its MODEL is loaded (AnimateDiff's motion modules) are left
    out; those behind them are known by their places without.
    """
    found = {}
    for key, weight in patcher.model.state_dict().items():
        if own := own_key(patcher.model.diffusion_model, key):
            found[own] = patcher.backup[own].weight if own in patcher.backup else weight
    return found


def own_key(unet: UNetModel, key: str) -> str | None:
    """The checkpoint's key of a weight of a UNet with layers put into its blocks; None for a weight of those."""
    if not key.startswith("diffusion_model."):
        return None
    parts = key.split(".")
    at = {"input_blocks": 3, "output_blocks": 3, "middle_block": 2}.get(parts[1])
    if at is None:
        return key
    block = list(unet.get_submodule(".".join(parts[1:at])).children())
    place = int(parts[at])
    if not isinstance(block[place], OWN_LAYERS):
        return None
    parts[at] = str(sum(isinstance(layer, OWN_LAYERS) for layer in block[:place]))
    return ".".join(parts)


def unpatched(patcher: Any, key: str) -> Tensor:
    """A weight as the checkpoint has it; LoRA may have been written into the live one."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    return comfy.utils.get_attr(patcher.model, key)
