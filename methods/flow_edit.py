"""FlowEdit (Kulikov et al., ICCV 2025, arXiv 2412.08629): from clip to edit without noise of the clip's own.

At each level sigma noise is drawn. The clip with it, x_source, and the edit with it, x = x_edit + x_source - x_0, are
both predicted, and the edit goes along their difference:
    x_edit' = x_edit + (sigma' - sigma) (d_edit(x) - d_source(x_source)).
Its two branches are FateZero's, source beside edit, on levels that are drawn in the place of inverted ones: what an
edit takes of the source and where it keeps the clip combine with it. The paper knows flows; with d the noise and
x = z / sqrt(abar) the same holds for DDIM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.key_frames import KeyFrames
from ..diffusion.denoiser import Denoiser, keys_on
from ..diffusion.invert import Inversion
from ..imports import no_grad
from ..settings import check, setting
from ..store.backends import DrawnLevels
from ..store.store import AttentionStore

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "FlowEdit"
PRESET = {"guidance_scale": 10.0, "strength": 0.7}
"""Guidance of the target, and where it begins, beside `FlowEditSettings`."""


@dataclass(frozen=True)
class FlowEditSettings:
    """How FlowEdit's noise is drawn. Raises ValueError for a number out of its range."""

    source_guidance: float = setting(
        4.0, "Guidance of the source's branch; the edit's is usually two to three times as strong.",
        least=1, most=100, step=0.1, group=GROUP,
    )  # fmt: skip
    draws: int = setting(
        1, "How many noises each step takes the mean of; each costs as much as the first.", least=1, symbol="n_avg",
        group=GROUP,
    )  # fmt: skip
    seed: int = setting(0, "Random seed for the noise.", least=0, most=2**63 - 1, group=GROUP)

    def __post_init__(self) -> None:
        check(self)


@no_grad
def draw(
    denoiser: Denoiser,
    latents: Tensor,
    source_embeddings: Tensor | Condition,
    steps: int = 50,
    settings: FlowEditSettings | None = None,
    key_frames: KeyFrames | str | tuple[str | int, ...] = ("self", "middle"),
    clip_norm: bool = False,
    *,
    prompt: str | None = None,
) -> Inversion:
    """A clip with noise that is drawn, in the place of its inversion: `edit` of it is FlowEdit's.

    latents: (frames, c, h, w). source_embeddings: of what the clip shows. The model is not called. The rest as for
    `invert`, whose errors it raises.
    """
    settings, schedule = settings or FlowEditSettings(), denoiser.schedule(steps)
    if latents.ndim != 4 or not len(latents):
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be (frames, c, h, w), at least one frame")
    levels = range(steps + 1)
    drawn = DrawnLevels(
        latents,
        [schedule.signal(level).item() for level in levels],
        [schedule.noise(level).item() for level in levels],
        settings.seed,
        settings.source_guidance,
        settings.draws,
    )
    return Inversion(
        AttentionStore(
            memory="recompute",
            levels=drawn,
            source=Condition.of(source_embeddings, "source_embeddings").to(latents),
            timesteps=schedule.timesteps,
            alphas=tuple(schedule.alphas.tolist()),
            key_frames=keys_on(denoiser, key_frames),
            clip_norm=clip_norm,
            formulation=schedule.formulation,
            model=denoiser.identity(),
            prompt=prompt,
        )
    )
