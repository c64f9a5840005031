import pytest
import torch

from fatezero.attention.control import AttentionSite
from fatezero.attention.masks import HeatOverSteps, foreign_tokens, mask_sites, threshold_mask, word_heat


def site(side, kind="cross", index=0):
    return AttentionSite("down", index, kind, heads=2, head_dim=4, height=side, width=side)


def test_masks_come_from_the_finest_grid_within_the_limit():
    sites = [site(32), site(16, index=1), site(16, index=2), site(8), site(16, kind="self")]
    assert mask_sites(sites, 256) == sites[1:3]
    assert mask_sites(sites, 100) == [sites[3]]
    with pytest.raises(ValueError, match="mask_tokens=32.*64 tokens"):
        mask_sites(sites, 32)


def test_heat_sums_words_and_averages_heads_and_layers():
    maps = torch.rand(2, 3, 2, 16, 5)  # layers, frames, heads, tokens, columns
    heat = word_heat([(site(4), maps[0]), (site(4), maps[1])], [1, 3])
    expected = (maps[..., 1] + maps[..., 3]).mean((0, 2)).view(3, 4, 4)
    assert torch.allclose(heat, expected)


def test_mask_is_pooled_resized_normalised_and_strictly_above():
    heat = torch.zeros(1, 5, 5)
    heat[0, 2, 2] = 8.0
    heat[0, 0, 0] = 2.4
    mask = threshold_mask(heat, (10, 10), 0.3)
    assert mask[0].sum() == 36, "3x3 cells around the peak, each twice as large; 2.4 / 8 is not above 0.3"
    assert mask[0, 2:8, 2:8].all()


def test_each_frame_has_its_own_maximum():
    heat = torch.stack([torch.eye(4), 100 * torch.eye(4)])
    first, second = threshold_mask(heat, (4, 4), 0.5)
    assert torch.equal(first, second)


def test_thresholds_at_the_ends_and_empty_heat():
    heat = torch.rand(2, 4, 4) + 0.1
    assert threshold_mask(heat, (4, 4), 0.0).all()
    assert not threshold_mask(heat, (4, 4), 1.0).any()
    assert not threshold_mask(torch.zeros(1, 4, 4), (4, 4), 0.3).any()


def test_a_token_is_foreign_where_the_words_get_more_attention():
    heat = torch.zeros(2, 4, 3, 3)
    heat[:, 0] = 1.0  # the start token, with attention everywhere
    heat[:, 1, :, 0] = 0.2  # the words, on the left
    heat[:, 2, :, 2] = 5.0  # another word, on the right
    heat[:, 2, :, 0] = 4.0
    heat[:, 3] = 0.1  # a word with equal attention everywhere
    foreign = foreign_tokens(heat, [1], [0])
    assert foreign[:, 2, :, 0].all() and foreign[:, 2].sum() == 6, "each over its own maximum: 1 against 0.8"
    assert (foreign[:, [0, 1, 3]] == 0).all()
    assert torch.equal(foreign_tokens(heat * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1), [1], [0]), foreign)
    both = foreign_tokens(heat, [1, 2], [0])
    assert (both[:, [1, 2]] == 0).all(), "the words are not foreign to each other"


def test_heat_is_summed_over_the_steps_so_far_of_each_frame():
    """Chunks may differ between steps, and a step may be evaluated again."""
    heat, over = torch.arange(12.0).view(3, 2, 2), HeatOverSteps()
    assert torch.equal(over.add(heat, (0, 1, 2), 0), heat)
    over.add(heat[1:] + 1, (1, 2), 1)
    assert torch.equal(over.add(heat[1:] + 2, (1, 2), 1), 2 * heat[1:] + 2)
    assert torch.equal(over.add(heat[:1], (0,), 1), 2 * heat[:1])
    assert torch.equal(over.add(heat[2:], (2,), 0), heat[2:]), "later steps do not count"
