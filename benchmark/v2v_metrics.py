"""V2VBench's figures of an edited clip, as its code computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..metrics.clip import ClipScorer
from ..metrics.frame_models import Aesthetic, DinoV2
from ..metrics.viclip import ViClip
from ..video.flow import Estimator


@dataclass(frozen=True)
class V2VMetrics:
    """The models that figures need; a figure whose model is None is left out."""

    aesthetic: Aesthetic | None = None
    clip: ClipScorer | None = None
    dino: DinoV2 | None = None
    pickscore: ClipScorer | None = None
    viclip: ViClip | None = None
    gmflow: Estimator | None = None
    dis: Estimator | None = None

    def measure(self, source: Tensor, edited: Tensor, target: str) -> dict[str, float | None]:
        """The figures of an edit, clips (f, 3, h, w) in 0..1; None where one is undefined, as for a single frame."""
        found: dict[str, float] = {}
        if self.aesthetic is not None:
            found["quality"] = self.aesthetic.scores(edited).mean().item()
        if self.clip is not None:
            found |= {"semantic": consistency(self.clip.pooled(edited)), "text": alignment(self.clip, edited, target)}
        if self.dino is not None:
            found["object"] = consistency(self.dino.pooled(edited))
        if self.pickscore is not None:
            found["pick"] = alignment(self.pickscore, edited, target)
        if self.viclip is not None and self.clip is not None:
            found["video_text"] = self.viclip.similarity(edited, target, self.clip)
        if self.gmflow is not None:
            found["motion"] = motion_alignment(self.gmflow, source, edited)
        if self.dis is not None:
            found["motion_flow"] = motion_alignment(self.dis, source, edited)
        return {name: None if math.isnan(value) else value for name, value in found.items()}


def consistency(features: Tensor) -> float:
    """Mean cosine similarity of the features (f, d) of consecutive frames, each at least 0; NaN for a single frame."""
    return F.cosine_similarity(features[1:], features[:-1], dim=-1).clamp(min=0).mean().item()


def alignment(clip: ClipScorer, frames: Tensor, prompt: str) -> float:
    """Mean similarity of frames (f, 3, h, w) and a prompt, times CLIP's own factor (100 for OpenAI's models)."""
    return clip.scale * (clip.images(frames) @ clip.text(prompt)).mean().item()


def motion_alignment(estimate: Estimator, source: Tensor, edited: Tensor) -> float:
    """Minus the mean distance in pixels of the flows of two clips (f, 3, h, w); NaN for a single frame."""
    flows = [
        (estimate(a, b), estimate(c, d)) for (a, b), (c, d) in zip(pairwise(source), pairwise(edited), strict=True)
    ]
    return -sum((a - b).norm(dim=0).mean().item() for a, b in flows) / len(flows) if flows else math.nan


def load_gmflow(path: str, device: torch.device | str = "cpu") -> Estimator:
    """GMFlow (Xu et al., CVPR 2022, arXiv 2111.13680) of the package ptlflow; V2VBench uses gmflow_sintel-0c07dcb3.pth.

    path: its weights as .safetensors, `safetensors.torch.save_file(torch.load(PTH)["model"], FILE)`. Raises ImportError
    if the package is not installed, ValueError for a file of other weights.
    """
    import ptlflow  # type: ignore[import-not-found, unused-ignore]

    model: Any = ptlflow.get_model("gmflow")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not contain GMFlow: {str(error).splitlines()[0]}") from error
    model = model.to(device).eval()

    @torch.no_grad()
    def estimate(a: Tensor, b: Tensor) -> Tensor:
        pair = torch.stack([a, b]).flip(1)[None]  # ptlflow's channels are BGR
        flow: Tensor = model({"images": pair.to(device)})["flows"][0, 0].float().cpu()
        return flow

    return estimate
