"""Estimators of optical flow: torchvision's RAFT and OpenCV's DIS."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from ..imports import F, no_grad, np, torch

if TYPE_CHECKING:
    from torch import Tensor


FlowName = Literal["auto", "raft", "dis"]
Estimator: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""Flow (2, h, w) in pixels, (dx, dy), from one frame (3, h, w) in 0..1 to another."""

_LEAST_SIDE = {"dis": 192, "raft": 128}
"""Smaller frames are enlarged first: both estimators work at an eighth of the size and less."""


def flow_estimator(name: FlowName = "auto", device: torch.device | str = "cpu") -> tuple[str, Estimator]:
    """An estimator and its name.

    "raft": torchvision's RAFT (arXiv 2003.12039), whose weights are downloaded if missing. "dis": OpenCV's DIS (arXiv
    1603.03590). "auto": RAFT if its weights are present, else DIS. Raises ValueError for another name, ImportError if
    the library is not installed.
    """
    if name not in get_args(FlowName):
        raise ValueError(f"flow is {name!r}; it must be one of {', '.join(get_args(FlowName))}")
    if name == "auto":
        name = "raft" if _raft_weights() is not None else "dis"
    if name == "raft":
        model = _raft(str(device))
        return name, lambda a, b: _at_least(a, b, "raft", lambda x, y: _run_raft(model, x, y, device))
    cv2 = _opencv()
    return name, lambda a, b: _at_least(a, b, "dis", lambda x, y: _run_dis(cv2, x, y))


def dis_flow() -> Estimator | None:
    """OpenCV's DIS; None if OpenCV is not installed."""
    return flow_estimator("dis")[1] if importlib.util.find_spec("cv2") else None


def _at_least(a: Tensor, b: Tensor, name: str, estimate: Estimator) -> Tensor:
    """Flow estimated at a size large enough and a multiple of 8, resized to the frames' own."""
    height, width = a.shape[-2:]
    times = max(1.0, _LEAST_SIDE[name] / min(height, width))
    size = [max(8, round(side * times / 8) * 8) for side in (height, width)]
    if size != [height, width]:
        a, b = (F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0] for x in (a, b))
    flow = estimate(a, b)
    if size != [height, width]:
        flow = F.interpolate(flow[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        flow = flow * torch.tensor([width / size[1], height / size[0]]).view(2, 1, 1).to(flow)
    return flow


# --- DIS --------------------------------------------------------------------------------


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "flow 'dis' needs OpenCV: pip install opencv-python-headless (or another OpenCV package), or use flow "
            "'none' to skip the warp error"
        ) from error
    return cv2


def _run_dis(cv2: Any, a: Tensor, b: Tensor) -> Tensor:
    def grey(frame: Tensor) -> np.ndarray:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return ((frame.cpu().float() * weights).sum(0).clamp(0, 1) * 255).round().byte().numpy()

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(grey(a), grey(b), None)
    return torch.from_numpy(flow).permute(2, 0, 1)


# --- RAFT -------------------------------------------------------------------------------


def _raft_weights() -> Path | None:
    """RAFT's weights on this machine; None if they or torchvision are missing."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights
    except (ImportError, RuntimeError):  # a torchvision built for another torch
        return None
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(Raft_Large_Weights.DEFAULT.url).name
    return path if path.is_file() else None


@lru_cache(maxsize=1)
def _raft(device: str) -> torch.nn.Module:
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    except ImportError as error:
        raise ImportError("flow 'raft' needs torchvision: install it, or use flow 'dis'") from error
    return raft_large(weights=Raft_Large_Weights.DEFAULT, progress=False).to(device).eval()


@no_grad
def _run_raft(model: torch.nn.Module, a: Tensor, b: Tensor, device: torch.device | str) -> Tensor:
    first, second = (2 * x[None].float().to(device) - 1 for x in (a, b))
    return model(first, second)[-1][0].cpu()
