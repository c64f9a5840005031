"""UNets in ComfyUI: their attention, hooked on a clone of the MODEL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from einops import rearrange
from torch import Tensor, nn

from ...attention.control import AttentionSite, Control, Kind
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.clip_norm import share_statistics
from ...models.unet import UNET
from ...store.identity import ModelIdentity
from .gradient import Derivative
from .hook import ALL_KINDS, OVERRIDE, Hook, HostFamily, hook_below
from .noise import noise_of
from .unet_layers import Layer, attention_layers, feature_of, identity_of, norms_of_clip

MODELS = "SD 1.x, SD 2.x and SDXL models and their fine-tunes"


def is_unet(model: Any) -> bool:
    """Whether a MODEL is an attention UNet for pictures."""
    unet = model.model.diffusion_model
    return isinstance(unet, UNetModel) and not any(isinstance(m, SpatialVideoTransformer) for m in unet.modules())


def check_unet(model: Any) -> None:
    """Raise ValueError for a MODEL that is not an attention UNet, or whose schedule DDIM cannot invert."""
    if not is_unet(model):
        name, network = type(model.model).__name__, type(model.model.diffusion_model).__name__
        raise ValueError(f"model: {name} with a {network} is not an attention UNet: use {MODELS}")
    noise_of(model, flows=False)


class HookedUNet(Hook):
    """A clone of a UNet's MODEL whose attention layers run through controls.

    If another pack replaces attention, its difference from plain attention is added to the control's output.
    """

    family = UNET

    def __init__(
        self,
        model: Any,
        kinds: Sequence[Kind] = ALL_KINDS,
        default_control: Callable[[int], Control] | None = None,
        clip_norm: bool = False,
    ) -> None:
        """kinds: of the attention layers to hook; the others stay as they are. default_control: makes the control of
        calls outside `controlled` from their number of frames.
        """
        check_unet(model)
        super().__init__(model, kinds)
        self._default_control, self._clip_norm = default_control, clip_norm
        self._one_row = False
        self._layers = attention_layers(model.model.diffusion_model)
        self._grids: dict[tuple[int, int], dict[Layer, AttentionSite]] = {}
        self._norms = norms_of_clip(model.model.diffusion_model)
        self._feature = feature_of(model.model.diffusion_model)
        self._derivative: Derivative | None = None
        """The derivative to compute in the next call."""
        self._tokens: Tensor | None = None
        """The input tokens of the self-attention layer under way, for a control that gathers its output from them."""
        self._window: tuple[int, ...] | None = None
        """The frames of the call under way, where another node splits the clip."""
        self._ours: set[Layer] = set()
        """The self-attention layers that run through us in this call."""
        self._text_rows = self._one_row_a_branch()
        self._replace_attention(model.model_options["transformer_options"].get("patches_replace", {}))
        if default_control is None and "self" in kinds:
            self.patcher.set_model_attn2_patch(self._text_rows)
            self.patcher.set_model_attn1_patch(self._input_tokens())
        around, key = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "fatezero"
        if "self" not in kinds:  # in addition to a hook with key frames
            key = "fatezero words"
        self.patcher.remove_wrappers_with_key(around, key)
        self.patcher.add_wrapper_with_key(around, key, self._around())

    def _replace_attention(self, replaced: dict[str, dict[Any, Any]]) -> None:
        """Hook the attention layers; replaced: the replacements of other packs."""
        for name, kind in (("attn1", "self"), ("attn2", "cross")):
            theirs = replaced.get(name, {})
            for block, number, index, layer_kind in self._layers:
                if layer_kind != kind or kind not in self.kinds:
                    continue
                # At the block's own key unless another pack sits at the layer's, which the host
                # reads first: a node that replaces a block during the run (PAG) then still does.
                at = (block, number, index) if (block, number, index) in theirs else (block, number)
                patch = self._patch(layer_kind, hook_below(theirs.get(at)))
                self.patcher.set_model_patch_replace(patch, name, *at)

    def identity(self) -> ModelIdentity:
        return identity_of(self.patcher)

    def of_chunk(self, value: Any, chunk: Chunk) -> Any:
        """With a row for each frame in tensors, also in parts of the condition."""
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == chunk.clip:
            return chunk.cut(value)
        if isinstance(getattr(value, "cond", None), Tensor):
            return value._copy_with(self.of_chunk(value.cond, chunk))
        return {k: self.of_chunk(v, chunk) for k, v in value.items()} if isinstance(value, dict) else value

    def sites(self, height: int, width: int) -> dict[Layer, AttentionSite]:
        if (height, width) not in self._grids:
            self._grids[height, width] = {
                layer: shape.site(layer[3], height, width) for layer, shape in self._layers.items()
            }
        return self._grids[height, width]

    @property
    def _idle(self) -> bool:
        """Whether no control is set, so that the MODEL runs without our changes."""
        return self._default_control is None and not self._controls

    @contextmanager
    def derivative(self, value: Callable[[], Tensor], parts: Sequence[nn.Module]) -> Iterator[Derivative]:
        self._derivative = Derivative(value, parts)
        try:
            yield self._derivative
        finally:
            self._derivative = None

    # Plain closures, because the host copies what it finds in a model's options.

    def _patch(self, kind: Kind, theirs: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **_: Any) -> Tensor:
            return self._attend(kind, theirs, q, k, v, extra_options)

        attend.previous = theirs  # type: ignore[attr-defined]  # so that hooking again replaces ours
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

    def _input_tokens(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def input_tokens(
            n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
        ) -> tuple[Tensor, Tensor, Tensor]:
            layer: Layer = (*options["block"], options["block_index"], "self")
            branches = self._positive.roles(options)
            controls = [self._control(branch, len(n) // len(branches))[0] for branch in branches]
            if layer not in self._ours or not any(control.wants_tokens for control in controls):
                return n, context, value
            site = self.sites(*options["original_shape"][-2:])[layer]
            self._check_tokens(site, n)
            gathers = all(control.gather is not None for control in controls)
            for control, part in zip(controls, n.chunk(len(branches)), strict=True):
                control.input_tokens(part, site)
            if not gathers:
                return n, context, value
            # One token is projected instead of all: the layer's replacement computes the output of all.
            self._tokens = n
            return n[:, :1], context[:, :1], value[:, :1]

        return input_tokens

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
            # Where only our own patches read the text's keys, one row of it serves all frames.
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
            self._replacement = self._replacements(options)
            branches = self._positive.roles(options)
            if 0 in branches:
                self._grid = x.shape[-2], x.shape[-1]
            frames = len(x) // len(branches)
            self._window = window_of(options)
            expected = {len(self._control(branch, frames)[0].chunk.frame_indices) for branch in branches}
            if self._controls and expected != {frames}:
                raise ValueError(
                    f"model: a node on it calls the UNet with {frames} of {max(expected)} frames without their "
                    "numbers: remove it"
                )
            handles = [h for norm in self._norms for h in share_statistics(norm, frames)] if self._clip_norm else []
            if self._feature is not None and self._controls:
                handles.append(self._feature.conv.register_forward_hook(self._featured(branches)))
            try:
                if self._derivative is not None:
                    return self._derivative.of(
                        lambda z, *of: executor(z, *of, control, options, **more), x, t, context, y
                    )
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
            done = [self._control(b, len(part))[0].feature(part, self._feature.name) for b, part in named]
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
        """One layer of a UNet call, each branch through its control: (branches*frames, tokens, channels)."""
        if self._idle:
            return _as_host(theirs, q, k, v, options)
        site = self.sites(*options["original_shape"][-2:])[(*options["block"], options["block_index"], kind)]
        branches, roles = options["cond_or_uncond"], self._positive.roles(options)
        if kind == "self" and self._tokens is not None:
            tokens, self._tokens = self._tokens, None
            self._mark_run(site.name, 0 in roles)
            return self._gather(site, tokens, roles, theirs)
        self._check_tokens(site, q)
        parts = zip(branches, roles, *(t.chunk(len(branches)) for t in (q, k, v)), strict=True)
        done = []
        for branch, role, q_part, k_part, v_part in parts:
            of_branch = {**options, "cond_or_uncond": [branch]}
            done.append(self._branch(role, site, theirs, q_part, k_part, v_part, of_branch))
        self._mark_run(site.name, 0 in roles)
        return torch.cat(done)

    def _replacements(self, options: dict[str, Any]) -> Callable[[AttentionSite], Any]:
        """Other nodes' replacements of attention layers in a call."""
        replaced, names = options.get("patches_replace", {}), {"self": "attn1", "cross": "attn2"}
        places = {site.name: layer for layer, site in self.sites(*self._grid).items()}

        def replacing(site: AttentionSite) -> Any:
            block, number, index, kind = places[site.name]
            found = replaced.get(names[kind], {})
            return hook_below(found.get((block, number, index), found.get((block, number))))

        return replacing

    def _gather(
        self, site: AttentionSite, tokens: Tensor, branches: Sequence[int], theirs: Callable[..., Tensor] | None
    ) -> Tensor:
        """One self-attention layer whose output comes from the control: (branches*frames, tokens, channels)."""
        if theirs is not None:
            raise ValueError(
                f"model: another node replaces self-attention ({site.name}), which TokenFlow does not compute: "
                "remove it"
            )
        done = []
        for branch, part in zip(branches, tokens.chunk(len(branches)), strict=True):
            gather = self._control(branch, len(part))[0].gather
            assert gather is not None
            done.append(gather(part, site))
        return torch.cat(done).to(tokens)

    @staticmethod
    def _check_tokens(site: AttentionSite, x: Tensor) -> None:
        if x.shape[1] != site.tokens:
            raise ValueError(
                f"{site.name} has {x.shape[1]} tokens where {site.height}x{site.width} are expected: another node "
                "on the model merges or rescales tokens (ToMe, HyperTile, Deep Shrink): remove it"
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

        control, text_tokens = self._control(branch, len(q))
        control.attend = attend
        text_tokens = text_tokens if site.kind == "cross" else None
        # The host repeats shorter prompts to the longest one's length, which changes nothing.
        q4, k4, v4 = split(q), split(k[:, :text_tokens]), split(v[:, :text_tokens])
        if not control.is_plain:
            self._check_kernel(control, q4, k4, v4, site, options.get(OVERRIDE))
        output = joined(control.layer(q4, k4, v4, site)).to(q)
        if theirs is not None:
            if site.kind == "self":
                k4, v4 = control.of_key_frames(k4, site), control.of_key_frames(v4, site)
            k4, v4 = (t.expand(len(q), -1, -1, -1) for t in (k4, v4))
            output = output + theirs(q, joined(k4), joined(v4), options) - joined(attend(q4, k4, v4))
        if control.captured.outputs is not None and site.kind == "self":
            control.captured.outputs[site.name] = output
        return output

    def _control(self, branch: int, frames: int) -> tuple[Control, int | None]:
        """The control of a branch and its text tokens; branches of guidance nodes use the negative's."""
        if self._default_control is not None:
            return self._default_control(frames), None
        control, text_tokens = self._controls.get(branch) or self._controls[1]
        return control if self._window is None else control.window(self._window), text_tokens


def window_of(options: dict[str, Any]) -> tuple[int, ...] | None:
    """The clip's frames in a call, from a model's transformer options; None for all.

    Context windows of other packs use AnimateDiff-Evolved's key.
    """
    frames = options.get("ad_params", {}).get("sub_idxs")
    return None if frames is None else tuple(int(frame) for frame in frames)


def _as_host(theirs: Callable[..., Tensor] | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The layer's attention without our hook."""
    if theirs is not None:
        return theirs(q, k, v, options)
    output: Tensor = host_attention.optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), transformer_options=options
    )
    return output


def share_key_frames(model: Any, key_frames: KeyFrames, clip_norm: bool) -> Any:
    """A MODEL whose frames attend to key frames, for any sampler; in context windows, to the window's."""
    return HookedUNet(
        model, default_control=lambda frames: Control(key_frames, Chunk.whole(frames)), clip_norm=clip_norm
    ).patcher


def _tokenizer(clip: Any) -> Any:
    """The CLIP tokenizer of SD's text encoders."""
    own = [getattr(clip.tokenizer, name) for name in ("clip_l", "clip_h", "clip_g") if hasattr(clip.tokenizer, name)]
    return own[0].tokenizer if own else None


FAMILY = HostFamily(
    models=MODELS,
    text_encoder="CLIP of SD 1.x, SD 2.x or SDXL",
    hook=HookedUNet,
    matches=is_unet,
    check=check_unet,
    count_layers=lambda model: len(attention_layers(model.model.diffusion_model)),
    tokenizer=_tokenizer,
    frame_dim=0,
)
