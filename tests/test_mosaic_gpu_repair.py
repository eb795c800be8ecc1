"""Which statement does this file keep true? The Hopper kernels count what is not finite as 0.

Without copies of the rows, and with the bits of a call whose rows have zeros there. The kernels
cannot be interpreted: their bits are compared where there is a GPU of compute capability 9.0 (tests
marked `gpu`). Here it is seen that they lower and what XLA makes beside them;
`experiments/compile_kernels.py` measures the memory of compiled calls.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.clipping._batch import inner_jaxprs
from dpfa_jax.pallas import mosaic_gpu, mosaic_gpu_gradients, mosaic_gpu_rows, triton
from dpfa_jax.pallas.mosaic_gpu_registers import ROWS, Matrix
from tests import _mosaic_gpu_common as forwards
from tests import test_mosaic_gpu_backward as backwards

BAD = (np.nan, np.inf, -np.inf)


def _with_holes(operands):
    """Records with NaN or infinities in both batches and several heads; they weigh nothing."""
    _, key, value, weights = operands[:4]
    for i, (batch, place, head) in enumerate(((0, 3, 0), (0, -1, 1), (1, 64, 1), (1, 65, 0))):
        key = key.at[batch, place, head, i].set(BAD[i % 3])
        value = value.at[batch, place, 1 - head, -1 - i].set(BAD[(i + 1) % 3])
        weights = weights.at[batch, place].set(-jnp.inf)
    flags = jnp.ones((2, -(-key.shape[1] // 16)), jnp.int32)
    return operands._replace(key=key, value=value, log_weights=weights, flags=flags)


def _with_lost_queries(operands):
    """The operands, and which of their queries have a NaN or an infinity now, (B, T, N)."""
    query, lost = operands.query, np.zeros(operands.query.shape[:3], bool)
    for i, place in enumerate(((0, 0, 0), (0, 63, 3), (1, 64, 1), (1, -1, 2))):
        query, lost[place] = query.at[(*place, 5 * i)].set(BAD[i % 3]), True
    return operands._replace(query=query), lost


def _zeroed(operands, lost):
    """Zeros by hand in place of what is not finite, and in all of such a query."""
    key, value = (jnp.where(jnp.isfinite(x), x, 0).astype(x.dtype) for x in operands[1:3])
    query = jnp.where(lost[..., None], 0, operands.query).astype(operands.query.dtype)
    return operands._replace(query=query, key=key, value=value)


def _same(found, wanted):
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from _equations(inner)


def _made(run, operands, shapes):
    """(primitive, dtype) of what has one of these shapes in a call, beside its arguments."""
    jaxpr = jax.make_jaxpr(run)(operands).jaxpr
    found = ((line.primitive.name, out.aval) for line in _equations(jaxpr) for out in line.outvars)
    return {(name, str(x.dtype)) for name, x in found if getattr(x, "shape", None) in shapes}


@pytest.mark.parametrize("mark_queries", (False, True))
def test_forward_makes_nothing_of_the_size_of_rows(mark_queries):
    operands = forwards.make_operands(keys=304)
    operands = _with_holes(operands._replace(value=operands.value[..., :32]))
    spec = forwards.make_spec({**forwards.NOISY, "mark_queries": mark_queries})
    shapes = [x.shape for x in operands[:3]]
    found = _made(lambda operands: mosaic_gpu.forward(operands, spec), operands, shapes)
    assert found == (set() if mark_queries else {("is_finite", "bool")})


def test_backward_makes_gradients_alone_of_the_size_of_keys():
    operands = _with_holes(backwards._operands(keys=304))
    run = backwards._backward(backwards._spec(backwards.NOISY))
    found = {name for name, _ in _made(run, operands, [operands.key.shape])}
    assert found == {"cond", "custom_vmap_call", "mpmd_map"}


def test_kernels_that_repair_lower_for_cuda_without_a_gpu():
    spec = forwards.make_spec(forwards.ROWS)
    operands = _with_holes(forwards.make_operands())
    text = backwards._lowered(lambda operands: mosaic_gpu.forward(operands, spec), operands)
    assert "dpfa_mosaic_forward_kernel_repair" in text
    operands = _with_holes(backwards._operands())
    text = backwards._lowered(backwards._backward(backwards._spec(backwards.NOISY)), operands)
    assert f"{backwards.NAME}_repair" in text


def _on_tiles(rows, matrix, body):
    """(n, 64, width) after `body` has changed each tile in shared memory."""

    def kernel(source, target, tile, full):
        program = jax.lax.axis_index("program")
        plgpu.copy_gmem_to_smem(source.at[program], tile, full)
        plgpu.barrier_wait(full)
        body(tile)
        plgpu.copy_smem_to_gmem(tile, target.at[program])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        scratch_types={
            "tile": plgpu.SMEM(rows.shape[1:], rows.dtype, transforms=matrix.transforms),
            "full": plgpu.Barrier(),
        },
        grid=(rows.shape[0],),
        grid_names=("program",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=LoweringSemantics.Lane,
        ),
    )(rows)


def _every_number(dtype, width, tiles=1):
    """All numbers of a dtype in an order of no pattern, as so many tiles at least."""
    kind = jnp.uint8 if jnp.dtype(dtype).itemsize == 1 else jnp.uint16
    bits = np.random.default_rng(0).permutation(1 << jnp.iinfo(kind).bits).astype(kind)
    tiles = max(tiles, -(-bits.size // (ROWS * width)))
    bits = jnp.asarray(np.resize(bits, (tiles, ROWS, width)))
    return jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype))


def _bits(rows):
    kind = jnp.uint8 if rows.dtype.itemsize == 1 else jnp.uint16
    return np.asarray(jax.lax.bitcast_convert_type(rows, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("width", (16, 32, 80, 128))
def test_clear_unfinite_changes_what_is_not_finite_alone(width, dtype):
    rows, matrix = _every_number(dtype, width), Matrix(width, jnp.dtype(dtype))

    def clear(tile):
        mosaic_gpu_rows.clear_unfinite(tile, matrix)

    found = jax.jit(lambda rows: _on_tiles(rows, matrix, clear))(rows)
    wanted = np.where(np.asarray(jnp.isfinite(rows)), _bits(rows), 0)
    np.testing.assert_array_equal(_bits(found), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *itertools.product(("bfloat16", "float16"), (16, 32, 64, 80, 128)),
        *itertools.product(("float8_e4m3fn",), (32, 64, 128)),
    ],
)
def test_clear_rows_clears_the_rows_that_unfinite_finds(dtype, width):
    matrix, tiles = Matrix(width, jnp.dtype(dtype)), 2 * width
    rows = _every_number(dtype, width, tiles)[:tiles]
    rows = jnp.where(jnp.isfinite(rows), rows, jnp.zeros_like(rows))
    # One bad number in every second row: in some tile each place of a tile has it.
    tile, row = jnp.arange(tiles)[:, None, None], jnp.arange(ROWS)[:, None]
    lost = (row + tile + tile // width) % 2 == 1
    here = lost & (jnp.arange(width) == (tile + 7 * row) % width)
    bad = jnp.asarray(jnp.nan if rows.dtype.itemsize == 1 else jnp.inf, rows.dtype)
    given = jnp.where(here, bad, rows)
    assert np.asarray(here).any(0).all()

    def clear(tile):
        lost = mosaic_gpu_rows.unfinite(tile, matrix)
        mosaic_gpu_rows.clear_rows(tile, lost, matrix)

    found = jax.jit(lambda rows: _on_tiles(rows, matrix, clear))(given)
    np.testing.assert_array_equal(_bits(found), np.where(np.asarray(lost), 0, _bits(rows)))


FORWARD = ("plain", "causal", "several groups", "several groups, float16", "rows", "width 80")
FORWARD += ("wide", "segments and window", "float8 scores", "float8 scores, causal, width 80")


@pytest.mark.gpu
@pytest.mark.parametrize("mark_queries", (False, True))
@pytest.mark.parametrize("name", FORWARD)
def test_forward_has_the_bits_of_a_call_with_zeros(name, mark_queries):
    # Noise included: another record's sums may not round differently for it.
    shapes, changes = forwards.CASES[name]
    spec = forwards.make_spec({**changes, "mark_queries": mark_queries})
    operands, lost = _with_lost_queries(_with_holes(forwards.make_operands(**shapes)))
    # Marked queries are answered by NaN in the kernel without repair too.
    clean = _zeroed(operands, lost & (not mark_queries))
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec))
    out, (answer, mass, factor, best) = run(operands)
    wanted, residuals = run(clean._replace(flags=jnp.zeros_like(clean.flags)))
    sign = np.where(np.swapaxes(lost, 1, 2) & (not mark_queries), -1.0, 1.0)
    _same(out, wanted)
    for found, other in zip((answer, mass, factor * sign), residuals, strict=False):
        _same(found, other)
    if best is not None:
        _same(best, residuals[3])
    assert mark_queries == bool(jnp.any(jnp.isnan(out)))


JUDGED = ("plain", "causal", "several groups", "float16", "rows", "width 80", "wide")
JUDGED += ("segments and window", "lengths", "no denominator")


def _judged(name, **more):
    """A call that knows of no record that is not finite, a key that is not, and the same zeroed."""
    shapes, changes = forwards.CASES[name]
    spec = forwards.make_spec({**changes, "mark_queries": True, "judge_keys": True, **more})
    operands = forwards.make_operands(**shapes)
    operands = operands._replace(flags=jnp.zeros((2, 1), jnp.int32))

    def spoilt(batch, place, head, column, bad):
        return operands._replace(key=operands.key.at[batch, place, head, column].set(bad))

    def wanted(batch, place):
        weights = operands.log_weights.at[batch, place].set(-jnp.inf)
        return operands._replace(key=operands.key.at[batch, place].set(0), log_weights=weights)

    return spec, operands, spoilt, wanted


def test_kernels_that_judge_keys_lower_for_cuda_without_a_gpu():
    spec, operands, *_ = _judged("causal")
    text = backwards._lowered(lambda operands: mosaic_gpu.forward(operands, spec), operands)
    assert "dpfa_mosaic_forward_kernel" in text and "dpfa_mosaic_forward_kernel_repair" in text


@pytest.mark.gpu
@pytest.mark.parametrize("name", JUDGED)
def test_a_key_that_is_not_finite_is_found_wherever_it_is(name):
    spec, operands, spoilt, wanted = _judged(name)
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec))
    clean, residuals = run(operands)
    assert not np.any(residuals[5])
    _same(residuals[4], operands.log_weights)
    keys, heads, width = operands.key.shape[1:]
    draw = np.random.default_rng(3)
    changed = 0
    # Every place of a tile and every chunk of a row, one at a time: no other helps to find it.
    for i, place in enumerate(np.resize(draw.permutation(keys), 260)):
        batch, head, column = draw.integers(2), draw.integers(heads), (7 * i) % width
        given = spoilt(batch, place, head, column, BAD[i % 3])
        out, (*others, weights, flags) = run(given)
        null = wanted(batch, place)
        expected, known = run(null)
        _same(out, expected)
        for mine, other in zip(others, known, strict=False):
            if other is not None:
                _same(mine, other)
        _same(weights, null.log_weights)
        assert np.all(np.asarray(flags) == 1)
        changed += not np.array_equal(np.asarray(out, np.float32), np.asarray(clean, np.float32))
    assert changed > 80


@pytest.mark.gpu
def test_a_flag_of_the_values_is_reported_wherever_it_is():
    spec, operands, *_ = _judged("float16")
    run = jax.jit(lambda flags: mosaic_gpu.forward(operands._replace(flags=flags), spec)[1][5])
    for count in (1, 129, 5000):
        flags = jnp.zeros((2, count), jnp.int32)
        assert not np.any(run(flags))
        for place in np.random.default_rng(0).integers(2 * count, size=50):
            assert np.all(np.asarray(run(flags.at[place // count, place % count].set(1))) == 1)


@pytest.mark.gpu
def test_a_key_that_no_query_sees_changes_nothing():
    spec, operands, *_ = _judged("causal")
    keys = jnp.concatenate([operands.key] * 3, axis=1)
    longer = operands._replace(
        key=keys,
        value=jnp.concatenate([operands.value] * 3, axis=1),
        log_weights=jnp.concatenate([operands.log_weights] * 3, axis=1),
    )
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec)[0])
    _same(run(longer._replace(key=keys.at[0, -1, 0, 0].set(jnp.nan))), run(longer))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ("causal", "float16", "width 80", "plain"))
@pytest.mark.parametrize("deterministic", (False, True))
def test_gradients_of_a_call_whose_keys_are_judged(name, bad, deterministic):
    spec, operands, spoilt, wanted = _judged(name, deterministic=deterministic)
    cotangent = backwards._cotangent(operands)

    @jax.jit
    def run(given):
        _, residuals = mosaic_gpu.forward(given, spec)
        return mosaic_gpu.backward(given, spec, residuals, cotangent)[:4]

    found, other = run(spoilt(1, 77, 0, 3, bad)), run(wanted(1, 77))
    for mine, expected in zip(found, other, strict=True):
        assert np.all(np.isfinite(np.asarray(mine, np.float32)))
        assert backwards._relative(mine, expected) < 1e-3
    assert not np.any(np.asarray(found[1], np.float32)[1, 77])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", (None, "fp8"))
@pytest.mark.parametrize("name", forwards.MECHANISMS)
def test_a_record_with_a_key_that_is_not_finite_is_one_that_is_not_there(name, precision):
    query, key, value, *_ = forwards.make_operands(width=128)
    words = jnp.asarray(forwards.KEY)
    answer = jax.jit(forwards.private_call(forwards.MECHANISMS[name], precision=precision))

    def run(key, value, weights):
        return np.asarray(answer(query, key, value, words, weights), np.float32)

    there, places = jnp.zeros((2, 300)), ((0, 7), (0, 290), (1, 128))
    every = run(key, value, there)
    for i, place in enumerate(places):
        found = run(key.at[*place, i % 2, 11 * i].set(BAD[i]), value, there)
        wanted = run(key.at[place].set(0), value.at[place].set(0), there.at[place].set(-jnp.inf))
        _same(found, wanted)
        assert not np.array_equal(found, every)


@pytest.mark.gpu
def test_under_vmap_the_other_examples_do_not_notice():
    spec, operands, spoilt, wanted = _judged("causal")
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec)[0])
    other = operands._replace(noise_key=operands.noise_key + 1)
    three = [operands, spoilt(0, 9, 1, 5, np.nan), other]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *three)
    found = jax.jit(jax.vmap(run))(stacked)
    for mine, alone in zip(found, (operands, wanted(0, 9), other), strict=True):
        _same(mine, run(alone))


BACKWARD = ("noisy", "wide causal", "running maximum", "float16", "float16 wide", "width 80")
BACKWARD += ("lengths", "mask")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKWARD)
def test_backward_has_the_bits_of_a_call_with_zeros(name):
    shapes, changes = backwards.CASES[name]
    spec = backwards._spec(changes)
    given = backwards._operands(**shapes)
    cotangent = backwards._cotangent(given)
    operands, lost = _with_lost_queries(_with_holes(given))
    # Answered as rows of zeros in the first batch, by NaN in the second.
    by_head = np.swapaxes(lost, 1, 2)
    factor = np.where(by_head, np.array([-1.0, 0.0])[:, None, None], 1.0).astype(np.float32)

    @jax.jit
    def run(operands, factor):
        clean, mass, _, best = backwards._residuals(given)
        residuals = clean, mass, factor, best
        return mosaic_gpu_gradients.fused(operands, spec, residuals, cotangent)[:4]

    found = run(operands, factor)
    wanted = run(_zeroed(operands, lost)._replace(flags=None), np.abs(factor))
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert np.all(np.isfinite(np.asarray(mine, np.float32)))
        _same(mine, other)
    # Sums of these have no fixed order.
    d_query, other = (
        np.where(lost[..., None], 0, np.asarray(x[0], np.float32)) for x in (found, wanted)
    )
    assert backwards._relative(d_query, other) < 1e-3
    assert not np.any(np.asarray(found[0], np.float32)[lost])


@pytest.mark.gpu
@pytest.mark.parametrize("backward", (mosaic_gpu_gradients.fused, triton.backward))
def test_gradients_do_not_notice_a_marked_query_without_a_cap(backward):
    operands = backwards._operands()._replace(flags=jnp.zeros((2, 19), jnp.int32))
    spec = backwards._spec({"score_cap": None, "mark_queries": True})
    cotangent = backwards._cotangent(operands).at[1, 7, 2].set(0)

    @jax.jit
    def run(query):
        given = operands._replace(query=query)
        _, residuals = mosaic_gpu.forward(given, spec)
        return backward(given, spec, residuals, cotangent)[1:4]

    for bad in BAD:
        found = run(operands.query.at[1, 7, 2, 3].set(bad))
        for mine, other in zip(found, run(operands.query.at[1, 7, 2].set(0)), strict=True):
            assert backwards._relative(mine, other) < 1e-3
