"""Paths of objects: parsing, positions, and pixel coverage."""

import pytest
import torch

from fatezero.methods.layout import Path, Stop, named_path

PATH = Path.parse("0:0.25,0.5,0.5; 4:0.75,0.5,0.25,0.5")


def test_a_path_is_linear_between_stops_and_constant_outside():
    assert PATH.at(0) == Stop(0, 0.25, 0.5, 0.5, 0.5)
    middle = PATH.at(2)
    assert (middle.x, middle.y, middle.width, middle.height) == (0.5, 0.5, 0.375, 0.5)
    assert PATH.at(9) == Stop(4, 0.75, 0.5, 0.25, 0.5)
    late = Path.parse("3:0.5,0.5,0.2")
    assert late.at(0) == late.at(7) == Stop(3, 0.5, 0.5, 0.2, 0.2)


def test_a_box_covers_pixels_by_area():
    mask = PATH.mask(5, 8, 8)
    assert mask.shape == (5, 8, 8)
    assert torch.equal(
        mask[0], torch.tensor([0, 0, 1, 1, 1, 1, 0, 0.0])[:, None] * torch.tensor([1, 1, 1, 1, 0, 0, 0, 0.0])
    )
    assert mask.sum((1, 2)).tolist() == pytest.approx([64 * w * 0.5 for w in (0.5, 0.4375, 0.375, 0.3125, 0.25)])
    outside = Path.parse("0:0,0.5,0.5").mask(1, 8, 8)
    assert outside.sum() == pytest.approx(8, abs=1e-5), "half of it is outside the picture"


def test_an_ellipse_covers_its_area():
    mask = Path.parse("0:0.5,0.5,0.5,0.75", "ellipse").mask(1, 64, 64)
    assert mask.sum().item() == pytest.approx(torch.pi * 16 * 24, rel=5e-3)
    assert mask[0, 32, 32] == 1 and mask[0, 0, 0] == 0 and 0 < mask[0, 32, 15:17].sum() < 2


def test_words_come_before_their_path():
    words, path = named_path("red burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3")
    assert words == "red burger" and [stop.frame for stop in path.stops] == [0, 15]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("burger", "must start with an object"),
        ("0:0.1,0.5,0.3", "must start with an object"),
        ("burger: 0:0.1,0.5", "must be frame:x,y,size"),
        ("burger: 0:a,b,c", "must be frame:x,y,size"),
        ("burger: 0:0.1,0.5,0.3,0.3,0.3", "must be frame:x,y,size"),
        ("burger:", "at least one stop"),
        ("burger: 4:0.1,0.5,0.3; 2:0.1,0.5,0.3", "4, 2; they must be increasing"),
        ("burger: -1:0.1,0.5,0.3", "at least 0"),
        ("burger: 0:0.1,0.5,0", "size is 0,0"),
        ("burger: 0:9,0.5,0.3", "centre is 9,0.5"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=message):
        named_path(text)
