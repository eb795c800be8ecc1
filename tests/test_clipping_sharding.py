"""Which statement does `clipped_grad` keep true on eight devices? One row moves the sum by C."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dpfa_jax import ZERO_OUT, clipping
from tests import _clipping_common as common

ROWS = 16
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def _loss(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def _sharded(body, *, check_vma=True, mesh=MESH):
    return jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
        )
    )


def _summed(w, x, **options):
    clipped = clipping.clipped_grad(_loss, clip_norm=1.0, **options)(w, x).psum("data")
    assert clipped.sensitivity(ZERO_OUT) == 1.0
    return clipped.tree


def _naive(w, x):
    """What a clip around jax.grad does with replicated parameters: the sum comes first."""
    grads = jax.vmap(jax.grad(_loss), (None, 0))(w, x)
    norms = jnp.sqrt(jnp.sum(grads**2, axis=(1, 2), keepdims=True))
    return jax.lax.psum(jnp.sum(grads * jnp.minimum(1.0, 1.0 / norms), axis=0), "data")


def _narrow(w, x):
    return _loss(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).astype(jnp.float32)


def _in_a_scan(w, x):
    """Four steps of a loop, each of the whole sum: a quarter of what they add up to."""

    def step(total, _):
        made = clipping.clipped_grad(_narrow, clip_norm=1.0)(w, x).psum("data")
        return total + made.tree, None

    return jax.lax.scan(step, jnp.zeros(w.shape), length=4)[0] / 4


_PER_DEVICE = jax.pmap(_summed, axis_name="data", in_axes=(None, 0))
_BY_RULE = jax.pmap(
    functools.partial(_summed, method="one_pass", microbatch_size=1),
    axis_name="data",
    in_axes=(None, 0),
)


def _pmapped(run, w, x):
    return run(w, x.reshape(8, ROWS // 8, -1))[0]


WAYS = {
    "shard_map": _sharded(_summed),
    "shard_map unchecked": _sharded(_summed, check_vma=False),
    "microbatches": _sharded(functools.partial(_summed, microbatch_size=1)),
    "two passes": _sharded(functools.partial(_summed, method="two_pass")),
    "two passes unchecked": _sharded(
        functools.partial(_summed, method="two_pass", microbatch_size=1), check_vma=False
    ),
    "one pass": _sharded(functools.partial(_summed, method="one_pass")),
    "remat": _sharded(jax.checkpoint(_summed)),
    "bfloat16 in a scan": _sharded(_in_a_scan),
    "pmap": functools.partial(_pmapped, _PER_DEVICE),
    "pmap of one pass in microbatches": functools.partial(_pmapped, _BY_RULE),
}


def _largest_move(run):
    """The largest ‖f(D) − f(D′)‖ found, D′ being D with one row NULL, as its mask or a zero row."""
    source, largest = np.random.default_rng(0), 0.0
    for trial in range(6):
        w = jnp.asarray(source.normal(size=(3, 2)), jnp.float32) * 0.1
        x = jnp.asarray(np.abs(source.normal(size=(ROWS, 3))) + 0.1, jnp.float32) * 10.0 ** (
            trial % 3
        )
        for row in (0, 5, 15):
            x = x if trial < 4 else jnp.zeros_like(x).at[row].set(x[row])  # alone in the batch
            whole = np.asarray(run(w, x), np.float64)
            other = np.asarray(run(w, x.at[row].set(0.0)), np.float64)
            largest = max(largest, float(np.linalg.norm(whole - other)))
    return largest


@pytest.mark.parametrize("way", WAYS)
def test_sensitivity_under_shard_map_is_what_is_claimed(way):
    assert 0.99 <= _largest_move(WAYS[way]) <= 1.0


def test_sensitivity_of_a_gradient_summed_before_its_clip_is_seen_to_be_larger():
    # Negative control: the trap that the parameters' mark avoids moves the sum by several bounds.
    assert _largest_move(_sharded(_naive)) > 2.0


def test_clipped_grad_is_the_same_on_one_two_and_eight_devices():
    w = jnp.full((3, 2), 0.1)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 3)), jnp.float32)
    alone = np.asarray(jax.jit(clipping.clipped_grad(_loss, clip_norm=1.0))(w, x).tree, np.float64)
    for devices in (2, 8):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        got = _sharded(_summed, mesh=mesh)(w, x)
        # Only the allowance for rounding differs: at most 2·(R₈ − R₁)·N·2⁻²⁴ of the sum.
        assert common.distance(got, [alone]) <= 2.0**-16 * common.length([alone])


def test_contributions_leave_room_for_the_rounding_of_all_shards():
    x = jnp.zeros((8 * 2500, 3)).at[7].set(100.0)
    run = _sharded(_summed)
    got = common.length([run(jnp.full((3, 2), 1e-5), x)])
    assert abs(got - clipping.shrinkage(2500, 8)) < 2**-12
    assert clipping.shrinkage(2500, 8) < clipping.shrinkage(2500) - 2**-8


def test_certificate_counts_are_summed_over_shards():
    def counts(w, x):
        made = clipping.clipped_grad(_loss, clip_norm=1e-3)(w, x).psum("data")
        return jnp.stack([made.examples, made.clipped, made.nonfinite])

    x = jnp.ones((ROWS, 3)).at[3].set(jnp.nan)
    assert _sharded(counts)(jnp.full((3, 2), 0.1), x).tolist() == [16, 15, 1]


def test_collectives_in_the_loss_are_refused():
    def whole(w, x):
        return jnp.sum(jnp.tanh(jax.lax.psum(x, "data") @ w))

    def gathered(w, x):
        return jnp.sum(x @ jax.lax.all_gather(w, "data", tiled=True))

    def body(loss, w, x):
        return clipping.clipped_grad(loss, clip_norm=1.0)(w, x).psum("data").tree

    x = jnp.ones((ROWS, 3))
    for check in (True, False):
        with pytest.raises(ValueError, match="collectives"):
            _sharded(functools.partial(body, whole), check_vma=check)(jnp.ones((3, 2)), x)
    run = jax.shard_map(
        functools.partial(body, gathered),
        mesh=MESH,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="collectives"):
        jax.jit(run)(jnp.ones((24, 2)), jnp.ones((ROWS, 24)))


def test_sharded_parameters_and_public_values_that_vary_are_refused():
    def sharded(w, x):
        return clipping.clipped_grad(_loss, clip_norm=1.0)(w, x).tree

    run = jax.shard_map(
        sharded, mesh=MESH, in_specs=(P(None, "data"), P("data")), out_specs=P("data")
    )
    with pytest.raises(NotImplementedError, match="Gather them"):
        jax.jit(run)(jnp.ones((3, 8)), jnp.ones((ROWS, 3)))

    def public(w, x):
        loss = lambda w, x, y: jnp.sum(x @ w) * jnp.sum(y)  # noqa: E731
        run = clipping.clipped_grad(loss, clip_norm=1.0, batch_axes=(0, None))
        return run(w, x, x[0]).psum("data").tree

    with pytest.raises(ValueError, match="varies over"):
        _sharded(public)(jnp.ones((3, 2)), jnp.ones((ROWS, 3)))


def test_fsdp_by_hand_gathers_parameters_and_scatters_the_sum():
    def step(w, x):
        full = jax.lax.all_gather(w, "data", tiled=True)
        # Equal on all shards, which all_gather does not say: its result is taken as it is.
        tree = clipping.clipped_grad(_loss, clip_norm=1.0)(full, x).tree
        return jax.lax.psum_scatter(tree, "data", tiled=True)

    run = jax.shard_map(
        step, mesh=MESH, in_specs=(P("data"), P("data")), out_specs=P("data"), check_vma=False
    )
    x = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, 8)), jnp.float32)
    w = jnp.full((8, 2), 0.1)
    want = np.asarray(jax.jit(clipping.clipped_grad(_loss, clip_norm=1.0))(w, x).tree, np.float64)
    assert common.distance(jax.jit(run)(w, x), [want]) <= 2.0**-16 * common.length([want])


def test_psum_refuses_a_sum_that_is_the_same_on_all_shards():
    def summed(times, w, x):
        made = clipping.clipped_grad(_loss, clip_norm=1.0)(w, x)
        for _ in range(times):
            made = made.psum("data")
        return made.tree

    w, x = jnp.ones((3, 2)), jnp.ones((16, 3))
    for times, spec in ((2, P("data")), (1, P())):
        run = jax.shard_map(
            lambda w, x, times=times: summed(times, w, x),
            mesh=MESH,
            in_specs=(P(), spec),
            out_specs=P(),
        )
        with pytest.raises(ValueError, match="differs between the shards"):
            jax.jit(run)(w, x)
