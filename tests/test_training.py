"""Which statement does this file keep true? Sampler, clipping, noise and account are one run.

Checkpoints go on bit for bit, ε included; nothing that a batch can hold (nothing, NaN) changes what
a step costs; and a canary that is planted finds no more than what the state says was spent.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from dpfa_jax import accounting, clipping, optim, random, sampling
from dpfa_jax.auditing import bounds

DELTA = 1e-5
SAMPLER = sampling.TruncatedPoisson(40, 0.2, 36)
PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
RECORDS = {
    "x": jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32),
    "y": jnp.asarray(np.random.default_rng(1).normal(size=(40, 2)), jnp.float32),
}


def _loss(params, record):
    return jnp.sum((record["x"] @ params["w"] + params["b"] - record["y"]) ** 2)


CLIPPED = clipping.clipped_grad(_loss, clip_norm=1.0)


@functools.cache
def _private(noise_multiplier, seed=0, target=None):
    tx = optim.privatize(
        noise_multiplier=noise_multiplier,
        sampling=SAMPLER,
        rng=jax.random.key(seed),
        target=target,
    )
    return optax.chain(tx, optax.adam(0.1))


@functools.cache
def _step(tx):
    @jax.jit
    def step(training, records):
        params, state, drawn = training
        batch, drawn = SAMPLER.next(drawn)
        c = CLIPPED(params, batch.gather(records), mask=batch.mask)
        updates, state = tx.update(c.tree, state, params, clipped=c)
        return optax.apply_updates(params, updates), state, drawn

    return step


def _start(tx):
    return PARAMS, tx.init(PARAMS), SAMPLER.init(jax.random.key(1))


def _bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "noise", [1.5, optax.linear_schedule(2.0, 1.0, 6)], ids=["fixed", "schedule"]
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(noise, tmp_path):
    tx = _private(noise, target=(5.0, DELTA))
    step, training, trail = _step(tx), _start(tx), []
    with ocp.StandardCheckpointer() as checkpointer:
        for count in range(5):
            training = step(training, RECORDS)
            trail.append((_bits(training), optim.epsilon(training[1], DELTA)))
            if count == 1:
                checkpointer.save(tmp_path / "two", training)
                checkpointer.wait_until_finished()
        # As another process does: nothing but the file and the configuration is left.
        again = _private.__wrapped__(noise, target=(5.0, DELTA))
        abstract = jax.eval_shape(lambda: _start(again))
        restored = checkpointer.restore(tmp_path / "two", abstract)
        assert (_bits(restored), optim.epsilon(restored[1], DELTA)) == trail[1]
        step = _step(again)
        for expected in trail[2:4]:
            restored = step(restored, RECORDS)
            assert (_bits(restored), optim.epsilon(restored[1], DELTA)) == expected
        if noise == 1.5:
            other = _private(0.5)
            abstract = jax.eval_shape(lambda: _start(other))
            mistaken = checkpointer.restore(tmp_path / "two", abstract)
            with pytest.raises(ValueError, match="restored into another"):
                optim.epsilon(mistaken[1], DELTA)


def test_epsilon_of_a_checkpoint_is_that_of_dp_accounting(tmp_path):
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    tx = _private(1.5)
    step, training = _step(tx), _start(tx)
    orders = np.array([float(order) for order in range(2, 200)])
    for count in range(1, 4):
        training = step(training, RECORDS)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(count), training[1])
            checkpointer.wait_until_finished()
            state = checkpointer.restore(
                tmp_path / str(count), jax.eval_shape(lambda: tx.init(PARAMS))
            )
        event = optim.event(state)
        assert isinstance(event, accounting.Repeated) and event.count == count
        oracle = RdpAccountant(orders)
        oracle.compose(dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(1.5)), count)
        curve = accounting.rdp_curve(event, orders)
        np.testing.assert_allclose(curve, oracle._rdp, rtol=1e-6)
        # Real orders do better than whole ones; truncation and the end of the noise cost a little.
        found = optim.epsilon(state, DELTA)
        assert oracle.get_epsilon(DELTA) * 0.99 < found < oracle.get_epsilon(DELTA) * 1.01


def test_training_without_noise_or_a_bound_is_gradient_descent():
    everyone = sampling.Poisson(40, 1.0)
    noise = optim.privatize(noise_multiplier=0.0, sampling=everyone, rng=jax.random.key(0))
    tx = optax.chain(noise, optax.sgd(0.05))
    clipped = clipping.clipped_grad(_loss, clip_norm=1e30)

    def mean(params):
        return jnp.mean(jax.vmap(_loss, (None, 0))(params, RECORDS))

    def step(carry, _):
        params, plain, state, drawn = carry
        batch, drawn = everyone.next(drawn)
        c = clipped(params, batch.gather(RECORDS), mask=batch.mask)
        updates, state = tx.update(c.tree, state, params, clipped=c)
        params = optax.apply_updates(params, updates)
        plain = jax.tree.map(lambda leaf, g: leaf - 0.05 * g, plain, jax.grad(mean)(plain))
        return (params, plain, state, drawn), None

    start = (PARAMS, PARAMS, tx.init(PARAMS), everyone.init(jax.random.key(1)))
    ours, plain, state, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=20)[0])(start)
    assert float(jnp.linalg.norm(plain["w"])) > 0.1
    for name in PARAMS:
        np.testing.assert_allclose(ours[name], plain[name], rtol=1e-5, atol=1e-6)
    assert optim.epsilon(state[0], DELTA) == math.inf


def test_units_without_rows_or_with_nothing_but_nans_add_nothing():
    run = clipping.clipped_grad(_loss, clip_norm=1.0, unit=3, microbatch_size=7)
    ids = jnp.arange(40) % 3
    nobody = jnp.zeros(40, bool)
    poisoned = jax.tree.map(lambda leaf: jnp.full_like(leaf, math.nan), RECORDS)
    summed = jax.jit(lambda records, mask, ids: run(PARAMS, records, mask=mask, unit_ids=ids))
    for records, mask, own, bad in (
        (RECORDS, nobody, ids, 0),
        (poisoned, nobody, ids, 0),
        (poisoned, ~nobody, ids, 3),
        (RECORDS, ~nobody, ids - 3, 0),  # all outside of [0, 3)
    ):
        made = summed(records, mask, own)
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(made.tree))
        assert int(made.nonfinite) == bad
    # One bad number, in one column of the gradient, takes its whole unit and nobody else's.
    one = RECORDS | {"y": RECORDS["y"].at[0, 0].set(math.nan)}
    made, without = summed(one, ~nobody, ids), summed(RECORDS, ids != 0, ids)
    assert _bits(made.tree) == _bits(without.tree) and int(made.nonfinite) == 1


def test_empty_batches_release_noise_and_are_charged():
    nobody = sampling.TruncatedPoisson(40, 1e-12, 4)
    tx = optim.privatize(noise_multiplier=1.0, sampling=nobody, rng=jax.random.key(0))
    batch, _ = nobody.next(nobody.init(jax.random.key(0)))
    assert not np.any(np.asarray(batch.mask))

    @jax.jit
    def step(state):
        c = CLIPPED(PARAMS, batch.gather(RECORDS), mask=batch.mask)
        return c.tree, *tx.update(c.tree, state, PARAMS, clipped=c)

    sums, updates, state = step(tx.init(PARAMS))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(sums))
    # Divided by the public expectation 4e-11, not by the 0 that was drawn.
    assert np.all(np.isfinite(np.asarray(updates["w"]))) and np.all(np.asarray(updates["w"]) != 0)
    assert optim.event(state) == accounting.Repeated(nobody.event(1.0, 8, 64), 1)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_batches_of_poison_cost_and_move_what_any_batch_does(poison):
    tx = _private(1.5)
    step = _step(tx)
    hostile = jax.tree.map(lambda leaf: jnp.full_like(leaf, poison), RECORDS)
    clean, poisoned = step(_start(tx), RECORDS), step(_start(tx), hostile)
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(poisoned[0]))
    assert optim.epsilon(poisoned[1], DELTA) == optim.epsilon(clean[1], DELTA)
    again = step(poisoned, RECORDS)
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(again[0]))


def test_one_poisoned_record_is_the_same_as_its_absence():
    hostile = RECORDS | {"x": RECORDS["x"].at[7].set(jnp.nan)}
    mask = jnp.ones(40, bool)
    clipped = jax.jit(lambda records, mask: CLIPPED(PARAMS, records, mask=mask))
    with_nan, without = clipped(hostile, mask), clipped(RECORDS, mask.at[7].set(False))
    assert _bits(with_nan.tree) == _bits(without.tree)
    assert int(with_nan.nonfinite) == 1 and int(without.nonfinite) == 0


# A canary ---------------------------------------------------------------------------------------

_Q, _STEPS, _Z, _RUNS = 0.25, 4, 1.0, 100_000
_AUDITED = sampling.Poisson(8, _Q)


def _canary_scores(seed: int, is_present: bool, claimed_share: float) -> np.ndarray:
    """Log-likelihood ratios of short runs; noise is scaled to a share of the true sensitivity."""
    data = jnp.zeros((8, 2)).at[1:, 1].set(jnp.linspace(-2.0, 2.0, 7))
    data = data.at[0, 0].set(-100.0 if is_present else 0.0)  # its gradient is clipped to norm 1
    clipped = clipping.clipped_grad(lambda w, x: jnp.dot(w, x), clip_norm=1.0)

    def run(rng):
        tx = optax.chain(
            optim.privatize(noise_multiplier=_Z, sampling=_AUDITED, rng=random.fold_in(rng, 0)),
            optax.sgd(1.0),
        )

        def step(carry, _):
            params, state, drawn = carry
            batch, drawn = _AUDITED.next(drawn)
            c = clipped(params, batch.gather(data), mask=batch.mask)
            c = dataclasses.replace(c, static_clip_norm=claimed_share)
            updates, state = tx.update(c.tree, state, params, clipped=c)
            return (optax.apply_updates(params, updates), state, drawn), updates[0]

        w = jnp.zeros(2)
        start = (w, tx.init(w), _AUDITED.init(random.fold_in(rng, 1)))
        (_, state, _), moves = jax.lax.scan(step, start, length=_STEPS)
        seen = moves * _AUDITED.expected_batch_size  # the canary pushes by +1 where it is drawn
        z = _Z * claimed_share
        ratio = _Q * jnp.expm1((2.0 * seen - 1.0) / (2.0 * z * z))
        return jnp.sum(jnp.log1p(ratio)), state[0].accountant.counts[0]

    keys = random.split(jax.random.key(seed), _RUNS)
    scores, counts = jax.jit(jax.vmap(run))(keys)
    assert np.all(np.asarray(counts) == _STEPS)
    return np.asarray(scores)


@pytest.mark.slow
@pytest.mark.parametrize(("claimed_share", "is_caught"), [(1.0, False), (0.5, True)])
def test_canary_finds_no_more_than_was_accounted_and_more_where_noise_is_halved(
    claimed_share, is_caught
):
    delta = 1e-2
    event = accounting.Repeated(_AUDITED.event(_Z, 2, 64), _STEPS)
    accounted = accounting.epsilon(event, delta)
    published = accounting.pld.epsilon(event, delta)
    found = bounds.epsilon_lower_bound(
        _canary_scores(1, False, claimed_share),
        _canary_scores(2, True, claimed_share),
        delta=delta,
        failure_probability=1e-6,
    )
    assert published < accounted
    if is_caught:
        assert found > 1.3 * accounted
    else:
        assert 0.5 * published < found <= published
