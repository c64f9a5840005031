"""FiVE-Bench's figures of an edited clip, as its code computes them, and how exclusive the change is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.clip import ClipScorer
from ..metrics.lpips import LEAST_SIDE, Lpips
from ..metrics.motion import Tracker, motion_fidelity
from ..metrics.preservation import SSIM_WINDOW, largest_change, psnr, share_of_change, ssim
from ..metrics.structure import Dino
from ..metrics.vlm import Answer, Questions, five_accuracy
from ..video.size import to_unit

STRIDE = 8
"""Every 8th frame is measured, but for motion and FiVE-Acc, which take the whole clip."""
NIQE_BLOCK = 96
"""NIQE measures whole blocks of this side in pixels."""
Niqe = Callable[[Tensor], float]
"""NIQE of a frame (1, 3, h, w) in 0..1."""


@dataclass(frozen=True)
class FiveMetrics:
    """The models that figures need; a figure whose model is None is left out."""

    clip: ClipScorer | None = None
    dino: Dino | None = None
    lpips: Lpips | None = None
    niqe: Niqe | None = None
    tracker: Tracker | None = None
    flow_tracker: Tracker | None = None
    answer: Answer | None = None

    def measure(
        self,
        source: Tensor,
        edited: Tensor,
        mask: Tensor,
        target: str,
        questions: Questions | None = None,
        saved: Tensor | None = None,
    ) -> dict[str, float | None]:
        """The figures of an edit; None where one is undefined.

        source, edited: (f, 3, h, w) in 0..1. mask: (f, h, w), 1 in the edited area. Pixels of the other area are black
        in both clips, as in the authors' code: PSNR, LPIPS, MSE and SSIM of the unedited area are means over the
        whole frame, and a large mask improves them. PSNR leaves out frames in which that area is the source's, where it
        is infinite. saved: the edit's uint8 frames at its own size, (f, h, w, 3), of which NIQE is; `edited` if None.
        """
        a, b, m = (x[::STRIDE] for x in (source, edited, mask))
        rest = (1 - m)[:, None]
        outside = [(x, y) for x, y, area in zip(a * rest, b * rest, rest, strict=True) if area.any()]
        found = {
            "psnr": _mean(psnr(x[None], y[None]) for x, y in outside),
            "mse": _mean(((x - y) ** 2).mean().item() for x, y in outside),
            "ssim": _mean(_padded_ssim(x[None], y[None]) for x, y in outside) if _fits(a, SSIM_WINDOW) else math.nan,
            "inside": share_of_change(source, edited, mask),
            "largest": largest_change(source, edited, 1 - mask) if bool((mask < 1).any()) else math.nan,
        }
        if self.lpips is not None:
            lpips, fits = self.lpips, _fits(a, LEAST_SIDE)
            found["lpips"] = _mean(lpips(x[None], y[None]) for x, y in outside) if fits else math.nan
        if self.dino is not None:
            found["structure"] = _mean(map(self.dino.distance, a, b))
        if self.niqe is not None:
            own = b if saved is None else to_unit(saved[::STRIDE])
            found["niqe"] = _mean(self.niqe(y[None]) for y in own)
        found |= self._clip_scores(b, m, target) | self._motions(source, edited)
        if self.answer is not None:
            found |= {"FiVE-Acc": math.nan} if questions is None else five_accuracy(self.answer, edited, questions)
        return {name: None if math.isnan(value) else value for name, value in found.items()}

    def _clip_scores(self, edited: Tensor, mask: Tensor, target: str) -> dict[str, float]:
        """100 times the similarity to the target prompt, of frames and of frames that are black outside the mask."""
        if self.clip is None:
            return {}
        text, some = self.clip.text(target), mask.flatten(1).any(1)

        def score(frames: Tensor) -> float:
            return _mean((100 * (self.clip.images(frames) @ text)).clamp(min=0).tolist()) if self.clip else math.nan

        area = (edited * mask[:, None])[some]
        return {"clip": score(edited), "clip_edit": score(area) if len(area) else math.nan}

    def _motions(self, source: Tensor, edited: Tensor) -> dict[str, float]:
        trackers = {"motion": self.tracker, "motion_flow": self.flow_tracker}
        return {
            name: motion_fidelity(track(edited), track(source)) if len(source) > 1 else math.nan
            for name, track in trackers.items()
            if track is not None
        }


def load_niqe(parameters: str, device: torch.device | str = "cpu") -> Niqe:
    """NIQE (Mittal et al., 2013) of pyiqa with a .mat file of its parameters, which is NaN for frames of less than 96
    pixels a side and for frames without detail. Raises ImportError if pyiqa is not installed, ValueError for another
    file.
    """
    import pyiqa  # type: ignore[import-not-found, unused-ignore]

    try:
        metric = pyiqa.create_metric("niqe", device=device, pretrained_model_path=parameters)
    except KeyError as error:
        raise ValueError(f"{parameters} has no {error} of NIQE") from error

    @torch.no_grad()
    def niqe(frame: Tensor) -> float:
        if not _fits(frame, NIQE_BLOCK):
            return math.nan
        try:
            return float(metric(frame.to(device)))
        except torch.linalg.LinAlgError:
            return math.nan

    return niqe


def load_squeeze(path: str, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS with SqueezeNet, which FiVE-Bench uses. Raises ValueError for another net."""
    found = Lpips.load(path)
    if found.name != "squeeze":
        raise ValueError(f'{path} has the net "{found.name}"; FiVE-Bench uses "squeeze"')
    return found


def _padded_ssim(a: Tensor, b: Tensor) -> float:
    """SSIM with windows at every pixel, the frames being reflected at their borders, as in torchmetrics."""
    border = 4 * [SSIM_WINDOW // 2]
    return ssim(*(F.pad(x, border, mode="reflect") for x in (a, b)))


def _fits(frames: Tensor, least: int) -> bool:
    return min(frames.shape[-2:]) >= least


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that are finite; NaN if none is."""
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else math.nan
