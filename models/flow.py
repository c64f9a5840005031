"""Any other model that is sampled as a flow: what needs its predictions only."""

from __future__ import annotations

from pathlib import Path

from .family import Family

FLOW = Family(
    title="flow model",
    network="model",
    formulation="flow",
    spans_clip=True,
    group_norms=False,
    half="bfloat16",
    demo="",
    demo_folder=Path(),
    attention=False,
)
