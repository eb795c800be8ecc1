"""Which statement does every method keep true in every dtype? One row at a time in float64 says so.

The definition is autograd and a clip in float64, one example after the other, on Flax models.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipping
from tests import _clipping_common as common

ROWS, LENGTH = 6, 4
_DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": None}


class Reader(nn.Module):
    """Embedding, normalisation, two dense layers and a bias, computed in a chosen dtype."""

    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(common.VOCABULARY, common.WIDTH, dtype=self.dtype)(tokens)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        x = nn.gelu(nn.Dense(12, dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x.mean(axis=0))


def _loss(dtype, params, tokens, scale):
    """Longer gradients for larger scales: half of the rows are to be clipped, whatever rounding."""
    logits = Reader(dtype).apply(params, tokens)
    assert isinstance(logits, jax.Array)
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return -scale * jax.nn.log_softmax(logits.astype(wide))[0]


@functools.cache
def _problem():
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, common.VOCABULARY)
    params = jax.jit(Reader(None).init)(jax.random.key(2), tokens[0])
    scale = jnp.array([0.1, 0.2, 0.3, 3.0, 4.0, 5.0])
    exact = common.gradients_one_by_one(functools.partial(_loss, None), params, (tokens, scale))
    norms = sorted(common.length(row) for row in exact)
    return params, (tokens, scale), exact, float(np.sqrt(norms[2] * norms[3]))


@functools.cache
def _plain_error(dtype: str) -> float:
    """How far plain gradients in this dtype, clipped in float64, are from the definition."""
    params, args, exact, bound = _problem()
    plain = jax.jit(jax.grad(functools.partial(_loss, _DTYPES[dtype])))
    error = 0.0
    for i, row in enumerate(exact):
        leaves = jax.tree.leaves(plain(params, *(arg[i] for arg in args)))
        mine = common.clip_in_order([[np.asarray(leaf, np.float64) for leaf in leaves]], bound)
        error += common.distance(mine, common.clip_in_order([row], bound))
    return error


_METHODS = ("vmap", "two_pass", "one_pass")
_QUICK = {("one_pass", "bfloat16")}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(*each, marks=() if each in _QUICK else pytest.mark.slow)
        for each in itertools.product(_METHODS, _DTYPES)
    ],
)
def test_every_method_in_every_dtype_is_the_loop_over_rows_in_float64(method, dtype):
    params, args, exact, bound = _problem()
    loss = functools.partial(_loss, _DTYPES[dtype])
    got = jax.jit(clipping.clipped_grad(loss, clip_norm=bound, method=method))(params, *args)
    margin = 1 - 2.0**-6 if method != "vmap" and dtype != "float32" else 1.0
    want = common.clip_in_order(exact, bound * clipping.shrinkage(ROWS) * margin)
    # Twice the error of plain gradients in this dtype; 2⁻¹² for the norms (CL2).
    error = common.distance(got.tree, want)
    assert error <= 2 * _plain_error(dtype) + 2**-12 * bound * ROWS
    assert (got.method, int(got.clipped), int(got.nonfinite)) == (method, 3, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(got.tree)} == {jnp.dtype("float32")}
    # Negative control: the sum without its clip is nowhere near.
    assert common.distance(got.tree, common.clip_in_order(exact, 1e9)) > 10 * error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["two_pass", "one_pass"])
@pytest.mark.parametrize("name", ["language", "picture", "sequences"])
def test_sums_by_rule_of_flax_models_are_those_of_the_definition(name, method):
    loss, params, args = common.problem(name)
    rows = common.exact_rows(name)
    norms = sorted(common.length(row) for row in rows)
    bound = (norms[2] + norms[3]) / 2
    run = jax.jit(clipping.clipped_grad(loss, clip_norm=bound, method=method, microbatch_size=4))
    got = run(params, *args)
    want = common.clip_in_order(rows, bound * clipping.shrinkage(len(rows)))
    assert common.distance(got.tree, want) <= 2**-12 * bound * len(rows)
    assert (int(got.clipped), int(got.examples), int(got.nonfinite)) == (3, 6, 0)
