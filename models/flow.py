"""Models that are sampled as a flow and whose attention is not controlled: what needs their predictions only."""

from __future__ import annotations

from dataclasses import replace

from .family import Family
from .wan import WAN

FLOW = Family(
    title="flow model",
    network="model",
    formulation="flow",
    spans_clip=True,
    half="bfloat16",
    attention=False,
)
WAN_I2V = replace(FLOW, title="Wan image-to-video", network="video transformer", trained_frames=WAN.trained_frames)
WAN_VACE = replace(WAN_I2V, title="Wan VACE")
QWEN_IMAGE = replace(FLOW, title="Qwen-Image", network="picture transformer")
FLUX = replace(FLOW, title="Flux", network="picture transformer")
