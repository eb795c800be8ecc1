"""Reading the releases of a function from its jaxpr, through every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy import stats

from dpfa_jax import _primitives, accounting, mechanisms, random
from dpfa_jax.accounting import Composed, Gaussian, Laplace, NoRelease, Repeated

ONE, TWO = Gaussian(2.0, 10), Laplace(3.0)
SPEC = jax.ShapeDtypeStruct((4,), jnp.float32)


def one(x):
    return _primitives.private_release(jnp.sin(x), ONE)


def two(x):
    return _primitives.private_release(x, TWO)


def mesh(*sizes):
    names = tuple("abc"[: len(sizes)])
    count = int(np.prod(sizes))
    return Mesh(np.array(jax.devices()[:count]).reshape(sizes), names)


CASES = {
    "no release": (jnp.sin, 0),
    "one call": (one, 1),
    "jit": (jax.jit(one), 1),
    "jit in jit": (jax.jit(lambda x: jax.jit(one)(x) + 1), 1),
    "twice": (lambda x: one(one(x)), 2),
    "checkpoint": (jax.checkpoint(one), 1),
    "vmap": (jax.vmap(one), 4),
    "nested vmap": (lambda x: jax.vmap(jax.vmap(one))(jnp.zeros((2, 3)) + x[0]), 6),
    "vmap out of another axis": (lambda x: jax.vmap(one, in_axes=1)(jnp.ones((2, 5)) * x[0]), 5),
    "scan": (lambda x: jax.lax.map(one, x), 4),
    "vmap of scan": (lambda x: jax.vmap(lambda y: jax.lax.map(one, y))(jnp.ones((3, 4)) * x), 12),
    "scan of scan": (
        lambda x: jax.lax.map(lambda y: jax.lax.map(one, y), jnp.ones((5, 4)) * x),
        20,
    ),
    "empty scan": (lambda x: jax.lax.map(one, x[:0]), 0),
    "fori_loop": (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: one(y), x), 3),
    "all branches of cond": (
        lambda x: jax.lax.cond(x[0] > 0, one, lambda y: one(one(y)), x),
        3,
    ),
    "all branches of switch": (lambda x: jax.lax.switch(1, [one, one, jnp.sin], x), 2),
    "grad": (jax.grad(lambda x: one(x).sum()), 1),
    "value_and_grad in scan": (
        lambda x: jax.lax.map(jax.value_and_grad(lambda y: one(y)), x),
        4,
    ),
    "linearize": (lambda x: jax.linearize(one, x)[0], 1),
    "jvp": (lambda x: jax.jvp(one, (x,), (x,))[1], 1),
    "shard_map": (
        jax.shard_map(one, mesh=mesh(4), in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a")),
        4,
    ),
    "shard_map over two axes": (
        jax.shard_map(
            one, mesh=mesh(2, 4), in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a")
        ),
        2,  # equal along the other axis
    ),
    "shard_map over two axes, nothing known": (
        jax.shard_map(
            one,
            mesh=mesh(2, 4),
            in_specs=PartitionSpec("a"),
            out_specs=PartitionSpec("a"),
            check_vma=False,
        ),
        8,
    ),
    "equal on all shards": (
        jax.shard_map(one, mesh=mesh(2, 4), in_specs=PartitionSpec(), out_specs=PartitionSpec()),
        1,
    ),
    "equal on all shards, nothing known": (
        jax.shard_map(
            one,
            mesh=mesh(4),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        ),
        4,
    ),
    "shard_map over one of two axes": (
        jax.jit(
            jax.shard_map(
                one,
                mesh=mesh(2, 4),
                in_specs=PartitionSpec("a"),
                out_specs=PartitionSpec("a"),
                axis_names={"a"},
            )
        ),
        2,
    ),
    "pmap": (jax.pmap(one), 4),
    "scan in shard_map": (
        jax.shard_map(
            lambda x: jax.lax.map(one, x),
            mesh=mesh(2),
            in_specs=PartitionSpec("a"),
            out_specs=PartitionSpec("a"),
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_events_counts_releases(name):
    fn, count = CASES[name]
    expected = NoRelease() if count == 0 else ONE if count == 1 else Repeated(ONE, count)
    assert accounting.events(fn, SPEC) == expected


def _together(*axes):
    return lambda x: _primitives.private_release(jnp.sin(x), ONE, axes)


def _sharded(fn, sizes, axes="a", **options):
    specs = PartitionSpec(axes)
    return jax.shard_map(fn, mesh=mesh(*sizes), in_specs=specs, out_specs=specs, **options)


TOGETHER = {
    "one axis": (_sharded(_together("a"), (4,)), 1),
    "one of two axes": (_sharded(_together("b"), (2, 4)), 2),
    "both axes": (_sharded(_together("a", "b"), (2, 4)), 1),
    "another axis than those": (_sharded(_together("b"), (4,)), 4),
    "scan": (_sharded(lambda x: jax.lax.map(_together("a"), x), (2,)), 2),
    "vmap of shard_map": (lambda x: jax.vmap(_sharded(_together("a"), (4,)))(jnp.ones((3, 4))), 3),
    "nested shard_maps": (
        _sharded(
            jax.shard_map(
                _together("b"),
                in_specs=PartitionSpec("b"),
                out_specs=PartitionSpec("b"),
                axis_names={"b"},
            ),
            (2, 2),
            axis_names={"a"},
        ),
        2,
    ),
    "no shard_map": (_together("a"), 1),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_events_counts_what_shards_release_together_once(name):
    fn, count = TOGETHER[name]
    assert accounting.events(fn, SPEC) == (ONE if count == 1 else Repeated(ONE, count))


def test_events_adds_up_releases_that_shards_share_and_others():
    both = _sharded(lambda x: one(_together("a")(x)), (4,))
    assert accounting.events(both, SPEC) == Repeated(ONE, 5)


def test_events_sees_through_custom_derivatives():
    @jax.custom_vjp
    def private(x):
        return one(x)

    private.defvjp(lambda x: (one(x), x), lambda x, g: (two(g) * x,))

    @jax.custom_jvp
    def tangent(x):
        return one(x)

    tangent.defjvps(lambda t, answer, x: t)
    assert accounting.events(private, SPEC) == ONE
    assert accounting.events(tangent, SPEC) == ONE
    assert accounting.events(jax.vmap(private), SPEC) == Repeated(ONE, 4)
    # A release in the backward pass is a release.
    both = accounting.events(jax.grad(lambda x: private(x).sum()), SPEC)
    assert both == Composed((ONE, TWO))


def _noised(x, rng, *, summed):
    """A sum over shards with noise on it, or shares of the sum with noise of their own."""
    x = jax.lax.psum(x, "a") if summed else x
    noisy = mechanisms.gaussian(rng, x, noise_std=2.0)
    noisy = _primitives.private_release(noisy, ONE)
    return noisy if summed else jax.lax.psum(noisy, "a")


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("summed", "count"), [(True, 1), (False, 4)])
def test_events_counts_noise_that_is_added_once_once_and_shares_of_it_each(summed, count, rounds):
    def run(x, rng):
        def step(total, key):
            return total + _noised(x, key, summed=summed), None

        return jax.lax.scan(step, jnp.zeros(1), random.split(rng, rounds))[0]

    specs = (PartitionSpec("a"), PartitionSpec())
    mapped = jax.shard_map(run, mesh=mesh(4), in_specs=specs, out_specs=PartitionSpec())
    found = accounting.events(mapped, SPEC, jax.random.key(0))
    count *= rounds
    assert found == (ONE if count == 1 else Repeated(ONE, count))
    if rounds == 1:  # what was counted is what happens: one noise of 2, or four
        out = [jax.jit(mapped)(jnp.ones(4), jax.random.key(seed))[0] - 4.0 for seed in range(200)]
        law = stats.chi2(200)
        square = float(np.sum(np.square(out))) / (4.0 * count)
        assert law.ppf(5e-7) < square < law.isf(5e-7)  # false with probability 1e-6
        assert not law.ppf(5e-7) < square * 4.0 < law.isf(5e-7)


def test_events_keeps_different_releases_apart():
    found = accounting.events(lambda x: two(jax.vmap(one)(x)), SPEC)
    assert found == Composed((Repeated(ONE, 4), TWO))


def test_events_takes_pytrees_and_keywords():
    def fn(batch, *, weights):
        return one(batch["x"]) + weights

    assert accounting.events(fn, {"x": SPEC}, weights=SPEC) == ONE


def test_events_refuses_releases_that_may_repeat_without_end():
    loop = lambda x: jax.lax.while_loop(lambda y: y[0] > 0, one, x)  # noqa: E731
    with pytest.raises(ValueError, match="while"):
        accounting.events(loop, SPEC)
    with pytest.raises(ValueError, match="while"):
        accounting.events(lambda x: jax.lax.while_loop(lambda y: one(y)[0] > 0, jnp.sin, x), SPEC)
    with pytest.raises(ValueError, match="fori_loop"):
        accounting.events(
            lambda x: jax.lax.fori_loop(0, x[0].astype(int), lambda _, y: one(y), x), SPEC
        )
    # Without a release a while loop is nobody's business.
    free = lambda x: jax.lax.while_loop(lambda y: y[0] > 0, jnp.sin, one(x))  # noqa: E731
    assert accounting.events(free, SPEC) == ONE


def test_events_refuses_primitives_it_does_not_know():
    def solve(x):
        return jax.lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: one(b))

    with pytest.raises(ValueError, match="custom_linear_solve"):
        accounting.events(solve, SPEC)


def test_events_refuses_a_release_without_an_accounting_event():
    with pytest.raises(TypeError, match="event"):
        accounting.events(lambda x: _primitives.private_release(x, "gaussian"), SPEC)


def test_events_runs_nothing():
    def fn(x):
        jax.debug.callback(lambda: (_ for _ in ()).throw(RuntimeError("ran")))
        return one(x)

    assert accounting.events(fn, SPEC) == ONE
