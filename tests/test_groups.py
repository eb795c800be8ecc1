"""Groups: the event of several rows never costs less than the exact pair of laws."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dpfa_jax import accounting
from dpfa_jax.accounting import (
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
    groups,
)

LINE = np.linspace(-60.0, 60.0, 240_001)
STEP = LINE[1] - LINE[0]


def law(weights, shifts, std):
    return sum(w * stats.norm.pdf(LINE, x, std) for w, x in zip(weights, shifts, strict=True))


def renyi(p, q, order):
    return math.log(np.sum(np.exp(order * np.log(p) + (1 - order) * np.log(q))) * STEP) / (
        order - 1
    )


@pytest.mark.parametrize(("rate", "rows"), [(0.1, 2), (0.5, 3), (0.02, 10)])
def test_grouped_poisson_is_never_below_the_exact_mixture(rate, rows):
    """All rows pull one way: Binomial(rows, rate) times a shift of 1, both directions."""
    std = 4.0
    counts = np.arange(rows + 1)
    with_group = law(stats.binom.pmf(counts, rows, rate), counts, std)
    without = law([1.0], [0.0], std)
    event = groups.grouped(PoissonSampled(Gaussian(std), rate), rows)
    assert event.sampling_rate == pytest.approx(1 - (1 - rate) ** rows)
    alone = PoissonSampled(Gaussian(std), rate)
    for order in (1.5, 2.0, 5.0, 20.0):
        exact = max(renyi(with_group, without, order), renyi(without, with_group, order))
        assert exact <= accounting.rdp_curve(event, order)[0]
        # Negative control: the event of one row is too cheap.
        assert exact > 1.5 * accounting.rdp_curve(alone, order)[0]
    # At a rate of 1 the bound is reached.
    whole = groups.grouped(PoissonSampled(Gaussian(std), 1.0), rows)
    assert accounting.rdp_curve(whole, 2.0)[0] == pytest.approx((rows / std) ** 2, rel=1e-9)


def test_grouped_without_replacement_is_never_below_the_exact_mixture():
    """Records all 0 but the group, which is +1 or −1: a hypergeometric number of them is drawn."""
    records, size, rows, std = 20, 4, 3, 6.0
    counts = np.arange(rows + 1)
    weights = stats.hypergeom.pmf(counts, records, rows, size)
    p, q = law(weights, counts, std), law(weights, -counts, std)
    event = groups.grouped(SampledWithoutReplacement(std, 1.0, size, records), rows)
    assert event == SampledWithoutReplacement(std, event.clip_norm, 12, records)
    assert event.clip_norm == pytest.approx(3.0) and event.clip_norm > 3.0
    for order in (2.0, 5.0, 20.0):
        exact = renyi(p, q, order)
        assert exact <= accounting.rdp_curve(event, order)[0]


def test_grouped_leaves_are_those_of_the_larger_shift():
    for make, cost in (
        (Gaussian, lambda z: accounting.mu(Gaussian(z))),
        (Laplace, lambda z: accounting.epsilon(Laplace(z), 0.0)),
        (DiscreteGaussian, lambda z: accounting.rdp_curve(DiscreteGaussian(z), 3.0)[0]),
    ):
        group = groups.grouped(make(12.0), 4)
        assert group.noise_multiplier == pytest.approx(3.0, rel=1e-12)
        assert cost(group.noise_multiplier) >= cost(3.0)
    assert groups.grouped(RandomizedResponse(0.5), 4).epsilon == pytest.approx(2.0)
    assert groups.grouped(BoundedRange(0.5), 4).bound == pytest.approx(2.0)
    pure = groups.grouped(ExponentialMechanism(0.5, 0.1), 4)
    assert (pure.epsilon, pure.zcdp) == (pytest.approx(2.0), pytest.approx(1.6))
    skellam = groups.grouped(Skellam(9.0, 3.0, 2.0), 4)
    assert (skellam.l1_sensitivity, skellam.l2_sensitivity) == (
        pytest.approx(12.0),
        pytest.approx(8.0),
    )
    assert groups.grouped(NonPrivate(), 2) == NonPrivate()
    assert groups.grouped(NoRelease(), 2) == NoRelease()
    assert groups.grouped(Gaussian(3.0, 9, 64), 2).radius_bits == 64
    plan = Composed([Repeated(Gaussian(8.0), 5), Laplace(9.0)])
    assert groups.grouped(plan, 1) is plan
    assert accounting.epsilon(groups.grouped(plan, 2), 1e-6) > 1.9 * accounting.epsilon(plan, 1e-6)


@pytest.mark.parametrize(("records", "capacity"), [(5, 2), (40, 30), (40, 33), (40, 39)])
def test_grouped_truncated_poisson_is_never_below_the_exact_mixture(records, capacity):
    """Two records of one person (+1 each, or not there), the others −1; who is dropped is random.

    Both directions, by summing over how many of each are drawn and kept.
    """
    rate, rows, std = 0.9, 2, 6.0
    laws = []
    for group in (rows, 0):
        sums: dict[int, float] = {}
        for own, others in itertools.product(range(group + 1), range(records - rows + 1)):
            chance = stats.binom.pmf(own, group, rate)
            chance *= stats.binom.pmf(others, records - rows, rate)
            kept = min(own + others, capacity)
            for mine in range(own + 1):
                ways = math.comb(own, mine) * math.comb(others, kept - mine) if mine <= kept else 0
                share = ways / math.comb(own + others, kept)
                sums[2 * mine - kept] = sums.get(2 * mine - kept, 0.0) + chance * share
        laws.append(law(list(sums.values()), list(sums), std))
    event = TruncatedPoissonSampled(Gaussian(std), rate, records, capacity)
    found = groups.grouped(event, rows)
    poisson = groups.grouped(PoissonSampled(Gaussian(std), rate), rows)
    too_little = []
    for epsilon in (0.0, 0.03, 0.3, 0.6):
        for p, q in (laws, laws[::-1]):
            exact = np.maximum(p - math.exp(epsilon) * q, 0.0).sum() * STEP
            assert accounting.delta(found, epsilon) >= exact
            too_little.append(exact > accounting.delta(poisson, epsilon))
    # Negative control: where records displace each other the Poisson group alone is too little.
    assert any(too_little) == (capacity in (30, 33))
    assert groups.grouped(event, 1) == event


def test_grouped_truncation_is_free_with_room():
    event = TruncatedPoissonSampled(Gaussian(4.0), 0.01, 10_000, 250)
    poisson = groups.grouped(PoissonSampled(Gaussian(4.0), 0.01), 3)
    free = accounting.epsilon(groups.grouped(Repeated(event, 100), 3), 1e-6)
    base = accounting.epsilon(Repeated(poisson, 100), 1e-6)
    assert base <= free <= base * (1 + 1e-6)


def test_grouped_refuses_bad_numbers():
    for rows in (0, -1, True, 10**400):
        with pytest.raises((TypeError, ValueError), match="Expected rows"):
            groups.grouped(Gaussian(1.0), rows)
    for event, rows in ((Gaussian(1.0), math.nan), (Gaussian(1.0), None), (Gaussian, 2)):
        with pytest.raises(TypeError):
            groups.grouped(event, rows)  # pyright: ignore
