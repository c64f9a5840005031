"""FiVE-Bench's figures, compared with torchmetrics' and with their formulas."""

import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_vlm import WORDS, write_vlm
from transformers import ViTConfig, ViTModel

from fatezero.benchmark.five_metrics import FiveMetrics
from fatezero.metrics.lpips import Lpips
from fatezero.metrics.motion import flow_tracker, load_cotracker, motion_fidelity
from fatezero.metrics.structure import Dino, _scaled, structure_distance
from fatezero.metrics.vlm import Questions, five_accuracy, load_vlm


@pytest.fixture(scope="module")
def pair():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    a = torch.stack([0.5 + 0.4 * torch.sin(x / 3), 0.5 + 0.4 * torch.sin(y / 4), (x + y) / 90])[None]
    return a, (a + 0.1 * torch.sin(x * y)).clamp(0, 1)


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    """LPIPS with weights computed by a formula."""
    shapes = {name: value.shape for name, value in Lpips("squeeze").state_dict().items()}
    shapes |= {f"lin{i}.model.1.weight": (1, *shapes.pop(f"weights.{i}"), 1, 1) for i in range(7)}
    made = {}
    for i, (name, shape) in enumerate(sorted(shapes.items()), 1):
        wave = torch.sin(i + 0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).view(shape)
        lin = name.startswith("lin")
        made[name] = (
            0.1 * wave.abs() if lin else wave * ((2 / wave[0].numel()) ** 0.5 if wave.ndim > 1 else 0.1)
        ).float()
    path = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_file(made, path)
    return Lpips.load(path)


def test_preservation_equals_torchmetrics(pair, squeeze):
    """The figures are torchmetrics 1.9's of frames that are black in the edited area, here from row 20 on."""
    a, b = pair
    mask = torch.ones(1, 48, 40)
    mask[:, :20] = 0
    for area, ssim, psnr, lpips in (
        (torch.zeros(1, 48, 40), 0.622275173664093, 23.289688110351562, 0.0071889180690050125),
        (mask, 0.8553637266159058, 27.06208038330078, 0.004919076804071665),
    ):
        found = FiveMetrics(lpips=squeeze).measure(a, b, area, "a star")
        assert found["ssim"] == pytest.approx(ssim, abs=1e-5)
        assert found["psnr"] == pytest.approx(psnr, abs=1e-4)
        assert found["lpips"] == pytest.approx(lpips, rel=1e-4)
        assert found["mse"] == pytest.approx(10 ** (-psnr / 10), rel=1e-4)


def test_frames_that_are_all_edited_have_no_preservation(pair):
    a, b = (x.repeat(9, 1, 1, 1) for x in pair)
    mask = torch.ones(9, 48, 40)
    none = FiveMetrics().measure(a, b, mask, "a star")
    assert none["psnr"] is None and none["ssim"] is None and none["mse"] is None and none["largest"] is None
    assert none["inside"] == 1
    mask[8, :20] = 0
    one = FiveMetrics().measure(a, b, mask, "a star")
    assert one["psnr"] == pytest.approx(27.06208, abs=1e-4), "the mean over the frames 0, 8, ... that have such an area"


def test_frames_that_are_kept_bit_for_bit_have_no_psnr(pair):
    """It would be infinite, and so would every mean with it."""
    a, b = (x.repeat(9, 1, 1, 1) for x in pair)
    mask = torch.zeros(9, 48, 40)
    mask[:, 20:] = 1
    b[8, :, :20] = a[8, :, :20]
    found = FiveMetrics().measure(a, b, mask, "a star")
    first = FiveMetrics().measure(a[:1], b[:1], mask[:1], "a star")
    assert found["psnr"] == pytest.approx(first["psnr"])
    assert found["mse"] == pytest.approx(first["mse"] / 2), "the other figures have these frames"
    assert FiveMetrics().measure(a, a, mask, "a star")["psnr"] is None


def test_niqe_is_of_the_edit_as_it_was_saved(pair):
    a, b = (x.repeat(9, 1, 1, 1) for x in pair)
    saved = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 24, 20, 3)
    metrics = FiveMetrics(niqe=lambda frame: 255 * frame.mean().item() + frame.shape[-1])
    found = metrics.measure(a, b, torch.zeros(9, 48, 40), "a star", saved=saved)
    assert found["niqe"] == pytest.approx((0 + 8) / 2 + 20, rel=1e-5)


def test_the_structure_distance_compares_the_keys_of_the_last_layer(pair):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    dino, (a, b) = Dino(model), (x[0] for x in pair)
    keys = dino.keys(a)
    assert keys.shape == (1 + (268 // 8) * (224 // 8), 12)
    pixels = torch.nn.functional.interpolate(255 * a[None], size=(268, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    states = model((pixels - mean) / std, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    last = model.layers[-1]
    assert torch.allclose(keys, last.attention.k_proj(last.layernorm_before(states[-2]))[0], atol=1e-4)
    other = dino.keys(b)
    cosines = [torch.nn.functional.cosine_similarity(k[:, None], k[None], dim=-1) for k in (keys, other)]
    assert dino.distance(a, b) == pytest.approx(((cosines[0] - cosines[1]) ** 2).mean().item(), rel=1e-4)
    assert dino.distance(a, b) > 0 == dino.distance(a, a)
    assert structure_distance(keys, 3 * keys) == pytest.approx(0, abs=1e-9), "lengths do not matter"


@pytest.mark.parametrize(
    ("size", "scaled"), [((480, 832), (224, 388)), ((100, 300), (160, 480)), ((300, 100), (480, 160))]
)
def test_frames_are_scaled_for_dino_as_the_authors_scale_them(size, scaled):
    assert _scaled(*size) == scaled


def test_motion_fidelity_is_the_mean_of_the_largest_similarities():
    right, down = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    steps = torch.arange(5.0)[:, None]
    source = torch.stack([steps * right, 3 + steps * right, steps * down])
    edited = torch.stack([2 * steps * right, steps * right, -steps * right])
    # The similarity to the track of the same start is lowered by 1: the first finds the second (1), the second the
    # first (1); the third finds at most the one at right angles, its own, 0 - 1, and the others, -1.
    assert motion_fidelity(edited, source) == pytest.approx((1 + 1 - 1) / 3)
    still = torch.zeros(3, 5, 2)
    assert math.isfinite(motion_fidelity(still, source)), "a point that stays has no direction, not NaN"
    with pytest.raises(ValueError, match="2 frames"):
        motion_fidelity(still[:, :1], source[:, :1])


def test_tracks_follow_the_flow():
    flow = torch.tensor([2.0, -1.0]).view(2, 1, 1).expand(2, 32, 64)
    tracks = flow_tracker(lambda a, b: flow)(torch.zeros(4, 3, 32, 64))
    assert tracks.shape == (55 * 55, 4, 2)
    assert torch.allclose(tracks[:, 3] - tracks[:, 0], torch.tensor([6.0, -3.0]), atol=1e-4)
    assert tracks[0, 0].tolist() == [1, 1] and tracks[-1, 0].tolist() == [63, 31]


COTRACKER = """
import torch

class CoTrackerPredictor(torch.nn.Module):
    def __init__(self, checkpoint):
        super().__init__()
        self.start = torch.nn.Parameter(torch.load(checkpoint, weights_only=True))

    def forward(self, video, grid_size):
        # The grid follows the centre of what is brighter than half of 255; visibilities are not used.
        assert video.shape[0] == 1
        bright = (video[0].mean(1) > 127).float()
        y, x = (torch.arange(side).float() for side in bright.shape[1:])
        total = bright.sum((1, 2))
        centre = torch.stack([(bright * x).sum((1, 2)) / total, (bright * y[:, None]).sum((1, 2)) / total], -1)
        grid = self.start + torch.cartesian_prod(*(torch.arange(grid_size).float(),) * 2)
        return (grid[None] + (centre - centre[0])[:, None])[None], None
"""


def test_a_tracker_of_cotracker_s_interface_gives_tracks_by_point(tmp_path, monkeypatch):
    """CoTracker's weights are not available here: a small predictor with its signature, frames and tracks."""
    (tmp_path / "cotracker").mkdir()
    (tmp_path / "cotracker" / "predictor.py").write_text(COTRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(torch.ones(2), tmp_path / "scaled_offline.pth")
    track = load_cotracker(str(tmp_path / "scaled_offline.pth"))
    right, down = torch.zeros(2, 4, 3, 16, 16)
    for f in range(4):
        right[f, :, 4:8, 2 * f : 2 * f + 4] = 1
        down[f, :, 2 * f : 2 * f + 4, 4:8] = 1
    tracks = track(right)
    assert tracks.shape == (55 * 55, 4, 2) and tracks[0, 0].tolist() == [1, 1]
    assert torch.allclose(tracks.diff(dim=1), torch.tensor([2.0, 0.0]), atol=1e-4)
    assert motion_fidelity(track(0.8 * right), tracks) == pytest.approx(1, abs=1e-4)
    assert motion_fidelity(track(down), tracks) == pytest.approx(0, abs=1e-4)


QUESTIONS = Questions("Is it a square?", "Is it a circle?", "What is it? a) square b) circle")


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [
        (("No.", "Yes", "b) circle"), (1, 1, 1, 1, 1)),
        (("yes", "YES", "B"), (0, 1, 1, 0, 0.5)),
        (("no", "yes", "a) square"), (1, 0, 1, 0, 0.5)),
        (("yes", "no", "a"), (0, 0, 0, 0, 0)),
    ],
)
def test_five_accuracy_is_the_mean_of_four(answers, accuracy):
    shown = []

    def answer(frames, question):
        shown.append(frames[:, 0, 0, 0].tolist())
        return next(text for key, text in zip(("square?", "circle?", "What"), answers, strict=True) if key in question)

    frames = torch.arange(41.0).view(41, 1, 1, 1).expand(-1, 3, 8, 8)
    found = five_accuracy(answer, frames, QUESTIONS)
    assert tuple(found.values()) == accuracy
    assert shown[0] == list(range(2, 41, 4)), "the frames that the authors' code shows"


def test_an_addition_has_no_question_of_the_source():
    def answer(frames, question):
        return "yes" if "circle?" in question else "a"

    assert five_accuracy(answer, torch.zeros(3, 3, 8, 8), Questions("", QUESTIONS.target, QUESTIONS.choice))["YN"] == 1


def test_a_vision_language_model_answers_about_the_frames(tmp_path):
    answer = load_vlm(str(write_vlm(tmp_path / "vlm")), local_files_only=True)
    dark, light = torch.zeros(3, 3, 24, 32), torch.ones(3, 3, 24, 32)
    texts = [answer(frames, "a square or b circle") for frames in (dark, light)]
    assert all(set(text.split()) <= set(WORDS) for text in texts), "only what it writes, not the question"
    assert texts == [answer(frames, "a square or b circle") for frames in (dark, light)]
    assert set(five_accuracy(answer, dark, QUESTIONS)) == {"YN", "MC", "union", "intersection", "FiVE-Acc"}
    with pytest.raises(ValueError, match="no chat template"):
        load_vlm(str(write_vlm(tmp_path / "mute", chats=False)), local_files_only=True)
