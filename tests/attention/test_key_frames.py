from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fatezero.attention.key_frames import Chunk, KeyFrames, Windows

entries = st.lists(st.sampled_from(["self", "first", "middle", "last", "previous", -2, 0, 3]), min_size=1, max_size=3)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("self", [0, 1, 2, 3]),
        ("first", [0, 0, 0, 0]),
        ("middle", [1, 1, 1, 1]),
        ("last", [3, 3, 3, 3]),
        ("previous", [0, 0, 1, 2]),
        (2, [2, 3, 3, 3]),
    ],
)
def test_entries_name_frames_and_are_clipped_to_the_clip(entry, expected):
    assert [KeyFrames.of(entry).of_frame(f, 4) for f in range(4)] == [(s,) for s in expected]


@given(entries, st.integers(1, 6))
def test_gather_stacks_the_tokens_of_the_key_frames(names, frames):
    keys = KeyFrames.of(names)
    k = torch.arange(frames * 2.0).view(frames, 1, 2, 1)
    gathered = keys.gather(k, range(frames), range(frames), frames).expand(frames, -1, -1, -1)
    for f in range(frames):
        expected = torch.cat([k[s] for s in keys.of_frame(f, frames)], dim=1)
        assert torch.equal(gathered[f], expected)


@given(entries, st.integers(1, 9), st.integers(2, 5), st.booleans())
def test_chunks_give_every_frame_its_whole_weight_and_one_owner(names, frames, chunk, clip_norm):
    keys = KeyFrames.of(names)
    chunks = keys.chunks(frames, chunk, clip_norm)
    weights = torch.zeros(frames)
    for chunk in chunks:
        weights[list(chunk.frame_indices)] += torch.tensor(chunk.weights)
    assert torch.allclose(weights, torch.ones(frames))
    assert sorted(f for p in chunks for f in p.owned) == list(range(frames))
    if keys.anchored:
        assert all(set(keys.of_frame(f, frames)) <= set(p.frame_indices) for p in chunks for f in p.frame_indices)


def test_chunks_of_anchored_key_frames_do_not_overlap():
    weighed = [
        [f for f, w in zip(p.frame_indices, p.weights, strict=True) if w] for p in KeyFrames.of("middle").chunks(7, 3)
    ]
    assert weighed == [[0, 1, 2], [3, 4, 5], [6]]


@given(st.integers(2, 9), st.integers(2, 8), st.integers(0, 7))
def test_windows_share_their_overlap(frames, window, overlap):
    overlap = min(overlap, window - 1)
    chunks = KeyFrames.of("previous").chunks(frames, Windows(window, overlap))
    shown = [set(chunk.frame_indices) for chunk in chunks]
    assert set().union(*shown) == set(range(frames))
    assert all(len(one) == min(window, frames) for one in shown)
    assert all(len(one & other) == overlap for one, other in pairwise(shown[:-1]))


def test_windows_count_frames_of_the_video():
    assert Windows.of_video(81, 30, 4) == Windows(21, 8), "as the host's node for Wan rounds"
    assert Windows.of_video(33, None, 1) == Windows(33, 16)
    assert [Windows.of_video(33, overlap, 8).overlap for overlap in (0, 1, 8, 9, 32)] == [0, 1, 1, 2, 4]
    assert Windows(9).advance == Windows(9, 2).advance == 7
    with pytest.raises(ValueError, match="windows of 4 frames cannot overlap by 4"):
        Windows(4, 4)
    with pytest.raises(ValueError, match="at least 2"):
        Windows.of_video(4, None, 4).starts(9)


def test_a_missing_key_frame_is_replaced_by_the_nearest():
    k = torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1, 1)
    gathered = KeyFrames.of(("previous", "first")).gather(k, (4, 5, 6), (4, 5, 6), 9)
    assert gathered.view(3, 2).tolist() == [[4, 4], [4, 4], [5, 4]]


def test_layers_with_few_channels_attend_to_their_own_frame_only():
    keys = KeyFrames(("middle",), least_channels=640)
    assert keys.at(320).entries == ("self",)
    assert keys.at(640) == keys


@pytest.mark.parametrize("wrong", [(), ("centre",), (1.5,), (True,)])
def test_unknown_entries_are_named(wrong):
    with pytest.raises(ValueError, match="key_frames"):
        KeyFrames.of(wrong)


def test_all_must_be_the_only_entry():
    keys = KeyFrames.of("all")
    assert keys.of_frame(1, 4) == (0, 1, 2, 3)
    assert keys.used((1, 2), 4) == (1, 2), "of one call"
    k = torch.arange(6.0).view(3, 1, 2, 1)
    assert keys.gather(k, range(3), range(3), 3).flatten().tolist() == list(range(6))
    assert not keys.anchored
    assert [chunk.frame_indices for chunk in keys.chunks(6, 4)] == [(0, 1, 2, 3), (2, 3, 4, 5)]
    with pytest.raises(ValueError, match="unknown entry"):
        KeyFrames.of(("all", "self"))


def test_a_window_keeps_its_order_and_may_hold_a_frame_of_zero_weight():
    windows = [([0, 1, 2], [1.0, 1.0, 1.0]), ([2, 3, 4, 0], [0.0, 1.0, 1.0, 1.0])]
    first, second = KeyFrames.of("all").around(windows, 5)
    assert second.frame_indices == (2, 3, 4, 0), "a window that wraps around the end"
    assert (first.owned, second.owned) == ((0, 1, 2), (3, 4))
    assert [first.weights[0] + second.weights[3], first.weights[2] + second.weights[0]] == [1.0, 1.0]
    assert not Chunk((1, 2, 0), (1.0,) * 3, (0, 1, 2), 3).is_whole
