"""The sharded release attacked through the public function, on its analytic worst pairs.

As in test_audit: the lower bound on μ holds with probability 1 − 1e-6, so a correct mechanism fails
once in a million runs, and it must come within 10 % of the claim at 10⁵ runs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import dpfa_jax
from dpfa_jax import accounting
from dpfa_jax.auditing import attacks, bounds

RUNS, FLOOR = 100_000, 1e3  # far above every denominator: the answer is the numerator over it
MESH = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
QUERIES = {"sums": 4, "records": 64}
"""By what is sent; as many are answered together."""
SUMS = {"value_bound": 1.0, "score_cap": 0.5, "denominator_weight": 0.0, "floor": FLOOR}
GROUPED = dpfa_jax.ClippedContributions(1.0, clip_norm=0.7, adjacency=dpfa_jax.GROUP(2), **SUMS)
# name: (mechanism, places of the records that one data set has, what they move the sums by, what
# is sent)
CASES = {
    "one record": (dpfa_jax.IndependentNoise(1.0, **SUMS), [2], 2.0, "sums"),
    "a group on two shards": (GROUPED, [2, 7], 1.4, "sums"),
    "one record sent": (dpfa_jax.IndependentNoise(1.0, **SUMS), [2], 8.0, "records"),
    "a group sent": (GROUPED, [2, 7], 1.4, "records"),
}


@functools.cache
def _sampler(mechanism, exchange):
    rows, sends = P(None, "seq"), exchange == "records"

    def attend(keys, query, key, value):
        def once(rng):
            return dpfa_jax.context_parallel_attention(
                query,
                key,
                value,
                axis_name="seq",
                mechanism=mechanism,
                rng=rng,
                queries="public",
                shard_queries=sends,
                exchange=exchange,
                scale=1.0,
                backend="xla",
            ).reshape(-1)  # this shard's queries, or all

        return jax.vmap(once)(keys)

    specs = {"mesh": MESH, "in_specs": (P(), rows if sends else P(), rows, rows)}
    specs["out_specs"] = rows if sends else P()
    return jax.jit(jax.shard_map(attend, **specs))


def _bound(name, mechanism):
    _, places, moved, exchange = CASES[name]
    queries = QUERIES[exchange]
    query = jnp.ones((1, queries, 1, 1))
    scores = []
    for seed, present in enumerate((places, [])):
        # NaN makes a record NULL.
        key = np.full((1, 8, 1, 1), np.nan, np.float32)
        key[0, present] = 2.0
        rng = jax.random.split(jax.random.key(seed), RUNS)
        run = _sampler(mechanism, exchange)
        answers = np.asarray(run(rng, query, key, np.ones_like(key)), np.float64)
        shift = np.full(queries, moved / math.sqrt(queries) / FLOOR)
        reference = np.zeros(queries)
        scores.append(
            attacks.two_point_scores(answers, reference=reference, shift=shift, covariance=1.0)
        )
    return bounds.mu_lower_bound(*reversed(scores), failure_probability=1e-6)


def _claim(name):
    mechanism, *_, exchange = CASES[name]
    return accounting.mu(mechanism.event((1, QUERIES[exchange], 1, 1), (1, 8, 1, 1)))


@pytest.mark.parametrize(
    "name",
    [
        "a group on two shards",
        pytest.param("one record", marks=pytest.mark.slow),
        "one record sent",
        pytest.param("a group sent", marks=pytest.mark.slow),
    ],
)
def test_sharded_release_leaks_what_its_event_says(name):
    found, claim = _bound(name, CASES[name][0]), _claim(name)
    assert 1 <= claim < 1 + 1e-9
    assert 0.9 * claim < found <= claim


@pytest.mark.parametrize("name", ["a group on two shards", "a group sent"])
def test_the_audit_catches_a_group_counted_as_one_record(name):
    weaker = dataclasses.replace(CASES[name][0], adjacency=dpfa_jax.ZERO_OUT)
    assert _bound(name, weaker) > _claim(name)
