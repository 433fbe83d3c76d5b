"""The comparison helpers themselves."""

from __future__ import annotations

import pytest
import torch

from fvgen.kernels._testing import assert_close, assert_close_outside_band, largest_error


def test_nan_is_an_error():
    with pytest.raises(AssertionError, match="largest error nan"):
        assert_close(torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0]), 1e-3, "x")


def test_integers_must_be_equal_whatever_the_tolerance():
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0, "x")


def test_error_is_relative_to_the_largest_entry():
    assert largest_error(torch.tensor([0.0, 101.0]), torch.tensor([1.0, 100.0])) == pytest.approx(0.01)
    assert largest_error(torch.zeros(0), torch.zeros(0)) == 0.0


def test_shape_and_dtype_are_compared():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2), torch.zeros(3), 1.0, "x")
    with pytest.raises(AssertionError, match="float64"):
        assert_close(torch.zeros(2).double(), torch.zeros(2), 1.0, "x")


def test_band_may_differ_but_must_be_small():
    expected = torch.ones(100)
    actual = expected.clone()
    actual[3] = 5.0
    band = torch.zeros(100, dtype=torch.bool)
    band[3] = True
    assert_close_outside_band(actual, expected, band, tolerance=1e-6, largest_share=0.01, name="x")
    with pytest.raises(AssertionError, match="discontinuity"):
        assert_close_outside_band(actual, expected, band, tolerance=1e-6, largest_share=0.001, name="x")
    with pytest.raises(AssertionError, match="away from"):
        assert_close_outside_band(actual, expected, ~band & False, tolerance=1e-6, largest_share=0.01, name="x")
