"""Which statement do the norm kernels keep true? No norm is below that of the exact product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import per_example
from dpfa_jax.pallas import norms

# rows, d, p, dtype, whether Gram tiles are cheaper; sides that tiles do not divide
SHAPES = [
    (200, 136, 72, jnp.bfloat16, False),
    (200, 640, 1000, jnp.float16, True),
    (64, 512, 768, jnp.bfloat16, True),
]


def _operands(rows, d, p, dtype, seed=0):
    source = np.random.default_rng(seed)
    return tuple(jnp.asarray(source.normal(size=(2, rows, width)), dtype) for width in (d, p))


def _exact(x, dy):
    """Squared norms, and (Σ ‖x_t‖‖dy_t‖)², in float64, of each of the batch."""
    x, dy = (np.asarray(each, np.float64) for each in (x, dy))
    lengths = np.linalg.norm(x, axis=2) * np.linalg.norm(dy, axis=2)
    return np.sum((x.transpose(0, 2, 1) @ dy) ** 2, axis=(1, 2)), np.sum(lengths, axis=1) ** 2


def _interpreted(x, dy):
    run = jax.jit(jax.vmap(lambda x, dy: norms.product_norm(x, dy, fast=False)))
    return np.asarray(run(x, dy), np.float64)


@pytest.mark.parametrize(("rows", "d", "p", "dtype", "is_gram"), SHAPES)
def test_product_norm_is_no_less_than_the_norm_and_little_more(rows, d, p, dtype, is_gram):
    x, dy = _operands(rows, d, p, dtype)
    # The second of the batch cancels to nothing: all that is left of it is the bound.
    x = x.at[1, 1::2].set(x[1, ::2])
    dy = dy.at[1, 1::2].set(-dy[1, ::2])
    assert norms.supports(x[0], dy[0]) is None and norms.is_gram(rows, d, p) == is_gram
    got, (want, unit) = _interpreted(x, dy), _exact(x, dy)
    assert want[0] > 0 and want[1] == 0
    slack = norms.gram_error(rows, d, p) * unit
    if not is_gram:
        lost, summed = norms.direct_error(rows, d, p)
        slack = (np.sqrt(want) + 1.02 * lost * np.sqrt(unit)) ** 2 * (1 + 3 * summed) - want
    assert np.all(got >= want) and np.all(got <= (want + slack) * (1 + 2**-18))
    assert got[1] >= 0.9 * slack[1] > 0
    # What the rules compute without kernels is the same norm.
    plain = np.asarray(jax.vmap(per_example.product_norm)(x, dy))
    assert abs(plain[0] - got[0]) <= 2 * slack[0] + 2**-18 * got[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "d", "p", "dtype"), [s[:4] for s in SHAPES])
def test_compiled_product_norm_is_no_less_than_the_norm(rows, d, p, dtype):
    # Rows of one sign: every sum of the matrix units runs the same way, and truncation adds up.
    x, dy = (abs(each) for each in _operands(rows, d, p, dtype))
    got = np.asarray(jax.jit(jax.vmap(norms.product_norm))(x, dy), np.float64)
    want, unit = _exact(x, dy)
    lost = 3 * max(norms.gram_error(rows, d, p), norms.direct_error(rows, d, p)[0])
    assert np.all(got >= want) and np.all(got <= want + lost * unit)


def test_product_norm_of_what_is_not_finite_is_not_finite():
    for is_gram, (rows, d, p) in ((False, (128, 64, 64)), (True, (64, 640, 640))):
        assert norms.is_gram(rows, d, p) == is_gram
        x, dy = _operands(rows, d, p, jnp.bfloat16)
        x = x.at[0, 3, 5].set(jnp.nan)
        dy = dy.at[1].set(0).at[1, 7, 2].set(jnp.inf)
        assert not np.any(np.isfinite(_interpreted(x, dy)))


def test_a_pair_of_tiles_counts_twice_off_the_diagonal():
    # Two tiles of rows that are all alike: 256 equal rows, not 128 and 128 that never met.
    x = jnp.ones((1, 256, 512), jnp.bfloat16)
    dy = jnp.ones((1, 256, 512), jnp.bfloat16)
    assert norms.is_gram(256, 512, 512)
    (got,), (want, unit) = _interpreted(x, dy), _exact(x, dy)
    assert want <= got <= want + 1.01 * norms.gram_error(256, 512, 512) * unit


def test_errors_bound_sums_that_round_to_the_worse_side():
    # Every addition loses its whole allowance: `depth` of them in the matrix units, and then one
    # for every sum of those, and so for squares.
    for length in (64, 128, 768, 50304):
        lost = 1 - (1 - 2.0**-23) ** min(length, 128) * (1 - 2.0**-24) ** (-(-length // 128))
        assert lost < norms.direct_error(length, 64, 64)[0] < 2.0**-23 * (128 + length / 128 + 1)
    d, p = (1 - norms.direct_error(length, 64, 64)[0] for length in (768, 50304))
    # What is left of a Gram sum whose lengths, read off a diagonal that lost as much, are charged.
    left = d * p * (1 - 2.0**-24) ** (2 * 128 + 36)
    assert left + norms.gram_error(1024, 768, 50304) * left >= 1


def test_supports_says_why_not():
    def reason(rows, d, p, first=jnp.bfloat16, second=jnp.bfloat16):
        return norms.supports(
            jax.ShapeDtypeStruct((rows, d), first), jax.ShapeDtypeStruct((rows, p), second)
        )

    assert reason(256, 768, 768) is None
    assert "16-bit" in str(reason(256, 768, 768, jnp.float32, jnp.float32))
    assert "16-bit" in str(reason(256, 768, 768, jnp.bfloat16, jnp.float16))
    assert "multiples of 8" in str(reason(256, 768, 50257))
    assert "below 64" in str(reason(32, 768, 768))


@pytest.mark.parametrize("shape", [(256, 768, 3072), (1024, 128, 200)])
def test_kernels_lower_for_cuda_without_a_gpu_and_hold_nothing_large(shape):
    rows, d, p = shape
    specs = [jax.ShapeDtypeStruct((4, rows, width), jnp.bfloat16) for width in (d, p)]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.vmap(norms.product_norm)).trace(*specs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text
    for held in (f"{rows}x{rows}xf32", f"{d}x{p}xf32"):
        assert held not in text
