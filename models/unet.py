"""Stable Diffusion's UNets: SD 1.x, SD 2.x, SDXL, and video UNets of their kind."""

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
    """The decoder level whose feature Plug-and-Play takes (arXiv 2211.12572, Sec. 4.1), after its second ResNet block:
    the first with attention.

    levels: (ResNet blocks, whether it has attention) of each decoder level. None where no level fits.
    """
    return next((i for i, (blocks, attends) in enumerate(levels) if attends and blocks > 1), None)


def clip_norms(blocks: Iterable[tuple[Any, Any]], last: Any) -> list[nn.GroupNorm]:
    """The GroupNorms whose statistics span the whole clip in the 5-D UNet of Tune-A-Video's and FateZero's code.

    blocks: the two norms of each ResNet block. last: the norm before the last convolution.
    """
    return [norm for norms in (*blocks, (last,)) for norm in norms if isinstance(norm, torch.nn.GroupNorm)]
