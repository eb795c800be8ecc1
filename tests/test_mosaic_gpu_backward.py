"""Which statement does this file keep true? The Hopper gradients are those of the definition.

The kernel cannot be interpreted: what it computes is compared with `reference` where there is a GPU
of compute capability 9.0 (tests marked `gpu`); here it must lower, alone and under transformations,
and go to Triton where it has no kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import reference
from dpfa_jax.pallas import mosaic_gpu, mosaic_gpu_gradient_blocks, mosaic_gpu_gradients, triton
from tests._mosaic_gpu_common import make_operands
from tests._mosaic_gpu_common import make_spec as _spec
from tests._mosaic_gpu_common import relative as _relative

CAPPED = {"score_cap": 2.0, "floor": 0.2}
NOISY = {**CAPPED, "noise": "sums", "noise_std": 0.1, "denominator_std": 0.2, "ball": 1.0}
NAME = "dpfa_mosaic_gradient_kernel"


def _operands(**changes):
    """As in the forward tests, with one record that does not count."""
    operands = make_operands(**changes)
    return operands._replace(log_weights=operands.log_weights.at[:, 5].set(-jnp.inf))


CASES = {
    "capped": ({}, CAPPED),
    "noisy": ({}, NOISY),
    "causal": ({"keys": 200}, {**CAPPED, "is_causal": True}),
    "wide": ({"width": 128}, NOISY),
    "wide causal": ({"width": 128, "keys": 200}, {**NOISY, "is_causal": True}),
    "wide, more queries": (
        {"width": 128, "keys": 150, "queries": 700},
        {**CAPPED, "is_causal": True},
    ),
    "wide, more keys": ({"width": 128, "keys": 700}, {**CAPPED, "is_causal": True}),
    "running maximum": ({"width": 128}, {"score_cap": None}),
    "running maximum, causal": (
        {"keys": 300, "queries": 300},
        {"score_cap": None, "is_causal": True},
    ),
    "float16": ({"dtype": "float16"}, NOISY),
    "float16 wide": ({"dtype": "float16", "width": 128}, CAPPED),
    "width 80": ({"width": 80}, CAPPED),
    "lengths": ({"width": 128, "key_lengths": jnp.array([150, 70], jnp.int32)}, CAPPED),
    "mask": ({"mask": jnp.arange(600).reshape(2, 1, 1, 300) % 7 > 1}, CAPPED),
    "one query and one key": ({"queries": 1, "keys": 6, "heads": 2}, CAPPED),
}


def _cotangent(operands):
    shape = (*operands.query.shape[:3], operands.value.shape[3])
    wave = jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32))
    return wave.reshape(shape).astype(operands.query.dtype)


def _residuals(operands):
    batch, queries, heads, _ = operands.query.shape
    ones = jnp.ones((batch, heads, queries))
    return _cotangent(operands), ones, ones, ones


def _backward(spec):
    def run(operands):
        residuals = _residuals(operands)
        return mosaic_gpu_gradients.fused(operands, spec, residuals, _cotangent(operands))[:4]

    return run


def _lowered(run, *arguments):
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["noisy", "wide causal", "running maximum", "float16"])
def test_backward_lowers_for_cuda_without_a_gpu(name):
    shapes, changes = CASES[name]
    operands = _operands(**shapes)
    text = _lowered(_backward(_spec(changes)), operands)
    assert NAME in text and "dpfa_key_gradient" not in text
    found = jax.eval_shape(_backward(_spec(changes)), operands)
    for array, given in zip(found, operands[:4], strict=True):
        assert (array.shape, array.dtype) == (given.shape, given.dtype)


@pytest.mark.parametrize(
    ("shapes", "changes", "part"),
    [
        ({"width": 192}, {}, "wider"),
        ({}, {"window": (60, 30)}, "windows"),
        ({"query_segments": jnp.zeros((2, 200)), "key_segments": jnp.zeros((2, 300))}, {}, "segm"),
        ({"mask": jnp.ones((2, 4, 200, 300), bool)}, {}, "masks by query"),
    ],
)
def test_lacking_says_which_gradients_have_no_kernel(shapes, changes, part):
    reason = mosaic_gpu_gradients.lacking(_operands(**shapes), _spec({**CAPPED, **changes}))
    assert reason is not None and part in reason
    assert mosaic_gpu_gradients.lacking(_operands(), _spec(NOISY)) is None


@pytest.mark.parametrize(
    ("shapes", "changes"),
    [
        ({"queries": 512, "keys": 512}, {"deterministic": True}),
        ({"queries": 512, "keys": 512}, {"window": (60, 30)}),
        ({"queries": 512, "keys": 511}, {}),
        ({"queries": 512, "keys": 512, "width": 80}, {}),
    ],
)
def test_backward_is_that_of_triton_where_asked_or_faster(shapes, changes):
    def jaxpr(changes, **shapes):
        operands = _operands(heads=1, kv_heads=1, **shapes)
        spec = _spec({**CAPPED, **changes})
        residuals = _residuals(operands), _cotangent(operands)
        return str(
            jax.make_jaxpr(mosaic_gpu.backward, static_argnums=1)(operands, spec, *residuals)
        )

    text = jaxpr(changes, **shapes)
    assert NAME not in text and "key_gradient_kernel" in text
    text = jaxpr({}, queries=512, keys=512)
    assert NAME in text and "key_gradient_kernel" not in text


def test_backward_under_vmap_lowers_to_one_kernel():
    operands, spec = _operands(queries=64, keys=64), _spec(CAPPED)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), operands)
    alone = _lowered(_backward(spec), operands)
    twice = jax.vmap(jax.vmap(_backward(spec)))
    mapped = _lowered(twice, jax.tree.map(lambda x: x[None], stacked))
    assert mapped.count(NAME) == alone.count(NAME)


def test_backward_lowers_under_shard_map_scan_and_remat():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    operands, spec = _operands(queries=64, keys=64), _spec(CAPPED)
    arrays = jax.tree.map(np.asarray, operands._replace(noise_key=None))
    here = jax.sharding.PartitionSpec("x")
    sharded = jax.shard_map(_backward(spec), mesh=mesh, in_specs=here, out_specs=here)
    with jax.set_mesh(mesh):
        assert NAME in _lowered(sharded, arrays)

    def scanned(operands):
        run = jax.checkpoint(_backward(spec))
        return jax.lax.scan(lambda c, _: (c, run(operands)), 0, None, length=2)[1]

    assert NAME in _lowered(scanned, operands)


@pytest.mark.parametrize("block_q", [64, 128])
def test_in_order_finds_what_each_thread_added(block_q):
    # Thread (warp, lane) holds rows 16·warp + lane/4 + {0, 8}, columns 8j + 2(lane mod 4) + {0, 1}.
    width = 128 if block_q == 64 else 64
    tiles = np.arange(3 * block_q * width, dtype=np.float32).reshape(1, 1, 3, block_q, width)
    sums = np.full((1, 1, 3, 2, 8, 128, 4), np.nan, np.float32)
    for half in range(2):
        rows = slice(64 * half, 64 * half + 64) if block_q == 128 else slice(0, 64)
        columns = slice(0, 64) if block_q == 128 else slice(64 * half, 64 * half + 64)
        mine = tiles[:, :, :, rows, columns]
        for thread in range(128):
            row = 16 * (thread // 32) + thread % 32 // 4
            column = 2 * (thread % 4)
            for four in range(8):
                pair, below = divmod(four, 2)
                for i, (step, move) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
                    place = (row + 8 * below, 16 * pair + column + step + move)
                    sums[:, :, :, half, four, thread, i] = mine[..., *place]
    found = mosaic_gpu_gradient_blocks.in_order(jnp.asarray(sums), block_q, width)
    wanted = tiles.reshape(1, 3 * block_q, 1, width)
    np.testing.assert_array_equal(np.asarray(found), wanted)


def _gradients(forward, backward, operands, spec):
    def run(operands):
        out, residuals = forward(operands, spec)
        cotangent = _cotangent(operands).astype(out.dtype)
        return backward(operands, spec, residuals, cotangent)[:4]

    return jax.jit(run)(operands)


def _wide(operands):
    rows = (operands.query, operands.key, operands.value)
    query, key, value = (x.astype(jnp.float32) for x in rows)
    return operands._replace(query=query, key=key, value=value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_backward_errs_at_most_twice_as_much_as_triton(name):
    shapes, changes = CASES[name]
    operands, spec = _operands(**shapes), _spec(changes)
    ours = _gradients(mosaic_gpu.forward, mosaic_gpu_gradients.fused, operands, spec)
    slow = _gradients(mosaic_gpu.forward, triton.backward, operands, spec)
    truth = _gradients(reference.forward, reference.backward, _wide(operands), spec)
    for mine, other, wanted in zip(ours, slow, truth, strict=True):
        assert _relative(mine, wanted) <= 2 * _relative(other, wanted) + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_backward_sums_a_long_memory_over_many_blocks(width):
    shapes = {"queries": 1500, "keys": 1300, "heads": 8, "kv_heads": 2, "width": width}
    operands, spec = _operands(**shapes), _spec({**CAPPED, "is_causal": True})
    ours = _gradients(mosaic_gpu.forward, mosaic_gpu_gradients.fused, operands, spec)
    slow = _gradients(mosaic_gpu.forward, triton.backward, operands, spec)
    for mine, other in zip(ours, slow, strict=True):
        assert _relative(mine, other) < 4e-3


@pytest.mark.gpu
def test_backward_under_vmap_is_a_loop_over_backward():
    operands, spec = _operands(keys=200, width=128), _spec({**CAPPED, "is_causal": True})
    other = operands._replace(value=operands.value[:, ::-1])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), operands, other)
    run = jax.jit(_backward(spec))
    found = jax.jit(jax.vmap(_backward(spec)))(both)
    for i, one in enumerate((operands, other)):
        for mapped, alone in zip(found, run(one), strict=True):
            assert _relative(mapped[i], alone) < 1e-3


@pytest.mark.gpu
def test_backward_leaves_out_rows_that_are_not_finite():
    operands, spec = _operands(width=128), _spec(CAPPED)
    flags = jnp.zeros((2, 5), jnp.int32).at[0, 0].set(1)
    key = operands.key.at[0, 5].set(jnp.nan)  # its weight is 0
    bad = operands._replace(key=key, flags=flags)
    wanted = jax.jit(_backward(spec))(operands._replace(key=operands.key.at[0, 5].set(0)))
    for found, clean in zip(jax.jit(_backward(spec))(bad), wanted, strict=True):
        assert _relative(found, clean) < 1e-3


@pytest.mark.gpu
def test_backward_writes_every_number():
    # Freed memory is full of NaN.
    spec = _spec(CAPPED)
    poison = jax.jit(lambda: jnp.full((1 << 26,), jnp.nan))()
    jax.block_until_ready(poison)
    del poison
    for name in ("capped", "wide"):
        for array in jax.jit(_backward(spec))(_operands(**CASES[name][0])):
            assert bool(jnp.all(jnp.isfinite(array)))
