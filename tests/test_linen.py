"""Which statement does this file keep true? A flax.linen model cannot lose its mask or its noise.

Every trap of Flax is either impossible here or an error that says what to do.
"""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import LazyRng, _fold_in_static

import dpfa_jax
from dpfa_jax import _flax, accounting
from dpfa_jax.linen import PrivateAttention, PrivateCrossAttention, _make_rng
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

Q, K, V = heads(2, 1, 3, 2, 2), heads(3, 1, 5, 2, 2), heads(4, 1, 5, 2, 2)
ATTEND = PrivateAttention(SEQUENCE, "private")


def layer(attention_fn=ATTEND, **options) -> nn.Module:
    return nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn, **options)


@functools.cache
def compiled(mechanism, queries):
    module = PrivateAttention(mechanism, queries)

    def run(operands, rng, options):
        return module.apply({}, *operands, rngs={"privacy": rng}, **options)

    return jax.jit(run)


def release(*operands, mechanism=SUMS, queries="public", rng=RNG, **options):
    """The layer's answer, compiled once for a set of shapes."""
    return compiled(mechanism, queries)(operands or (Q, K, V), rng, options)


def eager(rng=RNG, queries="public", **options):
    """The same as written, for errors that need values or static arguments."""
    attend = PrivateAttention(SUMS, queries)
    return attend.apply({}, Q, K, V, rngs={"privacy": rng}, **options)


def answer(model, variables, *operands, **options):
    """A model's answer under `RNG`, compiled."""
    run = jax.jit(
        lambda v, rng, args, kwargs: model.apply(v, *args, rngs={"privacy": rng}, **kwargs)
    )
    return run(variables, RNG, operands, options)


def shape_of(model, variables, *operands, **options):
    """Shape and dtype of that answer, without compiling anything."""
    return jax.eval_shape(
        lambda rng: model.apply(variables, *operands, rngs={"privacy": rng}, **options), KEY_SPEC
    )


class Stack(nn.Module):
    """Two private layers with different mechanisms, the second over public queries."""

    @nn.compact
    def __call__(self, x, memory):
        x = layer()(x)
        return layer(PrivateAttention(SUMS, "public"))(x, memory)


class Calls(nn.Module):
    """Two calls of one layer and one of another on equal operands: only their noise differs."""

    wrap: object = staticmethod(lambda cls: cls)

    @nn.compact
    def __call__(self, q):
        attend = self.wrap(PrivateAttention)
        one = attend(SEQUENCE, "private", name="one")
        return one(q, q, q), one(q, q, q), attend(SEQUENCE, "private", name="other")(q, q, q)


# What Flax passes --------------------------------------------------------------------------------


def test_private_attention_shows_flax_every_parameter():
    # Flax drops what is not in the signature: behind **kwargs there would be no mask.
    seen = inspect.signature(ATTEND).parameters
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in seen.values())
    passed = set(inspect.signature(nn.dot_product_attention).parameters)
    assert passed <= set(seen)


def test_private_attention_gets_the_mask_through_the_layer():
    model = layer(PrivateAttention(SUMS, "public"))
    mask = jnp.ones((1, 1, 3, 5)).at[..., 0].set(0.0)
    variables = model.init(RNG, X, MEMORY)
    changed = MEMORY.at[:, 0].add(1.0)

    @jax.jit
    def run(memory, mask, rng):
        return model.apply(variables, X, memory, mask=mask, rngs={"privacy": rng})

    np.testing.assert_array_equal(run(MEMORY, mask, RNG), run(changed, mask, RNG))
    all_of_it = jnp.ones_like(mask)
    assert np.any(np.asarray(run(MEMORY, all_of_it, RNG) != run(changed, all_of_it, RNG)))


def test_boolean_mask_takes_what_flax_makes():
    mask = nn.make_causal_mask(jnp.ones((1, 3)))
    assert mask.dtype == jnp.float32
    want = np.tril(np.ones((3, 3), bool))[None, None]
    np.testing.assert_array_equal(_flax.boolean_mask(mask), want)
    np.testing.assert_array_equal(_flax.boolean_mask(mask.astype(bool)), want)
    assert _flax.boolean_mask(None) is None


def test_private_attention_refuses_additive_masks():
    additive = jnp.where(jnp.arange(5) < 3, 0.0, -1e9) * jnp.ones((1, 1, 3, 1))
    with pytest.raises(ValueError, match="key_log_weights"):
        eager(mask=additive)
    # Traced, its values are unknown: it attends where it is exactly 1, so nowhere.
    nowhere = release(mask=jnp.zeros((1, 1, 3, 5)))
    np.testing.assert_array_equal(release(mask=additive), nowhere)


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (1, 1, 3, 4), (1, 3, 3, 5), (2, 1, 3, 5)])
def test_private_attention_refuses_masks_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"\(batch\.\.\., heads, queries, keys\) = \(1, 2, 3, 5\)"):
        eager(mask=jnp.ones(shape))


@pytest.mark.parametrize(
    ("mechanism", "queries"), [(SUMS, "public"), (SEQUENCE, "private")], ids=("sums", "sequence")
)
def test_private_attention_answers_masked_rows_without_the_values(mechanism, queries):
    mask = jnp.ones((1, 1, 3, 5)).at[:, :, 1].set(0.0)

    def row(value):
        out = release(Q, K, value, mechanism=mechanism, queries=queries, mask=mask)
        return np.asarray(out)[0, 1]

    if mechanism is SUMS:
        np.testing.assert_array_equal(row(V), row(V + 1.0))
    else:  # clipping the sequence scales every row, and a zero row stays zero
        np.testing.assert_allclose(row(V), row(3 * V), rtol=1e-6)
    mean = nn.dot_product_attention(Q, K, V, mask=mask)[0, 1]
    np.testing.assert_allclose(mean, np.mean(V[0], 0), rtol=1e-5)  # what Flax does


def test_private_attention_refuses_dropout_and_sown_weights_through_the_layer():
    model = layer(dropout_rate=0.1)
    variables = model.init(RNG, X, deterministic=True)
    rngs = {"privacy": RNG, "dropout": OTHER_RNG}
    with pytest.raises(ValueError, match="dropout_rate = 0"):
        model.apply(variables, X, deterministic=False, rngs=rngs)
    assert shape_of(model, variables, X, deterministic=True).shape == X.shape
    with pytest.raises(ValueError, match="sow_weights=False"):
        shape_of(model, variables, X, deterministic=True, sow_weights=True)


def test_private_attention_noise_is_apart_from_dropout_of_the_same_key():
    flax = LazyRng.create(RNG, "attention_fn", 1).as_jax_rng()
    seen = {}

    class Spy(PrivateAttention):
        def __call__(self, query, key, value):
            seen["ours"] = jax.random.key_data(_make_rng(self))
            return query

    layer(Spy(SEQUENCE, "private")).init_with_output({"params": RNG, "privacy": RNG}, X)
    assert jnp.any(seen["ours"] != jax.random.key_data(flax))


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"bias": jnp.zeros((1, 1, 3, 5))}, "key_log_weights"),
        ({"module": ATTEND}, "sow_weights=False"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum"),
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general"),
    ],
    ids=("bias", "sow", "einsum", "dot_general"),
)
def test_private_attention_refuses_what_breaks_the_bound(option, what):
    with pytest.raises(ValueError, match=what):
        eager(**option)


def test_private_attention_takes_only_sequence_release_for_private_tokens():
    model = layer(PrivateAttention(SUMS, "private"))
    with pytest.raises(ValueError, match="Use SequenceRelease"):
        model.init(RNG, X)
    with pytest.raises(TypeError, match="queries"):
        PrivateAttention(SUMS)  # pyright: ignore: no default for a promise
    with pytest.raises(ValueError, match="queries"):
        eager(queries="secret")


def test_private_attention_without_noise_is_the_layer_of_flax():
    mask = nn.make_causal_mask(jnp.ones((1, 3)))
    model = layer(PrivateAttention(dpfa_jax.NonPrivate(), "private"), normalize_qk=True)
    plain = layer(nn.dot_product_attention, normalize_qk=True)
    variables = model.init(RNG, X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, plain.init(RNG, X))
    want = plain.apply(variables, X, mask=mask)
    got = jax.jit(model.apply)(variables, X, mask=mask)  # no stream: nothing is random
    error = 64 * np.finfo(np.float32).eps * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, atol=error, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_private_attention_keeps_the_dtype_of_the_layer(dtype):
    model = layer(dtype=dtype, force_fp32_for_softmax=True)
    variables = model.init(RNG, X)
    assert shape_of(model, variables, X).dtype == dtype
    alone = PrivateAttention(SUMS, "public")
    assert shape_of(alone, {}, Q.astype(dtype), K, V).dtype == jnp.float32
    assert shape_of(alone, {}, Q, K, V, dtype=dtype).dtype == dtype


def test_private_attention_takes_any_number_of_batch_axes():
    q, k = heads(5, 2, 3, 4, 2, 2), heads(6, 2, 3, 5, 2, 2)
    mask = jnp.asarray(
        np.random.default_rng(7).integers(0, 2, size=(2, 3, 1, 4, 5)) * (np.arange(4) > 0)[:, None],
        bool,
    )
    quiet = PrivateAttention(dpfa_jax.NonPrivate(), "public")
    whole = np.asarray(quiet.apply({}, q, k, k, mask=mask))
    want = np.asarray(nn.dot_product_attention(q, k, k, mask=mask | ~mask.any(-1, keepdims=True)))
    seen = np.asarray(mask.any(-1))[:, :, 0]
    error = 64 * np.finfo(np.float32).eps * np.max(np.abs(want))
    np.testing.assert_allclose(whole[seen], want[seen], atol=error, rtol=0)
    np.testing.assert_array_equal(whole[~seen], 0.0)
    alone = PrivateAttention(SUMS, "public")
    for part in (mask[:1, :1], mask[:, :1], mask[:1]):
        assert shape_of(alone, {}, q, k, k, mask=part).shape == (2, 3, 4, 2, 2)
    assert shape_of(alone, {}, q[0, 0], k[0, 0], k[0, 0]).shape == (4, 2, 2)
    assert shape_of(alone, {}, q[0], K, V).shape == (3, 4, 2, 2)  # one memory
    with pytest.raises(ValueError, match="batch shape"):
        shape_of(alone, {}, q, k[:, :2], k[:, :2])


def test_private_attention_decodes_step_by_step():
    quiet = dpfa_jax.SequenceRelease(noise_multiplier=1e-9, clip_norm=100.0)
    model = layer(PrivateAttention(quiet, "private"), decode=True)
    variables = model.init(RNG, X)
    params, cache = variables["params"], variables["cache"]

    @jax.jit
    def step(cache, token, rng):
        return model.apply(
            {"params": params, "cache": cache}, token, rngs={"privacy": rng}, mutable=["cache"]
        )

    answers = []
    for i, rng in enumerate(dpfa_jax.random.split(RNG, 3)):
        out, state = step(cache, X[:, i : i + 1], rng)
        cache = state["cache"]
        answers.append(out)
    mask = nn.make_causal_mask(jnp.ones((1, 3)))
    want = layer(nn.dot_product_attention).apply({"params": params}, X, mask=mask)
    np.testing.assert_allclose(jnp.concatenate(answers, 1), want, atol=1e-4)
    spec = accounting.events(step, cache, X[:, :1], KEY_SPEC)
    assert spec == accounting.Gaussian(1e-9, coordinates=4)


# The stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rngs", [{}, {"params": RNG}, RNG], ids=("none", "params", "one key"))
def test_private_attention_refuses_to_fall_back_to_another_stream(rngs):
    with pytest.raises(ValueError, match=r'rngs=\{"privacy": rng\}'):
        ATTEND.apply({}, Q, Q, Q, rngs=rngs)


@pytest.mark.parametrize("rng", [0, jax.random.PRNGKey(0)], ids=("int", "legacy"))
def test_private_attention_refuses_weak_keys(rng):
    with pytest.raises((TypeError, ValueError), match=r"typed JAX key|PRNGKey"):
        eager(rng=rng)


def test_private_attention_needs_and_spends_nothing_at_init():
    model = Stack()
    out, variables = model.init_with_output({"params": RNG}, X, MEMORY)
    assert out.shape == X.shape
    zeros, _ = PrivateAttention(SUMS, "public").init_with_output({"params": RNG}, Q, K, V)
    np.testing.assert_array_equal(zeros, jnp.zeros((1, 3, 2, 2)))
    assert accounting.events(model.init, RNG, X, MEMORY) == accounting.NoRelease()
    assert "privacy" not in variables
    with pytest.raises(ValueError, match="mask"):  # what apply would refuse, init refuses
        layer().init(RNG, X, mask=jnp.ones((3, 3)))


def test_events_of_a_model_need_no_head_shapes():
    model = Stack()
    variables = model.init(RNG, X, MEMORY)
    found = accounting.events(
        model.apply,
        variables,
        jax.ShapeDtypeStruct(X.shape, X.dtype),
        MEMORY,
        rngs={"privacy": KEY_SPEC},
    )
    # 3 queries × 2 heads × width 2, and one denominator for each query and head
    want = {accounting.Gaussian(1.0, 12): 1, accounting.Gaussian(0.5, 18): 1}
    assert accounting.event.leaves(found) == want


@pytest.mark.parametrize("wrap", [lambda cls: cls, nn.jit], ids=("plain", "jit"))
def test_private_attention_draws_new_noise_for_every_layer_and_call(wrap):
    model = Calls(wrap)
    run = jax.jit(lambda rng: model.apply({}, Q, rngs={"privacy": rng}))
    outputs = run(RNG)
    assert not noise_repeats([*outputs, *run(OTHER_RNG)])
    assert noise_repeats([outputs[0], run(RNG)[0]])  # the question can be answered yes


def test_private_attention_runs_again_under_the_same_noise_in_remat():
    def gradient(model):
        def loss(q, rng):
            outputs = model.apply({}, q, rngs={"privacy": rng})
            return jnp.sum(outputs[0] * outputs[1]), outputs[:2]

        return jax.jit(jax.grad(loss, has_aux=True))(Q, RNG)

    # Each output is the derivative's factor of the other one: other noise, another gradient.
    (plain, outputs), (lifted, same) = gradient(Calls()), gradient(Calls(nn.remat))
    assert not noise_repeats(same)
    np.testing.assert_allclose(outputs[1], same[1], rtol=1e-5)
    np.testing.assert_allclose(plain, lifted, rtol=1e-4, atol=1e-5)


def test_private_attention_shared_between_layers_draws_new_noise():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            ones = nn.initializers.ones
            return [layer(kernel_init=ones, out_features=12)(x)[:, :1] for _ in range(2)]

    model = Shared()
    variables = model.init(RNG, X)
    first, second = answer(model, variables, X)
    assert np.all(np.asarray(first) != np.asarray(second))


def test_named_key_separates_what_flax_does_not():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("a", 1), ("a", "1"), ("a", "\x01")]
    flax = [jax.random.key_data(_fold_in_static(RNG, each)) for each in parts]
    np.testing.assert_array_equal(flax[0], flax[1])  # the trap
    ours = {tuple(jax.random.key_data(_flax.named_key(RNG, *each)).tolist()) for each in parts}
    assert len(ours) == len(parts)


def scanned(split_rngs, cls=PrivateAttention, **options):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            operands = (carry, carry, carry) if cls is PrivateAttention else (carry,)
            module = cls(SEQUENCE, "private") if cls is PrivateAttention else cls(**options)
            return carry, module(*operands)

    lift = nn.scan(Block, variable_broadcast="params", split_rngs=split_rngs, length=3)
    return lambda rngs: lift().apply({}, Q, None, rngs=rngs)[1]


def test_private_attention_draws_new_noise_in_every_step_of_a_scan():
    run = scanned({"params": False, "privacy": True})
    assert not noise_repeats(jax.jit(run)({"privacy": RNG}))
    found = accounting.events(lambda rng: run({"privacy": rng}), KEY_SPEC)
    assert found == accounting.Repeated(accounting.Gaussian(1.0, 12), 3)


def test_private_attention_refuses_a_scan_that_does_not_split_its_stream():
    same = scanned({"dropout": False}, nn.Dropout, rate=0.5, deterministic=False)
    masks = same({"dropout": RNG})
    np.testing.assert_array_equal(masks[0], masks[1])  # what Flax does with dropout
    for split, message in (
        ({"params": False}, 'PRNG stream "privacy"'),
        ({"params": False, "privacy": False}, "same noise"),
    ):
        run = scanned(split)
        for call in (run, jax.jit(run)):
            with pytest.raises(ValueError, match=message) as caught:
                call({"privacy": RNG})
            assert 'split_rngs={"params": ..., "privacy": True}' in str(caught.value)


def test_private_attention_draws_new_noise_for_every_vmapped_example():
    lift = nn.vmap(PrivateAttention, split_rngs={"privacy": False})(SEQUENCE, "private")
    q = jnp.broadcast_to(Q, (3, *Q.shape))
    assert not noise_repeats(answer(lift, {}, q, q, q))
    found = accounting.events(lambda rng: lift.apply({}, q, q, q, rngs={"privacy": rng}), KEY_SPEC)
    assert found == accounting.Repeated(accounting.Gaussian(1.0, 12), 3)


def test_private_attention_refuses_keys_that_traced_code_closes_over():
    def run(q, rng=RNG):
        return ATTEND.apply({}, q, q, q, rngs={"privacy": rng})

    with pytest.raises(ValueError, match="same noise"):
        jax.jit(run)(Q)
    with pytest.raises(ValueError, match="same noise"):
        jax.lax.scan(lambda carry, q: (carry, run(q)), 0, Q[None])
    with pytest.raises(ValueError, match="same noise"):
        jax.jit(lambda rng: jax.lax.map(lambda q: run(q, rng), Q[None]))(RNG)
    keys = dpfa_jax.random.split(RNG, 3)
    jax.eval_shape(lambda keys: jax.lax.map(lambda rng: run(Q, rng), keys), keys)
    # What runs once per call may close over its key: vmap, whose examples are told apart, and grad.
    examples = jnp.stack([Q, Q])
    assert not noise_repeats(jax.jit(lambda rng: jax.vmap(lambda q: run(q, rng))(examples))(RNG))
    jax.eval_shape(lambda rng: jax.grad(lambda q: jnp.sum(run(q, rng)))(Q), KEY_SPEC)


def test_private_attention_refuses_branches():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, q):
            attend = PrivateAttention(SEQUENCE, "private")
            return nn.cond(jnp.sum(q) > 0, lambda m, q: m(q, q, q), lambda m, q: q, attend, q)

    with pytest.raises(ValueError, match=r"nn\.cond"):
        Branch().apply({}, Q, rngs={"privacy": RNG})


# PrivateCrossAttention ---------------------------------------------------------------------------


def cross(mechanism=SUMS, **options) -> PrivateCrossAttention:
    return PrivateCrossAttention(num_heads=2, mechanism=mechanism, queries="public", **options)


def test_private_cross_attention_releases_one_memory_for_a_batch():
    model = cross(num_kv_heads=1, out_features=6)
    queries = jnp.concatenate([X, X + 1.0])
    variables = model.init(RNG, queries, MEMORY[0])
    out = answer(model, variables, queries, MEMORY[0])
    assert out.shape == (2, 3, 6)
    assert shape_of(model, variables, queries, MEMORY).shape == (2, 3, 6)
    found = accounting.events(
        model.apply, variables, queries, MEMORY[0], rngs={"privacy": KEY_SPEC}
    )
    assert found == accounting.Gaussian(0.5, 2 * 3 * 2 * 3)


def test_private_cross_attention_ignores_a_broken_record_alone():
    model = cross()
    variables = model.init(RNG, X, MEMORY)

    @jax.jit
    def run(memory, rng, **options):
        return model.apply(variables, X, memory, rngs={"privacy": rng}, **options)

    everything = {
        "mask": jnp.ones((1, 1, 1, 5)),
        "key_log_weights": jnp.zeros(5),
        "key_value_seq_lengths": jnp.array([5]),
    }

    def out(memory, **options):
        return np.asarray(run(memory, RNG, **(everything | options)))

    whole, broken = out(MEMORY), out(MEMORY.at[0, 2, 1].set(jnp.nan))
    without = out(MEMORY, mask=jnp.ones((1, 1, 1, 5)).at[..., 2].set(0.0))
    weightless = out(MEMORY, key_log_weights=jnp.zeros(5).at[2].set(-jnp.inf))
    short = out(MEMORY, key_value_seq_lengths=jnp.array([2]))
    np.testing.assert_array_equal(broken, without)
    np.testing.assert_array_equal(broken, weightless)
    assert np.any(whole != broken) and np.any(short != broken)


def test_private_cross_attention_without_noise_is_the_layer_of_flax():
    model = cross(dpfa_jax.NonPrivate())
    plain = layer(nn.dot_product_attention)
    variables = model.init(RNG, X, MEMORY)
    want = plain.apply(variables, X, MEMORY)
    error = 64 * np.finfo(np.float32).eps * np.max(np.abs(want))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, X, MEMORY), want, atol=error, rtol=0)


def test_private_cross_attention_refuses_self_attention_and_missing_streams():
    model = cross()
    variables = model.init(RNG, X, MEMORY)
    with pytest.raises(ValueError, match="one array as both"):
        model.apply(variables, X, X, rngs={"privacy": RNG})
    with pytest.raises(ValueError, match=r'rngs=\{"privacy": rng\}'):
        model.apply(variables, X, MEMORY, rngs={"params": RNG})
