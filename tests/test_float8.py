"""Which statement does this file keep true? Eight bits for scores change each number by itself.

F6 (float8.md): what a record's row is rounded to depends on that row alone, in every backend.
"""

import functools

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import float8, linen, nnx, random

NOISE = dpfa_jax.IndependentNoise(noise_multiplier=0.3, value_bound=1.0, score_cap=2.0)


def _numbers() -> np.ndarray:
    """Every finite number: four bits of exponent (bias 7), three of mantissa, by definition."""
    found = []
    for bits in range(0x7F):
        exponent, mantissa = bits >> 3, bits & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        found += [size, -size]
    return np.unique(found)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_rounded_is_the_nearest_number_of_the_format(dtype):
    draw = np.random.default_rng(3)
    size = draw.normal(size=4000) * 2.0 ** draw.integers(-12, 11, size=4000)
    rows = jnp.asarray(size, dtype)
    given = np.asarray(rows, np.float64)
    found = np.asarray(float8.rounded(rows), np.float64)
    numbers = _numbers()
    assert np.all(np.isin(found, numbers))
    clipped = np.clip(given, -float8.LARGEST, float8.LARGEST)
    nearest = np.min(np.abs(clipped[:, None] - numbers), axis=1)
    np.testing.assert_array_equal(np.abs(found - clipped), nearest)


def test_rounded_is_not_a_number_where_the_row_is_not_finite():
    rows = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3e38, -3e38])
    found = np.asarray(float8.rounded(rows), np.float64)
    np.testing.assert_array_equal(found, [np.nan, np.nan, np.nan, 448.0, -448.0])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_through_rounds_inside_jit_too(dtype):
    # XLA may take a conversion there and back for none; for CPUs this one does not.
    rows = jnp.asarray(np.random.default_rng(0).normal(size=300), dtype)
    wanted = np.asarray(float8.rounded(rows).astype(dtype), np.float32)
    for run in (float8.through, jax.jit(float8.through), jax.jit(lambda x: float8.through(x) * 1)):
        np.testing.assert_array_equal(np.asarray(run(rows), np.float32), wanted)
    assert not np.array_equal(wanted, np.asarray(rows, np.float32))


def test_through_has_the_gradient_of_the_identity():
    slope = jax.grad(lambda x: jnp.sum(float8.through(x) * jnp.arange(4.0)))(jnp.ones(4))
    np.testing.assert_array_equal(slope, np.arange(4.0))


def _rows(dtype="float32"):
    draw = np.random.default_rng(1)
    shapes = ((2, 9, 4, 16), (2, 150, 2, 16), (2, 150, 2, 8))
    return tuple(jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)


MECHANISMS = {
    "S2": NOISE,
    "S3": dpfa_jax.ClippedContributions(0.3, clip_norm=1.0, value_bound=1.0, score_cap=2.0),
    "none": dpfa_jax.NonPrivate(),
}


@pytest.mark.parametrize(
    ("backend", "name"), [("xla", "S2"), ("xla", "S3"), ("xla", "none"), ("triton", "S2")]
)
def test_private_attention_scores_the_rounded_rows(backend, name):
    query, key, value = _rows()
    options = {"mechanism": MECHANISMS[name], "queries": "public", "is_causal": True}
    options |= {"backend": backend}

    @functools.partial(jax.jit, static_argnames="precision")
    def attend(query, key, value, rng, precision=None):
        given = options | {"rng": rng, "precision": precision}
        return dpfa_jax.private_attention(query, key, value, **given)

    rng = jax.random.key(0)
    found = attend(query, key, value, rng, precision="fp8")
    wanted = attend(float8.through(query), float8.through(key), value, rng)
    np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(found, attend(query, key, value, rng))


def test_gradients_are_those_in_the_rounded_rows():
    query, key, value = _rows()
    options = {"mechanism": NOISE, "queries": "public", "backend": "xla"}

    def loss(precision):
        def run(*rows):
            rng = jax.random.key(0)
            out = dpfa_jax.private_attention(*rows, rng=rng, precision=precision, **options)
            return jnp.sum(jnp.sin(out))

        return run

    found = jax.grad(loss("fp8"), (0, 1, 2))(query, key, value)
    rows = float8.through(query), float8.through(key), value
    for one, other in zip(found, jax.grad(loss(None), (0, 1, 2))(*rows), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.any(np.asarray(one) != 0)


def test_a_record_that_is_not_finite_is_null_in_eight_bits_too():
    query, key, value = _rows()
    options = {"mechanism": NOISE, "rng": jax.random.key(0), "queries": "public"}
    bad = key.at[0, 5, 1, 3].set(jnp.inf)
    found = dpfa_jax.private_attention(query, bad, value, precision="fp8", **options)
    weights = jnp.zeros((2, 150, 2)).at[0, 5].set(-jnp.inf)
    left_out = dpfa_jax.private_attention(
        query, key, value, precision="fp8", key_log_weights=weights, **options
    )
    np.testing.assert_array_equal(found, left_out)


def test_flax_layers_take_the_precision_of_scores_alone():
    query, key, value = _rows()
    mechanism, options = dpfa_jax.NonPrivate(), {"queries": "public", "backend": "xla"}
    wanted = dpfa_jax.private_attention(
        query, key, value, mechanism=mechanism, rng=None, precision="fp8", **options
    )
    linen_layer = linen.PrivateAttention(mechanism, precision="fp8", **options)
    rngs = flax.nnx.Rngs(privacy=random.secure_key())
    nnx_layer = nnx.PrivateAttention(mechanism, precision="fp8", rngs=rngs, **options)
    # What the layer around says is for its projections.
    highest = jax.lax.Precision.HIGHEST
    for found in (
        linen_layer.apply({}, query, key, value, precision=highest),
        nnx_layer(query, key, value, precision=highest),
    ):
        np.testing.assert_array_equal(found, wanted)


def test_noise_that_is_correlated_like_the_scores_refuses_eight_bits():
    query, key, value = _rows()
    noise = dpfa_jax.GaussianProcessNoise(noise_multiplier=1.0, value_bound=1.0, key_bound=1.0)
    with pytest.raises(ValueError, match="precision=None"):
        dpfa_jax.private_attention(
            query,
            key,
            value,
            mechanism=noise,
            rng=random.secure_key(),
            queries="public",
            precision="fp8",
        )
