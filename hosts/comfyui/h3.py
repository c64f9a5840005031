"""MiniMax H3 in ComfyUI: the joint attention of its transformer, hooked on a clone by the host's public hooks.

A call has one branch. With a source, `patches_replace["dit"]` runs each block on the source's rows just before those of
the positive branch (`Beside`), and passes our `optimized_attention_override` to its attention, around any existing one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor

from ...attention.columns import ClosingColumns
from ...attention.control import AttentionSite, Control, Kind, Streams
from ...attention.key_frames import Chunk
from ...attention.packed import Packing
from ...models.h3 import H3, packing
from ...store.identity import ModelIdentity
from ..beside import Beside
from .flow import check_flow, identity_of_shapes
from .hook import ALL_KINDS, OVERRIDE, Hook, HostFamily, check_kinds, hook_below
from .latents import Shapes
from .noise import is_flow
from .pair import join_pair

try:
    from comfy.ldm.minimax.model import MiniMaxH3Model, PackedLayout
except ImportError:  # older hosts
    MiniMaxH3Model = PackedLayout = None

PREFETCH = "prefetch_dynamic_vbars"
"""The transformer option for loading the weights of blocks ahead."""
LAYOUT = "minimax_h3_layout"
"""The transformer option with the rows of a call's streams, in newer hosts."""


def is_h3(model: Any) -> bool:
    return MiniMaxH3Model is not None and type(model.model.diffusion_model) is MiniMaxH3Model and is_flow(model)


class HookedH3(Hook):
    """A clone of a MiniMax H3 MODEL whose attention layers run through controls."""

    family = H3
    pairs = True
    separate_calls = True
    reads_latents = True
    splits = frozenset({"c_crossattn", "latent_shapes", "minimax_payload"})
    reads = splits | {"denoise_mask", "audio_denoise_mask"}
    host_windows = False

    def __init__(self, model: Any, kinds: Sequence[Kind] = ALL_KINDS) -> None:
        """Raises ValueError for a MODEL that is not sampled as a flow, and for a subset of kinds."""
        check_flow(model)
        check_kinds(model, kinds)
        super().__init__(model, ("joint",))
        join_pair(self, model)
        self._unet = model.model.diffusion_model
        self._beside = Beside(len(self._unet.blocks), self._alone)
        self._options: Any = None
        """The options of the step's first call that the source ran beside."""
        self._streams: Streams = ()
        around = {WrappersMP.DIFFUSION_MODEL: self._around(), WrappersMP.CALC_COND_BATCH: self._paired_calls()}
        self._place(len(self._unet.blocks), self._block, around)

    def identity(self) -> ModelIdentity:
        return identity_of_shapes(self.patcher)

    def packing(self, shapes: Shapes) -> Packing:
        return packing(shapes)

    def need_clip(self, inputs: dict[str, Any]) -> set[str]:
        placed = inputs["minimax_payload"].cond.get("keyframes") if "minimax_payload" in inputs else None
        return super().need_clip(inputs) | ({"minimax_keyframes"} if placed else set())

    def input_of_chunk(self, name: str, value: Any, chunk: Chunk) -> Any:
        if name == "minimax_payload":  # the rows of the whole clip's streams
            return value._copy_with({key: part for key, part in value.cond.items() if key != "layout"})
        return super().input_of_chunk(name, value, chunk)

    def sites(self, height: int, width: int) -> dict[str, AttentionSite]:
        _, down, across = self._unet.patch_size  # the host pads latents to whole patches
        attn, grid = self._unet.blocks[0].attn, (-(-height // down), -(-width // across))
        found = [
            AttentionSite("block", i, "joint", attn.heads, attn.head_dim, *grid) for i in range(len(self._unet.blocks))
        ]
        return {site.name: site for site in found}

    def _forget(self) -> None:
        self._beside.forget()
        self._options = None

    # Plain closures, because the host copies what it finds in a model's options.

    def _paired_calls(self) -> Callable[..., Any]:
        """Runs the source beside the positive branch of a call."""

        def paired_calls(executor: Any, model: Any, conds: list[Any], x: Tensor, sigma: Tensor, options: Any) -> Any:
            paired = self._paired
            if paired is None or not self._controls or not self._positive.among(conds):
                return executor(model, conds, x, sigma, options)
            z = paired.latents[0].to(x)
            self._options = self._options or options  # a guidance node calls again with skipped layers
            try:
                with self._beside.phase("enter"):
                    executor(model, [None, self._conditions], z, sigma, self._options)
                with self._beside.phase("run"):
                    results = executor(model, conds, x, sigma, options)
                with self._beside.phase("leave"):
                    _, clean = executor(model, [None, self._conditions], z, sigma, self._options)
            finally:
                self._beside.forget()
            paired.control.captured.prediction = ((z - clean) / sigma)[None]
            return results

        return paired_calls

    def _around(self) -> Callable[..., Any]:
        """Finds the grid and the rows of the streams of a call."""

        def around(
            executor: Any, x: Any, timestep: Tensor, context: Tensor, transformer_options: Any, *rest: Any, **more: Any
        ) -> Any:
            options = transformer_options
            if self._controls:
                blocks = options.get("patches_replace", {}).get("dit", {})
                self._replacement = lambda site: hook_below(blocks.get(("double_block", site.index)))
                self._grid = x[0].shape[-2], x[0].shape[-1]
                self._streams = self._rows(x[0], x[1], context, more.get("minimax_payload") or {})
            if not self._beside.runs:  # blocks do not compute, and need no weights
                options = {**options, PREFETCH: False}
            return executor(x, timestep, context, options, *rest, **more)

        return around

    def _rows(self, video: Tensor, sound: Tensor, text: Tensor, payload: dict[str, Any]) -> Streams:
        """The rows of a call's streams, of latents that the host pads to whole patches."""
        sides = zip(self._grid, self._unet.patch_size[1:], strict=True)
        height, width = (-(-side // patch) * patch for side, patch in sides)
        size = (text.shape[1], video.shape[2], height, width, sound.shape[-1])
        layout = payload.get("layout")
        if layout is None or layout.signature != size:
            layout = PackedLayout(*size, keyframes=payload.get("keyframes"), refs=payload.get("refs"))
        return _streams_of(layout)

    def _block(self, index: int, theirs: Callable[..., Any] | None) -> Callable[..., Any]:
        """A block that runs the source's rows first in the positive branch."""

        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            forward = extra["original_block"] if theirs is None else lambda own: theirs(own, extra)
            if not self._controls:
                done: dict[str, Any] = forward(args)
                return done
            layout = args["transformer_options"].get(LAYOUT)
            others = args, self._streams if layout is None else _streams_of(layout)
            role = self._positive.roles(args["transformer_options"])[0]

            def run(rows: Tensor, others: tuple[dict[str, Any], Streams], beside: bool) -> Tensor:
                own, streams = others
                options = own["transformer_options"]
                override = self._override(index, role, beside, streams, options)
                options = {**options, OVERRIDE: override, "block_index": index}  # which newer hosts count
                output: Tensor = forward({**own, "img": rows, "transformer_options": options})["img"]
                return output

            if role == 0 or not self._beside.runs:
                return {"img": self._beside.block(index, args["img"], others, run)}
            return {"img": run(args["img"], others, False)}

        block.previous = theirs  # type: ignore[attr-defined]  # so that hooking again replaces ours
        return block

    def _alone(self, index: int, rows: Tensor, others: tuple[dict[str, Any], Streams]) -> Tensor:
        """The host's own block on the source's rows."""
        own = others[0]
        inputs = (own[name] for name in ("t_emb", "mod_segments", "rope_freqs"))
        output: Tensor = self._unet.blocks[index](rows, *inputs, transformer_options=own["transformer_options"])
        return output

    def _override(
        self, index: int, role: int, beside: bool, streams: Streams, options: dict[str, Any]
    ) -> Callable[..., Tensor]:
        """The attention of a layer on a branch. options: the block's, with the override of another node."""
        theirs, taken = options.get(OVERRIDE), False
        site = replace(self.sites(*self._grid)[f"block.{index}.joint"], streams=streams)
        control = self._control(role, beside)

        def override(
            func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **more: Any
        ) -> Tensor:
            nonlocal taken
            kernel = func if theirs is None else lambda *given, **named: theirs(func, *given, **named)
            more = {**more, "transformer_options": options}
            if not beside:
                self._mark_run(site.name, role == 0)
            if taken or control.is_plain:  # other packs' own, or attention as the model has it
                return kernel(q, k, v, heads, *rest, **more)
            taken = True
            more |= {"skip_reshape": True, "skip_output_reshape": True}

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = (t.contiguous() for t in (q, k, v))
                return kernel(q, k, v, heads, *rest, **more)

            _check_rows(site, q)
            control.attend = attend
            output = control.layer(q, k, v, site)
            if self._paired is not None and role == 0 and not beside:
                self._paired.control.forget(site.name)
            return rearrange(output, "1 h n d -> 1 n (h d)").to(q)

        return override

    def _control(self, role: int, beside: bool) -> Control:
        """The control of a branch; branches of guidance nodes use the negative's."""
        if beside:
            assert self._paired is not None
            return self._paired.control
        return (self._controls.get(role) or self._controls[1])[0]


def _streams_of(layout: Any) -> Streams:
    return tuple((kind, start, stop) for start, stop, kind in layout.segments)


def _check_rows(site: AttentionSite, q: Tensor) -> None:
    """Raise ValueError for other rows than the model's."""
    video, rows = site.rows("video"), q.shape[2]
    if rows != video.stop or (video.stop - video.start) % site.tokens:
        raise ValueError(
            f"model: {site.name} has {rows} rows where {video.stop} are expected: another node on the model adds or "
            "merges tokens: remove it"
        )


@dataclass(frozen=True)
class _Words:
    """The host's tokenizer of Qwen, as `PromptEdit` calls it: the words of a prompt, behind those of pictures."""

    host_tokenizer: Any
    columns: ClosingColumns = field(default_factory=ClosingColumns)

    def __call__(self, text: str, **_: Any) -> Any:
        return self.host_tokenizer.tokenizer(text)


def _tokenizer(clip: Any) -> _Words | None:
    own = getattr(clip.tokenizer, "qwen3vl_32b", None)
    return None if own is None else _Words(own)


FAMILY = HostFamily(
    models="MiniMax H3",
    text_encoder="Qwen3-VL of MiniMax H3",
    hook=HookedH3,
    matches=is_h3,
    check=check_flow,
    count_layers=lambda model: len(model.model.diffusion_model.blocks),
    tokenizer=_tokenizer,
    frame_dim=2,
)
