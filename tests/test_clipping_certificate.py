"""Which statement does `clipping.certificate` keep true? What is said of a sum is C, 2C or r·C."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpfa_jax import GROUP, REPLACE_ONE, SEQUENCE, ZERO_OUT, clipping


def _certificate(**changes):
    zero = jnp.int32(0)
    made = clipping.Clipped({"w": jnp.ones(3)}, zero, zero, zero, static_clip_norm=0.5)
    return dataclasses.replace(made, **changes)


def test_sensitivity_is_a_multiple_of_the_clip_norm():
    made = _certificate()
    want = {ZERO_OUT: 0.5, REPLACE_ONE: 1.0, GROUP(3): 1.5}
    for adjacency, value in want.items():
        assert made.sensitivity(adjacency) == value
        traced = _certificate(static_clip_norm=None, traced_clip_norm=jnp.float32(0.5))
        assert float(traced.sensitivity(adjacency)) == value
    with pytest.raises(ValueError, match="SEQUENCE"):
        made.sensitivity(SEQUENCE)
    with pytest.raises(TypeError, match="Adjacency"):
        made.sensitivity("ZERO_OUT")  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_sensitivity_of_a_senseless_clip_norm_is_an_error_or_nan(norm):
    with pytest.raises(ValueError, match="clip_norm"):
        _certificate(static_clip_norm=norm).sensitivity(ZERO_OUT)
    traced = _certificate(static_clip_norm=None, traced_clip_norm=jnp.float32(norm))
    assert math.isnan(float(traced.sensitivity(ZERO_OUT)))
    with pytest.raises(ValueError, match="without"):
        _certificate(static_clip_norm=None).sensitivity(ZERO_OUT)


def test_clipped_keeps_what_is_static_through_jit():
    made = jax.jit(lambda c: c)(_certificate())
    assert made.clip_norm == 0.5 and isinstance(made.clip_norm, float)
    assert [leaf.shape for leaf in jax.tree.leaves(made)] == [(3,), (), (), ()]


def test_psum_adds_trees_and_counts_and_not_clip_norms():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"w": jnp.arange(8.0)}

    def total(tree):
        one = jax.lax.pcast(jnp.int32(1), ("data",), to="varying")
        norm = jax.lax.pcast(jnp.float32(0.5), ("data",), to="varying")
        made = clipping.Clipped(tree, one, one, one, traced_clip_norm=norm)
        return made.psum("data")

    got = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=({"w": P("data")},), out_specs=P()))(
        tree
    )
    assert np.asarray(got.tree["w"]).tolist() == [28.0] and int(got.examples) == 8
    assert float(got.sensitivity(ZERO_OUT)) == 0.5


def test_psum_takes_the_largest_of_the_shards_traced_clip_norms():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(tree, norm):
        one = jax.lax.pcast(jnp.int32(1), ("data",), to="varying")
        made = clipping.Clipped(tree, one, one, one, traced_clip_norm=norm[0])
        return made.psum("data").sensitivity(ZERO_OUT)

    specs = ({"w": P("data")}, P("data"))
    run = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P()))
    norms = jnp.linspace(0.1, 0.8, 8)
    for shift in (0, 3, 7):
        assert float(run({"w": jnp.ones(8)}, jnp.roll(norms, shift))) == float(norms[-1])


def test_joint_clip_norm_is_the_root_of_the_sum_of_squares():
    assert clipping.joint_clip_norm([0.3]) == 0.3
    assert 5.0 <= clipping.joint_clip_norm([3.0, 4.0]) <= 5.0 * (1 + 2**-50)
    for bad in ([], [1.0, 0.0], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="clip_norm"):
            clipping.joint_clip_norm(bad)
