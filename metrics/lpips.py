"""LPIPS, the learned perceptual distance (Zhang et al., CVPR 2018, arXiv 1801.03924), with AlexNet features."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .preservation import weighted_mean

_LAYERS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
"""AlexNet's convolutions: channels in and out, kernel, stride, padding; pooling follows the first two."""
_NAMES = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
_SHIFT, _SCALE = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
LEAST_SIDE = 32


class Lpips(nn.Module):
    """The distance with the weights of the `lpips` package, version 0.1, net "alex".

    The weights are not bundled: write them once with
    `safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips_alex.safetensors")`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleList(nn.Conv2d(*layer) for layer in _LAYERS)
        self.weights = nn.ParameterList(torch.zeros(layer[1]) for layer in _LAYERS)

    @classmethod
    def load(cls, path: str | Path) -> Lpips:
        """Raises FileNotFoundError, or ValueError for a file of other weights."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no LPIPS weights at {path}")
        try:
            saved, own = load_file(path), {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
        for i, name in enumerate(_NAMES):
            for part in ("weight", "bias"):
                own[f"features.{i}.{part}"] = saved.get(f"net.{name}.{part}")
            linear = saved.get(f"lin{i}.model.1.weight", saved.get(f"lins.{i}.model.1.weight"))
            own[f"weights.{i}"] = None if linear is None else linear.flatten()
        missing = [name for name, tensor in own.items() if tensor is None]
        if missing:
            raise ValueError(f'{path} has other weights than lpips.LPIPS(net="alex"): {missing[0]} is missing')
        model = cls()
        model.load_state_dict(own, strict=False)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
        """Distance of frames (f, 3, h, w) in 0..1, 0 if equal; where: (f, h, w), weights of pixels.

        Raises ValueError for shapes that differ, or frames too small for the network.
        """
        if a.shape != b.shape:
            raise ValueError(f"frames differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
        if min(a.shape[-2:]) < LEAST_SIDE:
            raise ValueError(f"LPIPS needs frames of at least {LEAST_SIDE} pixels a side, not {tuple(a.shape[-2:])}")
        pairs = list(zip(a.split(1), b.split(1), strict=True))
        if where is None:
            return sum(layer.mean().item() for x, y in pairs for layer in self._maps(x, y)) / len(pairs)
        return weighted_mean(torch.cat([self._everywhere(self._maps(x, y), a.shape[-2:]) for x, y in pairs]), where)

    def _maps(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The distance at every place of each layer: (1, 1, y, x)."""
        layers = zip(self._units(a), self._units(b), self.weights, strict=True)
        return [(weight.view(-1, 1, 1) * (x - y) ** 2).sum(1, keepdim=True) for x, y, weight in layers]

    @staticmethod
    def _everywhere(layers: list[Tensor], size: torch.Size) -> Tensor:
        """The layers' distances on the picture's own grid, summed."""
        return torch.stack([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in layers]).sum(0)

    def _units(self, frames: Tensor) -> list[Tensor]:
        """Each layer's features, normalized at each place."""
        x, found = (2 * frames - 1 - _SHIFT.to(frames)) / _SCALE.to(frames), []
        for i, layer in enumerate(self.features):
            x = F.relu(layer(x))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
            if i < 2:
                x = F.max_pool2d(x, 3, stride=2)
        return found
