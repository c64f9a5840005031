"""A ComfyUI MODEL's video transformer: Wan's attention, hooked on a clone by the host's public hooks.

`patches_replace["dit"]` wraps each block, which then takes the branches of a call one after another, the source's
first. For the time of a call, hooks of the modules `self_attn` and `cross_attn` hand each an
`optimized_attention_override` of its own, around the one that is there by then. Overrides and block patches that other
packs set stay: the first as the kernel, the second around the block's own forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid5

import comfy.patcher_extension
import torch
from comfy.ldm.wan.model import WanModel
from einops import rearrange
from torch import Tensor, nn

from ...attention.control import SEPARATE, AttentionSite, Control, Kind
from ...diffusion.denoiser import refuse_clip_norm
from ...store.identity import IdentityCache, ModelIdentity
from ...store.records import Beside
from .noise import WORKING_MODELS, FlowNoise, noise_of
from .sameness import PAIR, ROOM, equal
from .unet import HookedModel, Positive, attention_layers, beneath, check_model, node_of, unpatched

WrappersMP = comfy.patcher_extension.WrappersMP

_IDENTITIES = IdentityCache()
_BRANCH = "fatezero_branch"
"""Where options hold the branch that a block computes."""
_OVERRIDE = "optimized_attention_override"
"""Where options hold what other nodes call in the place of the host's attention."""


def paired(model: Any, low_noise: Any, boundary: float) -> Any:
    """A MODEL that gives way to another below a sigma, in FateZero's own sampling.

    Raises ValueError for MODELs that are no Wan of the same shape.
    """
    for one, socket in ((model, "model"), (low_noise, "low_noise")):
        if not is_transformer(one):
            raise ValueError(f"{socket}: {type(one.model).__name__} is no Wan transformer")
    shapes = [(u.in_dim, u.dim, len(u.blocks)) for u in (m.model.diffusion_model for m in (model, low_noise))]
    if shapes[0] != shapes[1]:
        raise ValueError(f"low_noise: has another shape than the model, {shapes[1]} and {shapes[0]}")
    both = model.clone()
    both.model_options[PAIR] = Pair(model, low_noise, boundary)
    return both


@dataclass(frozen=True)
class Pair:
    """Wan 2.2's MODELs as they were joined, and the sigma below which the one for low noise takes over."""

    model: Any
    low_noise: Any
    boundary: float

    def __deepcopy__(self, memo: Any) -> Pair:
        return self  # the host copies what it finds in a model's options, older ones with all weights

    def low(self, model: Any) -> Any:
        """The one for low noise, with what nodes after the pair set on the MODEL: LoRA, guidance, patches.

        Raises ValueError, naming it, for what is bound to the modules of the first.
        """
        before, low = self.model, self.low_noise.clone()
        known = (ROOM, "model_sampling")  # a flow's is of the run, which is the first's
        parts = {name: part for name, part in model.object_patches.items() if name not in known}
        bound = [part for name, part in parts.items() if not equal(part, before.object_patches.get(name))]
        if bound or not equal(model.injections, before.injections):
            what = node_of(bound[0]) if bound else "LoRA Loader (Bypass)"
            raise ValueError(
                f"model: {what} after Wan 2.2 Pair would change the model for high noise alone: put it before"
            )
        added = {key: held[len(before.patches.get(key, [])) :] for key, held in model.patches.items()}
        if any(added.values()):
            low.patches |= {key: [*low.patches.get(key, []), *held] for key, held in added.items() if held}
            low.patches_uuid = uuid5(low.patches_uuid, str(model.patches_uuid))
        of_options = {name: value for name, value in model.model_options.items() if name != PAIR}
        low.model_options = _with_added(low.model_options, of_options, before.model_options)
        low.wrappers = _with_added(low.wrappers, model.wrappers, before.wrappers)
        low.callbacks = _with_added(low.callbacks, model.callbacks, before.callbacks)
        return low


def _with_added(to: Any, now: Any, before: Any) -> Any:
    """What settings became elsewhere, from `before` to `now`, on top of one's own: dicts merged, lists prolonged."""
    if equal(now, before):
        return to
    if isinstance(now, dict):
        to, before = to or {}, before or {}
        return {**to, **{name: _with_added(to.get(name), held, before.get(name)) for name, held in now.items()}}
    return [*(to or []), *now[len(before or []) :]] if isinstance(now, list) else now


def is_transformer(model: Any) -> bool:
    """Whether a MODEL is a video transformer of a kind that is known."""
    return isinstance(model.model.diffusion_model, WanModel)


def check_transformer(model: Any) -> None:
    """Raise ValueError for a Wan of another kind than text to video, or sampled otherwise than as a flow."""
    unet = model.model.diffusion_model
    plain = type(unet) is WanModel and unet.model_type == "t2v" and unet.in_dim == unet.out_dim
    if not plain or getattr(unet, "ref_conv", None) is not None:
        raise ValueError(f"model: is {_kind_of(unet)}, not text to video. FateZero works with {WORKING_MODELS}")
    if not isinstance(noise_of(model), FlowNoise):
        raise ValueError("model: is a video transformer that is not sampled as a flow")


def _kind_of(unet: Any) -> str:
    """What a Wan is called: "Wan VACE" for a VaceWanModel, "Wan S2V" for a WanModel_S2V."""
    kind = re.sub("Wan|Model|_", "", type(unet).__name__)
    if kind:
        return "Wan " + {"Vace": "VACE", "Humo": "HuMo"}.get(kind, kind)
    return f"Wan {unet.model_type} with {unet.in_dim} channels in"


class HookedTransformer:
    """A clone of a MODEL whose attention layers ask a control, with `HookedModel`'s interface.

    `answers` says which control answers for which branch of a call, and how many text tokens its prompt has: 0 is the
    positive one, 1 the negative, as in the host's `cond_or_uncond`.
    """

    def __init__(self, model: Any) -> None:
        """Raises ValueError for a MODEL that is no Wan for text to video."""
        check_transformer(model)
        self.given = model
        """The MODEL as other nodes left it."""
        self.patcher = model.clone()
        pair: Pair | None = self.patcher.model_options.pop(PAIR, None)
        self.low = None if pair is None else HookedTransformer(pair.low(model))
        """What takes over below the boundary."""
        self.boundary = 0.0 if pair is None else pair.boundary
        self.answers: dict[int, tuple[Control, int | None]] = {}
        self.one_text = False
        self.reached: set[str] = set()
        self._unet = model.model.diffusion_model
        self._sites: dict[tuple[int, int], dict[str, AttentionSite]] = {}
        self._grid = (0, 0)
        self._beside: Beside | None = None
        self._conditions: Any = None
        self._options: dict[str, Any] | None = None
        """The options of the call that the source ran in."""
        self._source = -1
        """Which branch of the call under way is the source's, where it is beside the edit's."""
        self._replacing: Callable[[AttentionSite], Any] = lambda site: None
        self._positive = Positive(None)
        replaced = self.patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
        blocks = [beneath(replaced.get(("double_block", i))) for i in range(len(self._unet.blocks))]
        for i, theirs in enumerate(blocks):
            self.patcher.set_model_patch_replace(self._block(i, theirs), "dit", "double_block", i)
        around = {WrappersMP.DIFFUSION_MODEL: self._around(), WrappersMP.CALC_COND_BATCH: self._joined()}
        for kind in around:
            self.patcher.remove_wrappers_with_key(kind, "fatezero")
        for kind, wrapper in around.items():
            self.patcher.add_wrapper_with_key(kind, "fatezero", wrapper)
        self.patcher.add_object_patch(ROOM, self._room(model.get_model_object(ROOM)))

    def identity(self) -> ModelIdentity:
        """What tells the MODEL from another, LoRA on it or not."""
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
        """The attention layers on latents of this size, which the host pads to whole patches."""
        if (height, width) not in self._sites:
            _, down, across = self._unet.patch_size
            grid = -(-height // down), -(-width // across)
            heads, kinds = self._unet.num_heads, ("self", "cross")
            found = [
                AttentionSite("block", i, kind, heads, self._unet.dim // heads, *grid)  # type: ignore[arg-type]
                for i in range(len(self._unet.blocks))
                for kind in kinds
            ]
            self._sites[height, width] = {site.name: site for site in found}
        return self._sites[height, width]

    @contextmanager
    def answering(
        self,
        answers: dict[int, tuple[Control, int | None]],
        clip_norm: bool,
        beside: tuple[Beside, Any] | None = None,
        conditions: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[None]:
        """beside: the source's branch, to run in the same calls, and the host's conditions of it. conditions: the
        host's, of the positive branch.

        Raises ValueError where the calls inside did not reach all attention layers of the positive branch.
        """
        refuse_clip_norm(clip_norm)
        self.answers, self.reached = answers, set()
        self._beside, self._conditions = beside or (None, None)
        self._positive = Positive(conditions)
        try:
            yield
            self._positive.check(self.sites(*self._grid), self._replacing)
        finally:
            self.answers, self._source = {}, -1
            self._beside = self._conditions = self._options = None

    # Plain closures, because the host copies what it finds in a model's options.

    def _room(self, of_host: Callable[..., Any]) -> Callable[..., Any]:
        """What the host asks before it calls branches together: they run one after another, so that parting them would
        save nothing, and would have the source's attention kept for all blocks.
        """
        of_host = beneath(of_host)

        def room(*args: Any, **more: Any) -> Any:
            return 0 if self._source >= 0 else of_host(*args, **more)

        room.previous = of_host  # type: ignore[attr-defined]
        return room

    def _joined(self) -> Callable[..., Any]:
        """The source's conditions beside those of a call, its latents in the place of the call's (`_around`)."""

        def joined(executor: Any, model: Any, conds: list[Any], x: Tensor, sigma: Tensor, options: Any) -> Any:
            beside = self._beside
            if beside is None or not self.answers or not self._positive.among(conds):
                return executor(model, conds, x, sigma, options)
            again = self._options is not None
            try:
                if again:  # a guidance node calls once more, with layers left out, which the source has
                    self._source = 1
                    executor(model, [None, self._conditions], x, sigma, self._options)
                    self._source = -1
                    return executor(model, conds, x, sigma, options)
                self._source, self._options = len(conds), options
                *results, clean = executor(model, [*conds, self._conditions], x, sigma, options)
            finally:
                self._source = -1
                if again:
                    beside.control.captured.records.clear()
            beside.control.captured.prediction = rearrange(
                (x - clean) / sigma.view(-1, 1, 1, 1, 1), "1 c f y x -> f c y x"
            )
            return results

        return joined

    def _around(self) -> Callable[..., Tensor]:
        def around(executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
            if not self.answers:
                return executor(x, *rest, **more)
            self._grid = x.shape[-2], x.shape[-1]
            # of the host's (x, t, context, clip_fea, time_dim_concat, transformer_options)
            options = more["transformer_options"] if "transformer_options" in more else rest[4]
            branches = options["cond_or_uncond"]
            if len(x) != len(branches):
                raise ValueError(f"latent: holds {len(x) // len(branches)} clips; FateZero edits one")
            if self._beside is not None and self._source in branches:
                x = x.clone()
                x[branches.index(self._source)] = rearrange(self._beside.latents, "f c y x -> c f y x").to(x)
            self._replacing = self._replacements(options)
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
        """What other nodes have in the place of an attention layer in a call."""
        blocks = options.get("patches_replace", {}).get("dit", {})

        def replacing(site: AttentionSite) -> Any:
            place = f"diffusion_model.blocks.{site.index}."
            parts = [part for name, part in self.patcher.object_patches.items() if name.startswith(place)]
            block = blocks.get(("double_block", site.index))
            return next((part for part in [beneath(block), *parts] if part is not None), None)

        return replacing

    def _block(self, index: int, theirs: Callable[..., Any] | None) -> Callable[..., Any]:
        """A block that takes its branches one after another."""

        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            forward = extra["original_block"] if theirs is None else lambda own: theirs(own, extra)
            if not self.answers:
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

        block.previous = theirs  # type: ignore[attr-defined]  # hooked again, ours gives way
        return block

    def _entering(self, index: int, kind: Kind) -> Callable[..., Any]:
        """A hook of an attention module that hands it our override for this call."""

        def entering(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
            options = named.get("transformer_options") or {}
            if _BRANCH not in options:
                return None
            override = self._override(f"block.{index}.{kind}", options[_BRANCH], options)
            return args, {**named, "transformer_options": {**options, _OVERRIDE: override}}

        return entering

    def _override(self, name: str, branch: int, options: dict[str, Any]) -> Callable[..., Tensor]:
        """The attention of a layer on a branch. options: the module's, with what another node calls in its place."""
        theirs, taken = options.get(_OVERRIDE), False

        def override(
            func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **more: Any
        ) -> Tensor:
            nonlocal taken
            kernel = func if theirs is None else lambda *given, **named: theirs(func, *given, **named)
            more = {**more, "transformer_options": options}
            control = self._answer(branch)[0]
            if taken or type(control) is Control:  # other packs' own, or attention as the model has it
                self._reach(name, branch)
                return kernel(q, k, v, heads, *rest, **more)
            taken = True
            more = {name: value for name, value in more.items() if name not in ("skip_reshape", "skip_output_reshape")}

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
                q, k, v = (t.contiguous() for t in (q, k, v))
                return kernel(q, k, v, heads, *rest, **more, skip_reshape=True, skip_output_reshape=True)

            return self._attend(name, branch, q, k, v, heads, attend)

        return override

    def _attend(
        self, name: str, branch: int, q: Tensor, k: Tensor, v: Tensor, heads: int, attend: Callable[..., Tensor]
    ) -> Tensor:
        """One layer of one branch, (1, tokens, channels), by its control."""
        site = self.sites(*self._grid)[name]
        frames, rest = divmod(q.shape[1], site.tokens)
        control, text_tokens = self._answer(branch)
        if rest or frames != len(control.chunk.frame_indices):
            raise ValueError(
                f"{site.name} has {q.shape[1]} tokens where {len(control.chunk.frame_indices)} frames of "
                f"{site.height}x{site.width} are expected: another node on the model adds or merges tokens; remove it"
            )
        control.attend = attend
        q4 = rearrange(q, "1 (f t) (h d) -> f h t d", f=frames, h=heads)
        if site.kind == "cross":
            k4, v4 = (rearrange(x[:, :text_tokens], "1 s (h d) -> 1 h s d", h=heads) for x in (k, v))
            output = control.cross_attention(q4, k4, v4, site)
        else:
            k4, v4 = (rearrange(x, "1 (f t) (h d) -> f h t d", f=frames, h=heads) for x in (k, v))
            output = control.self_attention(q4, k4, v4, site)
        if self._beside is not None and branch == 0 and self._source >= 0:
            self._beside.control.forget(site.name)
        self._reach(name, branch)
        return rearrange(output, "f h t d -> 1 (f t) (h d)").to(q)

    def _reach(self, name: str, branch: int) -> None:
        self.reached.add(name)
        if branch == 0:
            self._positive.reached.add(name)

    def _answer(self, branch: int) -> tuple[Control, int | None]:
        """The control of a branch; a branch that a guidance node adds goes as the negative one does."""
        if self._beside is not None and branch == self._source:
            return self._beside.control, self._beside.condition.text_tokens
        return self.answers.get(branch) or self.answers[1]


def _row_of(value: Any, row: int, rows: int) -> Any:
    """A branch's row of what a block is given; what all share as it is."""
    return value[row : row + 1] if isinstance(value, Tensor) and len(value) == rows else value


def hooked(model: Any, kinds: Sequence[Kind] = SEPARATE) -> HookedModel | HookedTransformer:
    """A clone of a MODEL, hooked as its kind asks for; ValueError for one that FateZero does not know.

    kinds: of attention layers, of a UNet; some alone are hooked of no transformer.
    """
    if is_transformer(model) and len(kinds) == len(SEPARATE):
        return HookedTransformer(model)
    return HookedModel(model, kinds=kinds)


def check_known(model: Any) -> None:
    """Raise ValueError for a MODEL that FateZero does not know."""
    (check_transformer if is_transformer(model) else check_model)(model)


def count_layers(model: Any) -> int:
    """How many attention layers a MODEL has."""
    unet = model.model.diffusion_model
    return 2 * len(unet.blocks) if is_transformer(model) else len(attention_layers(unet))
