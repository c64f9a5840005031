"""The public `edit` and `edit_many`: a prompt pair without an injection uses FateZero's fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from ..attention.condition import Condition
from ..attention.prompt import PromptEdit
from ..diffusion import edit as loop
from ..diffusion.denoiser import Denoiser
from ..diffusion.invert import Inversion
from ..diffusion.parts import Edit, Injection
from ..methods.fatezero import FusionSettings

if TYPE_CHECKING:
    from torch import Tensor


@wraps(loop.edit)
def edit(
    denoiser: Denoiser,
    inversion: Inversion,
    target_embeddings: Tensor | Condition,
    negative_embeddings: Tensor | Condition | None = None,
    guidance_scale: float = 7.5,
    prompt: PromptEdit | None = None,
    fusion: Injection | None = None,
    chunk_frames: int | None = None,
    **more: Any,
) -> Tensor:
    if fusion is None and prompt is not None:
        fusion = FusionSettings()
    return loop.edit(
        denoiser, inversion, target_embeddings, negative_embeddings, guidance_scale, prompt, fusion, chunk_frames,
        **more,
    )  # fmt: skip


def edit_many(
    denoiser: Denoiser, inversion: Inversion, edits: Sequence[Edit], chunk_frames: int | None = None, **more: Any
) -> list[Tensor]:
    """`diffusion.edit.edit_many`, where a prompt pair without an injection uses FateZero's fusion."""
    fused = [replace(e, fusion=FusionSettings()) if e.fusion is None and e.prompt is not None else e for e in edits]
    return loop.edit_many(denoiser, inversion, fused, chunk_frames, **more)
