"""Confidence intervals by resampling (Efron, 1979): no assumption on how figures are spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 4000


class Interval(NamedTuple):
    """An estimate and the bounds that hold with 95 % confidence; NaN where nothing was measured."""

    value: float
    low: float
    high: float


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Tensor], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """An interval for a statistic of paired samples, cases being drawn with replacement.

    columns: one or more sequences with a value for each case; cases that are NaN in any are left out.
    statistic: takes a tensor (..., cases) of each column and gives (...).
    """
    table = torch.tensor(columns, dtype=torch.float64)
    table = table[:, ~table.isnan().any(0)]
    cases = table.shape[1]
    if not cases:
        return Interval(math.nan, math.nan, math.nan)
    drawn = torch.randint(cases, (RESAMPLES, cases), generator=torch.Generator().manual_seed(seed))
    spread = statistic(*(column[drawn] for column in table))
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.nanquantile(spread, ends, interpolation="nearest").tolist()  # a ratio may be infinite
    return Interval(statistic(*table).item(), low, high)


def mean_of(values: Sequence[float]) -> Interval:
    """Of the mean."""
    return bootstrap([values], lambda x: x.mean(-1))


def difference_of(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Of the mean difference between paired values."""
    return bootstrap([values, others], lambda x, y: (x - y).mean(-1))


def error_ratio(shares: Sequence[float], others: Sequence[float]) -> Interval:
    """Of how much larger the mean error 1 - share is than another's: 1 for as large, below 1 for less."""
    return bootstrap([shares, others], lambda x, y: (1 - x).mean(-1) / (1 - y).mean(-1))
