"""UNets of Stable Diffusion: SD 1.x, SD 2.x, SDXL, and video UNets derived from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..files.bundled import DEMO
from ..imports import torch
from .family import Family

if TYPE_CHECKING:
    from torch import nn

UNET = Family(
    title="Stable Diffusion",
    network="UNet",
    formulation="ddim",
    spans_clip=False,
    group_norms=True,
    half="float16",
    demo="demo",
    demo_folder=DEMO,
)


def feature_level(levels: Iterable[tuple[int, bool]]) -> int | None:
    """The decoder level of Plug-and-Play's feature (arXiv 2211.12572, Sec. 4.1), the output of its second ResNet block.

    It is the first level with attention and two blocks; None if no level fits. levels: (number of ResNet blocks, has
    attention) of each decoder level.
    """
    return next((i for i, (blocks, attends) in enumerate(levels) if attends and blocks > 1), None)


def clip_norms(blocks: Iterable[tuple[Any, Any]], last: Any) -> list[nn.GroupNorm]:
    """The GroupNorms that span the whole clip in the 5-D UNet of Tune-A-Video's and FateZero's code.

    blocks: the two norms of each ResNet block. last: the norm before the last convolution.
    """
    return [norm for norms in (*blocks, (last,)) for norm in norms if isinstance(norm, torch.nn.GroupNorm)]
