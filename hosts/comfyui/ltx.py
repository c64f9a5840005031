"""LTX-2.x in ComfyUI: its blocks, which hold a video and its sound, and its text.

A block makes six attention calls. The video's self-attention (`attn1`) and the one to its text (`attn2`) are
controlled; those of the sound, and between video and sound, are the branch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import prod
from typing import Any

from torch import Tensor

from ...attention.packed import Packing
from ...models.ltx import LTX2, Words, text_columns
from ...store.identity import ModelIdentity
from .blocks import HookedBlocks, check_sampled_as_flow
from .conditions import KEYFRAMES, READ
from .flow import identity_of_shapes
from .hook import HostFamily
from .latents import Shapes

try:
    from comfy.ldm.lightricks.av_model import CompressedTimestep, LTXAVModel
except ImportError:  # older hosts
    CompressedTimestep = LTXAVModel = None

UNPROCESSED = "unprocessed_ltxav_embeds"
"""The option of a CONDITIONING whose text the model's connector has yet to process."""


GUIDES = frozenset({"denoise_mask", "audio_denoise_mask", KEYFRAMES, "guide_attention_entries"})
"""The model inputs of guides and clean frames."""


class HookedLTX(HookedBlocks):
    """A clone of an LTX-2.x MODEL."""

    family = LTX2
    container = "transformer_blocks"
    attention = {"self": "attn1", "cross": "attn2"}
    reads = READ | {"frame_rate", "latent_shapes", "ref_audio", *GUIDES}
    splits = reads - GUIDES
    reads_latents = True
    always = False

    @property
    def layout(self) -> str:
        unet, name = self._unet, type(self.patcher.model).__name__
        heads, dim = self.heads
        return f"{name} in={unet.in_channels} {len(self._blocks)} blocks of {heads} heads, {dim}"

    @property
    def heads(self) -> tuple[int, int]:
        return self._unet.num_attention_heads, self._unet.attention_head_dim

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def other_tokens(self, clip: Tensor, rest: Sequence[Any], named: dict[str, Any]) -> tuple[int, int]:
        places = rest[5] if len(rest) > 5 else named.get(KEYFRAMES)
        count = 0 if places is None else places.shape[2]
        self._guides = count // prod(clip.shape[-2:])
        if not count:
            return 0, 0
        in_use = (named["denoise_mask"][0] >= 0).all(0).flatten()
        return 0, int(in_use[-count:].sum())

    def packing(self, shapes: Shapes) -> Packing:
        """As the host's context windows map the frames to the sound."""
        (_, _, frames, *_), (_, _, sound, *_) = shapes
        begins = tuple(frame * sound / frames for frame in range(frames + 1))
        return Packing(tuple(map(tuple, shapes)), 2, begins)

    def identity(self) -> ModelIdentity:
        """The architecture, unless the store keeps attention."""
        return identity_of_shapes(self.patcher) if self.memory == "recompute" else super().identity()

    def row_of(self, value: Any, row: int, rows: int) -> Any:
        if CompressedTimestep is not None and isinstance(value, CompressedTimestep):
            own = copy(value)
            own.data, own.batch_size = value.data[row : row + 1], 1
            return own
        return super().row_of(value, row, rows)


def is_ltx(model: Any) -> bool:
    """Whether a MODEL is LTX-2.x, with or without sound."""
    return LTXAVModel is not None and type(model.model.diffusion_model) is LTXAVModel


def _tokenizer(clip: Any) -> Words | None:
    """Gemma's, of LTX-2's text encoders."""
    if not type(clip.tokenizer).__name__.startswith("LTXAVGemma"):
        return None
    own = getattr(clip.tokenizer, clip.tokenizer.clip)

    def encode(text: str) -> list[int]:
        found: list[int] = own.tokenizer(text)["input_ids"][own.tokens_start :]
        return found

    return Words(encode)


def _text_tokens(embeddings: Tensor, options: dict[str, Any]) -> int | None:
    return text_columns(embeddings.shape[1]) if options.get(UNPROCESSED) else None


FAMILY = HostFamily(
    models="LTX-2.x",
    text_encoder="Gemma of LTX-2",
    hook=HookedLTX,
    matches=is_ltx,
    check=check_sampled_as_flow,
    count_layers=lambda model: 2 * len(model.model.diffusion_model.transformer_blocks),
    tokenizer=_tokenizer,
    text_tokens=_text_tokens,
    takes=lambda model: frozenset({"ref_audio", KEYFRAMES}),  # their tokens' attention is the model's own
    frame_dim=2,
    clean_frames=True,
)
