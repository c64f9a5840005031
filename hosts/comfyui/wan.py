"""Wan in ComfyUI: its blocks and its text.

A block attends to the clip (`self_attn`) and to the text (`cross_attn`); image-to-video models attend to a picture's
embedding first. Tokens of references are in front of the clip's (`ref_conv`) or behind them (reference clips, appended
frames). The picture's attention, these tokens, and the blocks of VACE and Animate besides are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel
from torch import Tensor, nn

from ...attention.key_frames import Chunk
from ...models.wan import WAN, WAN_CONDITIONED, begins_with_reference
from ...store.identity import ModelIdentity
from .blocks import HookedBlocks, check_sampled_as_flow
from .conditions import READ
from .flow import identity_of_shapes
from .hook import HostFamily
from .noise import FlowNoise, noise_of

try:
    from comfy.ldm.wan.model_animate import AnimateWanModel
except ImportError:  # older hosts
    AnimateWanModel = None

MODELS = "Wan 2.1 and 2.2 for text to video"
REFERENCES = frozenset({"context_latents", "time_dim_concat"})
"""Clips and frames that only the class `WanModel` reads (Bernini, Phantom)."""
FRAMES_AT = {"c_concat": 2, "camera_conditions": 2, "vace_context": 3}
"""The dimension of the frames in inputs for each frame of a clip."""
PER_POSE = {"pose_latents": 1, "face_pixel_values": 4}
"""Inputs for each frame but the first, a reference picture, and their values for each."""
PICTURES = frozenset({"concat_latent_image", "concat_mask"})
"""Of models with more channels in than out."""


def is_text_to_video(model: Any) -> bool:
    """Whether a MODEL is a Wan for text to video."""
    unet = model.model.diffusion_model
    plain = type(unet) is WanModel and unet.model_type == "t2v" and unet.in_dim == unet.out_dim
    return plain and getattr(unet, "ref_conv", None) is None


def is_conditioned(model: Any) -> bool:
    """Whether a MODEL is a Wan with inputs besides text: pictures, control videos, references, cameras, poses."""
    known = type(model.model.diffusion_model) in (WanModel, VaceWanModel, CameraWanModel, AnimateWanModel)
    return known and not is_text_to_video(model) and isinstance(noise_of(model), FlowNoise)


def takes_of(model: Any) -> frozenset[str]:
    """The options of a CONDITIONING that a Wan reads."""
    unet = model.model.diffusion_model
    taken = REFERENCES if type(unet) is WanModel else frozenset[str]()
    taken |= PICTURES if unet.in_dim > unet.out_dim else frozenset[str]()
    return taken if getattr(unet, "ref_conv", None) is None else taken | {"reference_latents"}


class HookedWan(HookedBlocks):
    """A clone of a Wan MODEL."""

    family = WAN
    container = "blocks"
    attention = {"self": "self_attn", "cross": "cross_attn"}
    reads = splits = READ | REFERENCES
    window_options = frozenset({"cond_retain_index_list"})

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

    def other_tokens(self, clip: Tensor, rest: Sequence[Any], named: dict[str, Any]) -> tuple[int, int]:
        def count(latents: Tensor) -> int:
            return latents.shape[-3] * prod(self.token_grid(*latents.shape[-2:]))

        picture, frames = named.get("reference_latent"), rest[3]
        before = 0 if picture is None or self._unet.ref_conv is None else prod(self.token_grid(*picture.shape[-2:]))
        behind = [*(named.get("context_latents") or []), *([] if frames is None else [frames])]
        return before, sum(map(count, behind))

    def input_of_chunk(self, name: str, value: Any, chunk: Chunk) -> Any:
        """As the host's context windows cut it: the first frame of every window has no pose."""
        frames, given = list(chunk.frame_indices), value.cond
        if name in PER_POSE:
            each = PER_POSE[name]
            rows = [(frame - 1) * each + i for frame in frames[1:] for i in range(each)]
            return value._copy_with(given[:, :, [row for row in rows if row < given.shape[2]]])
        if name == "context_latents":  # videos of the clip's length, and pictures
            return value._copy_with([self._cut(one, 2, chunk) for one in given])
        return value._copy_with(self._cut(given, FRAMES_AT[name], chunk)) if name in FRAMES_AT else value

    def _cut(self, given: Tensor, dim: int, chunk: Chunk) -> Tensor:
        """An input for the frames of a chunk, with those that the host's context windows retain."""
        if given.shape[dim] != chunk.clip:
            return given
        rows = list(chunk.frame_indices)
        for row in getattr(self.handler, "cond_retain_index_list", None) or ():
            rows[row] = range(chunk.clip)[row]
        return given.index_select(dim, torch.tensor(rows, device=given.device))

    @staticmethod
    def calls_before(module: nn.Module, inputs: dict[str, Any]) -> int:
        return int(hasattr(module, "k_img"))

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


class HookedConditionedWan(HookedWan):
    """A clone of a Wan MODEL with inputs besides text."""

    family = WAN_CONDITIONED
    reads = splits = HookedWan.reads | {
        "clip_fea", "reference_latent", "vace_context", "vace_strength", "face_pixel_values", "pose_latents",
        "camera_conditions",
    }  # fmt: skip
    reads_latents = True
    always = False

    def has_reference(self, inputs: dict[str, Any]) -> bool:
        control = inputs.get("vace_context")
        return type(self._unet) is AnimateWanModel or (control is not None and begins_with_reference(control.cond))

    def identity(self) -> ModelIdentity:
        """The architecture, unless the store keeps attention."""
        return identity_of_shapes(self.patcher) if self.memory == "recompute" else super().identity()


FAMILY = HostFamily(
    models=MODELS,
    text_encoder="UMT5 of Wan",
    hook=HookedWan,
    matches=is_text_to_video,
    check=check_sampled_as_flow,
    count_layers=lambda model: 2 * len(model.model.diffusion_model.blocks),
    tokenizer=_tokenizer,
    takes=takes_of,
    frame_dim=2,
)
CONDITIONED = replace(
    FAMILY,
    models="Wan for image-to-video, Fun control, VACE and Animate",
    text_encoder="",
    hook=HookedConditionedWan,
    matches=is_conditioned,
)
