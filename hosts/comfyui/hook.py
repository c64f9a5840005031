"""Shared code of model families: the hook on a clone of a MODEL, and the interface of a family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.utils
from comfy.cli_args import args
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...attention.control import SEPARATE, AttentionSite, Control, Kind, attention_map
from ...attention.key_frames import Chunk
from ...attention.packed import PackedChunk, Packing
from ...diffusion.denoiser import refuse_clip_norm
from ...models.family import Family
from ...store.identity import ModelIdentity
from ...store.records import Memory, PairedBranch, kept_as_map
from .conditions import NOTHING, READ
from .latents import Shapes
from .sameness import WINDOWS, same_forward

ALL_KINDS: Sequence[Kind] = SEPARATE
OVERRIDE = "optimized_attention_override"
"""The transformer option with the function that replaces the host's attention kernel."""

COMPILED = "torch.compile"
"""The key of the wrapper that compiles a MODEL's calls (TorchCompileModel), which would not follow controls from step
to step: calls of ours are not compiled."""
COMPILER_OFF = "disable_comfy_compiler"
"""The host's option against planning a call's memory from earlier calls, which newer hosts do on GPUs. Their plans fail
for tensors that outlive a call, and for calls that differ: those of controls do both."""
SAME_KERNEL = 0.1
"""The largest difference from softmax attention, as a share of the largest value, of kernels that round it."""

Controls = Mapping[int, tuple[Control, int | None]]
"""The control of each branch of a call and the number of text tokens of its prompt, None for all: 0 is the positive
branch, 1 the negative, as in the host's `cond_or_uncond`."""


class Hook:
    """A clone of a MODEL whose attention layers run through controls while `controlled` is open.

    Hooks of other packs stay in place. Each family derives from it.
    """

    family: Family
    pairs = False
    """Whether the source branch can run in the calls of the edit."""
    separate_calls = False
    """Whether the source runs in calls of its own beside the edit's, so that the host need not batch them."""
    always = True
    """Whether runs that control no attention are hooked too."""
    reads: frozenset[str] = READ
    """The model inputs from a prompt that it supports."""
    reads_latents = False
    """Whether these depend on the latents."""
    splits: frozenset[str] = READ
    """Those that calls on some frames of a clip may have."""
    host_windows = True
    """Whether the host's context windows fit its latents."""
    window_options: frozenset[str] = NOTHING
    """Options of the host's context windows that it follows besides the windows."""
    low: Hook | None = None
    """The hook of the MODEL that takes over below the sigma `boundary`."""
    boundary = 0.0

    def __init__(self, model: Any, kinds: Sequence[Kind] = ALL_KINDS) -> None:
        """kinds: of the attention layers to hook; the others stay as they are."""
        self.given, self.kinds = model, kinds
        """The MODEL as other nodes left it."""
        self.handler = model.model_options.get(WINDOWS)
        """The host's context windows, of a pair those of its first MODEL."""
        self.patcher = model.clone()
        self.patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
        self.one_text = False
        """Whether the text of each branch is the same for all frames."""
        self.memory: Memory = "recompute"
        """The memory of the store that the run fills or reads."""
        self.ran: set[str] = set()
        """The names of the layers that ran through a control."""
        self._controls: Controls = {}
        self._clip_norm = False
        self._paired: PairedBranch | None = None
        self._conditions: Any = None
        self._positive = PositiveBranch(None)
        self._grid = (0, 0)
        self._replacement: Callable[[AttentionSite], Any] = lambda site: None

    def identity(self) -> ModelIdentity:
        """The identity of the MODEL, LoRA included or not."""
        raise NotImplementedError

    def sites(self, height: int, width: int) -> Mapping[Any, AttentionSite]:
        """The attention layers on latents of this size."""
        raise NotImplementedError

    def joins(self, source: Hook) -> bool:
        """Whether a source can run in the calls of this MODEL, or beside them."""
        if not self.pairs or type(source) is not type(self) or "model_function_wrapper" in self.patcher.model_options:
            return False  # such a wrapper may call branches one by one
        return self is source or same_forward(self.given, source.given)

    def _place(self, blocks: int, block: Callable[[int, Any], Any], wrappers: Mapping[str, Any]) -> None:
        """Replace a transformer's blocks, around other nodes' replacements, and wrap its calls; instead of an earlier
        hook's. block: makes the replacement, from a block's index and the replacement below ours.
        """
        replaced = self.patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
        below = [hook_below(replaced.get(("double_block", i))) for i in range(blocks)]
        for i, theirs in enumerate(below):
            self.patcher.set_model_patch_replace(block(i, theirs), "dit", "double_block", i)
        for kind, wrapper in wrappers.items():
            self.patcher.remove_wrappers_with_key(kind, "fatezero")
            self.patcher.add_wrapper_with_key(kind, "fatezero", wrapper)

    @property
    def trained_frames(self) -> int | None:
        """See `Denoiser.trained_frames`."""
        return self.family.trained_frames

    def has_reference(self, inputs: dict[str, Any]) -> bool:
        """Whether a clip begins with a reference, which windows after the first lack. inputs: the model's, from a
        prompt.
        """
        return False

    def packing(self, shapes: Shapes) -> Packing | None:
        """That of latents of several streams; None for a model whose calls have the whole clip."""
        return None

    def need_clip(self, inputs: dict[str, Any]) -> set[str]:
        """Of the model inputs from a prompt, those that calls on some frames cannot have."""
        return set(inputs) - self.splits

    def of_chunk(self, condition: dict[str, Any], chunk: Chunk) -> dict[str, Any]:
        """A condition of the host's for the frames of a chunk."""
        inputs = {name: self.input_of_chunk(name, own, chunk) for name, own in condition["model_conds"].items()}
        return {**condition, "model_conds": inputs}

    def input_of_chunk(self, name: str, value: Any, chunk: Chunk) -> Any:
        """A model input from a prompt for the frames of a chunk."""
        if name == "latent_shapes" and isinstance(chunk, PackedChunk):
            return value._copy_with(chunk.shapes)
        return value

    @contextmanager
    def controlled(
        self,
        controls: Controls,
        clip_norm: bool = False,
        source: tuple[PairedBranch, Any] | None = None,
        conditions: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[None]:
        """Run the attention of the calls inside through controls.

        source: the source branch that runs in the same calls, with its conditions. conditions: those of the positive
        branch. Raises ValueError for clip norm without GroupNorms, and where the calls did not reach all attention
        layers of the positive branch.
        """
        if not self.family.group_norms:
            refuse_clip_norm(clip_norm)
        self._controls, self.ran, self._positive = controls, set(), PositiveBranch(conditions)
        self._clip_norm, (self._paired, self._conditions) = clip_norm, source or (None, None)
        try:
            with uncompiled():
                yield
            sites = [site for site in self.sites(*self._grid).values() if site.kind in self.kinds]
            self._positive.check(sites, self._replacement)
        finally:
            self._controls, self._clip_norm, self._paired, self._conditions = {}, False, None, None
            self._forget()

    def _forget(self) -> None:
        """Drop the state of a call, which an error may leave."""

    def derivative(self, value: Callable[[], Tensor], parts: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """Compute a value that controls have after the next call, and its gradient in the latents; in `controlled`."""
        raise ValueError("model: guidance by gradients needs a UNet")

    def _check_kernel(
        self, control: Control, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite, kernel: Any
    ) -> None:
        """Raise ValueError for another node's kernel that is not softmax attention, where the store keeps maps.

        A map is multiplied with values without the kernel. q, k, v: (f h t d). kernel: the node's, None for none.
        """
        if kernel is None or not kept_as_map(self.memory, site, k.shape[-2], q.dtype):
            return
        q, k, v = q[:1], k[:1], v[:1]
        softmax = attention_map(q, k) @ v
        if (control.attend(q, k, v) - softmax).abs().max() > SAME_KERNEL * softmax.abs().max():
            raise ValueError(
                f"memory: stored maps are softmax attention, but {node_of(kernel)} on the model computes another kind: "
                "invert with memory recompute, or remove that node"
            )

    def _mark_run(self, name: str, positive: bool) -> None:
        self.ran.add(name)
        if positive:
            self._positive.ran.add(name)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Calls without the host's compiler; hosts that have none, or were started without it, stay as they are."""
    compiled = getattr(args, COMPILER_OFF, None) is False
    if compiled:
        setattr(args, COMPILER_OFF, True)
    try:
        yield
    finally:
        if compiled:
            setattr(args, COMPILER_OFF, False)


def check_kinds(model: Any, kinds: Sequence[Kind]) -> None:
    """Raise ValueError for a subset of the kinds of layers, which only UNets hook."""
    if len(kinds) < len(ALL_KINDS):
        raise ValueError(f"model: layout guidance needs an attention UNet, not {type(model.model).__name__}")


class PositiveBranch:
    """The positive branch of the calls of a step, and the attention layers that ran for it.

    The host's calls list it as branch 0. Those of guidance nodes number their branches from 0, and only the uuid of
    the condition identifies it.
    """

    def __init__(self, conditions: Sequence[dict[str, Any]] | None) -> None:
        """conditions: the host's, of the positive prompt; None if it is branch 0 of every call."""
        self._uuids = None if conditions is None else {condition["uuid"] for condition in conditions}
        self.ran: set[str] = set()

    def among(self, conds: Sequence[Any]) -> bool:
        """Whether a call of these conditions, a list for each branch, contains it."""
        if self._uuids is None:
            return conds[0] is not None
        return any(condition["uuid"] in self._uuids for entries in conds for condition in entries or [])

    def roles(self, options: dict[str, Any]) -> list[int]:
        """The branches of a call, with 0 only for this one."""
        branches: list[int] = options["cond_or_uncond"]
        if self._uuids is None:
            return branches
        named = zip(branches, options["uuids"], strict=True)
        return [0 if uuid in self._uuids else branch or 1 for branch, uuid in named]

    def check(self, sites: Sequence[AttentionSite], replacement: Callable[[AttentionSite], Any]) -> None:
        """Raise ValueError if a layer did not run; replacement: another node's replacement of a layer."""
        missed = [site for site in sites if site.name not in self.ran]
        if missed and len(missed) == len(sites):
            raise ValueError(
                "model: no attention layer ran in a call: another node on the model skips calls (EasyCache, LazyCache, "
                "TeaCache) or replaces the model: remove it"
            )
        if missed:
            found = next((name for name in map(node_of, map(replacement, missed)) if name), None)
            raise ValueError(
                f"model: {len(missed)} of {len(sites)} attention layers ({missed[0].name}, ...) did not run in a step: "
                f"{found or 'another node on the model'} skips or replaces them: remove it"
            )


@dataclass(frozen=True)
class HostFamily:
    """A model family in this host, for code that serves all families.

    models, text_encoder: the models that it covers and their text encoder, in words. hook: the class that hooks a
    MODEL, made of the MODEL and the kinds of attention layers to hook.
    """

    models: str
    text_encoder: str
    hook: type[Hook]
    matches: Callable[[Any], bool]
    """Whether a MODEL is of this family."""
    check: Callable[[Any], None]
    """Raise ValueError for a MODEL of this family that cannot be edited."""
    count_layers: Callable[[Any], int]
    """The number of attention layers of a MODEL."""
    tokenizer: Callable[[Any], Any]
    """The tokenizer in a CLIP, for `PromptEdit`; None for a text encoder of another family."""
    frame_dim: int
    """The dimension of LATENT samples along which frames lie."""
    takes: Callable[[Any], frozenset[str]] = lambda model: NOTHING
    """The options of a CONDITIONING in `REFUSED` that a MODEL takes."""
    clean_frames: bool = False
    """Whether a MODEL keeps frames clean that have a noise mask."""
    text_tokens: Callable[[Tensor, dict[str, Any]], int | None] = lambda embeddings, options: None
    """The text columns that a model makes of a prompt's embeddings, given the prompt's options; None for one each."""


def hook_below(hook: Any) -> Any:
    """The hook below ours, if any; otherwise another node's hook itself."""
    return getattr(hook, "previous", hook)


def node_of(hook: Any) -> str | None:
    """The node or pack that a function belongs to; None for no function."""
    hook = getattr(hook, "func", hook)
    if hook is None:
        return None
    module, name = name_of_node(hook).split(".")
    return f"{name} ({module})"


def name_of_node(hook: Any) -> str:
    """The module, whose name the host takes from its path, and the class or function that a function belongs to."""
    module: str = getattr(hook, "__module__", None) or type(hook).__module__
    name: str = getattr(hook, "__qualname__", type(hook).__qualname__)
    return re.split(r"[./\\]", module)[-1] + "." + name.partition(".")[0]


def unpatched(patcher: Any, key: str) -> Tensor:
    """A weight of the checkpoint, without LoRA merged into it."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    return comfy.utils.get_attr(patcher.model, key)
