"""Models that are sampled as a flow and whose attention is not controlled: what needs their predictions only."""

from __future__ import annotations

from dataclasses import replace

from .family import Family

FLOW = Family(
    title="flow model",
    network="model",
    formulation="flow",
    spans_clip=True,
    half="bfloat16",
    attention=False,
)
QWEN_IMAGE = replace(FLOW, title="Qwen-Image", network="picture transformer")
FLUX = replace(FLOW, title="Flux", network="picture transformer")
