"""Host checks: what is refused is named, in one sentence, whatever it is."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from dpfa_jax import _check


def test_real_refuses_numbers_beyond_the_floats():
    for huge in (10**309, 10**400, -(10**400), 1 << 20000, Fraction(10**400, 3)):
        with pytest.raises(ValueError, match=r"Expected delta within the floats, got -?2"):
            _check.real("delta", huge)


def test_integer_takes_whole_numbers_beyond_the_floats_and_checks_their_range():
    assert _check.integer("count", 10**400, low=1) == 10**400
    assert _check.integer("count", np.int64(3)) == 3
    for bad in (10**400, -(10**400)):
        with pytest.raises(ValueError, match="Expected count >= 0 and count <= 5, got"):
            _check.integer("count", bad, low=0, high=5)
    for endless in (1 << 20000, -(1 << 20000)):  # str() of these raises in Python
        with pytest.raises(ValueError, match="Expected count of at most 8192 bits, got 20001"):
            _check.integer("count", endless)


@pytest.mark.parametrize(
    "bad", [True, 1.0, math.nan, math.inf, "1", None, Decimal(1), np.float32(2), np.ones(1), 1j]
)
def test_integer_refuses_what_is_no_whole_number(bad):
    with pytest.raises((TypeError, ValueError), match="Expected count"):
        _check.integer("count", bad)
