"""Calibration returns the private side of its bracket and says when there is none."""

import math

import dp_accounting
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import Gaussian, Repeated

TARGETS = [(e, d) for e in (0.01, 0.5, 1.0, 8.0) for d in (1e-12, 1e-6, 1e-2)]


@pytest.mark.parametrize(("epsilon", "delta"), TARGETS)
def test_noise_multiplier_meets_its_target_and_no_less_noise_does(epsilon, delta):
    for releases, coordinates in ((1, 0), (1, 1000), (777, 64)):
        found = accounting.noise_multiplier(
            epsilon=epsilon, delta=delta, releases=releases, coordinates=coordinates
        )
        event = Repeated(Gaussian(found, coordinates), releases)
        assert accounting.epsilon(event, delta) <= epsilon
        assert accounting.delta(event, epsilon) <= delta
        less = Repeated(Gaussian(found * (1 - 1e-9), coordinates), releases)
        assert accounting.delta(less, epsilon) > delta


def test_noise_multiplier_agrees_with_dp_accounting():
    for epsilon, delta in ((0.5, 1e-5), (1.0, 1e-6), (4.0, 1e-8)):
        rival = dp_accounting.get_sigma_gaussian(epsilon, delta)
        ours = accounting.noise_multiplier(epsilon=epsilon, delta=delta)
        assert abs(ours / rival - 1) <= 1e-6


def test_noise_multiplier_grows_with_what_is_released():
    base = accounting.noise_multiplier(epsilon=1.0, delta=1e-6)
    assert accounting.noise_multiplier(epsilon=1.0, delta=1e-6, coordinates=10**7) > base
    four = accounting.noise_multiplier(epsilon=1.0, delta=1e-6, releases=4)
    assert abs(four / (2 * base) - 1) <= 1e-9
    assert accounting.noise_multiplier(epsilon=0.0, delta=1e-6) > base


def test_noise_multiplier_raises_noise_to_pay_for_the_cut_off():
    # At this δ the flux at the ideal multiplier is already more than δ.
    found = accounting.noise_multiplier(epsilon=1.0, delta=1e-10, coordinates=10**7)
    assert found > 2 * accounting.noise_multiplier(epsilon=1.0, delta=1e-10)
    assert accounting.epsilon(Gaussian(found, 10**7), 1e-10) <= 1.0


@pytest.mark.parametrize(
    "hopeless",
    [
        {"epsilon": 1.0, "delta": 1e-6, "coordinates": 10**40},
        {"epsilon": 1.0, "delta": 1e-6, "releases": 10**308, "coordinates": 1},
        {"epsilon": 1e-300, "delta": 5e-324},
    ],
)
def test_noise_multiplier_says_so_where_no_noise_meets_the_target(hopeless):
    with pytest.raises(ValueError, match="Expected"):
        accounting.noise_multiplier(**hopeless)


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, -math.inf])
def test_noise_multiplier_refuses_bad_targets(bad):
    for arguments in (
        {"epsilon": bad, "delta": 1e-5},
        {"epsilon": 1.0, "delta": bad},
        {"epsilon": 1.0, "delta": 0.0},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "delta": 1e-5, "releases": 0},
        {"epsilon": 1.0, "delta": 1e-5, "coordinates": -1},
    ):
        with pytest.raises((TypeError, ValueError), match="Expected"):
            accounting.noise_multiplier(**arguments)
