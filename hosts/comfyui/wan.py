"""Wan in ComfyUI: its blocks and its text."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from comfy.ldm.wan.model import WanModel
from torch import Tensor

from ...models.wan import WAN
from .blocks import HookedBlocks, check_sampled_as_flow
from .hook import HostFamily

MODELS = "Wan 2.1 and 2.2 for text to video"


def is_text_to_video(model: Any) -> bool:
    """Whether a MODEL is a Wan for text to video."""
    unet = model.model.diffusion_model
    plain = type(unet) is WanModel and unet.model_type == "t2v" and unet.in_dim == unet.out_dim
    return plain and getattr(unet, "ref_conv", None) is None


class HookedWan(HookedBlocks):
    """A clone of a Wan MODEL."""

    family = WAN
    container = "blocks"
    attention = {"self": "self_attn", "cross": "cross_attn"}

    @property
    def layout(self) -> str:
        unet = self._unet
        name = type(self.patcher.model).__name__
        return f"{name} in={unet.in_dim} {len(self._blocks)} blocks of {unet.num_heads} heads, {unet.dim}"

    @property
    def heads(self) -> tuple[int, int]:
        return self._unet.num_heads, self._unet.dim // self._unet.num_heads

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        _, down, across = self._unet.patch_size  # the host pads latents to whole patches
        return -(-height // down), -(-width // across)

    def with_tokens(self, args: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        img, times = args["img"], args["vec"]
        if times.shape[1] > 1:  # a timestep for each frame or token
            times = times[:, tokens // -(-img.shape[1] // times.shape[1])]
        return {**args, "img": img[:, tokens], "vec": times, "pe": args["pe"][:, tokens]}


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
    check=check_sampled_as_flow,
    count_layers=lambda model: 2 * len(model.model.diffusion_model.blocks),
    tokenizer=_tokenizer,
    frame_dim=2,
)
