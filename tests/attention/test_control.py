"""Attention without maps."""

import pytest
import torch

from fatezero.attention.control import attention_map, token_shares


@pytest.mark.parametrize("tokens", [[3], [0, 2, 6], list(range(7))])
def test_token_shares_equal_map_columns(tokens):
    """Also for more tokens than a head has channels."""
    q, k = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(1, 3, 7, 4, dtype=torch.float64)
    expected = attention_map(q, k).mean(1)[..., tokens]
    assert torch.allclose(token_shares(q, k, tokens), expected)
