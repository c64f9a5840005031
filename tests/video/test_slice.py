"""x-t slices."""

import pytest
import torch
from PIL import Image

from fatezero.video.maps import write_slice
from fatezero.video.slice import moving_row, slice_picture, slices, xt_slice


@pytest.fixture
def clip():
    return torch.arange(3 * 4 * 600 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(3, 4, 600, 3)


def test_a_slice_is_one_row_of_every_frame(clip):
    by_hand = torch.stack([clip[t, 2] for t in range(3)])
    assert torch.equal(xt_slice(clip, 2), by_hand)
    assert torch.equal(xt_slice(clip, 2, 5)[5:10], by_hand[1].expand(5, -1, -1))
    with pytest.raises(ValueError, match="0 to 3"):
        xt_slice(clip, 4)


def test_slices_of_both_clips(clip):
    other = 255 - clip
    shown = slices((clip, other), 1, stretch=2, labels=("", ""))
    assert torch.equal(shown, torch.cat([xt_slice(clip, 1, 2), xt_slice(other, 1, 2)]))
    small = slices((clip[:, :, :100], other[:, :, :100]), 1, labels=("", ""))
    assert small.shape == (2 * 3 * 83, 500, 3)
    assert torch.equal(small[::83, ::5], torch.cat([clip[:, 1, :100], other[:, 1, :100]]))
    with pytest.raises(ValueError, match="3 frames of 600x4 and 2 frames"):
        slices((clip, clip[:2]), 0)


def test_the_row_with_most_motion_is_chosen(clip, tmp_path):
    still = torch.zeros_like(clip)
    assert moving_row(still) == 2, "the middle"
    moving = still.clone()
    moving[1, 3, 7] = 40
    assert moving_row(still, moving) == 3
    write_slice(tmp_path / "s.png", still, moving)
    picture = torch.frombuffer(bytearray(Image.open(tmp_path / "s.png").tobytes()), dtype=torch.uint8)
    assert torch.equal(picture, slice_picture(still, moving, 3).flatten())
