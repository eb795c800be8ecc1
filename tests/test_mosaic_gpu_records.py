"""Which statement does this file keep true? The Hopper kernel weighs records as defined.

It cannot be interpreted: what it computes is compared where there is a GPU of compute capability
9.0 (tests marked `gpu`).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import float8
from dpfa_jax.pallas import (
    mosaic_gpu,
    mosaic_gpu_gradients,
    mosaic_gpu_records,
    triton_records,
)
from tests import _mosaic_gpu_common as forwards

CASES = {
    "heads that divide a block": (2, 300, 16, 128, 128, "bfloat16", 9.0),
    "heads that do not": (2, 513, 40, 128, 128, "float16", 9.0),
    "width that is no power of 2": (1, 77, 3, 80, 80, "bfloat16", 8.0),
    "narrow rows": (2, 64, 1, 8, 16, "bfloat16", 1.0),
    "wide rows": (1, 50, 5, 256, 256, "bfloat16", 2.0),
    "two widths": (2, 33, 12, 128, 40, "bfloat16", 1e-9),
    "no bound": (2, 130, 7, 96, 64, "float16", None),
}


def _rows(name, *, spoilt):
    memories, length, heads, key_width, width, dtype, bound = CASES[name]
    draw = np.random.default_rng(0)
    key = draw.standard_normal((memories, length, heads, key_width), np.float32)
    value = draw.standard_normal((memories, length, heads, width), np.float32)
    if spoilt:
        key[0, 5, heads - 1, key_width - 1] = np.nan
        key[-1, length - 1, 0, 0] = np.inf
        value[-1, 7, 0, width // 2] = -np.inf
        value[0, 9, heads // 2, 0] = np.nan
        value[0, 12, 0] = 0.0
    if spoilt and dtype == "bfloat16":
        # Their squares leave float32's range, at either end.
        value[0, 11, 0], value[0, 14, 0, 0], value[0, 13, heads - 1] = 3e38, 1e25, 1e-30
    return jnp.asarray(key, dtype), jnp.asarray(value, dtype), bound


def _float64_weights(key, value, bound):
    """Logarithms of the weights and which records are NULL, slowly."""
    key, value = np.asarray(key, np.float64), np.asarray(value, np.float64)
    null = ~np.all(np.isfinite(key).all(-1) & np.isfinite(value).all(-1), axis=-1)
    if bound is None:
        return np.zeros(key.shape[:3]), null
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.minimum(0.0, np.log(bound / np.sqrt(np.sum(value**2, axis=-1)))), null


@pytest.mark.gpu
@pytest.mark.parametrize("keys", (False, True))
@pytest.mark.parametrize("spoilt", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_record_weights_are_the_definition_in_float64(name, spoilt, keys):
    key, value, bound = _rows(name, spoilt=spoilt)
    assert mosaic_gpu_records._takes((key, value), bound)
    if keys:
        found, flags = mosaic_gpu_records.record_log_weights(key, value, bound)
    else:
        # As if every key were finite.
        key = jnp.nan_to_num(key, posinf=0, neginf=0)
        known = mosaic_gpu_records.value_log_weights(value, bound)
        assert known is not None
        found, flags = known
    wanted, null = _float64_weights(key, value, bound)
    assert np.array_equal(np.isneginf(found), np.broadcast_to(null[..., None], found.shape))
    assert np.array_equal(np.any(flags != 0, axis=1), null.any(axis=1))
    kept = ~np.broadcast_to(null[..., None], found.shape)
    # A weight larger than it should be by 2⁻¹⁵ at most.
    assert np.max(np.abs(np.asarray(found, np.float64) - wanted)[kept]) < 2.0**-15


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("heads that divide a block", "heads that do not", "two widths"))
def test_a_record_changes_no_other_records_weight(name):
    key, value, bound = _rows(name, spoilt=False)
    spoilt = _rows(name, spoilt=True)
    before = np.asarray(mosaic_gpu_records.record_log_weights(key, value, bound)[0])
    after = np.asarray(mosaic_gpu_records.record_log_weights(*spoilt)[0])
    pairs = ((key, spoilt[0]), (value, spoilt[1]))
    same = [np.all(np.asarray(a) == np.asarray(b), axis=(2, 3)) for a, b in pairs]
    untouched = same[0] & same[1]
    assert untouched.any() and not untouched.all()
    np.testing.assert_array_equal(before[untouched], after[untouched])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("heads that divide a block", "heads that do not", "two widths"))
def test_narrow_keys_are_those_of_float8(name):
    key, value, bound = _rows(name, spoilt=False)
    # Ties, numbers below the normal ones, and some beyond the largest.
    scale = jnp.exp2(jnp.arange(key.shape[1]) % 21 - 12.0)[:, None, None]
    key = (key.astype(jnp.float32) * scale).astype(key.dtype)
    *known, narrow = mosaic_gpu_records.narrow_records(key, value, bound)
    wanted = float8.rounded(key)
    assert narrow.dtype == wanted.dtype
    np.testing.assert_array_equal(narrow.view(jnp.uint8), wanted.view(jnp.uint8))
    for one, other in zip(
        known, mosaic_gpu_records.record_log_weights(key, value, bound), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
def test_gradient_of_record_weights_is_that_of_triton():
    key, value, _ = _rows("two widths", spoilt=False)
    for bound in (3.0, 9.0):

        def loss(module, value, bound=bound):
            weights, _ = module.record_log_weights(key, value, bound)
            return jnp.sum(jnp.sin(weights))

        ours = jax.grad(lambda v: loss(mosaic_gpu_records, v))(value)
        theirs = jax.grad(lambda v: loss(triton_records, v))(value)
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=1e-2 / bound
        )


@pytest.mark.gpu
def test_record_weights_under_vmap_are_a_loop():
    key, value, bound = _rows("heads that divide a block", spoilt=True)
    batched = (jnp.stack([key, key[::-1]]), jnp.stack([value, value[::-1]]))
    found = jax.vmap(lambda k, v: mosaic_gpu_records.record_log_weights(k, v, bound))(*batched)
    for i in range(2):
        one = mosaic_gpu_records.record_log_weights(batched[0][i], batched[1][i], bound)
        for a, b in zip(found, one, strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize(
    "changes",
    (
        {"dtype": "float32"},
        {"width": 12},
        {"width": 264},
        {"bound": 2.0**-50},
        {"length": 0},
    ),
)
def test_what_the_kernel_does_not_take_is_triton(changes):
    given = {"length": 40, "width": 16, "dtype": "bfloat16", "bound": 1.0} | changes
    rows = jnp.ones((2, given["length"], 3, given["width"]), given["dtype"])
    assert not mosaic_gpu_records._takes((rows, rows), given["bound"])
    if not changes.get("length", 1):
        return
    found = mosaic_gpu_records.record_log_weights(rows, rows, given["bound"])
    wanted = triton_records.record_log_weights(rows, rows, given["bound"])
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert mosaic_gpu_records.narrow_records(rows, rows, given["bound"])[2] is None
    assert mosaic_gpu_records.value_log_weights(rows, given["bound"]) is None


def test_every_row_is_in_one_block():
    for heads, width in itertools.product((1, 3, 7, 12, 16, 40, 128), (8, 64, 80, 128, 256)):
        widths = (width,) * (1 + heads % 2)
        plan = mosaic_gpu_records._Plan(1000, heads, widths, "bf16", 1.0)
        # Whole turns of the warpgroup, so that no turn reads rows of two blocks.
        assert plan.records * heads % plan.together == 0
        assert plan.blocks * plan.records >= 1000 > (plan.blocks - 1) * plan.records
        assert plan.share * 8 >= width and plan.share <= 32


@pytest.mark.parametrize("narrow", (False, True))
def test_lowers_for_cuda_without_a_gpu(narrow):
    rows = jnp.ones((2, 40, 3, 64), jnp.bfloat16)
    run = mosaic_gpu_records.narrow_records if narrow else mosaic_gpu_records.record_log_weights
    traced = jax.jit(lambda k, v: run(k, v, 1.0)).trace(rows, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_record_kernel" in text


def test_lowers_under_shard_map_scan_and_grad():
    rows = np.ones((2, 40, 3, 64), np.float32)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    here = jax.sharding.PartitionSpec("x")

    def loss(value, key):
        weights, _ = mosaic_gpu_records.record_log_weights(key, value, 1.0)
        return weights.sum()

    def run(rows):
        rows = rows.astype(jnp.bfloat16)
        step = jax.checkpoint(jax.grad(loss))
        return jax.lax.scan(lambda c, _: (c, step(rows, rows)), 0, None, length=2)[1][0]

    sharded = jax.shard_map(run, mesh=mesh, in_specs=here, out_specs=here)
    with jax.set_mesh(mesh):
        text = jax.jit(sharded).trace(rows).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_record_kernel" in text


def _call(precision):
    noise = dpfa_jax.IndependentNoise(1.0, value_bound=3.0, score_cap=2.0)
    call = forwards.private_call(noise, is_causal=True, precision=precision)
    return lambda *given: jnp.sum(call(*given).astype(jnp.float32))


@pytest.mark.parametrize("precision", (None, "fp8"))
@pytest.mark.parametrize("transform", ("grad", "vmap", "nested vmap", "scan", "shard_map"))
def test_whole_calls_lower_for_cuda_under_transformations(monkeypatch, transform, precision):
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    # Triton's gradients, which are faster for so few rows, do not lower without a device.
    monkeypatch.setattr(mosaic_gpu_gradients, "faster", lambda *lengths: True)
    step = jax.checkpoint(jax.grad(_call(precision), (0, 1, 2)))
    rows = jnp.ones((2, 300, 2, 64), jnp.bfloat16)
    data = jnp.arange(8, dtype=jnp.uint32)

    def looped(*given):
        return jax.lax.scan(lambda carry, _: (carry, step(*given)), 0, None, length=2)[1]

    depth = {"vmap": 1, "nested vmap": 2}.get(transform, 0)
    run = {"scan": looped}.get(transform, step)
    for _ in range(depth):
        rows, run = jnp.stack([rows, rows]), jax.vmap(run, (0, 0, 0, None))
    if transform == "shard_map":
        auto, here = (jax.sharding.AxisType.Auto,), jax.P("x")
        mesh = jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(here, here, here, jax.P()), out_specs=(here,) * 3
        )
    traced = jax.jit(run).trace(rows, rows, rows, data)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Weights, answers plain or repaired, and gradients plain or repaired; no name survives vmap.
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") >= 5


def test_nothing_but_the_kernels_rounds_to_eight_bits(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    rows, data = jnp.ones((2, 304, 2, 64), jnp.bfloat16), jnp.arange(8, dtype=jnp.uint32)
    traced = jax.jit(_call("fp8")).trace(rows, rows, rows, data)
    lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    eight = [line for line in lines if "f8E4M3FN" in line]
    assert eight and not any("stablehlo.convert" in line for line in eight)
