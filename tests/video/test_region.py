"""A window around a mask: it covers the mask, moves without jitter, and is laid back exactly."""

import numpy as np
import pytest
import torch

from fatezero.video.region import Region, region_of, searched_region


def moving(at, frames=40, size=(200, 300), side=20):
    masks = torch.zeros(frames, *size)
    for i in range(frames):
        x, y = at(i)
        masks[i, int(y) : int(y) + side, int(x) : int(x) + side] = 1
    return masks


RANDOM = np.random.default_rng(0)
PATHS = {
    "still": (lambda i: (100, 50), 0), "jitter": (lambda i: (100 + RANDOM.integers(-3, 4), 50), 1),
    "straight": (lambda i: (10 + 6 * i, 50), 1), "sine": (lambda i: (120 + 80 * np.sin(i / 6), 80), 4),
    "straight with jitter": (lambda i: (20 + 6 * i + RANDOM.integers(-3, 4), 20 + 3 * i), 1),
    "at the rim": (lambda i: (0, 180), 0), "fast": (lambda i: (7 * i % 280, 50), 600),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_window_covers_the_mask_without_jitter(name):
    at, most = PATHS[name]
    masks = moving(at)
    region = region_of(masks)
    width, height = region.size
    corners = np.array(region.corners)
    assert (corners >= 0).all() and (corners + np.array(region.size) <= [300, 200]).all()
    assert [float(cut.sum()) for cut in region.cut(masks)] == [float(mask.sum()) for mask in masks]
    assert np.abs(np.diff(corners, 2, axis=0)).max() <= most
    assert 20 < width <= 40 and 20 < height <= 40


def test_a_search_goes_on_in_the_window_that_it_found():
    true, looked = moving(lambda i: (100 + 2 * i, 50)), []

    def search(region):  # what is found is coarser the larger the window is
        looked.append(region.size)
        coarse = region.size[0] // 15
        grown = torch.nn.functional.max_pool2d(true[:, None], 2 * coarse + 1, 1, coarse)[:, 0]
        yield from region.cut(grown)

    region = searched_region(search, (300, 200), 40)
    assert looked[0] == (300, 200) and looked[1][0] < 150 and region.size[0] < looked[1][0] and len(looked) == 2
    assert [float(cut.sum()) for cut in region.cut(true)] == [400.0] * 40
    whole = searched_region(lambda region: torch.ones(40, 200, 300), (300, 200), 40)
    assert whole == Region((300, 200), ((0, 0),) * 40)
    with pytest.raises(ValueError, match="empty"):
        searched_region(lambda region: torch.zeros(40, 200, 300), (300, 200), 40)


def test_frames_without_an_object_follow_the_others():
    masks = moving(lambda i: (10 + 6 * i, 50))
    masks[10:20] = 0
    corners = np.array(region_of(masks).corners)
    assert np.abs(np.diff(corners, 2, axis=0)).max() <= 1
    with pytest.raises(ValueError, match="empty"):
        region_of(torch.zeros(3, 20, 20))


def test_masks_of_ones_one_pixel_and_an_aspect():
    assert region_of(torch.ones(2, 30, 50)).size == (50, 30)
    one = torch.zeros(1, 100, 100)
    one[0, 99, 0] = 1
    region = region_of(one)
    assert region.size == (16, 16) and region.corners == ((0, 84),)
    wide = region_of(moving(lambda i: (100, 50), frames=2), aspect=16 / 9).size
    assert wide[0] / wide[1] == pytest.approx(16 / 9, rel=0.1)


def test_stitched_frames_are_the_sources_outside_the_window():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(0, 256, (3, 90, 120, 3), dtype=torch.uint8, generator=generator)
    region = Region((40, 30), ((10, 20), (11, 21), (80, 60)))
    edits = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    results = torch.stack(list(region.stitched(sources, edits, torch.ones(3, 4, 4), 8)))
    changed = (results != sources).any(-1)
    for i, (left, top) in enumerate(region.corners):
        outside = torch.ones(90, 120, dtype=torch.bool)
        outside[top : top + 30, left : left + 40] = False
        assert not changed[i][outside].any()
        assert changed[i][top + 10 : top + 20, left + 10 : left + 30].float().mean() > 0.95
        first = (results[i].int() - sources[i]).abs()[top, left + 5 : left + 35].float().mean()
        assert first < 25  # faded at sides inside the frame
    assert (results[2, 89, 90:110] == 0).float().mean() > 0.9  # but not at the frame's own side
