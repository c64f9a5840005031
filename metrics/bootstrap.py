"""Bootstrap confidence intervals (Efron, 1979), without assumptions about the distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 4000


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval; NaN if nothing was measured."""

    value: float
    low: float
    high: float


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Tensor], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The interval of a statistic of paired samples, resampling cases with replacement.

    columns: sequences with a value per case; cases that are NaN in any of them are dropped. statistic: maps a tensor
    (..., cases) per column to (...).
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
    """The interval of the mean."""
    return bootstrap([values], lambda x: x.mean(-1))


def difference_of(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The interval of the mean difference between paired values."""
    return bootstrap([values, others], lambda x, y: (x - y).mean(-1))


def error_ratio(shares: Sequence[float], others: Sequence[float]) -> Interval:
    """The interval of the ratio of mean errors 1 - share, ours over the others'."""
    return bootstrap([shares, others], lambda x, y: (1 - x).mean(-1) / (1 - y).mean(-1))
