import pytest
import torch
import torch.nn.functional as F

from fatezero.benchmark.measure import visible_pixels
from fatezero.demo.scenes import render
from fatezero.demo.show import FRAMES, MOTION, SCENE
from fatezero.metrics.evaluate import evaluate
from fatezero.metrics.temporal import warp_error
from fatezero.video.flow import flow_estimator


def test_dis_finds_a_translation():
    torch.manual_seed(0)
    wide = F.interpolate(torch.rand(1, 3, 24, 36), size=(96, 144), mode="bicubic")[0].clamp(0, 1)
    name, estimate = flow_estimator("dis")
    flow = estimate(wide[..., 4:132], wide[..., 1:129])
    assert name == "dis"
    assert flow.shape == (2, 96, 128)
    inner = flow[:, 12:-12, 12:-12]
    assert (inner[0] - 3).abs().mean() < 0.2
    assert inner[1].abs().mean() < 0.2


def test_dis_is_close_to_the_demo_worlds_true_flow():
    clip = render(SCENE, MOTION, FRAMES)
    _, estimate = flow_estimator("dis")
    flow = torch.stack([estimate(a, b) for a, b in zip(clip.frames[:-1], clip.frames[1:], strict=True)])
    difference = (flow - clip.flow).norm(dim=1)[visible_pixels(clip)]
    assert difference.median() < 0.35, "pixels"
    known = warp_error(clip.frames, clip.flow, visible_pixels(clip))
    assert warp_error(clip.frames, flow, visible_pixels(clip)) < 4 * known


def test_both_flows_distinguish_a_steady_clip_from_a_flickering_one():
    clip = render(SCENE, MOTION, FRAMES)
    flicker = (clip.frames + 0.1 * torch.tensor([1.0, -1.0]).repeat(4).view(-1, 1, 1, 1)).clamp(0, 1)
    _, estimate = flow_estimator("dis")
    for flow in (estimate, (clip.flow, _backward(clip))):
        figures = evaluate(clip.frames, flicker, flow=flow).figures
        assert figures["warp error"].value > 10 * figures["warp error of the source"].value
        assert len(figures["warp error"].by_frame) == FRAMES - 1
        assert 0.5 < figures["pixels not occluded"].value <= 1


def _backward(clip):
    from fatezero.video.motion import warp

    return -warp(clip.flow, -clip.flow)


def test_names_and_missing_libraries(monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, raft, dis"):
        flow_estimator("farneback")
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ImportError, match=r"opencv-python-headless.*flow 'none'"):
        flow_estimator("dis")
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ImportError, match="torchvision"):
        flow_estimator("raft")
