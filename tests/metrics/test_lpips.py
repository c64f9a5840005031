"""LPIPS compared with the `lpips` package, on weights computed by a formula."""

import pytest
import torch
from safetensors.torch import save_file

from fatezero.metrics.lpips import Lpips

SHAPES = {
    "lin0.model.1.weight": (1, 64, 1, 1),
    "lin1.model.1.weight": (1, 192, 1, 1),
    "lin2.model.1.weight": (1, 384, 1, 1),
    "lin3.model.1.weight": (1, 256, 1, 1),
    "lin4.model.1.weight": (1, 256, 1, 1),
    "net.slice1.0.bias": (64,),
    "net.slice1.0.weight": (64, 3, 11, 11),
    "net.slice2.3.bias": (192,),
    "net.slice2.3.weight": (192, 64, 5, 5),
    "net.slice3.6.bias": (384,),
    "net.slice3.6.weight": (384, 192, 3, 3),
    "net.slice4.8.bias": (256,),
    "net.slice4.8.weight": (256, 384, 3, 3),
    "net.slice5.10.bias": (256,),
    "net.slice5.10.weight": (256, 256, 3, 3),
}


def _weights() -> dict[str, torch.Tensor]:
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        wave = torch.sin(1 + i + 0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).view(shape)
        if name.startswith("lin"):
            made[name] = (0.1 * wave.abs()).float()
        else:
            made[name] = (wave * ((2 / wave[0].numel()) ** 0.5 if wave.ndim > 1 else 0.1)).float()
    return made


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(_weights(), path)
    return Lpips.load(path)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    a = torch.stack([0.5 + 0.4 * torch.sin(x / 3), 0.5 + 0.4 * torch.sin(y / 4), (x + y) / 90])[None]
    return a, (a + 0.1 * torch.sin(x * y)).clamp(0, 1)


def test_it_equals_the_package(lpips, pair):
    """The figures are lpips 0.1.4's, normalize=True, and with spatial=True over the upper 20 rows."""
    upper = torch.zeros(1, 48, 40)
    upper[:, :20] = 1
    assert lpips(*pair) == pytest.approx(0.0402456559240818, rel=1e-4)
    assert lpips(*pair, upper) == pytest.approx(0.04996558666229248, rel=1e-4)


def test_equal_frames_score_zero_and_a_clip_the_mean_of_its_frames(lpips, pair):
    a, b = pair
    assert lpips(a, a) == 0
    assert lpips(torch.cat([a, a]), torch.cat([a, b])) == pytest.approx(lpips(a, b) / 2, rel=1e-5)


def test_bad_input(lpips, pair, tmp_path):
    a, b = pair
    with pytest.raises(ValueError, match="32 pixels"):
        lpips(a[..., :20], b[..., :20])
    with pytest.raises(ValueError, match="differ in shape"):
        lpips(a, b[..., :-1])
    with pytest.raises(FileNotFoundError, match="no LPIPS weights"):
        Lpips.load(tmp_path / "none.safetensors")
    save_file({"net.slice1.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"net.slice1.0.bias is missing"):
        Lpips.load(tmp_path / "other.safetensors")
