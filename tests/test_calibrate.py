"""Calibration returns the private side of its bracket and says when there is none."""

import functools
import math
from typing import Any

import dp_accounting
import pytest

from dpfa_jax import accounting
from dpfa_jax.accounting import (
    Composed,
    Gaussian,
    NonPrivate,
    NoRelease,
    PoissonSampled,
    Repeated,
    calibrate,
    pld,
)

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


def test_noise_multiplier_takes_wide_noise():
    target = {"epsilon": 1.0, "delta": 1e-10, "coordinates": 10**7}
    wide = accounting.noise_multiplier(**target, radius_bits=64)
    assert accounting.epsilon(Gaussian(wide, 10**7, 64), 1e-10) <= 1.0
    assert wide < accounting.noise_multiplier(epsilon=1.0, delta=1e-10) * (1 + 1e-4)
    assert wide < 0.5 * accounting.noise_multiplier(**target)


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


def training(noise_multiplier):
    return Repeated(PoissonSampled(Gaussian(noise_multiplier), 0.01), 500)


def test_smallest_meets_its_target_and_less_does_not():
    for epsilon in (0.3, 4.0):
        found = calibrate.smallest(training, epsilon=epsilon, delta=1e-6, tolerance=1e-5)
        assert accounting.epsilon(training(found), 1e-6) <= epsilon
        assert accounting.epsilon(training(found * (1 - 1e-4)), 1e-6) > epsilon


def test_largest_meets_its_target_and_more_does_not():
    def run(rate):
        return Repeated(PoissonSampled(Gaussian(1.0), rate), 500)

    found = calibrate.largest(run, epsilon=1.5, delta=1e-6, tolerance=1e-5)
    assert accounting.epsilon(run(found), 1e-6) <= 1.5
    assert accounting.epsilon(run(found * (1 + 1e-4)), 1e-6) > 1.5
    everything = calibrate.largest(run, epsilon=1e5, delta=1e-6)
    assert everything == 1.0


def test_steps_is_the_largest_plan_that_fits():
    step, spent = PoissonSampled(Gaussian(1.0), 0.01), Gaussian(4.0)
    for before in (None, spent):
        found = calibrate.steps(step, epsilon=1.5, delta=1e-5, spent=before)
        parts = [Repeated(step, found)] + ([before] if before else [])
        assert accounting.epsilon(Composed(parts), 1e-5) <= 1.5
        assert accounting.epsilon(Composed([*parts, step]), 1e-5) > 1.5
    assert calibrate.steps(NonPrivate(), epsilon=1.5, delta=1e-5) == 0
    assert calibrate.steps(step, epsilon=1.5, delta=1e-5, spent=Gaussian(0.5)) == 0
    assert calibrate.steps(NoRelease(), epsilon=1.5, delta=1e-5) == 1 << 53


def test_smallest_says_so_where_the_target_is_out_of_reach():
    with pytest.raises(ValueError, match="even there epsilon is"):
        calibrate.smallest(training, epsilon=1e-9, delta=1e-12, high=100.0)
    with pytest.raises(ValueError, match=r"from 1e-12 on meets.*even there epsilon is inf"):
        calibrate.largest(lambda rate: NonPrivate(), epsilon=1.0, delta=1e-5)
    with pytest.raises(ValueError, match=r"a batch of one record meets.*costs epsilon"):
        calibrate.batch_size(sampled(0.5, 1000), records=10, epsilon=0.1, delta=1e-5)


def sampled(multiplier, count):
    return lambda rate: Repeated(PoissonSampled(Gaussian(multiplier), rate), count)


def test_batch_size_is_the_largest_that_fits():
    make = sampled(1.0, 300)
    for records in (500, 40_000):
        found = calibrate.batch_size(make, records=records, epsilon=1.5, delta=1e-6)
        assert accounting.epsilon(make(found / records), 1e-6) <= 1.5
        assert accounting.epsilon(make((found + 1) / records), 1e-6) > 1.5
    assert calibrate.batch_size(make, records=7, epsilon=1e5, delta=1e-6) == 7


def test_searches_take_the_loss_distribution_as_their_cost():
    cost = functools.partial(pld.epsilon, discretization=1e-2)
    target: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-6}
    noise = calibrate.smallest(training, **target, tolerance=1e-3, cost=cost)
    assert cost(training(noise), 1e-6) <= 2.0 < cost(training(noise * 0.998), 1e-6)
    # The distribution needs less noise than the RDP curve: that is what it is for.
    assert noise < 0.99 * calibrate.smallest(training, **target)
    step = PoissonSampled(Gaussian(1.0), 0.05)
    count = calibrate.steps(step, **target, cost=cost)
    assert cost(Repeated(step, count), 1e-6) <= 2.0 < cost(Repeated(step, count + 1), 1e-6)
    assert count > calibrate.steps(step, **target)


def test_adaptive_clipping_meets_its_target_with_both_releases():
    for batch, share in ((64, 0.1), (10_000, 0.01)):
        gradient, std = calibrate.adaptive_clipping(
            epsilon=1.0, delta=1e-5, sampling_rate=0.02, steps=200, batch=batch
        )
        together = (gradient**-2 + (2 * std) ** -2) ** -0.5
        event = Repeated(PoissonSampled(Gaussian(together), 0.02), 200)
        assert 0.999 < accounting.epsilon(event, 1e-5) <= 1.0 + 1e-9
        assert std >= batch / 20 and (2 * std) ** -2 <= share * together**-2 * (1 + 1e-9)
    with pytest.raises(ValueError, match="even there"):
        calibrate.adaptive_clipping(
            epsilon=1.0, delta=1e-6, sampling_rate=0.5, steps=10**9, batch=1, coordinates=10**9
        )


def test_narrow_ends_within_its_width_for_any_falling_cost():
    """Straight, curved, flat and stepped costs: the end meets the target, a width less does not."""
    costs = (
        *(lambda x: 1 / x, lambda x: x**-9.0, lambda x: 3 * math.exp(-x) + 0.1, lambda x: 10 - x),
        *(lambda x: 3.0 if x < 2.0 else 0.5, lambda x: math.inf if x < 1.7 else 0.0),
    )
    for cost in costs:
        for target in (0.6, 0.9):
            calls = []

            def found(x, cost=cost, calls=calls):
                calls.append(x)
                return cost(x)

            end = calibrate._narrow(found, target, 0.5, 11.0, 1e-6)
            assert cost(end) <= target < cost(end / (1 + 1e-6))
            assert len(calls) <= 90


def test_adaptive_clip_split_composes_to_the_whole():
    for total, std in ((1.0, 5.0), (0.5, 0.2500001), (3.0, 1e6), (1e-3, 1.0)):
        gradients = calibrate.adaptive_clip_split(noise_multiplier=total, count_noise_std=std)
        both = accounting.mu(Composed([Gaussian(gradients), Gaussian(2 * std)]))
        assert both <= (1 / total) * (1 + 1e-12)
        assert gradients >= total
    with pytest.raises(ValueError, match="count_noise_std"):
        calibrate.adaptive_clip_split(noise_multiplier=1.0, count_noise_std=0.5)


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_searches_refuse_bad_targets(bad):
    for call in (
        lambda: calibrate.smallest(training, epsilon=bad, delta=1e-5),
        lambda: calibrate.smallest(training, epsilon=1.0, delta=bad),
        lambda: calibrate.smallest(training, epsilon=1.0, delta=1e-5, low=bad),
        lambda: calibrate.smallest(training, epsilon=1.0, delta=1e-5, high=bad),
        lambda: calibrate.smallest(training, epsilon=1.0, delta=1e-5, tolerance=bad),
        lambda: calibrate.largest(training, epsilon=bad, delta=1e-5),
        lambda: calibrate.steps(Gaussian(1.0), epsilon=bad, delta=1e-5),
        lambda: calibrate.steps(Gaussian(1.0), epsilon=1.0, delta=bad),
        lambda: calibrate.adaptive_clip_split(noise_multiplier=bad, count_noise_std=1.0),
        lambda: calibrate.adaptive_clip_split(noise_multiplier=1.0, count_noise_std=bad),
    ):
        with pytest.raises(ValueError, match="Expected"):
            call()
