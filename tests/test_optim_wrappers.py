"""Which statement does this file keep true? O3, O4 under whatever stands around `privatize`.

Recipes for TrainState, nnx.Optimizer and optax.masked; wrappers that are refused; meshes.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dpfa_jax
from dpfa_jax import accounting, clipping, optim
from tests.optim_common import COORDINATES, PARAMS, SAMPLER, certificate, private, stepper

STEP = SAMPLER.event(2.0, COORDINATES, 64)
SUMS = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.linspace(-1.0, 1.0, 5)}


def _reference():
    """One step outside of everything: parameters after plain gradient descent."""
    tx = optax.chain(private(), optax.sgd(0.5))
    return stepper(tx)(PARAMS, tx.init(PARAMS), SUMS)


def _equal(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


# Recipes ----------------------------------------------------------------------------------------


def test_with_certificate_serves_train_state():
    tx = optax.chain(private(), optax.sgd(0.5))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)

    @jax.jit
    def step(state, sums):
        c = certificate(sums)
        bound = state.replace(tx=optim.with_certificate(tx, c))
        return bound.apply_gradients(grads=c.tree).replace(tx=tx)

    state = step(state, SUMS)
    params, opt_state = _reference()
    assert _equal(state.params, params) and _equal(state.opt_state, opt_state)
    assert optim.event(state.opt_state) == optim.event(state) == accounting.Repeated(STEP, 1)
    state = step(state, SUMS)
    assert optim.event(state) == accounting.Repeated(STEP, 2)
    with pytest.raises(TypeError, match="certificate"):
        state.apply_gradients(grads=SUMS)


def test_privatize_serves_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(PARAMS["a"]), nnx.Param(PARAMS["b"])

    model = Model()
    tx = optax.chain(private(), optax.sgd(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, sums):
        _, structure = jax.tree.flatten(nnx.state(model, nnx.Param))
        c = certificate(jax.tree.unflatten(structure, jax.tree.leaves(sums)))
        optimizer.update(model, c.tree, clipped=c)

    step(model, optimizer, SUMS)
    params, _ = _reference()
    np.testing.assert_array_equal(model.a[...], params["a"])
    np.testing.assert_array_equal(model.b[...], params["b"])
    assert optim.event(optimizer.opt_state) == accounting.Repeated(STEP, 1)
    assert 0 < optim.epsilon(optimizer.opt_state, 1e-5) < 1
    step(model, optimizer, SUMS)
    assert optim.event(optimizer.opt_state) == accounting.Repeated(STEP, 2)


MATRICES = {"a": True, "b": False}


def test_privatize_stands_before_what_is_masked():
    # Weight decay on matrices and a frozen vector: after the noise, anything goes.
    tx = optax.chain(
        private(),
        optax.masked(optax.add_decayed_weights(0.1), MATRICES),
        optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
        optax.sgd(0.5),
    )
    params, state = stepper(tx)(PARAMS, tx.init(PARAMS), SUMS)
    expected, _ = _reference()
    np.testing.assert_array_equal(params["a"], expected["a"])
    assert not np.any(np.asarray(params["b"]))
    assert optim.event(state) == accounting.Repeated(STEP, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.masked(private(), MATRICES),
        lambda: optax.partition(
            {"private": private(), "rest": optax.sgd(1.0)}, {"a": "private", "b": "rest"}
        ),
    ],
    ids=["masked", "partition"],
)
def test_privatize_refuses_to_noise_a_part(wrap):
    tx = wrap()
    with pytest.raises(ValueError, match="leave without noise"):
        tx.init(PARAMS)


# What is refused --------------------------------------------------------------------------------


def _update(tx, change):
    state = tx.init(PARAMS)

    def run(sums):
        c = certificate(sums)
        return tx.update(change(c), state, PARAMS, clipped=c)

    return run


@pytest.mark.parametrize(
    "change",
    [
        lambda c: jax.tree.map(lambda leaf: 2.0 * leaf, c.tree),
        lambda c: jax.tree.map(lambda leaf: leaf / 16, c.tree),
        lambda c: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), c.tree),
        lambda c: jax.tree.map(jnp.copy, c.tree),
        lambda c: {"a": c.tree["a"], "b": c.tree["b"] + 0.0},
        lambda c: {"a": c.tree["a"]},
        lambda c: {"x": c.tree["a"], "y": c.tree["b"]},
        lambda c: c,
        lambda c: {},
        lambda c: None,
    ],
)
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_privatize_refuses_what_is_not_the_sum_itself(change, mode):
    run = _update(private(), change)
    with pytest.raises(ValueError, match="certificate's tree themselves"):
        (jax.jit(run) if mode == "jit" else run)(SUMS)


def test_privatize_refuses_a_certificate_that_is_none():
    tx = private()
    state, c = tx.init(PARAMS), certificate(SUMS)
    for given in (None, 1.0, SUMS):
        with pytest.raises(TypeError, match="Expected clipped= to be the certificate"):
            tx.update(c.tree, state, PARAMS, clipped=given)
    with pytest.raises(TypeError, match="certificate"):
        tx.update(c.tree, state, PARAMS)
    half = dataclasses.replace(c, tree=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), c.tree))
    with pytest.raises(TypeError, match="float32"):
        tx.update(half.tree, state, PARAMS, clipped=half)
    with pytest.raises(TypeError, match="PrivateState"):
        tx.update(c.tree, (), PARAMS, clipped=c)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.scale(2.0), tx),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.transforms.conditionally_transform(tx, lambda step: step < 3),
        lambda tx: optax.transforms.conditionally_mask(tx, lambda step: step < 3),
    ],
    ids=["scale", "clip", "MultiSteps", "apply_if_finite", "transform_if", "mask_if"],
)
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_privatize_refuses_wrappers_that_change_the_sum_or_take_the_account_back(wrap, mode):
    tx = wrap(private())
    state = tx.init(PARAMS)

    def run(state, sums):
        c = certificate(sums)
        return tx.update(c.tree, state, PARAMS, clipped=c)

    with pytest.raises((ValueError, TypeError), match="certificate"):
        (jax.jit(run) if mode == "jit" else run)(state, SUMS)


def test_privatize_refuses_a_key_that_every_call_would_repeat():
    tx = private()
    state = tx.init(PARAMS)

    def closed(sums):
        c = certificate(sums)
        return tx.update(c.tree, state, PARAMS, clipped=c)[0]

    with pytest.raises(ValueError, match="same noise"):
        jax.jit(closed)(SUMS)

    def step(state, _):
        return state, tx.update(c.tree, state, PARAMS, clipped=c)[0]

    c = certificate(SUMS)
    with pytest.raises(ValueError, match="outside the function being traced"):
        jax.lax.scan(step, state, length=2)


def test_privatize_runs_in_a_scan_that_carries_its_state():
    tx = optax.chain(private(), optax.sgd(0.5))

    def step(carry, sums):
        params, state = carry
        c = certificate(sums)
        updates, state = tx.update(c.tree, state, params, clipped=c)
        return (optax.apply_updates(params, updates), state), None

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), SUMS)
    (params, state), _ = jax.jit(lambda c, x: jax.lax.scan(step, c, x))(
        (PARAMS, tx.init(PARAMS)), twice
    )
    first = _reference()
    expected, after = stepper(tx)(*first, SUMS)
    assert _equal(params, expected) and _equal(state, after)


# Meshes -----------------------------------------------------------------------------------------


def _mesh(devices: int):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


def _in_shard_map(tx, devices: int, *, summed: bool = True, check_vma: bool = True):
    """One step in shard_map, each device bringing a part of the sum."""

    def step(params, state, parts):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], parts))
        c = c.psum("data") if summed else c
        updates, state = tx.update(c.tree, state, params, clipped=c)
        return optax.apply_updates(params, updates), state

    specs = dict(in_specs=(P(), P(), P("data")), out_specs=(P(), P()), check_vma=check_vma)
    mapped = jax.jit(jax.shard_map(step, mesh=_mesh(devices), **specs))
    share = jax.tree.map(lambda leaf: jnp.stack([leaf / devices] * devices), SUMS)
    assert accounting.events(mapped, PARAMS, tx.init(PARAMS), share) == STEP
    return mapped(PARAMS, tx.init(PARAMS), share)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_privatize_adds_the_same_words_on_one_two_and_eight_devices(devices):
    tx = optax.chain(private(), optax.sgd(0.5))
    params, state = _in_shard_map(tx, devices)
    expected, after = _reference()
    assert _equal(params, expected) and _equal(state, after)
    assert optim.event(state) == accounting.Repeated(STEP, 1)


def test_privatize_refuses_sums_of_one_shard_and_meshes_it_cannot_see_through():
    tx = private()
    with pytest.raises(ValueError, match=r"c\.psum\('data'\) first"):
        _in_shard_map(tx, 2, summed=False)
    with pytest.raises(ValueError, match="check_vma=False"):
        _in_shard_map(tx, 2, check_vma=False)
    one = jax.tree.map(lambda leaf: leaf[None], PARAMS)

    def step(sums):
        c = certificate(sums)
        c = c.psum("i")
        return tx.update(c.tree, tx.init(PARAMS), PARAMS, clipped=c)[0]

    with pytest.raises(ValueError, match=r"tracked|same noise"):
        jax.pmap(step, axis_name="i")(one)


@pytest.mark.parametrize("spec", [P(), P("data")], ids=["replicated", "sharded"])
def test_privatize_adds_the_same_words_to_sharded_parameters(spec):
    shapes = {"a": jnp.zeros((16, 4)), "b": jnp.zeros(8)}
    tx = optax.chain(private(), optax.sgd(0.5))
    step = stepper(tx)
    alone, _ = step(shapes, tx.init(shapes), shapes)
    spread = jax.device_put(shapes, NamedSharding(_mesh(8), spec))
    params, state = step(spread, tx.init(shapes), spread)
    assert _equal(params, alone)
    assert params["a"].sharding.is_equivalent_to(NamedSharding(_mesh(8), spec), 2)
    assert optim.epsilon(state, 1e-5) < 1


# Accumulation -----------------------------------------------------------------------------------


def _accumulate(norms, every=4):
    tx = optim.accumulate(optax.chain(private(), optax.sgd(0.5)), every)

    @jax.jit
    def step(params, state, sums, norm):
        c = certificate(sums, norm)
        updates, state = tx.update(c.tree, state, params, clipped=c)
        return optax.apply_updates(params, updates), state

    params, state, trail = PARAMS, tx.init(PARAMS), []
    part = jax.tree.map(lambda leaf: leaf / every, SUMS)
    for norm in norms:
        params, state = step(params, state, part, jnp.float32(norm))
        trail.append(params)
    return trail, state


def test_accumulate_is_one_step_of_the_whole_batch():
    trail, state = _accumulate([1.0] * 8)
    expected, _ = _reference()
    for params in trail[:3]:
        assert _equal(params, PARAMS)
    for name in PARAMS:
        # The traced clip norm enlarges the noise by 2⁻²², which may cross a grid step of 2⁻⁹.
        np.testing.assert_allclose(trail[3][name], expected[name], rtol=0, atol=2.0**-13)
    assert _equal(trail[3], trail[6]) and not _equal(trail[6], trail[7])
    assert optim.event(state) == accounting.Repeated(STEP, 2)
    assert int(state.step) == 0 and not np.any(np.asarray(state.total["a"]))


def test_accumulate_takes_the_largest_clip_norm_of_its_microbatches():
    plain, doubled = (_accumulate(norms)[0][3]["a"] for norms in ([1.0] * 4, [1.0, 4.0, 1.0, 1.0]))
    mean = -0.5 * np.asarray(SUMS["a"]) / 16
    noise, more = np.asarray(plain) - mean, np.asarray(doubled) - mean
    np.testing.assert_allclose(more, 4.0 * noise, rtol=0, atol=2.0**-10)
    poisoned, _ = _accumulate([1.0, np.nan, 1.0, 1.0])
    assert np.all(np.isnan(np.asarray(poisoned[3]["a"])))


def test_accumulate_takes_static_clip_norms_that_change_between_calls():
    tx, alone = optim.accumulate(private(), 2), private()

    def update(tx, norm, state, sums):
        c = certificate(sums, norm)
        return tx.update(c.tree, state, PARAMS, clipped=c)

    run = jax.jit(update, static_argnums=(0, 1))
    _, state = run(tx, 4.0, tx.init(PARAMS), PARAMS)
    updates, _ = run(tx, 1.0, state, PARAMS)
    expected, _ = run(alone, 4.0, alone.init(PARAMS), PARAMS)
    # The rounding that is paid for enlarges the noise by 2⁻¹⁸, which may cross a grid step of 2⁻⁷.
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=0, atol=2.0**-11)


def _watch():
    """A transformation that shows what `accumulate` hands on: the sum and its sensitivity."""

    def update(updates, state, params=None, *, clipped):
        return updates, jnp.asarray(clipped.sensitivity(dpfa_jax.ZERO_OUT), jnp.float32)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.float32(0.0), update)


def _accumulated(parts, units):
    """(sum in float64, sensitivity) of a step whose parts hold `units` units of norm 1 each."""
    tx = optim.accumulate(_watch(), len(parts))

    def step(state, part):
        c = dataclasses.replace(certificate(part), units=units)
        updates, state = tx.update(c.tree, state, part, clipped=c)
        return state, updates

    state, out = jax.jit(lambda parts: jax.lax.scan(step, tx.init(parts[0]), parts))(parts)
    return np.asarray(out[-1], np.float64), float(state.inner)


def test_accumulate_charges_what_rounding_moves():
    units = 2.0**21
    # The first part is as long as units of norm 1 can be, and a unit in the last one moves the
    # rounded sum by a whole spacing of float32, 2, instead of by 1.
    parts = jnp.zeros((8, 3)).at[:, 0].set(units).at[0, 0].add(2.0)
    whole, declared = _accumulated(parts.at[7, 0].add(1.0), int(units) + 1)
    other, _ = _accumulated(parts, int(units) + 1)
    moved = np.linalg.norm(whole - other)
    assert 1.9 < moved <= declared < 3.01
    # Of few units nothing is left to pay for.
    assert 1.0 < _accumulated(parts / units, 16)[1] < 1.0 + 2.0**-15


def test_accumulate_adds_in_a_double_word():
    source = np.random.default_rng(0)
    parts = jnp.asarray(source.normal(size=(64, 1000)), jnp.float32)
    exact = np.asarray(parts, np.float64).sum(0)
    found, _ = _accumulated(parts, 64)
    np.testing.assert_array_equal(found, np.asarray(exact, np.float32))
    plain = functools.reduce(jnp.add, parts)
    assert np.any(np.asarray(plain) != np.asarray(exact, np.float32))


def test_accumulate_wants_to_know_how_many_units_there_may_be():
    tx, c = optim.accumulate(private(), 2), certificate(SUMS)
    unknown = dataclasses.replace(c, units=None)
    with pytest.raises(ValueError, match="how many units"):
        tx.update(unknown.tree, tx.init(PARAMS), PARAMS, clipped=unknown)
    made = clipping.clipped_grad(lambda w, x: w @ x, clip_norm=1.0)(jnp.ones(3), jnp.ones((7, 3)))
    assert made.units == 7
    shared = clipping.clipped_grad(lambda w, x: w @ x, clip_norm=1.0, unit=4)
    assert shared(jnp.ones(3), jnp.ones((7, 3)), unit_ids=jnp.zeros(7, int)).units == 4


def test_accumulate_refuses_means_and_conditions():
    tx = optim.accumulate(private(), 2)
    state, c = tx.init(PARAMS), certificate(SUMS)
    with pytest.raises(ValueError, match="certificate's tree themselves"):
        tx.update(jax.tree.map(lambda leaf: leaf / 2, c.tree), state, PARAMS, clipped=c)
    with pytest.raises(ValueError, match="Expected every >= 1"):
        optim.accumulate(private(), 0)
    with pytest.raises(ValueError, match="outside the function being traced"):
        guarded = optax.apply_if_finite(tx, 3)
        guarded.update(c.tree, guarded.init(PARAMS), PARAMS, clipped=c)


def test_linen_parameters_are_a_tree_like_any_other():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    tx = optax.chain(private(), optax.adam(1e-2))
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, state = stepper(tx)(params, tx.init(params), zeros)
    assert not _equal(after, params)
    assert optim.event(state) == accounting.Repeated(SAMPLER.event(2.0, 9, 64), 1)


def test_privatize_refuses_units_that_its_sampler_does_not_draw():
    params, rows = jnp.zeros(2), jnp.ones((4, 2))
    sampler = dpfa_jax.sampling.Poisson(records=100, sampling_rate=0.1)

    def loss(w, x):
        return jnp.sum(w * x)

    by_row = clipping.clipped_grad(loss, clip_norm=1.0)(params, rows)
    shared = clipping.clipped_grad(loss, clip_norm=1.0, unit=2)
    by_unit = shared(params, rows, unit_ids=jnp.array([0, 0, 1, 1]))
    for unit, right, wrong in (("example", by_row, by_unit), ("unit", by_unit, by_row)):
        tx = optim.privatize(
            noise_multiplier=1.0, sampling=sampler, rng=jax.random.key(0), unit=unit
        )
        state = tx.init(params)
        assert tx.update(right.tree, state, params, clipped=right)[0].shape == (2,)
        with pytest.raises(ValueError, match="clipped by"):
            tx.update(wrong.tree, state, params, clipped=wrong)
