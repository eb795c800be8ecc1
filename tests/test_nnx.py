"""Which statement does this file keep true? No copy of a flax.nnx model can repeat its noise.

A stream's count comes back from wherever a key was drawn, or drawing it is an error.
"""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpfa_jax
from dpfa_jax import accounting
from dpfa_jax.nnx import PrivateAttention, PrivateCrossAttention, apply, reseed
from tests._flax_common import (
    KEY_SPEC,
    MEMORY,
    OTHER_RNG,
    RNG,
    SEQUENCE,
    SUMS,
    X,
    heads,
    noise_repeats,
)


def streams(rng=RNG) -> nnx.Rngs:
    return nnx.Rngs(params=0, privacy=rng)


def attention(mechanism=SEQUENCE, queries="private", rngs=None, **options) -> PrivateAttention:
    return PrivateAttention(mechanism, queries=queries, rngs=rngs or streams(), **options)


def layer(mechanism=SEQUENCE, queries="private", rngs=None, **options) -> nnx.MultiHeadAttention:
    rngs = rngs or streams()
    attend = attention(mechanism, queries, rngs)
    return nnx.MultiHeadAttention(
        2, 4, attention_fn=attend, rngs=rngs, **({"decode": False} | options)
    )


def count(model) -> int:
    return int(model.attention_fn.count[...])


class Stack(nnx.Module):
    """Two private layers with different mechanisms, the second over public queries."""

    def __init__(self, rngs):
        self.first = layer(rngs=rngs)
        self.second = layer(SUMS, "public", rngs)

    def __call__(self, x, memory):
        return self.second(self.first(x), memory)


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def stack_of_layers(rngs):
    return layer(rngs=rngs)


def scan_layers(model, x):
    def step(x, model):
        return x, model(x)

    axes = (nnx.Carry, 0)
    return nnx.scan(step, in_axes=axes, out_axes=axes)(x, model)[1]


class Scanned(nnx.Module):
    """A stack of layers as one model."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, x):
        return scan_layers(self.layers, x)


# What Flax passes --------------------------------------------------------------------------------


def test_private_attention_takes_what_flax_passes():
    seen = set(inspect.signature(PrivateAttention.__call__).parameters)
    assert set(inspect.signature(nnx.dot_product_attention).parameters) <= seen
    with pytest.raises(ValueError, match="decode"):
        layer(decode=None)(X)


def test_private_attention_without_noise_is_the_layer_of_flax():
    model = layer(dpfa_jax.NonPrivate(), num_kv_heads=1)
    plain = nnx.MultiHeadAttention(2, 4, num_kv_heads=1, decode=False, rngs=streams())
    mask = nnx.make_causal_mask(jnp.ones((1, 3)))
    assert mask.dtype == jnp.float32
    want = plain(X, mask=mask)
    error = 64 * np.finfo(np.float32).eps * np.max(np.abs(want))
    run = jax.jit(lambda model, mask: (model(X, mask=mask), model(X, is_causal=True), model(X)))
    masked, causal, whole = run(model, mask)  # no noise, no count
    for got in (masked, causal):
        np.testing.assert_allclose(got, want, atol=error, rtol=0)
    assert np.max(np.abs(whole - want)) > 1e-3


def test_private_attention_refuses_masks_and_options_that_do_not_fit():
    q, k = heads(1, 1, 3, 2, 2), heads(2, 1, 5, 2, 2)
    attend = attention(SUMS, "public")
    for mask in (jnp.ones((3, 5)), jnp.ones((1, 3, 5)), jnp.ones((1, 1, 3, 4))):
        with pytest.raises(ValueError, match=r"heads, queries, keys\) = \(1, 2, 3, 5\)"):
            attend(q, k, k, mask=mask)
    for option, message in (
        ({"mask": jnp.full((1, 1, 3, 5), -1e9)}, "key_log_weights"),
        ({"bias": jnp.zeros((1, 1, 3, 5))}, "key_log_weights"),
        ({"dropout_rate": 0.1}, "dropout_rate = 0"),
        ({"module": attend}, "sow_weights=False"),
        ({"input_positions": jnp.arange(3)}, "input_positions"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, k, **option)


def test_private_attention_refuses_dropout_and_sown_weights_through_the_layer():
    model = layer(dropout_rate=0.1, rngs=nnx.Rngs(0, privacy=RNG))
    with pytest.raises(ValueError, match="dropout_rate = 0"):
        model(X, deterministic=False)
    with pytest.raises(ValueError, match="sow_weights=False"):
        model(X, deterministic=True, sow_weights=True)
    assert model(X, deterministic=True).shape == X.shape


def test_private_attention_takes_only_sequence_release_for_private_tokens():
    with pytest.raises(ValueError, match="Use SequenceRelease"):
        layer(SUMS)(X)
    with pytest.raises(TypeError, match="queries"):
        PrivateAttention(SUMS, rngs=streams())  # pyright: ignore: no default for a promise
    with pytest.raises(ValueError, match="queries"):
        attention(queries="secret")


def test_private_attention_answers_masked_rows_without_the_values():
    attend = attention(SUMS, "public")
    q, k = heads(1, 1, 3, 2, 2), heads(2, 1, 5, 2, 2)
    mask = jnp.ones((1, 1, 3, 5)).at[:, :, 1].set(0.0)
    run = jax.jit(apply)
    rows = [np.asarray(run(attend, RNG, q, k, value, mask=mask))[0] for value in (k, k + 1.0)]
    np.testing.assert_array_equal(rows[0][1], rows[1][1])
    assert np.all(rows[0][0] != rows[1][0])
    plain = nnx.dot_product_attention(q, k, k, mask=mask)[0, 1]
    np.testing.assert_allclose(plain, np.mean(k[0], 0), rtol=1e-5)  # what Flax does


def test_private_attention_decodes_step_by_step():
    quiet = dpfa_jax.SequenceRelease(noise_multiplier=1e-9, clip_norm=100.0)
    model = layer(quiet, decode=True)
    model.init_cache(X.shape)
    step = nnx.jit(lambda model, token: model(token))
    got = jnp.concatenate([step(model, X[:, i : i + 1]) for i in range(3)], 1)
    plain = nnx.MultiHeadAttention(2, 4, decode=False, rngs=streams())
    np.testing.assert_allclose(got, plain(X, is_causal=True), atol=1e-4)
    assert count(model) == 3


# The stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rngs", [nnx.Rngs(0), nnx.Rngs(params=RNG)], ids=("default", "params"))
def test_private_attention_refuses_to_fall_back_to_another_stream(rngs):
    with pytest.raises(ValueError, match=r"privacy=dpfa_jax\.random\.secure_key\(\)"):
        attention(rngs=rngs)


@pytest.mark.parametrize("seed", [0, jax.random.key(0), jax.random.PRNGKey(0)], ids=str)
def test_private_attention_refuses_seeds(seed):
    with pytest.raises(ValueError, match="32-bit seed"):
        attention(rngs=nnx.Rngs(params=0, privacy=seed))


def test_private_attention_draws_new_noise_for_every_layer_and_call():
    rngs = streams()
    first, second = layer(rngs=rngs), layer(rngs=rngs)
    nnx.update(second, nnx.state(first, nnx.Param))
    jitted = nnx.jit(lambda model, x: model(x))
    outputs = [first(X), first(X), second(X), jitted(first, X), jitted(first, X), first(X)]
    assert not noise_repeats(outputs)
    assert count(first) == 5
    fresh = layer(rngs=streams())
    assert noise_repeats([outputs[0], fresh(X)])  # the question can be answered yes


def test_private_attention_counts_through_the_transformations_of_flax():
    model = layer()

    def loss(model):
        return jnp.sum(model(X))

    both = nnx.jit(lambda model: (nnx.grad(loss)(model), nnx.grad(nnx.remat(loss))(model)))
    both(model)
    assert count(model) == 2


COPIES = {
    "merge": lambda model: nnx.merge(*nnx.split(model))(X),
    "clone": lambda model: nnx.clone(model)(X),
    "deepcopy": lambda model: copy.deepcopy(model)(X),
    "pickle": lambda model: pickle.loads(pickle.dumps(model))(X),
    "tree map": lambda model: jax.tree.map(lambda leaf: leaf, model)(X),
    "jit of split": lambda model: jax.jit(lambda state: nnx.merge(nnx.split(model)[0], state)(X))(
        nnx.split(model)[1]
    ),
    "jit of module": lambda model: jax.jit(lambda model: model(X))(model),
    "jit closure": lambda model: jax.jit(lambda x: model(x))(X),
    "nnx.jit closure": lambda model: nnx.jit(lambda x: model(x))(X),
    "clone in nnx.jit": lambda model: nnx.jit(lambda model: nnx.clone(model)(X))(model),
    "grad in jit of module": lambda model: jax.jit(
        lambda model: nnx.grad(lambda model: jnp.sum(model(X)))(model)
    )(model),
    "nnx.jit without graph updates": lambda model: nnx.jit(
        lambda model: model(X), graph_updates=False
    )(model),
    "made in nnx.jit": lambda model: nnx.jit(lambda: layer())()(X),
    "lax.scan": lambda model: jax.lax.scan(
        lambda carry, x: (carry, nnx.merge(*nnx.split(model))(x)), 0, X[None]
    ),
}


@pytest.mark.parametrize("use", COPIES.values(), ids=COPIES)
def test_private_attention_refuses_copies_whose_count_is_lost(use):
    model = layer()
    with pytest.raises(ValueError, match=r"dpfa_jax\.nnx\.(apply|reseed)"):
        use(model)
    assert count(model) == 0


def test_dropout_of_flax_repeats_where_private_attention_refuses():
    drop = nnx.Dropout(0.5, deterministic=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(drop)
    run = jax.jit(lambda state: nnx.merge(graph, state)(jnp.ones(64)))
    np.testing.assert_array_equal(run(state), run(state))


SCANS = {
    "broadcast": lambda model: nnx.scan(lambda model, x: model(x), in_axes=(None, 0), out_axes=0)(
        model, X[None]
    ),
    "carry": lambda model: nnx.scan(
        lambda model, x: (model, model(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(model, X[None]),
    "shared key": lambda model: nnx.scan(
        lambda model, x: model(x),
        in_axes=(nnx.StateAxes({nnx.RngKey: None, nnx.RngCount: nnx.Carry, ...: None}), 0),
        out_axes=0,
    )(model, X[None]),
}


@pytest.mark.parametrize("use", SCANS.values(), ids=SCANS)
@pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=("eager", "jit"))
def test_private_attention_refuses_scans_that_might_repeat(use, outer):
    with pytest.raises(ValueError, match=r"dpfa_jax\.nnx\.apply|nnx\.RngState"):
        outer(use)(layer())


def test_private_attention_scans_a_stack_of_layers():
    model = stack_of_layers(streams())
    with pytest.raises(ValueError, match="reseed"):  # made in a transformation: not yet its own
        scan_layers(model, X)
    reseed(model, RNG)
    run = nnx.jit(scan_layers)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), state))
    first, second = run(model, X), run(model, X)
    assert not noise_repeats([*first, *second])
    np.testing.assert_array_equal(model.attention_fn.count[...], [2, 2, 2])
    with pytest.raises(ValueError, match="key data of shape"):
        model.attention_fn(*[heads(1, 1, 3, 2, 2)] * 3)


def test_private_attention_draws_new_noise_for_every_vmapped_example():
    model = layer()
    run = nnx.jit(nnx.vmap(lambda model, x: model(x), in_axes=(None, 0)))
    outputs = run(model, jnp.stack([X, X]))
    assert not noise_repeats([*outputs, model(X)])


def test_updates_and_checkpoints_never_turn_a_stream_back():
    model = layer()
    old = jax.tree.map(jnp.copy, nnx.state(model))
    model(X)
    nnx.update(model, old)
    assert count(model) == 1
    restored = layer(rngs=streams(OTHER_RNG))
    nnx.update(restored, old)
    np.testing.assert_array_equal(
        restored.query.kernel[...], model.query.kernel[...]
    )  # the parameters are the checkpoint's, the key is not
    assert not noise_repeats([restored(X), layer()(X)])
    kept = nnx.state(model, nnx.RngState)
    assert all(leaf.dtype == jnp.uint32 for leaf in jax.tree.leaves(kept))  # no typed keys


def test_reseed_gives_every_layer_its_own_key():
    model = Stack(streams())
    copied = nnx.clone(model)
    reseed(copied, RNG)
    keys = [np.asarray(m.attention_fn.key[...]) for m in (copied.first, copied.second)]
    assert np.any(keys[0] != keys[1])
    again = nnx.clone(model)
    reseed(again, RNG)
    np.testing.assert_array_equal(again.first.attention_fn.key[...], keys[0])
    reseed(again, OTHER_RNG)
    assert np.any(np.asarray(again.first.attention_fn.key[...]) != keys[0])
    with pytest.raises(ValueError, match="argument of the function"):
        jax.jit(lambda: reseed(nnx.clone(model), RNG))()
    inside = nnx.jit(lambda model, rng: reseed(model, rng))
    model.first.attention_fn.count[...] = jnp.uint32(5)
    inside(model, OTHER_RNG)
    assert model.first(X).shape == X.shape


def test_apply_is_a_function_of_the_key():
    model = layer()
    run = jax.jit(apply)
    one = run(model, RNG, X)
    np.testing.assert_array_equal(one, run(model, RNG, X))
    assert not noise_repeats([one, run(model, OTHER_RNG, X)])
    assert count(model) == 0
    with pytest.raises(ValueError, match="argument of the function"):
        jax.jit(lambda x: apply(model, RNG, x))(X)
    keys = dpfa_jax.random.split(RNG, 3)
    jax.eval_shape(lambda keys: jax.lax.map(lambda rng: apply(model, rng, X), keys), keys)


def test_events_of_a_model_need_no_head_shapes():
    model = Stack(streams())
    found = accounting.events(
        apply, model, KEY_SPEC, jax.ShapeDtypeStruct(X.shape, X.dtype), MEMORY
    )
    # 3 queries × 2 heads × width 2, and one denominator for each query and head
    want = {accounting.Gaussian(1.0, 12): 1, accounting.Gaussian(0.5, 18): 1}
    assert accounting.event.leaves(found) == want
    layers = stack_of_layers(streams())
    found = accounting.events(apply, Scanned(layers), KEY_SPEC, X)
    assert found == accounting.Repeated(accounting.Gaussian(1.0, 12), 3)


# PrivateCrossAttention ---------------------------------------------------------------------------


def cross(mechanism=SUMS, **options) -> PrivateCrossAttention:
    return PrivateCrossAttention(
        2, 4, mechanism=mechanism, queries="public", rngs=streams(), **options
    )


def test_private_cross_attention_releases_one_memory_for_a_batch():
    model = cross(num_kv_heads=1, out_features=6)
    queries = jnp.concatenate([X, X + 1.0])
    spec = jax.eval_shape(apply, model, KEY_SPEC, queries, MEMORY[0])
    assert spec.shape == (2, 3, 6)
    assert jax.eval_shape(apply, model, KEY_SPEC, queries, MEMORY).shape == (2, 3, 6)
    found = accounting.events(apply, model, KEY_SPEC, queries, MEMORY[0])
    assert found == accounting.Gaussian(0.5, 2 * 3 * 2 * 3)
    wide = PrivateCrossAttention(2, 4, 7, mechanism=SUMS, queries="public", rngs=streams())
    assert jax.eval_shape(apply, wide, KEY_SPEC, X, jnp.ones((5, 7))).shape == X.shape


def test_private_cross_attention_ignores_a_broken_record_alone():
    model, run = cross(), jax.jit(apply)

    def out(memory, weights):
        return np.asarray(run(model, RNG, X, memory, key_log_weights=weights))

    whole, broken = out(MEMORY, jnp.zeros(5)), out(MEMORY.at[0, 2, 1].set(jnp.nan), jnp.zeros(5))
    weightless = out(MEMORY, jnp.zeros(5).at[2].set(-jnp.inf))
    np.testing.assert_array_equal(broken, weightless)
    assert np.all(np.isfinite(broken)) and np.any(whole != broken)


def test_private_cross_attention_refuses_self_attention():
    with pytest.raises(ValueError, match="one array as both"):
        cross()(X, X)
    with pytest.raises(ValueError, match="num_heads to divide"):
        cross(qkv_features=5)
