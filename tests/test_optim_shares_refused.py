"""Which statement does noise in shares keep true when misused? O7: an error or NaN, never less.

Every test runs on the eight devices of tests/conftest.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpfa_jax import optim
from dpfa_jax.optim import account, shares
from tests.optim_common import PARAMS, certificate
from tests.shares_common import LARGE, ROWS, SAME, in_shares, mapped, mesh, on_each

DELTA = 1e-5


def _refused(tx, change, *, sizes=(8,), spec=ROWS, **options):
    def step(state, own):
        c = change(certificate(jax.tree.map(lambda leaf: leaf[0], own)))
        return tx.update(c.tree, state, clipped=c)[0]

    run = jax.shard_map(step, mesh=mesh(*sizes), in_specs=(P(), spec), out_specs=P(), **options)
    rows = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), PARAMS)
    jax.eval_shape(run, tx.init(PARAMS), rows)


def test_sums_that_shares_are_not_for_are_refused():

    def same(c):
        return c

    with pytest.raises(ValueError, match=r"without c\.psum"):
        _refused(in_shares(), lambda c: c.psum("data"))
    with pytest.raises(ValueError, match="the same on all shards"):
        _refused(in_shares(), same, spec=P())  # rows that every shard has
    with pytest.raises(ValueError, match="the same on all shards"):  # one leaf of two is summed
        _refused(
            in_shares(),
            lambda c: dataclasses.replace(
                c, tree=c.tree | {"b": jax.lax.psum(c.tree["b"], "data")}
            ),
        )
    with pytest.raises(ValueError, match="or in parts"):
        _refused(
            in_shares(), lambda c: c.psum("data", {"a": P(None, "data"), "b": P()}), sizes=(4,)
        )
    with pytest.raises(ValueError, match="sum over all shards"):  # the second axis is nobody's
        _refused(in_shares(), same, sizes=(2, 4), spec=P(("data", "model")))
    with pytest.raises(ValueError, match=r"without c\.psum"):  # the second axis was added up
        _refused(
            in_shares(axes=("data", "model")),
            lambda c: c.psum("model"),
            sizes=(2, 4),
            spec=P(("data", "model")),
        )
    _refused(in_shares(), lambda c: c.psum("model"), sizes=(2, 4), spec=P(("data", "model")))
    with pytest.raises(ValueError, match="manual mesh axis, got 'rows'"):
        _refused(in_shares(axes="rows"), same)
    with pytest.raises(ValueError, match=r"check_vma=False|the same on all shards"):
        _refused(in_shares(), same, check_vma=False)
    with pytest.raises(ValueError, match="scaled, averaged"):
        tx = in_shares()
        _refused(optax.chain(optax.scale(2.0), tx), same)
    with pytest.raises(ValueError, match="how many units"):
        _refused(in_shares(), lambda c: dataclasses.replace(c, units=None))
    with pytest.raises(ValueError, match="integers of 32 bits"):
        _refused(in_shares(), lambda c: dataclasses.replace(c, units=1 << 17))
    with pytest.raises(ValueError, match="clipped by"):
        _refused(in_shares(), lambda c: dataclasses.replace(c, unit="unit"))
    with pytest.raises(ValueError, match="sum over all shards"):
        _refused(optim.accumulate(in_shares(), 2), same)
    with pytest.raises(ValueError, match=r"c\.psum\('data'\) first"):
        _refused(in_shares(axes=None), same)


def test_shares_outside_of_a_mesh_are_refused():
    tx = in_shares()
    c = certificate(PARAMS)
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        tx.update(c.tree, tx.init(PARAMS), clipped=c)

    def one(sums):
        c = certificate(sums)
        return tx.update(c.tree, tx.init(PARAMS), clipped=c)[0]

    rows = on_each(PARAMS, 8)
    with pytest.raises(ValueError, match="manual mesh axis"):
        jax.vmap(one, axis_name="data")(rows)
    with pytest.raises(ValueError, match="Expected"):
        jax.pmap(one, axis_name="data")(rows)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((), ValueError),
        (("data", "data"), ValueError),
        (8, TypeError),
        (("data", 8), TypeError),
        (True, TypeError),
        ({"data": 8}, TypeError),
        (b"data", TypeError),
    ],
)
def test_shares_that_name_no_axes_are_refused(value, error):
    with pytest.raises(error, match="Expected shares"):
        in_shares(axes=value)


def test_too_many_shards_are_refused(monkeypatch):
    monkeypatch.setattr(shares, "SHARDS", 4)
    with pytest.raises(ValueError, match="at most 4 shards, got 8"):
        _refused(in_shares(), lambda c: c)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**18.5])
def test_a_poisoned_sum_on_one_shard_poisons_all_of_the_release(value):
    sums = jax.tree.map(lambda leaf: leaf.at[3].set(value), on_each(PARAMS, 8))
    only = sums | {"b": on_each(PARAMS, 8)["b"]}
    tx = in_shares()
    for given in (sums, only):
        updates, _ = mapped(tx, 8)(tx.init(PARAMS), given)
        assert all(np.all(np.isnan(np.asarray(leaf))) for leaf in jax.tree.leaves(updates))


def test_traced_clip_norms_of_the_shards_are_charged_by_their_largest():
    tx = in_shares()

    def step(state, own, norm):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], own), norm[0])
        return tx.update(c.tree, state, clipped=c)[0]

    run = jax.shard_map(step, mesh=mesh(8), in_specs=(SAME, ROWS, ROWS), out_specs=SAME)
    run = jax.jit(run)
    rows, state = on_each(LARGE, 8), tx.init(LARGE)
    ones = jnp.ones(8)
    plain, mixed = run(state, rows, ones), run(state, rows, ones.at[5].set(4.0))
    ratio = np.std(np.asarray(mixed["w"])) / np.std(np.asarray(plain["w"]))
    assert ratio == pytest.approx(4.0, rel=1e-4)
    for bad in (math.nan, math.inf):
        poisoned = run(state, rows, ones * bad)
        assert np.all(np.isnan(np.asarray(poisoned["w"])))


def test_a_schedule_with_too_little_noise_for_32_bits_poisons_the_step():
    tx = in_shares(optax.constant_schedule(2.0**-14))
    rows = on_each(PARAMS, 8)  # of 16 units each: 128 > 2⁻¹⁴·2¹⁸
    updates, _ = mapped(tx, 8)(tx.init(PARAMS), rows)
    assert np.all(np.isnan(np.asarray(updates["a"])))
    tx = in_shares(optax.constant_schedule(2.0**-10))
    updates, _ = mapped(tx, 8)(tx.init(PARAMS), rows)
    assert np.all(np.isfinite(np.asarray(updates["a"])))


def test_shares_without_noise_are_the_plain_sum():
    tx = in_shares(0.0)
    sums = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), PARAMS)
    updates, state = mapped(tx, 8)(tx.init(PARAMS), sums)
    assert np.all(np.asarray(updates["a"]) == 0.5)
    assert optim.epsilon(state, DELTA) == math.inf
    assert account.plan_of(state.accountant).tolist() == np.asarray(state.plan).tolist()


def test_the_largest_sums_that_are_allowed_do_not_overflow():
    # 2¹⁸ units of norm 1 on eight shards, all in one direction, with noise of 1.
    units = 1 << 15
    tx = in_shares(1.0)
    sums = jax.tree.map(lambda leaf: jnp.full((8, *leaf.shape), float(units)), PARAMS)

    def step(state, own):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
        c = dataclasses.replace(c, units=units)
        return tx.update(c.tree, state, clipped=c)[0]

    run = jax.shard_map(step, mesh=mesh(8), in_specs=(SAME, ROWS), out_specs=SAME)
    updates = jax.jit(run)(tx.init(PARAMS), sums)
    assert np.max(np.abs(16 * np.asarray(updates["a"]) - 8 * units)) < 6.0
