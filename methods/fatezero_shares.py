"""Shares of an edit's steps."""

from __future__ import annotations

from typing import TypeAlias

from ..settings import shown

Shares: TypeAlias = float | tuple[float, float]
"""A share of the steps up to which something is done, or where it begins and ends."""


def begin_and_end(shares: Shares) -> tuple[float, float]:
    """Where something begins and ends."""
    return shares if isinstance(shares, tuple) else (0.0, shares)


def check_shares(name: str, shares: tuple[float, float]) -> None:
    """Raise ValueError for shares outside 0..1, or that end before they begin."""
    if not 0 <= shares[0] <= shares[1] <= 1:
        raise ValueError(
            f"{name} begins at {shown(shares[0])} and ends at {shown(shares[1])}; give 0 <= begin <= end <= 1"
        )
