"""Which statement do parameters in parts keep true? O6, CL10: one noise, whatever holds it.

Every test runs on the eight devices of tests/conftest.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpfa_jax import ZERO_OUT, accounting, clipping, optim, random
from dpfa_jax.clipping import partition
from dpfa_jax.optim import words
from tests.optim_common import SAMPLER, certificate, private

ROWS, C = 16, 0.7
# Cut along the rows, along the columns (stretches of 3 and 24 scalars), along both, and not at all.
PARAMS = {
    "rows": jnp.full((16, 3), 0.1),
    "columns": jnp.full((3, 24), -0.1),
    "both": jnp.full((8, 8, 2), 0.2),
    "whole": jnp.zeros(5),
}
COORDINATES = 48 + 72 + 128 + 5
STEP = SAMPLER.event(2.0, COORDINATES, 64)
SPECS = {"rows": P("a"), "columns": P(None, "a"), "both": P("a"), "whole": P()}
WIDE_SPECS = {
    "rows": P(("b", "a")),
    "columns": P(None, ("a", "b")),
    "both": P("b", "a"),
    "whole": P(),
}


def _mesh(*sizes):
    names = ("a", "b")[: len(sizes)]
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=auto, devices=jax.devices()[: math.prod(sizes)])


def _loss(params, x):
    hidden = jnp.tanh(x @ params["rows"] @ params["columns"])
    return jnp.sum(hidden) + jnp.sum(params["both"]) * x[0] + params["whole"] @ x[:5]


def _private(specs):
    return optim.privatize(
        noise_multiplier=2.0,
        sampling=SAMPLER,
        rng=jax.random.key(0),
        partition_specs=specs,
    )


def _summed(params, x, specs, names):
    whole = clipping.gather(params, specs)
    return clipping.clipped_grad(_loss, clip_norm=C)(whole, x).psum(names, specs)


@functools.cache
def _rows():
    source = np.random.default_rng(0)
    return jnp.asarray(np.abs(source.normal(size=(ROWS, 16))) + 0.1, jnp.float32)


def _sums():
    """A sum that the test chose: multiples of ½, which any order of addition adds exactly."""
    return jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) - 30.5, PARAMS)


@functools.cache
def _alone():
    """Update and state of one step on one device, without a mesh."""
    tx = private()

    @jax.jit
    def step(state, sums):
        c = certificate(sums)
        return tx.update(c.tree, state, clipped=c)

    return step(tx.init(PARAMS), _sums())


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2, 8])
def test_privatize_adds_the_same_words_to_parts_on_one_two_and_eight_devices(devices):
    tx, mesh = _private(SPECS), _mesh(devices)

    def step(params, state, share):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], share)).psum("a", SPECS)
        return tx.update(c.tree, state, params, clipped=c)

    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(SPECS, P(), P("a")), out_specs=(SPECS, P()))
    )
    state = tx.init(PARAMS)
    share = jax.tree.map(lambda leaf: jnp.stack([leaf / devices] * devices), _sums())
    updates, after = mapped(PARAMS, state, share)
    expected, other = _alone()
    for name in PARAMS:
        np.testing.assert_array_equal(updates[name], expected[name])
    assert optim.event(after) == optim.event(other) == accounting.Repeated(STEP, 1)
    np.testing.assert_array_equal(after.key_data, other.key_data)
    # Counted once, although eight devices run it.
    assert accounting.events(mapped, PARAMS, state, share) == STEP


def test_normals_of_parts_are_the_slices_of_the_whole_and_no_two_repeat():
    data = random.key_data(jax.random.key(3))
    shapes = [(1024, 1024), (16, 3), (6, 24), (2, 8, 5)]  # the first has a key of its own
    specs = [P(("a", "b")), P(("b", "a")), P(None, ("b", "a")), P("a", "b")]
    tree = [jnp.zeros(shape) for shape in shapes]

    def whole(data):
        return words.normals(data, shapes, tuple(((),) * len(shape) for shape in shapes))

    def parts(data, tree):
        return words.normals(data, [leaf.shape for leaf in tree], partition.split_axes(tree, specs))

    mesh = _mesh(2, 4)
    mapped = jax.shard_map(parts, mesh=mesh, in_specs=(P(), specs), out_specs=specs)
    expected, found = jax.jit(whole)(data), jax.jit(mapped)(data, tree)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    small = np.concatenate([np.asarray(leaf).ravel() for leaf in found[1:]])
    assert len(np.unique(small)) == small.size
    # The first leaf has the words of its own key, the others those of one key, in order.
    key = [random.wrap_key_data(random.fold_in_data(data, jnp.uint32(i))) for i in (0, 4)]
    first = random.normal(key[0], (2, 1024), radius_bits=64)
    np.testing.assert_array_equal(found[0][:2], first)
    np.testing.assert_array_equal(small, random.normal(key[1], (small.size,), radius_bits=64))


def test_gather_joins_parts_and_psum_cuts_them_as_their_specs_say():
    # On six of the eight devices, so that no axis stands in for the other.
    shapes = {"rows": (12, 2), "columns": (2, 12), "both": (4, 6), "whole": (3,)}
    tree = {
        name: jnp.arange(100.0, 100.0 + math.prod(shape)).reshape(shape)
        for name, shape in shapes.items()
    }

    def joined(tree, ones):
        whole = clipping.gather(tree, WIDE_SPECS)
        mine = jax.tree.map(lambda leaf: leaf * ones[0], whole)  # a summand on every shard
        count = jnp.int32(0)
        c = clipping.Clipped(mine, count, count, count, static_clip_norm=C, units=5)
        summed = c.psum(("a", "b"), WIDE_SPECS)
        assert (c.psum("b").units, summed.units) == (10, 30)
        return whole, summed.tree

    mapped = jax.shard_map(
        joined,
        mesh=_mesh(3, 2),
        in_specs=(WIDE_SPECS, P(("a", "b"))),
        out_specs=(P(), WIDE_SPECS),
    )
    whole, summed = jax.jit(mapped)(tree, jnp.ones(6))
    for name in tree:
        np.testing.assert_array_equal(whole[name], tree[name])
        np.testing.assert_array_equal(summed[name], 6.0 * tree[name])


def test_sensitivity_of_parts_is_that_of_the_joint_norm():
    def summed(params, x):
        c = _summed(params, x, SPECS, "a")
        assert c.sensitivity(ZERO_OUT) == C
        return c.tree

    run = jax.jit(jax.shard_map(summed, mesh=_mesh(8), in_specs=(SPECS, P("a")), out_specs=SPECS))
    largest = 0.0
    for scale, row in ((1.0, 0), (1.0, 5), (100.0, 15), (1e-2, 3)):
        x = scale * _rows()
        for given in (x, jnp.zeros_like(x).at[row].set(x[row])):
            whole, other = run(PARAMS, given), run(PARAMS, given.at[row].set(0.0))
            moved = [np.float64(whole[name]) - other[name] for name in PARAMS]
            largest = max(largest, math.sqrt(sum(np.sum(leaf**2) for leaf in moved)))
    assert 0.99 * C <= largest <= C


def test_sensitivity_of_norms_of_parts_is_seen_to_be_larger():
    # Negative control: the trap of clipping each shard's part by its own norm.
    def step(params, x):
        whole = clipping.gather(params, SPECS)
        grads = jax.vmap(jax.grad(_loss), (None, 0))(
            jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "a", to="varying"), whole),
            jax.lax.all_gather(x, "a", tiled=True),
        )
        place = jax.lax.axis_index("a")
        mine = jax.lax.dynamic_slice_in_dim(grads["rows"], place * 2, 2, 1)
        norms = jnp.sqrt(jnp.sum(mine**2, axis=(1, 2), keepdims=True))
        return jnp.sum(mine * jnp.minimum(1.0, C / norms), axis=0)

    run = jax.jit(jax.shard_map(step, mesh=_mesh(8), in_specs=(SPECS, P("a")), out_specs=P("a")))
    x = _rows()
    assert np.linalg.norm(run(PARAMS, x) - run(PARAMS, x.at[0].set(0.0))) > 2 * C


def _wrong(given, held=SPECS, *, told=None, gathered=None, state=None):
    """One step whose psum is given one set of specs, privatize another, shard_map a third."""
    tx = _private(given if told is None else told)
    state = tx.init(PARAMS) if state is None else state

    def step(params, state, x):
        whole = clipping.gather(params, held if gathered is None else gathered)
        c = clipping.clipped_grad(_loss, clip_norm=C)(whole, x).psum("a", given)
        return tx.update(c.tree, state, params, clipped=c)

    mapped = jax.shard_map(step, mesh=_mesh(8), in_specs=(held, P(), P("a")), out_specs=(held, P()))
    jax.eval_shape(mapped, PARAMS, state, _rows())


def test_wrong_partition_specs_are_refused():
    swapped = SPECS | {"both": P(None, "a")}
    for given, told in ((SPECS, P()), (None, SPECS), (SPECS, swapped), (swapped, SPECS)):
        with pytest.raises(ValueError, match="same specs"):
            _wrong(given, told=told)
    with pytest.raises(ValueError, match="differs along"):
        _wrong(SPECS, SPECS | {"rows": P()}, gathered=SPECS)  # rows are whole
    with pytest.raises(ValueError, match="differs along"):
        _wrong(SPECS, gathered=SPECS | {"rows": P()})  # rows are in parts
    for other in (swapped, SPECS | {"rows": P()}):  # the sum is cut as the parameters are not
        with pytest.raises(ValueError, match="cut as their parameters"):
            _wrong(other)
    with pytest.raises(ValueError, match="mesh axes out of"):
        _wrong(SPECS | {"rows": P("nowhere")})
    with pytest.raises(ValueError, match="mesh axes out of"):
        _wrong(SPECS | {"both": P("a", "a")})
    with pytest.raises(ValueError, match="at most 1 entries"):
        _wrong(SPECS | {"whole": P(None, None, "a")})
    with pytest.raises(ValueError, match="equal parts"):
        _wrong(SPECS | {"whole": P("a")})
    with pytest.raises(TypeError, match="prefix tree of PartitionSpecs"):
        _wrong(SPECS | {"whole": None})
    with pytest.raises(ValueError):
        _wrong({"rows": P("a")})
    alone = _private(SPECS)
    fewer = {name: leaf for name, leaf in PARAMS.items() if name != "whole"}
    specs = {name: spec for name, spec in SPECS.items() if name != "whole"}
    state = _private(specs).init(fewer)
    with pytest.raises(ValueError, match="another"):  # a state made for fewer parameters
        _wrong(SPECS, told=SPECS, state=state)
    assert alone.init(PARAMS).accountant.events == (STEP,)


def test_init_inside_shard_map_counts_all_parts_and_wants_their_specs():
    def count(specs):
        def body(params):
            state = _private(specs).init(params)
            assert state.accountant.events == (STEP,)
            return state

        return jax.shard_map(body, mesh=_mesh(8), in_specs=(SPECS,), out_specs=P())

    assert jax.eval_shape(count(SPECS), PARAMS).key_data.shape == (8,)
    with pytest.raises(ValueError, match="differs along"):
        jax.eval_shape(count(None), PARAMS)


def test_parts_are_not_summed_again_nor_over_a_part_of_the_batch():
    def body(names, again, params, x):
        c = _summed(params, x, WIDE_SPECS, names)
        return c.psum(again).tree if again else c.tree

    def run(names, again=None):
        mapped = jax.shard_map(
            functools.partial(body, names, again),
            mesh=_mesh(2, 4),
            in_specs=(WIDE_SPECS, P(("a", "b"))),
            out_specs=WIDE_SPECS,
        )
        return jax.eval_shape(mapped, PARAMS, _rows())

    assert run(("a", "b"))["rows"].shape == (16, 3)
    with pytest.raises(ValueError, match="whole sums"):
        run(("a", "b"), again="a")
    with pytest.raises(ValueError, match="Sum over every axis"):
        run("a")


def test_a_key_for_each_shard_is_refused():
    # Each shard would publish the same sum with noise of its own: 8 releases charged as one.
    tx = _private(None)
    state = tx.init(PARAMS)
    keys = jnp.stack([random.key_data(jax.random.key(i)) for i in range(8)])

    def step(keys, x):
        c = clipping.clipped_grad(_loss, clip_norm=C)(PARAMS, x).psum("a")
        return tx.update(c.tree, state._replace(key_data=keys[0]), clipped=c)[0]

    mapped = jax.shard_map(step, mesh=_mesh(8), in_specs=(P("a"), P("a")), out_specs=P("a"))
    with pytest.raises(ValueError, match="one key for all shards"):
        jax.eval_shape(mapped, keys, _rows())


def test_parts_train_in_microbatches_through_a_chain_in_a_scan():
    tx = optim.accumulate(optax.chain(_private(WIDE_SPECS), optax.adam(0.1)), 2)
    state = tx.init(PARAMS)
    specs = jax.tree.map(lambda _: P(), state)
    private, adam = specs.inner
    inner = private, (adam[0]._replace(mu=WIDE_SPECS, nu=WIDE_SPECS), *adam[1:])
    specs = specs._replace(inner=inner, total=WIDE_SPECS, rest=WIDE_SPECS)

    def step(carry, _, x):
        params, state = carry
        c = _summed(params, x, WIDE_SPECS, ("a", "b"))
        updates, state = tx.update(c.tree, state, params, clipped=c)
        return (optax.apply_updates(params, updates), state), None

    def run(params, state, x):
        return jax.lax.scan(functools.partial(step, x=x), (params, state), length=4)[0]

    mapped = jax.shard_map(
        run,
        mesh=_mesh(2, 4),
        in_specs=(WIDE_SPECS, specs, P(("a", "b"))),
        out_specs=(WIDE_SPECS, specs),
    )
    params, state = jax.jit(mapped)(PARAMS, state, _rows())
    assert optim.event(state) == accounting.Repeated(STEP, 2)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    assert not np.any(np.asarray(params["rows"]) == np.asarray(PARAMS["rows"]))
