"""One release of records on all GPUs of the machine: the compiled kernels and the devices' sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import dpfa_jax
from dpfa_jax import random, reference

pytestmark = pytest.mark.gpu

KEY = jax.random.key(3)
B, T, N, WIDTH, KEYS = 2, 512, 2, 64, 1032  # keys of each GPU: several groups
# The Hopper kernels take no mask by position.
EXCHANGES = (None, "sums", "records")
"""What is sent where queries are sharded; None where they are not."""
BACKENDS = {"triton": {"is_causal": True}, "mosaic_gpu": {}, "mosaic_gpu fp8": {"precision": "fp8"}}


def _arrays(keys):
    source = np.random.default_rng(0)
    shapes = (B, T, N, WIDTH), (B, keys, N, WIDTH), (B, keys, N, WIDTH)
    return [jnp.asarray(source.normal(size=shape), jnp.bfloat16) for shape in shapes]


def _options(backend):
    return {"queries": "public", "backend": backend.split()[0], **BACKENDS[backend]}


def _sharded(mechanism, exchange, devices, backend):
    shard_queries = exchange is not None
    mesh = jax.make_mesh((len(devices),), ("seq",), (AxisType.Auto,), devices=devices)

    def one(query, key, value, rng):
        return dpfa_jax.context_parallel_attention(
            query,
            key,
            value,
            axis_name="seq",
            mechanism=mechanism,
            rng=rng,
            shard_queries=shard_queries,
            exchange=exchange or "auto",
            **_options(backend),
        )

    rows = P(None, "seq")
    spec = rows if shard_queries else P()
    return jax.shard_map(one, mesh=mesh, in_specs=(spec, rows, rows, P()), out_specs=spec)


def _whole(mechanism, backend):
    def one(query, key, value, rng):
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, **_options(backend)
        )

    return one


def _both(call, arrays):
    """Answer and gradients."""

    def loss(*given):
        out = call(*given).astype(jnp.float32)
        return jnp.sum(jnp.sin(jnp.where(jnp.isnan(out), 0.0, out))), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays, KEY)
    return [np.asarray(x, np.float64) for x in (out, *grads)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "mechanism",
    [
        dpfa_jax.IndependentNoise(1e-6, value_bound=1.0, score_cap=1.0, floor=0.5),
        dpfa_jax.ClippedContributions(
            1e-6, value_bound=1.0, score_cap=1.0, clip_norm=2.0, floor=0.5
        ),
    ],
)
def test_records_on_all_gpus_are_answered_as_on_one(mechanism, exchange, backend):
    devices = jax.devices("gpu")
    arrays = _arrays(KEYS * len(devices))
    # NULL is NULL wherever it lies: one record of the last GPU.
    arrays[1] = arrays[1].at[0, -3, 1, 5].set(jnp.nan)
    # A query of the first.
    arrays[0] = arrays[0].at[1, 7, 0, 2].set(jnp.inf)
    found = _both(_sharded(mechanism, exchange, devices, backend), arrays)
    want = _both(_whole(mechanism, backend), arrays)
    assert np.all(np.isnan(found[0][1, 7, 0])) and np.isnan(found[0]).sum() == WIDTH
    found[0], want[0] = np.nan_to_num(found[0]), np.nan_to_num(want[0])
    for ours, theirs in zip(found, want, strict=True):
        assert np.all(np.isfinite(ours))
        # Equal but for roundings to bfloat16: of each entry, and of a part on each GPU.
        assert np.linalg.norm(ours - theirs) <= 2.0**-7 * np.linalg.norm(theirs)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_noise_on_all_gpus_is_that_of_one_call(exchange):
    # Without records and without a denominator the answer is the noise over the floor, in float32.
    devices = jax.devices("gpu")
    mechanism = dpfa_jax.IndependentNoise(
        1.0, value_bound=1.0, score_cap=1.0, denominator_weight=0.0, floor=1e6
    )
    query, key, value = (x.astype(jnp.float32) for x in _arrays(KEYS * len(devices)))
    none = jnp.full_like(key, jnp.nan)
    run = _sharded(mechanism, exchange, devices, "triton")
    out = jax.jit(run)(query, none, value, KEY)
    matrix, _ = reference.noise_field(random.key_data(KEY), *out.shape)
    noise, matrix = np.asarray(out, np.float64), np.asarray(matrix, np.float64)
    std = np.sum(noise * matrix) / np.sum(matrix**2)
    # In units of the noise: the public grid is 2⁻¹⁰ of it at most.
    assert np.max(np.abs(noise / std - matrix)) <= 2.0**-10
