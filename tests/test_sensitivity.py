"""Each sensitivity is never exceeded and is reached, by float64 ascent on plain NumPy maps."""

import math

import numpy as np
import pytest

from dpfa_jax import sensitivity
from dpfa_jax.adjacency import GROUP, REPLACE_ONE, SEQUENCE, ZERO_OUT
from dpfa_jax.auditing.attacks import sensitivity_ascent
from tests import oracles

RELATIONS = [ZERO_OUT, REPLACE_ONE, GROUP(2)]


def assert_tight(found, bound):
    """The rule of theory.md, section 10: reached to 1 % and never exceeded."""
    assert 0.99 <= found / bound <= 1.0


def changed_rows(adjacency):
    return adjacency.rows, adjacency.kind != "REPLACE_ONE"


def ascend(fn, shape, adjacency, valid, **options):
    changed, removed = changed_rows(adjacency)
    worst = sensitivity_ascent(
        fn,
        lambda rng: (rng.normal(size=shape), rng.normal(size=shape)),
        oracles.neighbours(changed, removed=removed, valid=valid),
        **options,
    )
    return worst.distance


def rows_in(score_columns, score_bound, value_bound):
    """Rows of (scores, values): scores clipped to a box, values to a ball."""

    def valid(rows):
        scores = np.clip(rows[:, :score_columns], -score_bound, score_bound)
        return np.concatenate(
            [scores, oracles.into_ball(rows[:, score_columns:], value_bound)], axis=1
        )

    return valid


def softmax_ascent(*, rows, changed, score_bound, value_bound, public_weight, queries=2):
    public = np.array([value_bound, 0.0]) if public_weight else None

    def outputs(data):
        return oracles.softmax_outputs(
            data[:, :queries].T,
            data[:, queries:-1],
            public_weight=public_weight,
            public_value=public,
        )

    valid = rows_in(queries, score_bound, value_bound)
    project = oracles.neighbours(changed, removed=False, valid=valid)
    shape = (rows, queries + 3)
    return sensitivity_ascent(
        outputs, lambda rng: (rng.normal(size=shape), rng.normal(size=shape)), project, restarts=3
    ).distance


@pytest.mark.parametrize("public_weight", [0.0, 0.7])
@pytest.mark.parametrize(("rows", "changed"), [(2, 1), (4, 1), (4, 2)])
def test_softmax_output_is_reached(rows, changed, public_weight):
    setting = dict(value_bound=1.5, score_bound=0.8, public_weight=public_weight)
    found = softmax_ascent(rows=rows, changed=changed, **setting)
    bound = sensitivity.softmax_output(rows=[rows] * 2, changed_rows=changed, **setting)
    assert_tight(found, bound)
    with pytest.raises(AssertionError):  # negative control: a bound 3 % too small is caught
        assert_tight(found, 0.97 * bound)
    with pytest.raises(AssertionError):  # and one that counts a single query
        assert_tight(found, sensitivity.softmax_output(rows=rows, changed_rows=changed, **setting))


def test_softmax_output_adds_squares_over_outputs_that_see_different_rows():
    one = [sensitivity.softmax_output(value_bound=1, score_bound=1, rows=n) for n in (1, 2, 3)]
    all_three = sensitivity.softmax_output(value_bound=1, score_bound=1, rows=[1, 2, 3])
    assert all_three == pytest.approx(math.sqrt(sum(x**2 for x in one)), rel=1e-12)
    assert sensitivity.softmax_output(value_bound=1, score_bound=1, rows=0) == 0
    assert sensitivity.softmax_output(value_bound=1, score_bound=1e3, rows=10**9) >= 2


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("adjacency", RELATIONS, ids=str)
def test_attention_sums_is_reached(adjacency, weight):
    queries, value_bound, cap = 2, 1.5, 0.3

    def sums(data):
        return oracles.attention_sums(
            data[:, :queries].T,
            data[:, queries:-1],
            data[:, -1],
            cap=cap,
            denominator_weight=weight,
        )

    found = ascend(
        sums, (3, queries + 3), adjacency, rows_in(queries, 5.0, value_bound), restarts=4
    )
    setting = dict(value_bound=value_bound, denominator_weight=weight, adjacency=adjacency)
    bound = sensitivity.attention_sums(queries=queries, **setting)
    assert_tight(found, bound)
    with pytest.raises(AssertionError):
        assert_tight(found, 0.97 * bound)
    with pytest.raises(AssertionError):  # √m dropped
        assert_tight(found, sensitivity.attention_sums(queries=1, **setting))


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("adjacency", RELATIONS, ids=str)
def test_clipped_contributions_is_reached(adjacency, weight):
    queries, value_bound, clip_norm = 2, 1.5, 0.9

    def sums(data):
        return oracles.clipped_contributions(
            data[:, :queries].T,
            data[:, queries:-1],
            data[:, -1],
            cap=0.3,
            denominator_weight=weight,
            clip_norm=clip_norm,
        )

    found = ascend(
        sums, (3, queries + 3), adjacency, rows_in(queries, 5.0, value_bound), restarts=4
    )
    bound = sensitivity.clipped_contributions(
        clip_norm=clip_norm, value_bound=value_bound, denominator_weight=weight, adjacency=adjacency
    )
    assert_tight(found, bound)
    with pytest.raises(AssertionError):
        assert_tight(found, 0.97 * bound)


def gaussian_process_setting(weight):
    gamma, clip_norm = 0.7, 0.9
    # Far apart, so that replaced records can be nearly orthogonal.
    queries = np.array([[2.4, 0.1], [-2.4, 0.3], [0.2, 2.0]])
    whiten = np.linalg.inv(np.linalg.cholesky(np.exp(gamma * queries @ queries.T)))

    def whitened(data):
        return whiten @ oracles.kernel_sums(
            queries,
            data[:, :2],
            data[:, 2:-1],
            data[:, -1],
            gamma=gamma,
            denominator_weight=weight,
            clip_norm=clip_norm,
        )

    return whitened, clip_norm


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("adjacency", RELATIONS, ids=str)
def test_gaussian_process_is_reached(adjacency, weight):
    whitened, clip_norm = gaussian_process_setting(weight)
    found = ascend(whitened, (3, 5), adjacency, rows_in(2, 3.0, 1.5), restarts=4, steps=300)
    bound = sensitivity.gaussian_process(
        clip_norm=clip_norm, value_bound=1.5, denominator_weight=weight, adjacency=adjacency
    )
    assert_tight(found, bound)
    with pytest.raises(AssertionError):
        assert_tight(found, 0.97 * bound)


def test_gaussian_process_needs_every_query_to_see_the_record():
    # The precondition of S5 matters: a causal mask on the shift breaks the same bound.
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(200, 4))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    gram = np.exp(2 * (queries @ queries.T - 1))
    factor = np.linalg.cholesky(gram + 1e-4 * np.eye(200))
    shift = gram[:, 100]
    bound = sensitivity.gaussian_process(
        clip_norm=1, value_bound=1, denominator_weight=0, adjacency=ZERO_OUT
    )
    assert np.linalg.norm(np.linalg.solve(factor, shift)) <= bound
    masked = np.where(np.arange(200) >= 100, shift, 0)
    assert np.linalg.norm(np.linalg.solve(factor, masked)) > 10 * bound


@pytest.mark.parametrize("adjacency", RELATIONS, ids=str)
def test_random_features_is_reached(adjacency):
    # One frequency: features of two keys can be opposite, which is what REPLACE_ONE pays for.
    frequencies = np.array([[1.3, -0.4]])

    def memory(data):
        return oracles.random_feature_sums(
            frequencies,
            data[:, :2],
            data[:, 2:-1],
            data[:, -1],
            gamma=0.7,
            denominator_weight=0.5,
            clip_norm=0.9,
        )

    found = ascend(memory, (3, 5), adjacency, rows_in(2, 3.0, 1.5), restarts=4)
    bound = sensitivity.random_features(clip_norm=0.9, adjacency=adjacency)
    assert_tight(found, bound)
    with pytest.raises(AssertionError):
        assert_tight(found, 0.97 * bound)


def test_random_features_and_gaussian_process_add_squares_over_memories():
    setting = dict(clip_norm=2, adjacency=ZERO_OUT)
    assert sensitivity.random_features(memories=9, **setting) == pytest.approx(6, rel=1e-12)
    joint = sensitivity.gaussian_process(memories=9, value_bound=1, denominator_weight=1, **setting)
    assert joint == pytest.approx(6, rel=1e-12)


def test_sequence_release_is_reached():
    def clipped(sequence):
        return sequence * min(1.0, 0.9 / max(np.linalg.norm(sequence), 1e-300))

    worst = sensitivity_ascent(
        clipped,
        lambda rng: (rng.normal(size=(3, 2)), rng.normal(size=(3, 2))),
        lambda left, right: (left, right),
    )
    bound = sensitivity.sequence_release(clip_norm=0.9)
    assert_tight(worst.distance, bound)
    with pytest.raises(AssertionError):  # the published mistake: C instead of 2C
        assert_tight(worst.distance, bound / 2)


@pytest.mark.parametrize("candidates", [2, 3, 6])
@pytest.mark.parametrize("score_bound", [0.05, 1.0, 4.0])
def test_sampled_attention_is_reached(score_bound, candidates):
    def project(left, right):
        left, right = (np.clip(side, -score_bound, score_bound) for side in (left, right))
        right[1:] = left[1:] = (left[1:] + right[1:]) / 2
        return left, right

    worst = sensitivity_ascent(
        oracles.log_softmax,
        lambda rng: (rng.normal(size=candidates), rng.normal(size=candidates)),
        project,
        measure=lambda moved: float(np.abs(moved).max()),
    )
    bound = sensitivity.sampled_attention(score_bound=score_bound, candidates=candidates)
    assert_tight(worst.distance, bound)
    assert bound < 2 * score_bound
    with pytest.raises(AssertionError):
        assert_tight(worst.distance, 0.97 * bound)


def test_sampled_attention_of_one_candidate_reveals_nothing():
    assert sensitivity.sampled_attention(score_bound=5.0, candidates=1) == 0


def test_sampled_attention_zcdp_is_reached_and_not_exceeded():
    worst = 0.0
    for score_bound in (0.1, 0.5, 1.0, 3.0):
        bound = sensitivity.sampled_attention_zcdp(score_bound=score_bound)
        for candidates in (2, 3, 10):
            for others in np.linspace(-score_bound, score_bound, 9):
                pair = [
                    np.exp(oracles.log_softmax(np.array([s] + [others] * (candidates - 1))))
                    for s in (score_bound, -score_bound)
                ]
                for order in (1, 1.01, 1.5, 2, 4, 16, 64):
                    cost = max(
                        oracles.renyi_divergence(*pair, order),
                        oracles.renyi_divergence(*pair[::-1], order),
                    )
                    worst = max(worst, cost / (order * bound))
    assert_tight(worst, 1.0)


def test_default_denominator_weight_minimises_the_linearised_error():
    # ZERO_OUT: noise² of the ratio ∝ (Cv²+c²)(d + 1·‖o‖²·d…): numerator d coordinates, and the
    # denominator's coordinate scaled by Cv/c, both with std ∝ √(Cv²+c²).
    value_bound, dim = 2.0, 16
    grid = value_bound * np.geomspace(0.01, 10, 4001)
    error = (value_bound**2 + grid**2) * (dim + value_bound**2 / grid**2)
    best = grid[np.argmin(error)]
    chosen = sensitivity.default_denominator_weight(
        value_bound=value_bound, value_dim=dim, adjacency=ZERO_OUT
    )
    assert chosen == pytest.approx(best, rel=2e-3)


def test_default_denominator_weight_is_free_under_replacement():
    chosen = sensitivity.default_denominator_weight(
        value_bound=2.0, value_dim=16, adjacency=REPLACE_ONE
    )

    def bound(weight):
        return sensitivity.attention_sums(
            value_bound=2.0, denominator_weight=weight, queries=1, adjacency=REPLACE_ONE
        )

    assert bound(chosen) == pytest.approx(bound(0.0), rel=1e-12)
    assert bound(1.01 * chosen) > bound(0.0) * 1.001


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, math.inf])
def test_every_sensitivity_refuses_a_bad_bound(bad):
    calls = [
        lambda: sensitivity.softmax_output(value_bound=bad, score_bound=1.0, rows=3),
        lambda: sensitivity.attention_sums(
            value_bound=bad, denominator_weight=1.0, queries=1, adjacency=ZERO_OUT
        ),
        lambda: sensitivity.clipped_contributions(
            clip_norm=bad, value_bound=1.0, denominator_weight=1.0, adjacency=ZERO_OUT
        ),
        lambda: sensitivity.gaussian_process(
            clip_norm=bad, value_bound=1.0, denominator_weight=1.0, adjacency=ZERO_OUT
        ),
        lambda: sensitivity.random_features(clip_norm=bad, adjacency=ZERO_OUT),
        lambda: sensitivity.sequence_release(clip_norm=bad),
        lambda: sensitivity.sampled_attention(score_bound=bad or -1.0, candidates=3),
        lambda: sensitivity.sampled_attention_zcdp(score_bound=bad or -1.0),
        lambda: sensitivity.gaussian_process_rounding(
            queries=1,
            jitter=bad,
            jitter_error=0.0,
            weight_error=0.0,
            sum_error=0.0,
            adjacency=ZERO_OUT,
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Expected finite"):
            call()


def test_every_record_sensitivity_refuses_a_whole_sequence():
    for call in (
        lambda: sensitivity.attention_sums(
            value_bound=1.0, denominator_weight=1.0, queries=1, adjacency=SEQUENCE
        ),
        lambda: sensitivity.clipped_contributions(
            clip_norm=1.0, value_bound=1.0, denominator_weight=1.0, adjacency=SEQUENCE
        ),
        lambda: sensitivity.random_features(clip_norm=1.0, adjacency=SEQUENCE),
    ):
        with pytest.raises(ValueError, match="sequence_release"):
            call()


def test_sensitivities_do_not_vanish_for_extreme_bounds():
    tiny = sensitivity.attention_sums(
        value_bound=1e-200, denominator_weight=1e-200, queries=2, adjacency=ZERO_OUT
    )
    assert tiny >= 2e-200
    assert sensitivity.sampled_attention(score_bound=800.0, candidates=2) >= 1600 - math.log(2)
    assert sensitivity.clipped_contributions(
        clip_norm=1.0, value_bound=1e-200, denominator_weight=1e200, adjacency=REPLACE_ONE
    ) >= math.sqrt(2)
