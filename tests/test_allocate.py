"""Splits of a budget: they compose to the whole, and importance gives the least noise."""

import math

import numpy as np
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import Composed, Gaussian, allocate, gdp


def test_by_weights_composes_to_the_whole():
    for weights in ([1.0], [1.0, 3.0], [1e-12, 1.0, 1e12], [0.1] * 1000, [1e300, 1e300]):
        multipliers = allocate.by_weights(0.7, weights)
        total = accounting.mu(Composed([Gaussian(each) for each in multipliers]))
        assert total <= 0.7 * (1 + 1e-15)
        assert total >= 0.7 * (1 - 1e-12)


def test_by_weights_meets_an_epsilon_target():
    mu = gdp.mu(1.0, 1e-5)
    event = Composed([Gaussian(each) for each in allocate.by_weights(mu, [1.0, 2.0, 5.0])])
    assert accounting.epsilon(event, 1e-5) <= 1.0


def test_by_importance_is_the_least_total_noise():
    rng = np.random.default_rng(0)
    importance = [1.0, 16.0, 0.3, 7.0]
    best = np.array(allocate.by_importance(0.5, importance))
    least = float((importance * best**2).sum())
    assert accounting.mu(Composed([Gaussian(z) for z in best.tolist()])) <= 0.5 * (1 + 1e-15)
    for _ in range(500):
        other = np.array(allocate.by_weights(0.5, rng.dirichlet(np.ones(4)).tolist()))
        assert float((importance * other**2).sum()) >= least * (1 - 1e-9)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_splits_refuse_bad_numbers(bad):
    for call in (
        lambda: allocate.by_weights(bad, [1.0]),
        lambda: allocate.by_weights(1.0, [1.0, bad]),
        lambda: allocate.by_weights(1.0, []),
        lambda: allocate.by_weights(1.0, [1e-320, 1e300]),
        lambda: allocate.by_importance(1.0, [bad]),
        lambda: allocate.by_importance(1.0, []),
    ):
        with pytest.raises(ValueError, match="Expected"):
            call()
