"""Flow smoothing: average an edit over time along the source's motion.

A video does not flicker but its edit does, so the flicker is in their difference. In each step the edit predicts clean
latents x_0, which are averaged along the source's optical flow (S) in two ways:
    z_0 + S(x_0 - z_0), with the source's z_0, and S(x_0).
The difference is mostly smooth where the video is not, so an error of the flow loses little of the edit and nothing of
the source. But where the edit removes a texture, the difference contains it. Therefore, at each place, the average that
changes x_0 less has the larger weight. It needs no additional UNet calls; figures are in `benchmarks/QUALITY.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..diffusion.parts import Edit
from ..settings import check, setting
from ..video.motion import Motion, smooth_along

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "Flow smoothing"


@dataclass(frozen=True)
class FlowSmoothing:
    """The strength of the smoothing, and the source's motion. Raises ValueError for an amount outside 0 to 1."""

    amount: float = setting(
        0.8,
        "Share of the edit that each frame takes from its neighbours along the source's motion; 0 is off. Lowers the "
        "warp error, but can lose frames of edits that change a shape.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    motion: Motion | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check(self)

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Every edit and model supports it."""

    def smoothed(self, clean: Tensor, source: Tensor, causal: bool = False) -> Tensor:
        """Smooth clean latents (frames, c, h, w) of the edit, given the source's; ValueError without the motion.

        causal: whether each latent but the first codes several frames. The motion is then that of the frames, which is
        followed from the middle of one latent's frames to that of the next.
        """
        if self.amount == 0 or len(source) == 1:
            return clean
        motion = self.motion
        if motion is not None and causal and motion.frames > len(source):
            motion = motion.of_latents(len(source))
        if motion is None or motion.frames != len(source):
            known = "none" if motion is None else f"that of {motion.frames} frames"
            raise ValueError(f"flow smoothing needs the motion of the clip's {len(source)} frames, but has {known}")
        return smooth_along(source, clean, motion, self.amount)

    def summary(self) -> str:
        return f"smoothed the edit along the source's motion by {self.amount:g}"
