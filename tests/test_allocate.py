"""Splits of a budget: they compose to the whole, and importance gives the least noise."""

import math

import numpy as np
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import Composed, Gaussian, allocate, gdp
from dpfa_jax.accounting import event as event_lib


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


def test_split_meets_its_target_and_less_noise_does_not():
    parts = {
        "embedding": allocate.Part(4.0, 1, 10**6, 64),
        "layer 0/head 0": allocate.Part(1.0, 10, 100),
        "layer 0/head 1": allocate.Part(2.0, 10, 100),
    }
    for epsilon, delta in ((0.5, 1e-6), (8.0, 1e-9)):
        found = allocate.split(parts, epsilon=epsilon, delta=delta)
        assert accounting.epsilon(found.event, delta) <= epsilon
        less = [
            part.at(z * (1 - 1e-8))
            for z, part in zip(found.noise_multipliers, parts.values(), strict=True)
        ]
        assert accounting.epsilon(accounting.Composed(less), delta) > epsilon
        alone = found.epsilons(delta)
        assert list(alone) == ["embedding", "layer 0", "layer 0/head 0", "layer 0/head 1"]
        assert max(alone["layer 0/head 0"], alone["layer 0/head 1"]) < alone["layer 0"] < epsilon
    assert "layer 0/head 1: noise multiplier" in str(found)
    with pytest.raises(ValueError, match="Expected one of"):
        found.of("layer")


def test_split_is_the_least_noise_of_all_that_cost_as_much():
    rng = np.random.default_rng(0)
    importance, releases = (1.0, 9.0, 2.5), (1, 100, 7)
    parts = {
        str(i): allocate.Part(w, n)
        for i, (w, n) in enumerate(zip(importance, releases, strict=True))
    }
    found = allocate.split(parts, epsilon=1.0, delta=1e-6)
    square = np.array(found.noise_multipliers) ** 2
    least, total = np.dot(importance, square), np.sum(np.array(releases) / square)
    for _ in range(500):
        other = square * np.exp(rng.normal(0, 0.3, 3))
        other *= np.sum(np.array(releases) / other) / total
        assert np.dot(importance, other) >= least * (1 - 1e-9)


def test_per_head_names_and_charges_every_head():
    table = [[1.0, 16.0], [1.0, 1.0], [81.0, 1.0]]
    heads = allocate.per_head(
        layers=3, heads=2, epsilon=2.0, delta=1e-6, importance=table, releases=5, coordinates=64
    )
    assert heads.names[:3] == ("layer 0/head 0", "layer 0/head 1", "layer 1/head 0")
    assert accounting.epsilon(heads.event, 1e-6) <= 2.0
    ratio = heads.noise_multipliers[0] / heads.noise_multipliers[4]
    assert ratio == pytest.approx(81**0.25)
    assert sum(event_lib.leaves(heads.event).values()) == 30
    for bad in ([[1.0]], [[1.0, 1.0]] * 2, [[1.0, 1.0], [1.0], [1.0, 1.0]]):
        with pytest.raises(ValueError, match="importance of 3 layers"):
            allocate.per_head(layers=3, heads=2, epsilon=1.0, delta=1e-6, importance=bad)


def test_split_refuses_bad_targets_and_says_what_is_out_of_reach():
    part = {"a": allocate.Part()}
    for epsilon, delta in ((math.nan, 1e-5), (-1.0, 1e-5), (1.0, math.nan), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="Expected"):
            allocate.split(part, epsilon=epsilon, delta=delta)
    with pytest.raises(ValueError, match="64 radius bits"):
        allocate.split({"a": allocate.Part(coordinates=10**15)}, epsilon=1.0, delta=1e-9)
    with pytest.raises(ValueError, match="at least one part"):
        allocate.split({}, epsilon=1.0, delta=1e-9)
    for importance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="importance"):
            allocate.Part(importance)
