"""A mask without attention: where the predictions for both prompts disagree.

As in DiffEdit (Couairon et al., ICLR 2023, arXiv 2210.11427) and Follow-Your-Shape (arXiv 2508.08134): D is the mean
over channels of |v_target - v_source| on the source's noisy latents, divided by its maximum in each frame and averaged
over several levels. The edit keeps its latents where D exceeds a threshold, Otsu's (IEEE TSMC 1979) unless one is
given; elsewhere they are the source's after every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.masks import GivenMask
from ..diffusion.denoiser import Denoiser, chunks_of
from ..diffusion.parts import BaseInjection, Edit, EditContext, Injected
from ..diffusion.prompt_mask import prompt_heat
from ..imports import F, no_grad, torch
from ..settings import setting
from ..store.streams import mask_of_all, mask_of_latents
from .flow_edit import draw
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

GROUP = "Flow mask"
BINS = 256
"""Bins of Otsu's histogram."""
AREA = 0.6
"""The threshold of `area_of_prompts`: Otsu's takes in too much around a small object."""


@dataclass(frozen=True)
class FlowMaskSettings(BaseInjection):
    """How the mask is made of the predictions. Raises ValueError for a number out of range."""

    threshold: float = setting(
        0.0, "Difference above which the clip may change, relative to each frame's maximum; 0: found by Otsu's method.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    grow: int = setting(0, "Places of the latents by which the mask is grown.", least=0, most=64, group=GROUP)
    still: int = setting(
        1, "Frames of the latents, before and after, over which differences are averaged, against flicker.", least=0,
        most=64, group=GROUP,
    )  # fmt: skip
    within: bool = field(default=False, kw_only=True)
    """Whether a given mask limits the computed one instead of replacing it."""

    needs_attention = False

    @property
    def limits(self) -> bool:
        return True

    def injected(self, edit: Edit, context: EditContext) -> Injected:
        return FlowMask(self, edit, context)

    def reads_source(self, step: int, steps: int) -> bool:
        return False

    def preparing_calls(self, steps: int, edit: Edit, spans_clip: bool) -> int:
        return 0 if self.replaced_by(edit.mask) else 2 * min(4, steps)

    def inside(self) -> Self:
        return replace(self, within=True)

    def replaced_by(self, mask: GivenMask | None) -> bool:
        """Whether a given mask is used instead of the computed one."""
        return mask is not None and mask.replaces and not self.within

    def summary(self, steps: int) -> str:
        how = f"threshold {self.threshold:g}" if self.threshold else "Otsu's threshold"
        return f"mask from the predictions for both prompts ({how}, grown by {self.grow})"


class FlowMask(Injected):
    """The mask of one edit."""

    own_level = False

    def __init__(self, settings: FlowMaskSettings, edit: Edit, context: EditContext) -> None:
        self.context, self.store = context, context.store
        self.settings, self._given = settings, edit.mask
        self._inside: Tensor | None = None
        self.difference: Tensor | None = None
        """D of the video, (frames, h, w); None where a given mask replaces the computed one."""
        self.mask: Tensor | None = None
        """The mask of the video from D, (frames, h, w), before it is joined with a given one."""

    def prepare(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        context, settings, given = self.context, self.settings, self._given
        store = context.store
        if settings.replaced_by(given):
            assert given is not None
            self._inside = self.of_latents(given)
            return
        self.difference = prompt_heat(context.denoiser, store, context.target, ((), ()), (), chunks).edit
        self.mask = mask_from(self.difference, settings)
        found = mask_of_all(store, self.mask).to(context.latents_like)
        if given is not None:
            own = mask_of_latents(store, given).to(found)
            joining = replace(given, how="intersection") if settings.within else given
            found = joining.joined(own, found)
        self._inside = found[:, None]

    def blends_latents(self, step: int) -> bool:
        return True


@no_grad
def area_of_prompts(
    denoiser: Denoiser,
    latents: Tensor,
    source: Condition,
    targets: Sequence[Condition],
    steps: int = 50,
    key_frames: KeyFrames | str | tuple[str | int, ...] = ("self", "middle"),
) -> Tensor:
    """Where edits of a clip to some targets will change it, before an inversion: 0 or 1, (frames, h, w) of the latents.

    Their predictions are compared with the source's on the clip (f, c, h, w) with sampled noise: the union of the masks
    at the threshold `AREA`, each without parts that are much weaker than its strongest. Eight model calls a target.
    """
    store = draw(denoiser, latents, source, steps, key_frames=key_frames).store
    calls = store.calls(None)
    chunks = [chunks_of(denoiser, calls, latents, timestep) for timestep in store.timesteps]
    with denoiser.hooked(False):
        heats = [prompt_heat(denoiser, store, one, ((), ()), (), chunks).edit for one in targets]
    return torch.stack([connected(mask_from(heat, FlowMaskSettings(AREA)), heat) for heat in heats]).amax(0)


def connected(mask: Tensor, heat: Tensor, least: float = 0.5) -> Tensor:
    """The parts of a mask (f, h, w), connected in and between frames, with at least a share of the largest's heat."""
    rest, parts = mask > 0, []
    while rest.any():
        part, before = torch.zeros_like(mask), mask
        part.view(-1)[(heat + 1).mul(rest).argmax()] = 1
        while not torch.equal(part, before):
            part, before = F.max_pool3d(part[None, None], 3, 1, 1)[0, 0] * rest, part
        parts.append((float((part * heat).sum()), part))
        rest = rest & (part == 0)
    most = max((amount for amount, _ in parts), default=0.0)
    return sum((part for amount, part in parts if amount >= least * most), torch.zeros_like(mask))


def mask_from(heat: Tensor, settings: FlowMaskSettings) -> Tensor:
    """The mask of a heat (frames, h, w): 0 or 1."""
    around = 2 * settings.still + 1
    calm = F.avg_pool1d(heat.flatten(1).T[:, None], around, stride=1, padding=settings.still, count_include_pad=False)[
        :, 0
    ].T.reshape(heat.shape)
    mask = (calm > (settings.threshold or otsu(calm))).float()
    return F.max_pool2d(mask[:, None], 2 * settings.grow + 1, stride=1, padding=settings.grow)[:, 0]


def otsu(values: Tensor) -> float:
    """The threshold that separates values in 0..1 into two classes of the largest variance between them."""
    counts = torch.histc(values.float().cpu(), BINS, 0, 1).double()
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    below, mean = counts.cumsum(0), (counts * centres).cumsum(0)
    above = counts.sum() - below
    between = below * above * (mean / below.clamp(min=1) - (mean[-1] - mean) / above.clamp(min=1)) ** 2
    best = between >= between.max() * (1 - 1e-9)
    return float((centres[best].mean() + 0.5 / BINS).item())


METHOD = Method(
    name="flow_mask",
    title=GROUP,
    paper="Couairon et al., ICLR 2023, arXiv 2210.11427; Long et al., 2025, arXiv 2508.08134",
    sentence="Changes the clip only where the predictions for both prompts disagree, without attention.",
    part="injection",
    settings=FlowMaskSettings,
    presets={
        "flow_mask": {"noise": "drawn", "injection": "flow_mask", "guidance_scale": 10.0, "strength": 0.7},
    },
    node_id="FateZeroFlowMask",
    node_title="Flow Mask Settings (FateZero)",
    aliases=("otsu", "diffedit", "automatic mask", "inversion-free"),
)
