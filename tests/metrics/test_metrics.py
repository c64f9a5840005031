import math
import mmap

import pytest
import torch

from fatezero.metrics.memory import PeakMemory
from fatezero.metrics.preservation import changed_pixels, intersection_over_union, psnr, ssim
from fatezero.metrics.temporal import frame_accuracy, temporal_consistency, warp_error
from fatezero.video.motion import inside, visible, warp


def test_psnr_of_known_errors():
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 0.1) == pytest.approx(20)
    half = torch.zeros(2, 4, 4)
    half[:, :2] = 1
    b = a.clone()
    b[:, :, 2:] = 1.0
    assert psnr(a, b, half) == math.inf, "pixels outside are ignored"
    assert psnr(a, b, 1 - half) == pytest.approx(0)


def test_psnr_refuses_clips_it_cannot_compare():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="no pixel"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))


def _cameras() -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    a = torch.stack([0.5 + 0.4 * torch.sin(x / 3), 0.5 + 0.4 * torch.sin(y / 4), (x + y) / 60])[None].double()
    return a, (a + 0.1 * torch.sin(x * y)).clamp(0, 1)


def test_ssim_equals_scikit_image():
    """The figure is scikit-image 0.26's with gaussian_weights=True, sigma=1.5, use_sample_covariance=False."""
    a, b = _cameras()
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, b) == pytest.approx(0.6579118320080287, abs=1e-9)


def test_ssim_uses_only_the_mask():
    a, b = _cameras()
    b[..., :15] = a[..., :15]
    left = torch.zeros(1, 24, 30)
    left[..., :10] = 1  # windows extend five pixels further
    assert ssim(a, b, left) == pytest.approx(1)
    assert ssim(a, b, 1 - left) < 0.97
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[..., :10], b[..., :10])


def test_changed_pixels_are_those_that_differ():
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[1, :, 2:6, 2:6] = 0.9
    changed = changed_pixels(a, b)
    assert not changed[0].any()
    assert changed[1, 3:5, 3:5].all() and not changed[1, 0].any()


def test_intersection_over_union():
    a = torch.tensor([1, 1, 0, 0]).bool()
    assert intersection_over_union(a, a) == 1
    assert intersection_over_union(a, ~a) == 0
    assert intersection_over_union(a, torch.tensor([1, 0, 0, 0]).bool()) == 0.5
    assert intersection_over_union(a & ~a, a & ~a) == 1


def test_a_still_clip_has_zero_warp_error():
    frames = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    assert warp_error(frames, torch.zeros(3, 2, 8, 8), torch.ones(3, 8, 8, dtype=torch.bool)) < 1e-12


def test_a_translation_with_its_flow_has_zero_error_away_from_the_border():
    wide = torch.rand(1, 3, 8, 20)
    frames = torch.cat([wide[..., 3 - t : 15 - t] for t in range(3)])
    flow = torch.zeros(2, 2, 8, 12)
    flow[:, 0] = 1.0
    assert warp_error(frames, flow, inside(flow)) < 1e-10
    assert warp_error(frames, torch.zeros_like(flow), inside(flow)) > 1e-2


def test_everything_occluded_is_undefined():
    assert math.isnan(warp_error(torch.rand(2, 3, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4).bool()))


def test_occlusion_by_forward_and_backward_flow():
    forward = torch.zeros(1, 2, 8, 12)
    forward[:, 0] = 2.0
    mask = visible(forward, -forward)
    assert mask[0, :, :9].all()
    assert not mask[0, :, 10:].any(), "moves out of the picture"
    assert not visible(forward, forward)[0, :, :9].any(), "the flows contradict"


def test_warping_by_the_demo_worlds_flow_follows_the_picture():
    from fatezero.benchmark.measure import visible_pixels
    from fatezero.demo.scenes import render
    from fatezero.demo.show import FRAMES, MOTION, SCENE

    clip = render(SCENE, MOTION, FRAMES)
    mask = visible_pixels(clip)
    assert mask.float().mean() > 0.85
    assert warp_error(clip.frames, clip.flow, mask) < 5e-4
    assert warp_error(clip.frames, 0 * clip.flow, mask) > 10 * warp_error(clip.frames, clip.flow, mask)
    assert warp(clip.frames[1:], clip.flow).shape == clip.frames[1:].shape


def test_clip_scores():
    still = torch.ones(4, 5)
    assert temporal_consistency(still) == pytest.approx(1)
    assert temporal_consistency(torch.eye(3)) == pytest.approx(0)
    assert temporal_consistency(torch.ones(1, 5)) == 1
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert frame_accuracy(frames, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(2 / 3)


def test_peak_memory_counts_live_tensors():
    with PeakMemory(torch.device("cpu")) as small:
        pass
    with PeakMemory(torch.device("cpu")) as large:
        # Pages of its own: a tensor may reuse memory that the process has freed but not returned.
        fresh = mmap.mmap(-1, 400_000_000)
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
    fresh.close()
    assert large.bytes - small.bytes > 300e6
