"""Which statement do moving clip norms keep true? O1, CL5: a step costs what its account says.

A schedule of clip norms costs nothing beside the noise, which follows it; a threshold that is
learned costs its noisy count, in the state's account too.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpfa_jax import REPLACE_ONE, ZERO_OUT, accounting, clipping, optim, random, sampling
from dpfa_jax.optim import plan
from tests import _clipping_common as common

DELTA = 1e-5
SAMPLER = sampling.Poisson(64, 0.25)
FIXED = sampling.WithoutReplacement(64, 16)
WIDE = 40_000


def _private(noise_multiplier: Any = 2.0, sampler=SAMPLER, **options):
    return optim.privatize(
        noise_multiplier=noise_multiplier, sampling=sampler, rng=jax.random.key(0), **options
    )


def _loss(w, x):
    return jnp.sum(w * x)


def _neighbours(run):
    """The largest move by a NULL row, and by the opposite of one."""
    source, null, replaced = np.random.default_rng(0), 0.0, 0.0
    for scale in (1e-3, 1.0, 1e3):
        x = jnp.asarray(source.normal(size=(8, 4)) * scale, jnp.float32)
        for row in range(8):
            whole, gone, other = (
                np.float64(run(each)) for each in (x, x.at[row].set(0), x.at[row].multiply(-1))
            )
            null = max(null, float(np.linalg.norm(whole - gone)))
            replaced = max(replaced, float(np.linalg.norm(whole - other)))
    return null, replaced


def test_scheduled_clip_norms_bound_every_step_and_are_what_noise_is_scaled_by():
    schedule = optax.linear_schedule(2.0, 0.5, 3)
    tx = _private()
    rows = jnp.zeros((3, WIDE))

    @jax.jit
    def step(state, count):
        c = clipping.clipped_grad(_loss, clip_norm=schedule(count))(jnp.zeros(WIDE), rows)
        updates, state = tx.update(c.tree, state, clipped=c)
        return updates, state, c.clip_norm

    @jax.jit
    def summed(count, x):
        c = clipping.clipped_grad(_loss, clip_norm=schedule(count))(jnp.zeros(4), x)
        return c.tree, c.sensitivity(ZERO_OUT), c.sensitivity(REPLACE_ONE)

    state = tx.init(jnp.zeros(WIDE))
    for count in range(5):
        expected = max(2.0 - 0.5 * count, 0.5)
        null, replaced = _neighbours(lambda x, count=count: summed(jnp.int32(count), x)[0])
        _, one, two = summed(jnp.int32(count), jnp.ones((8, 4)))
        assert 0.99 * expected <= null <= float(one) <= expected * (1 + 2**-20)
        assert 1.98 * expected <= replaced <= float(two) <= 2 * expected * (1 + 2**-20)
        updates, state, norm = step(state, jnp.int32(count))
        assert float(norm) == pytest.approx(expected)
        # 40,000 coordinates: .0035 is one standard error of the ratio.
        assert np.std(16.0 * np.asarray(updates)) == pytest.approx(2.0 * expected, rel=0.018)
    # The charge is that of the constant multiplier, whatever the clip norms were.
    assert optim.event(state) == accounting.Repeated(SAMPLER.event(2.0, WIDE, 64), 5)


@pytest.mark.parametrize("sampler", [SAMPLER, FIXED], ids=["zero out", "replace one"])
def test_count_noise_std_is_charged_with_the_gradient_of_the_same_sample(sampler):
    count_std = 3.0
    tx = _private(2.0, sampler, count_noise_std=count_std)
    state = tx.init(jnp.zeros(5))
    c = clipping.clipped_grad(_loss, clip_norm=1.0)(jnp.zeros(5), jnp.ones((3, 5)))
    plain, _ = _private(2.0, sampler).update(
        c.tree, _private(2.0, sampler).init(jnp.zeros(5)), clipped=c
    )
    updates, state = tx.update(c.tree, state, clipped=c)
    np.testing.assert_array_equal(updates, plain)  # the gradient's noise is the one asked for
    charged = optim.event(state).event
    # One unit moves the sum by 1 (2) and the count by ½ (1), in units of their noise:
    moved = math.hypot(1 / 2.0, (0.5 if sampler is SAMPLER else 1.0) / count_std)
    together = sampler.event(1 / moved, 6, 64)
    found, exact = (accounting.epsilon(each, DELTA) for each in (charged, together))
    assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-9)
    assert found > 1.01 * accounting.epsilon(sampler.event(2.0, 6, 64), DELTA)
    count = clipping.threshold_event(count_std, sampler.adjacency)
    assert (count.radius_bits, plan.RADIUS_BITS) == (64, 64)
    np.testing.assert_allclose(moved**2, 1 / 4 + 1 / count.noise_multiplier**2, rtol=1e-12)


def test_adaptive_training_stops_at_its_target_and_tells_a_checkpoint_without_the_count():
    target = (2.0, DELTA)
    tx = _private(2.0, count_noise_std=2.0, target=target)
    settings: dict[str, Any] = dict(
        target_quantile=0.5, learning_rate=0.2, expected_batch_size=16.0, low=0.01, high=10.0
    )

    @jax.jit
    def step(state, norm, rng, x):
        c = clipping.clipped_grad(_loss, clip_norm=norm)(jnp.zeros(4), x)
        updates, state = tx.update(c.tree, state, clipped=c)
        norm = clipping.adapt_clip_norm(rng, c, count_noise_std=2.0, **settings)
        return state, norm, jnp.any(updates != 0)

    state, norm, moved = tx.init(jnp.zeros(4)), jnp.float32(1.0), []
    x = jnp.ones((16, 4))
    for rng in random.split(jax.random.key(1), 9):
        state, norm, go = step(state, norm, rng, x)
        moved.append(bool(go))
    joint = optim.event(tx.init(jnp.zeros(4)))
    assert joint == accounting.NoRelease()
    charged = optim.event(state).event
    allowed = plan.steps_within(charged, plan.Target(*target))
    without = plan.steps_within(SAMPLER.event(2.0, 4, 64), plan.Target(*target))
    assert 0 < allowed < without and moved == [True] * allowed + [False] * (9 - allowed)
    assert optim.epsilon(state, DELTA) <= 2.0
    other = _private(2.0).init(jnp.zeros(4))
    forgotten = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(state))
    with pytest.raises(ValueError, match="restored into another"):
        optim.epsilon(forgotten, DELTA)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_count_noise_std_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="count_noise_std"):
        _private(count_noise_std=bad)


def test_count_noise_std_beside_a_schedule_is_refused():
    with pytest.raises(NotImplementedError, match="count_noise_std"):
        _private(optax.constant_schedule(2.0), count_noise_std=1.0)


def test_heads_of_an_nnx_attention_layer_are_clipped_each_by_itself():
    loss, params, args = common.problem("sequences")

    def label(path, leaf):
        if "attention" not in path or "out/bias" in path:
            return "rest"
        return ("head", 0 if "out/kernel" in path else leaf.ndim - 2)

    bounds = {"head": 0.01, "rest": 0.1}
    run = clipping.clipped_grad(
        loss, clip_norm=lambda tree: clipping.label_groups(tree, label, bounds)
    )
    got = jax.jit(run)(params, *(arg[:1] for arg in args))
    assert {group.name for group in got.groups} == {"rest", "head[0]", "head[1]"}
    assert math.isclose(got.clip_norm, math.sqrt(0.1**2 + 2 * 0.01**2), rel_tol=1e-12)
    attention = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(got.tree)
        if "attention" in jax.tree_util.keystr(path, simple=True, separator="/")
    }
    for head in range(2):
        parts = []
        for path, leaf in attention.items():
            if "out/bias" not in path:
                axis = 0 if "out/kernel" in path else leaf.ndim - 2
                parts.append(np.take(np.asarray(leaf), head, axis))
        assert len(parts) == 7  # kernels and biases of three projections, the kernel of the last
        assert 0.00999 <= common.length(parts) <= 0.01
