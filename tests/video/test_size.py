import pytest
import torch

from fatezero.video.sheet import contact_sheet, enlarge, mask_frames
from fatezero.video.size import check_size, crop, fit_size, resize_to_fill, to_bytes, to_unit


def test_crop_cuts_the_named_sides():
    frames = torch.arange(6 * 8).view(1, 6, 8, 1).expand(-1, -1, -1, 3)
    assert torch.equal(crop(frames, left=1, top=2, right=3, bottom=0), frames[:, 2:6, 1:5])
    with pytest.raises(ValueError, match="does not fit 8x6"):
        crop(frames, left=4, right=4)


@pytest.mark.parametrize(
    ("size", "short", "multiple", "expected"),
    [((1280, 720), 512, 8, (912, 512)), ((720, 1280), 512, 8, (512, 912)), ((65, 63), 64, 4, (68, 64))],
)
def test_fitting_keeps_the_aspect_ratio_in_multiples(size, short, multiple, expected):
    assert fit_size(*size, short, multiple) == expected


def test_sizes_that_are_not_multiples_are_refused_with_the_nearest():
    check_size(64, 32, 8)
    with pytest.raises(ValueError, match="65x32.*multiples of 8.*64x32"):
        check_size(65, 32, 8)
    with pytest.raises(ValueError, match="multiples of 8"):
        check_size(0, 32, 8)


def test_resizing_covers_and_crops_evenly():
    frames = torch.zeros(2, 20, 40, 3, dtype=torch.uint8)
    frames[:, :, 18:22] = 255
    small = resize_to_fill(frames, 10, 10)
    assert small.shape == (2, 10, 10, 3)
    assert small[0, 5, :, 0].argmax() in (4, 5), "the middle is preserved"
    assert resize_to_fill(frames, 40, 20) is frames


def test_bytes_and_unit_range_are_inverses():
    frames = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    assert torch.equal(to_bytes(to_unit(frames)), frames)


def test_a_contact_sheet_shows_every_frame_of_every_row():
    red = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    red[..., 0] = 255
    page = contact_sheet([("source", red), ("mask", mask_frames(torch.ones(3, 16, 16)))], "title", tile=32)
    reds = sum(count for count, colour in page.getcolors(1 << 20) if colour == (255, 0, 0))
    assert reds == 3 * 32 * 32
    assert enlarge(red, 4).shape == (3, 64, 64, 3)
