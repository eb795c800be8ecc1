"""The auditor: what it reports is true, it sees what it claims to see, and it fires."""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dpfa_jax.auditing.attacks import sensitivity_ascent, two_point_direction, two_point_scores
from dpfa_jax.auditing.bounds import clopper_pearson, epsilon_lower_bound, mu_lower_bound


def binomial_tail(trials, probability, at_least):
    """P(Bin(n, p) ≥ k) to 40 digits."""
    with mpmath.workdps(40):
        p = mpmath.mpf(probability)
        term = mpmath.binomial(trials, at_least) * p**at_least * (1 - p) ** (trials - at_least)
        total = mpmath.mpf(0)
        for k in range(at_least, trials + 1):
            total += term
            if term < total * mpmath.mpf(10) ** -30:
                break
            term *= mpmath.mpf(trials - k) / (k + 1) * p / (1 - p)
        return total


@pytest.mark.parametrize("alpha", [0.05, 5e-7])
@pytest.mark.parametrize(
    ("successes", "trials"),
    [(1, 20), (19, 20), (20, 20), (7, 1000), (999, 1000), (69_000, 100_000)],
)
def test_clopper_pearson_fails_as_rarely_as_it_says(successes, trials, alpha):
    low, high = clopper_pearson(successes, trials, failure_probability=alpha)
    # Exactly α at the bound itself; the outward 1e-9 may only lower it.
    tail = binomial_tail(trials, low, successes) / alpha
    assert 1 - 1e-3 < tail < 1
    if successes < trials:
        with mpmath.workdps(40):
            tail = binomial_tail(trials, 1 - mpmath.mpf(high), trials - successes) / alpha
        assert 1 - 1e-3 < tail < 1
    else:
        assert high == 1
    inside = low + (high - low) * 1e-4
    assert binomial_tail(trials, inside, successes) > alpha  # negative control: a tighter one fails


def test_clopper_pearson_of_nothing_seen_is_everything():
    assert clopper_pearson(0, 5, failure_probability=0.1)[0] == 0
    with pytest.raises(ValueError, match="successes"):
        clopper_pearson(6, 5, failure_probability=0.1)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_mu_lower_bound_stays_below_the_truth(mu):
    # At failure probability 0.1 at most a tenth of 400 audits may exceed the truth: more than 70
    # has probability 1e-6. At 1e-9 none may: false alarm rate 4e-7.
    rng = np.random.default_rng(7)
    audits, runs = 400, 2000
    loose = tight = cheating = 0
    for _ in range(audits):
        null, alternative = rng.normal(size=runs), rng.normal(mu, 1, size=runs)
        loose += mu_lower_bound(null, alternative, failure_probability=0.1) > mu
        tight += mu_lower_bound(null, alternative, failure_probability=1e-9) > mu
        # Negative control: the threshold is chosen on the runs that evaluate it, and α not split.
        thresholds = np.linspace(-3, mu + 3, 49)
        hits = (alternative[:, None] >= thresholds).sum(0)
        alarms = (null[:, None] >= thresholds).sum(0)
        low = scipy.stats.beta.ppf(0.1, hits, runs - hits + 1)
        high = scipy.stats.beta.isf(0.1, alarms + 1, runs - alarms)
        best = np.nanmax(scipy.special.ndtri(low) - scipy.special.ndtri(high))
        cheating += best > mu
    assert tight == 0
    assert loose <= 70
    assert cheating > 70


@pytest.mark.parametrize(("runs", "excess"), [(10_000, 1.3), (100_000, 1.1), (1_000_000, 1.03)])
@pytest.mark.parametrize("claim", [1.0, 2.0])
def test_mu_lower_bound_detects_a_claim_that_is_too_small(runs, excess, claim):
    # theory.md, section 10. Exact mechanisms must pass, with a false alarm rate of 1e-6 each.
    rng = np.random.default_rng(3)
    null = rng.normal(size=runs)
    assert mu_lower_bound(null, rng.normal(claim * excess, 1, size=runs)) > claim
    honest = mu_lower_bound(null, rng.normal(claim, 1, size=runs))
    assert claim / excess < honest <= claim


def test_mu_lower_bound_of_a_constant_mechanism_is_zero():
    assert mu_lower_bound(np.zeros(100), np.zeros(100)) == 0
    assert mu_lower_bound(np.ones(1000), np.zeros(1000)) == 0  # never negative


def test_mu_lower_bound_sees_an_output_that_gives_the_input_away():
    assert mu_lower_bound(np.full(10_000, -np.inf), np.full(10_000, np.inf)) > 5


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_epsilon_lower_bound_is_reached_by_randomised_response(epsilon):
    rng = np.random.default_rng(0)
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    null = (rng.random(200_000) > truth).astype(float)
    alternative = (rng.random(200_000) < truth).astype(float)
    found = epsilon_lower_bound(null, alternative, delta=0.0)
    assert 0.93 * epsilon < found <= epsilon  # false alarm rate 1e-6
    # With δ as large as the whole advantage nothing is left.
    assert epsilon_lower_bound(null, alternative, delta=2 * truth - 1) < 0.02


def test_epsilon_lower_bound_stays_below_the_truth():
    # N(0,1) against N(1,1): the exact ε at δ = 1e-2 is 2.0498 (δ(ε) solved below).
    def delta(epsilon):
        with mpmath.workdps(30):
            return mpmath.ncdf(0.5 - epsilon) - mpmath.exp(epsilon) * mpmath.ncdf(-0.5 - epsilon)

    with mpmath.workdps(30):
        exact = float(mpmath.findroot(lambda x: delta(x) - mpmath.mpf("0.01"), 2.0))
    rng = np.random.default_rng(1)
    found = [
        epsilon_lower_bound(rng.normal(size=20_000), rng.normal(1, 1, size=20_000), delta=0.01)
        for _ in range(20)
    ]
    assert 0.4 * exact < min(found) and max(found) <= exact  # false alarm rate 2e-5 in total


def test_bounds_refuse_what_would_hide_a_leak():
    good = np.zeros(100)
    for bad in (np.full(100, np.nan), np.zeros((100, 1)), np.zeros(3)):
        for arrays in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match="Expected scores_"):
                mu_lower_bound(*arrays)
            with pytest.raises(ValueError, match="Expected scores_"):
                epsilon_lower_bound(*arrays, delta=1e-5)
    for probability in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="failure_probability"):
            mu_lower_bound(good, good, failure_probability=probability)
    with pytest.raises(ValueError, match="delta"):
        epsilon_lower_bound(good, good, delta=math.nan)


def in_box(left, right):
    return np.clip(left, -1, 1), np.clip(right, -1, 1)


def uniform_pair(rng):
    return rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 3)


def test_sensitivity_ascent_climbs_to_a_corner_and_returns_what_it_evaluated():
    matrix = np.array([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]])
    corners = np.array(np.meshgrid(*[[-2, 2]] * 3)).reshape(3, -1)
    truth = np.linalg.norm(matrix @ corners, axis=0).max()
    worst = sensitivity_ascent(lambda x: matrix @ x, uniform_pair, in_box)
    assert worst.distance == pytest.approx(truth, rel=1e-9)
    again = np.linalg.norm(matrix @ (worst.left - worst.right))
    assert again == worst.distance

    def gradient(left, right):
        slope = matrix.T @ (matrix @ (left - right))
        return slope, -slope

    guided = sensitivity_ascent(
        lambda x: matrix @ x, uniform_pair, in_box, gradient=gradient, restarts=4, steps=60
    )
    assert guided.distance == pytest.approx(truth, rel=1e-9)


def test_sensitivity_ascent_leaves_a_plateau():
    # The gradient vanishes below the cap: only the random coordinate moves get away.
    worst = sensitivity_ascent(
        lambda x: np.maximum(x, 0.9),
        lambda rng: (np.full(3, 0.1), np.full(3, 0.1)),
        in_box,
        restarts=2,
    )
    assert worst.distance == pytest.approx(0.1 * math.sqrt(3), rel=1e-6)


def test_sensitivity_ascent_reports_a_map_that_is_not_finite():
    with pytest.raises(ValueError, match="finite on neighbouring data"):
        sensitivity_ascent(lambda x: np.where(x > 0, x, np.nan), uniform_pair, in_box)


def test_two_point_scores_are_unit_normals_a_mu_apart():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    covariance = root @ root.T + np.eye(4)
    reference, shift = rng.normal(size=4), rng.normal(size=4)
    noise = rng.normal(size=(100_000, 4)) @ np.linalg.cholesky(covariance).T
    null = two_point_scores(
        reference + noise, reference=reference, shift=shift, covariance=covariance
    )
    mu = math.sqrt(shift @ np.linalg.inv(covariance) @ shift)
    _, said = two_point_direction(shift, covariance)
    assert said == pytest.approx(mu, rel=1e-12)
    # 4.9 standard errors: false alarm rate 1e-6.
    assert abs(null.mean()) < 4.9 / math.sqrt(null.size)
    assert abs(null.std() - 1) < 4.9 / math.sqrt(2 * null.size)
    moved = two_point_scores(
        reference + shift + noise, reference=reference, shift=shift, covariance=covariance
    )
    assert moved - null == pytest.approx(mu, rel=1e-9)
    direction, _ = two_point_direction(shift, np.diag(covariance))
    other = direction @ shift / math.sqrt(direction @ covariance @ direction)
    assert other < mu  # negative control: no other direction separates them as well


def test_two_point_audit_fires_on_noise_that_is_a_tenth_too_small():
    rng = np.random.default_rng(5)
    shift = np.array([1.0, 2.0, 2.0])

    def audit(noise_std):
        runs = [
            centre + noise_std * rng.normal(size=(100_000, 3)) for centre in (np.zeros(3), shift)
        ]
        scores = [
            two_point_scores(each, reference=np.zeros(3), shift=shift, covariance=9.0)
            for each in runs
        ]
        return mu_lower_bound(*scores)

    assert audit(3.0) <= 1.0  # false alarm rate 1e-6
    assert audit(0.9 * 3.0) > 1.0


def test_two_point_scores_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="shift of shape"):
        two_point_direction([1.0, 2.0], np.ones(3))
    with pytest.raises(ValueError, match="non-zero shift"):
        two_point_direction([0.0, 0.0], 1.0)
    with pytest.raises(ValueError, match="Expected releases"):
        two_point_scores(np.ones((5, 3)), reference=[0.0], shift=[1.0], covariance=1.0)
