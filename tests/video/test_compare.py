import pytest
import torch

from fatezero.video.compare import compare

A = torch.zeros(4, 32, 40, 3, dtype=torch.uint8)
B = torch.full((4, 32, 40, 3), 200, dtype=torch.uint8)


def test_side_by_side():
    shown = compare(A, B, "side by side")
    assert torch.equal(shown[:, :, :40], A) and torch.equal(shown[:, :, 40:], B)


def test_a_wipe_moves_across_the_clip():
    shown = compare(A, B, "wipe")
    edges = [(frame[16, :, 0] == 200).sum().item() for frame in shown]
    assert edges == sorted(edges) and edges[0] < 8 and edges[-1] > 32
    assert shown[0, 16, -1, 0] == 0 and shown[-1, 16, 0, 0] == 200


def test_a_split_is_in_the_middle():
    shown = compare(A, B, "split")
    assert (shown[:, :, :20] == 200).all()
    assert (shown[:, :, 20] == 255).all(), "the line"
    assert (shown[:, :, 21:] == 0).all()


def test_the_difference_is_scaled_to_full_brightness():
    other = A.clone()
    other[2, 3, 4] = 20
    shown = compare(A, other, "difference")
    assert shown[2, 3, 4, 0] == 255 and shown.sum() == 3 * 255
    assert (compare(A, A, "difference") == 0).all()


@pytest.mark.parametrize("how", ["side by side", "wipe", "split", "difference"])
def test_labels_are_written_and_inputs_unchanged(how):
    a, b = torch.zeros(2, 64, 96, 3, dtype=torch.uint8), torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    shown = compare(a, b, how, ("source", "a very long label that would not fit into half of the picture"))
    assert (shown[0] > 100).any()
    assert not a.any() and not b.any()


def test_clips_that_differ_and_unknown_words_are_refused():
    with pytest.raises(ValueError, match="4 frames of 40x32 and 3 frames"):
        compare(A, B[:3], "wipe")
    with pytest.raises(ValueError, match="must be one of side by side, wipe, split, difference"):
        compare(A, B, "fade")
