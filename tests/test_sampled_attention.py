import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dpfa_jax
from dpfa_jax import accounting, random
from tests.attention_common import (
    KEY,
    B,
    H,
    N,
    S,
    T,
    arrays,
)

# Sampled attention -------------------------------------------------------------------------------


def test_sampled_attention_draws_from_the_softmax_of_clipped_scores():
    query, key, _ = arrays()
    keys = random.split(KEY, 4000)
    drawn = jax.jit(
        jax.vmap(lambda rng: dpfa_jax.sampled_attention(query, key, rng=rng, score_bound=0.5))
    )(keys)
    scores = np.einsum(
        "btnh,bsh->btns", *(np.asarray(x, np.float64) for x in (query, key[:, :, 0]))
    )
    weights = np.exp(np.clip(scores / math.sqrt(H), -0.5, 0.5))
    weights /= weights.sum(-1, keepdims=True)
    counts = (np.asarray(drawn)[..., None] == np.arange(S)).sum(0)
    # Pearson's statistic of all B·T·N draws together; false alarms 1e-6. Plain scores must fail.
    free = weights.size - B * T * N
    limit = stats.chi2.isf(1e-6, free)
    assert np.sum((counts - 4000 * weights) ** 2 / (4000 * weights)) < limit
    plain = np.exp(scores / math.sqrt(H))
    plain /= plain.sum(-1, keepdims=True)
    assert np.sum((counts - 4000 * plain) ** 2 / (4000 * plain)) > limit


def test_sampled_attention_is_charged_for_every_query_and_head():
    query, key, _ = arrays()
    event = accounting.events(
        lambda q, k, rng: dpfa_jax.sampled_attention(q, k, rng=rng, score_bound=0.1),
        query,
        key,
        KEY,
    )
    exact = B * T * N * (0.2 + math.log1p(math.expm1(-0.2) / S))
    # The sampler's integer weights cost a little more than the real-valued mechanism, never less.
    assert exact <= accounting.epsilon(event, 0.0) <= exact * (1 + 1e-4)


def test_sampled_attention_keeps_rows_that_are_not_finite_as_candidates():
    query, key, _ = arrays()
    spoiled = key.at[:, 3].set(jnp.nan)
    keys = random.split(KEY, 2000)
    drawn = jax.jit(
        jax.vmap(lambda rng: dpfa_jax.sampled_attention(query, spoiled, rng=rng, score_bound=0.1))
    )(keys)
    assert np.all(drawn >= 0) and np.any(np.asarray(drawn) == 3)
    with pytest.raises(ValueError, match="empty key axis"):
        dpfa_jax.sampled_attention(query, key[:, :0], rng=KEY, score_bound=1.0)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="score_bound"):
            dpfa_jax.sampled_attention(query, key, rng=KEY, score_bound=bad)
