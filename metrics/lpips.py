"""LPIPS, the learned perceptual distance (Zhang et al., CVPR 2018, arXiv 1801.03924), with AlexNet's or SqueezeNet's
features."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .preservation import weighted_mean

_SHIFT, _SCALE = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
LEAST_SIDE = 32


class _Fire(nn.Module):
    """SqueezeNet's block: a convolution of 1 pixel, then two of 1 and 3 pixels side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def _pool(ceil: bool = False) -> nn.Module:
    return nn.MaxPool2d(3, 2, ceil_mode=ceil)


def _alexnet() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), _pool(), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), _pool(),
        nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
    ]  # fmt: skip


def _squeezenet() -> list[nn.Module]:
    """Version 1.1."""
    fires = [_Fire(*of) for of in ((64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192),
                                   (384, 48, 192), (384, 64, 256), (512, 64, 256))]  # fmt: skip
    first = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), _pool(True)]
    return [*first, *fires[:2], _pool(True), *fires[2:4], _pool(True), *fires[4:]]


_NETS = {
    "alex": (_alexnet, (0, 2, 5, 8, 10, 12), (64, 192, 384, 256, 256)),
    "squeeze": (_squeezenet, (0, 2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512)),
}
"""Layers, where they are cut into slices whose outputs are compared, and the channels of these."""


class Lpips(nn.Module):
    """The distance with the weights of the `lpips` package, version 0.1, net "alex" or "squeeze".

    The weights are not bundled: write them once with
    `safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips_alex.safetensors")`.
    """

    def __init__(self, name: str = "alex") -> None:
        super().__init__()
        layers, cuts, channels = _NETS[name]
        made = list(enumerate(layers()))
        slices = [nn.Sequential(OrderedDict((str(i), layer) for i, layer in made[a:b])) for a, b in pairwise(cuts)]
        self.name = name
        self.net = nn.ModuleDict({f"slice{n}": part for n, part in enumerate(slices, 1)})
        self.weights = nn.ParameterList(torch.zeros(width) for width in channels)

    @classmethod
    def load(cls, path: str | Path) -> Lpips:
        """The net is the file's. Raises FileNotFoundError, or ValueError for a file of other weights."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no LPIPS weights at {path}")
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
        model = cls("squeeze" if any(".squeeze." in name for name in saved) else "alex")
        for i in range(len(model.weights)):
            linear = saved.get(f"lin{i}.model.1.weight", saved.get(f"lins.{i}.model.1.weight"))
            saved |= {} if linear is None else {f"weights.{i}": linear.flatten()}
        missing = [name for name in model.state_dict() if name not in saved]
        if missing:
            raise ValueError(f'{path} has other weights than lpips.LPIPS(net="{model.name}"): {missing[0]} is missing')
        model.load_state_dict(saved, strict=False)
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
        """Each slice's features, normalized at each place."""
        x, found = (2 * frames - 1 - _SHIFT.to(frames)) / _SCALE.to(frames), []
        for part in self.net.values():
            x = part(x)
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found
