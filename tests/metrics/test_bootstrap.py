import math

import pytest
import torch

from fatezero.metrics.bootstrap import difference_of, error_ratio, mean_of


def test_equal_values_have_an_interval_of_zero_width():
    assert mean_of([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert difference_of([1.0, 3.0], [0.5, 2.5]) == (0.5, 0.5, 0.5)


def test_intervals_have_their_nominal_coverage():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        sample = torch.randn(40, generator=generator, dtype=torch.float64) + 5
        interval = mean_of(sample.tolist())
        covered += interval.low <= 5 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_ratio_of_errors():
    paper = [1.0, 0.5, 0.5, 0.0]
    assert error_ratio([1.0, 0.75, 0.75, 0.5], paper).value == pytest.approx(0.5)
    assert error_ratio(paper, paper) == (1.0, 1.0, 1.0)
    perfect = error_ratio([1.0] * 4, paper)
    assert perfect.value == 0 and perfect.high == 0


def test_a_ratio_to_a_tiny_error_has_no_upper_bound():
    ratio = error_ratio([0.5, 1.0, 1.0, 0.5], [0.5, 1.0, 1.0, 1.0])
    assert ratio.value == 2 and ratio.high == math.inf


def test_cases_without_measurement_are_skipped():
    assert mean_of([1.0, math.nan, 3.0]).value == 2
    assert difference_of([1.0, math.nan], [0.0, 5.0]).value == 1
    assert all(math.isnan(v) for v in mean_of([math.nan]))
    assert all(math.isnan(v) for v in mean_of([]))
