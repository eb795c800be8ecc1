"""Events: frozen, hashable, and unable to hold a number that would cost too little."""

import dataclasses
import math

import numpy as np
import pytest

from dpfa_jax.accounting import event as events_lib
from dpfa_jax.accounting.event import (
    BoundedRange,
    Composed,
    DiscreteGaussian,
    ExponentialMechanism,
    Gaussian,
    Laplace,
    NonPrivate,
    NoRelease,
    PoissonSampled,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    Skellam,
    TruncatedPoissonSampled,
)

LEAVES = (
    Gaussian(2.0, 7),
    Laplace(3.0),
    DiscreteGaussian(4.0),
    ExponentialMechanism(1.0, 0.1),
    RandomizedResponse(1.0),
    BoundedRange(2.0),
    Skellam(5.0, 3.0, 2.0),
    PoissonSampled(Gaussian(1.0, 3), 0.01),
    TruncatedPoissonSampled(Gaussian(1.0), 0.01, 1000, 40),
    SampledWithoutReplacement(2.0, 1.0, 10, 1000),
    NonPrivate(),
    NoRelease(),
)


@pytest.mark.parametrize("event", [*LEAVES, Repeated(LEAVES[0], 3), Composed(LEAVES)], ids=str)
def test_event_is_frozen_hashable_and_one_line(event):
    assert hash(event) == hash(dataclasses.replace(event))
    assert event == dataclasses.replace(event)
    assert "\n" not in str(event)
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, getattr(event, field.name))


@pytest.mark.parametrize("bad", [math.nan, -1e-9, -math.inf, math.inf, "1", None, True, [1.0]])
def test_noise_multiplier_refuses_what_is_no_multiplier(bad):
    for make in (Gaussian, Laplace, DiscreteGaussian):
        with pytest.raises((TypeError, ValueError)):
            make(bad)


@pytest.mark.parametrize("bad", [math.nan, -1e-9, "1", None, True])
def test_exponential_mechanism_refuses_what_is_no_bound(bad):
    for arguments in ((bad, 1.0), (1.0, bad)):
        with pytest.raises((TypeError, ValueError)):
            ExponentialMechanism(*arguments)


@pytest.mark.parametrize("bad", [math.nan, -0.5, 1.5, math.inf, "1", None, True])
def test_sampled_events_refuse_what_is_no_sample(bad):
    base = Gaussian(1.0)
    for make in (
        lambda: PoissonSampled(base, bad),
        lambda: PoissonSampled(bad, 0.1),
        lambda: PoissonSampled(Laplace(1.0), 0.1),
        lambda: PoissonSampled(Repeated(base, 2), 0.1),
        lambda: TruncatedPoissonSampled(base, bad, 10, 5),
        lambda: TruncatedPoissonSampled(base, 0.1, bad, 5),
        lambda: TruncatedPoissonSampled(base, 0.1, 10, bad),
        lambda: TruncatedPoissonSampled(base, 0.1, 10, 0),
        lambda: SampledWithoutReplacement(1.0, bad if bad != 1.5 else 0.0, 5, 10),
        lambda: SampledWithoutReplacement(1.0, 1.0, bad, 10),
        lambda: SampledWithoutReplacement(1.0, 1.0, 11, 10),
        lambda: SampledWithoutReplacement(1.0, 1.0, 5, bad),
        lambda: RandomizedResponse(bad if bad not in (1.5, math.inf) else -1.0),
        lambda: BoundedRange(bad if bad not in (1.5, math.inf) else -1.0),
        lambda: Skellam(bad if bad != 1.5 else -1.0, 1.0, 1.0),
        lambda: Skellam(1.0, 1.0, 2.0),
    ):
        with pytest.raises((TypeError, ValueError)):
            make()


@pytest.mark.parametrize("bad", [-1, 0, 1.0, math.nan, "1", None, True])
def test_repeated_refuses_what_is_no_count(bad):
    with pytest.raises((TypeError, ValueError)):
        Repeated(Gaussian(1.0), bad)


@pytest.mark.parametrize("bad", [-1, 1.5, math.nan, "1", None, True])
def test_gaussian_refuses_what_is_no_number_of_coordinates(bad):
    with pytest.raises((TypeError, ValueError)):
        Gaussian(1.0, bad)


@pytest.mark.parametrize("bad", [(), [], None, 3, Gaussian(1.0), (Gaussian,), ("x",), "ab"])
def test_composed_refuses_what_is_no_sequence_of_events(bad):
    with pytest.raises((TypeError, ValueError)):
        Composed(bad)


def test_numpy_numbers_become_python_numbers():
    event = Gaussian(np.float64(0.5))
    assert type(event.noise_multiplier) is float
    assert event == Gaussian(0.5)


def test_leaves_counts_through_nesting():
    gaussian, laplace = Gaussian(2.0), Laplace(1.0)
    inner = Composed([gaussian, Repeated(laplace, 5), NoRelease()])
    event = Composed([Repeated(inner, 10**30), gaussian])
    assert events_lib.leaves(event) == {gaussian: 10**30 + 1, laplace: 5 * 10**30}
    assert events_lib.leaves(NoRelease()) == {}


def test_leaves_takes_deep_nesting_apart_without_recursion():
    event = Gaussian(1.0)
    for _ in range(5000):
        event = Repeated(event, 1)
    assert events_lib.leaves(event) == {Gaussian(1.0): 1}


def test_leaves_refuses_what_is_no_event():
    for bad in (None, Gaussian, "Gaussian", 1.0, (Gaussian(1.0),), events_lib.Event()):
        with pytest.raises(TypeError):
            events_lib.leaves(bad)
