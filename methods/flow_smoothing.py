"""Flow smoothing: what an edit changes moves as the source does.

A video is steady, and an edit of it flickers, so the flicker is in their difference. In each step the edit predicts
clean latents x_0, which are averaged along the source's optical flow, S, in two ways:
    z_0 + S(x_0 - z_0), the difference to the source's z_0, and S(x_0).
The difference is mostly even where the video is not, so that an average that is off by a pixel costs little of it, and
nothing of the source. But where the edit takes a texture away, its difference holds that texture. So, place by place,
each counts the more the less it changes; the steps that follow draw on what came of it. No UNet call is added; measured
in `benchmarks/QUALITY.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..settings import check, setting
from ..video.motion import Motion, smooth_along

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "Flow smoothing"


@dataclass(frozen=True)
class FlowSmoothing:
    """How much of the edit a frame takes over from its neighbours. motion: the source's.

    Raises ValueError for an amount outside 0 to 1.
    """

    amount: float = setting(
        0.8,
        "How much of the edit each frame takes over from its neighbours along the source's motion; 0 is none.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    motion: Motion | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check(self)

    def smoothed(self, clean: Tensor, source: Tensor) -> Tensor:
        """Clean latents (frames, 4, h, w) of the edit, smoothed beside the source's; ValueError without its motion."""
        if self.amount == 0 or len(source) == 1:
            return clean
        if self.motion is None or self.motion.frames != len(source):
            known = "none" if self.motion is None else f"that of {self.motion.frames} frames"
            raise ValueError(f"flow smoothing needs the motion of the clip's {len(source)} frames, and has {known}")
        return smooth_along(source, clean, self.motion, self.amount)

    def summary(self) -> str:
        return f"smoothed the edit along the source's motion by {self.amount:g}"
