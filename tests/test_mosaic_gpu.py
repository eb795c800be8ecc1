"""Which statement does this file keep true? The Hopper kernel lowers as asked, refuses the rest.

It cannot be interpreted: what it computes is compared with `reference` where there is a GPU of
compute capability 9.0 (tests marked `gpu`), its rounding with what is charged for it here.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import _primitives, admission, float8, reference
from dpfa_jax.pallas import accumulators, mosaic_gpu, mosaic_gpu_gradients
from tests._mosaic_gpu_common import CASES, KEY, MECHANISMS, NOISY, private_call
from tests._mosaic_gpu_common import make_operands as _operands
from tests._mosaic_gpu_common import make_spec as _spec
from tests._mosaic_gpu_common import relative as _relative


def _score_error(operands, spec):
    """How far weights may be off for the unit's sums of products of eight-bit numbers.

    It keeps 13 bits or more of a step of 32 products, hence 2⁻¹¹ of all their magnitudes.
    """
    if not spec.float8_scores:
        return 1e-5
    rows = (jnp.max(jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=-1)) for x in operands[:2])
    largest = [float(jnp.max(jnp.abs(x.astype(jnp.float32)))) for x in operands[:2]]
    sums = [float(x) for x in rows]
    return 2.0**-11 * spec.scale * min(sums[0] * largest[1], sums[1] * largest[0])


@pytest.mark.parametrize(
    "name", ["plain", "causal", "several groups, narrow", "float16", "rows", "float8 scores"]
)
def test_forward_lowers_for_cuda_without_a_gpu(name):
    shapes, changes = CASES[name]
    spec = _spec(changes)
    traced = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec)).trace(_operands(**shapes))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("dpfa_mosaic_forward_kernel") >= 1


def test_forward_lowers_in_shard_map_where_nothing_varies():
    operands, spec = _operands(), _spec(NOISY)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])
    sharded = jax.shard_map(
        lambda o: mosaic_gpu.forward(o, spec)[0], mesh=mesh, in_specs=jax.P(), out_specs=jax.P()
    )
    text = jax.jit(sharded).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_forward_kernel" in text


def _mesh():
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])


def test_results_vary_over_the_axes_over_which_the_call_does():
    spec, found = _spec({**NOISY, "mark_queries": True}), []

    def run(operands):
        weights, flags = mosaic_gpu.record_log_weights(operands.key, operands.value, 1.0)
        narrow = mosaic_gpu.narrow_records(operands.key, operands.value, 1.0)[2]
        given = operands._replace(log_weights=weights, flags=flags)
        out, residuals = mosaic_gpu.forward(given, spec)
        columns = mosaic_gpu.column_squares(operands, spec)
        whole = mosaic_gpu.forward(operands, spec)
        grads = mosaic_gpu_gradients.fused(given, spec, residuals, out)
        leaves = jax.tree.leaves((weights, flags, narrow, out, residuals, columns, whole, grads))
        found.extend(_primitives.varying(leaf) for leaf in leaves)
        return out

    operands = _operands(queries=64, keys=64)
    specs = jax.tree.map(lambda _: jax.P("x"), operands)._replace(noise_key=jax.P())
    sharded = jax.shard_map(run, mesh=_mesh(), in_specs=(specs,), out_specs=jax.P("x"))
    jax.eval_shape(sharded, operands)
    assert len(found) >= 12 and set(found) == {frozenset("x")}


@pytest.mark.parametrize("backend", ("triton", "mosaic_gpu"))
def test_every_shards_release_is_charged(monkeypatch, backend):
    # A value that were taken to be equal on all shards would be one release of all of them.
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    rows = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    data = jax.ShapeDtypeStruct((8,), jnp.uint32)

    def charged(backend):
        def call(rows, data):
            return dpfa_jax.private_attention(
                rows,
                rows,
                rows,
                mechanism=dpfa_jax.IndependentNoise(1.0, value_bound=3.0, score_cap=2.0),
                rng=dpfa_jax.random.wrap_key_data(data),
                queries="public",
                backend=backend,
            )

        specs = jax.P("x"), jax.P()
        sharded = jax.shard_map(call, mesh=_mesh(), in_specs=specs, out_specs=jax.P("x"))
        return dpfa_jax.accounting.events(sharded, rows, data)

    assert charged(backend) == charged("xla")
    assert charged(backend).count == 2


def test_column_squares_lowers_for_cuda_without_a_gpu():
    spec = _spec(NOISY)
    traced = jax.jit(lambda operands: mosaic_gpu.column_squares(operands, spec)).trace(_operands())
    assert "dpfa_mosaic_column_kernel" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_supports_refuses_where_it_is_not_compiled():
    assert not mosaic_gpu.preferred(4096)
    reason = mosaic_gpu.supports(_operands(), _spec(NOISY))
    assert reason is not None and "9.0" in reason


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({"dtype": "float32"}, "bfloat16"),
        ({"keys": 131080, "queries": 8}, "131072"),
        ({"mask": jnp.ones((2, 4, 200, 300), bool)}, "masks by query"),
        ({"key_offset": jnp.int32(300)}, "positions of a longer memory"),
    ],
)
def test_lacking_says_what_has_no_kernel(shapes, part):
    reason = mosaic_gpu.lacking(_operands(**shapes), _spec(NOISY))
    assert reason is not None and part in reason
    assert mosaic_gpu.lacking(_operands(), _spec(NOISY)) is None


def test_sums_rounding_is_not_exceeded_by_a_unit_that_rounds_to_the_worse_side():
    # Steps of 16 keys that each err by 5.5·2⁻²³ of what was added so far, always against us; the
    # groups then join in float32. One record of weight 1 leaves a sum of n.
    sizes = (accumulators.SHORTEST_GROUP, accumulators.GROUP_KEYS)
    lengths = (16, 300, 1024, 4096, 8192, 9000, 32768, 32784, 131072)
    for keys, size in itertools.product(lengths, sizes):
        error, mass, run, low, pairs = 0.0, 0, 16 * size, 0.0, keys >= accumulators.PAIRED_FROM
        for first in range(0, keys, size):
            inside = 0
            for step in range(first, min(first + size, keys), 16):
                inside += min(16, keys - step)
                if first == 0:  # the changed record's group
                    error += 5.5 * 2.0**-23 * inside
            mass += inside
            # The changed record's run, then the runs one after another.
            error += 2.0**-24 * mass if 0 < first < run else 0.0
            if first + size > run and (first + size) % run == 0:
                if pairs:
                    # Only the low word rounds: no error of a sum is above 2⁻²⁴ of it.
                    low += 2.0**-24 * mass
                    error += 2.0**-24 * low
                else:
                    error += 2.0**-24 * mass
        if pairs:
            # The last group's join, and both low words'.
            error += 2.0**-24 * (run + low + 2.0**-24 * mass)
        error += 2.0**-24 * mass if keys > size else 0.0
        assert 2 * error <= accumulators.sums_rounding(keys)
    # Groups of 1024 keys would not do.
    assert 2 * 5.5 * 2.0**-23 * 16 * sum(range(1, 65)) > accumulators.sums_rounding(1024)


def test_sums_rounding_stays_near_one_percent():
    assert accumulators.sums_rounding(512) < 0.012
    assert accumulators.sums_rounding(4096) < 0.015
    assert accumulators.rounding(8192) < 0.028
    assert accumulators.rounding(32768) < 0.043
    assert accumulators.rounding(65536) < 0.036
    assert accumulators.rounding(131072) < 0.044
    assert accumulators.rounding(131073) == math.inf
    with pytest.raises(ValueError, match="131072"):
        accumulators.sums_rounding(131073)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_reference(name):
    shapes, changes = CASES[name]
    operands, spec = _operands(**shapes), _spec(changes)
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec))
    out, (_, mass, _, _) = run(operands)
    scored = admission.as_scored(reference, operands, spec)
    wanted, residuals = jax.jit(lambda operands: reference.forward(operands, spec))(scored)
    assert _relative(out, wanted) < 2.0**-8
    if spec.score_cap is not None and spec.denominator_std != math.inf:
        assert _relative(jnp.swapaxes(mass, 1, 2), residuals[1]) < _score_error(operands, spec)
    np.testing.assert_array_equal(
        np.asarray(run(operands)[0], np.float32), np.asarray(out, np.float32)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("float8_scores", (False, True))
@pytest.mark.parametrize(("width", "score_cap"), [(16, 2.0), (80, 2.0), (128, 2.0), (64, None)])
def test_forward_marks_queries_that_are_not_finite(width, score_cap, float8_scores):
    flags = jnp.zeros((2, 19), jnp.int32)
    operands = _operands(width=width, flags=flags)
    rows = jnp.array([0, 7, 8, 63, 64, 129, 199])
    columns = jnp.array([0, width - 1, 3, width // 2, 1, 9, width - 2])
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan, jnp.inf, jnp.nan, -jnp.inf])
    query = operands.query.at[1, rows, 2, columns].set(bad.astype(jnp.bfloat16))
    changes = {**NOISY, "score_cap": score_cap, "mark_queries": True}
    if score_cap is None:
        changes = {"score_cap": None, "mark_queries": True}
    spec = _spec({**changes, "float8_scores": float8_scores})
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec))
    out, (_, _, factor, _) = run(operands._replace(query=query))
    lost = np.zeros((2, 200, 4), bool)
    lost[1, np.asarray(rows), 2] = True
    found = np.asarray(out, np.float32)
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(lost[..., None], found.shape))
    np.testing.assert_array_equal(np.asarray(jnp.swapaxes(factor, 1, 2)) == 0, lost)
    # Nobody else notices.
    clean = np.asarray(run(operands)[0], np.float32)
    np.testing.assert_array_equal(found[~lost], clean[~lost])


@pytest.mark.parametrize("flags", (None, jnp.zeros((2, 19), jnp.int32)))
def test_queries_of_calls_that_clip_contributions_are_rounded_outside(flags):
    # The kernel that sums and the one that finds the norms then read the same bits.
    operands = _operands(flags=flags)
    spec = _spec({**NOISY, "float8_scores": True, "mark_queries": flags is not None})
    traced = jax.make_jaxpr(lambda operands: mosaic_gpu.forward(operands, spec)[0])(operands)
    rounded = "f8_e4m3fn[2,200,4,64]" in str(traced)
    assert rounded == (flags is None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("width", (32, 64, 80, 128))
def test_queries_are_rounded_in_the_kernel_as_everywhere(width, dtype):
    # Rows that are rounded already are not rounded again: any difference is the kernel's own.
    flags = jnp.zeros((2, 19), jnp.int32)
    operands = _operands(width=width, dtype=dtype, flags=flags)
    spec = _spec({**NOISY, "float8_scores": True})
    draw = np.random.default_rng(7)
    sizes = 2.0 ** draw.integers(-13, 11, operands.query.shape)
    steps = draw.integers(-255, 256, operands.query.shape) / 128  # with all ties
    query = jnp.asarray(steps * sizes, dtype)
    run = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec)[0])
    found = run(operands._replace(query=query))
    wanted = run(operands._replace(query=float8.through(query)))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


@pytest.mark.gpu
def test_float8_scores_of_columns_are_those_of_forward():
    # Contributions are clipped by norms from the one kernel and summed by the other.
    operands, spec = _operands(keys=200, width=128), _spec({**NOISY, "float8_scores": True})
    found = jax.jit(lambda operands: mosaic_gpu.column_squares(operands, spec))(operands)
    scored = admission.as_scored(reference, operands, spec)
    wanted = reference.plain_column_squares(scored, spec)
    assert _relative(found, wanted) < 2 * _score_error(operands, spec)
    # Rows as they are would be farther off than the unit's sums explain.
    assert _relative(reference.plain_column_squares(operands, spec), wanted) > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("keys", (32768, 40000))
@pytest.mark.parametrize("width", (64, 128, 256))
def test_sums_of_long_memories_lose_nothing_between_runs(width, keys):
    # One word would lose each 1 beside 2²⁶, and so it does in shorter memories.
    operands = _operands(queries=64, keys=keys, width=width)
    value = jnp.zeros_like(operands.value)
    value = value.at[:, 0].set(2.0**26).at[:, -1].set(-(2.0**26)).at[:, 9000:33000:6000].set(1)
    operands = operands._replace(
        query=jnp.zeros_like(operands.query),
        value=value,
        log_weights=jnp.zeros_like(operands.log_weights),
    )
    spec = _spec(
        {**NOISY, "noise_std": 1e-3, "denominator_std": math.inf, "floor": 1.0, "ball": 2.0**28}
        | {"score_cap": 1e-9}
    )
    # What joins shares of a tile loses nothing here.
    shape = dataclasses.replace(mosaic_gpu.cut(operands, spec), shares=False)
    run = jax.jit(lambda o: mosaic_gpu.forward(o, spec, shape=shape)[0])
    out = np.asarray(run(operands), np.float32)
    lost = 1.0 if keys >= accumulators.PAIRED_FROM else 0.0
    np.testing.assert_allclose(out, 4.0 * lost, atol=0.05)


_SUMMED = ("causal", "several groups", "several runs", "several groups, float16", "width 80")
_SUMMED += ("wide, several groups, causal", "wide, several runs", "segments and window", "lengths")
_SUMMED += ("float8 scores, causal, width 80",)


@pytest.mark.parametrize("name", _SUMMED)
def test_sums_lower_for_cuda_without_a_gpu(name):
    shapes, changes = CASES[name]
    operands = _operands(**shapes, flags=jnp.zeros((2, 1), jnp.int32))
    # No noise is drawn, whatever the spec says: there is no key.
    operands = operands._replace(noise_key=None)
    run = jax.jit(lambda operands: mosaic_gpu.sums(operands, _spec(changes)))
    text = run.trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_forward_kernel_repair" in text


def test_sums_without_a_public_reference_are_refused():
    with pytest.raises(ValueError, match="score_cap"):
        mosaic_gpu.sums(_operands(), _spec({"score_cap": None}))


@pytest.mark.gpu
@pytest.mark.parametrize("name", _SUMMED)
def test_sums_are_the_reference(name):
    shapes, changes = CASES[name]
    operands, spec = _operands(**shapes), _spec(changes)
    flagged = operands._replace(flags=jnp.zeros((2, 1), jnp.int32))
    run = jax.jit(lambda operands: mosaic_gpu.sums(operands, spec))
    found = run(flagged)
    scored = admission.as_scored(reference, operands, spec)
    numerator, denominator = jax.jit(lambda o: reference.sums(o, spec))(scored)
    # Of weights that are rounded to 16 bits, each by itself.
    assert _relative(found[0][0], numerator[0]) < 2.0**-8
    assert _relative(found[1][0], denominator[0]) < _score_error(operands, spec)
    # As integers are made of them: two words, the numerators' second one 0.
    assert not np.any(found[0][1])
    assert np.all(np.abs(found[1][1]) <= 2.0**-24 * np.abs(found[1][0]))
    # One key's and one query's rows are not finite: as if the key were not there, the query zeros.
    lost = operands._replace(
        query=operands.query.at[0, 3, 1, 2].set(jnp.nan),
        key=operands.key.at[1, 7, 0, 5].set(jnp.inf),
        log_weights=operands.log_weights.at[1, 7, 0].set(-jnp.inf),
    )
    clean = lost._replace(
        query=lost.query.at[0, 3, 1].set(0), key=operands.key, flags=flagged.flags
    )
    for ours, theirs in zip(
        jax.tree.leaves(run(lost._replace(flags=flagged.flags + 1))),
        jax.tree.leaves(run(clean)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("precision", (None, "fp8"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("name", MECHANISMS)
def test_calls_of_every_mechanism_lower_with_their_gradients(name, dtype, precision, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    monkeypatch.setattr(mosaic_gpu_gradients, "faster", lambda *lengths: True)
    call, operands = private_call(MECHANISMS[name], precision=precision), _operands(dtype=dtype)

    def loss(*given):
        return jnp.sum(call(*given, jnp.asarray(KEY)).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = step.trace(*operands[:3]).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_forward_kernel" in text and "dpfa_mosaic_gradient_kernel" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("name", MECHANISMS)
def test_calls_of_every_mechanism_are_those_of_the_definition(name, dtype):
    query, key, value, *_ = _operands(dtype=dtype)
    words = jnp.asarray(KEY)
    found, wanted = (
        jax.jit(private_call(MECHANISMS[name], backend=backend))(query, key, value, words)
        for backend in ("mosaic_gpu", "xla")
    )
    assert _relative(found, wanted) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "keys"),
    [(16, 300), (48, 300), (64, 300), (80, 300), (80, 700), (96, 300), (112, 300), (128, 300)],
)
@pytest.mark.parametrize("first", [None, 4112])
def test_forward_draws_the_noise_of_the_reference(width, keys, first):
    operands = _operands(width=width, keys=keys)
    if first is not None:
        operands = operands._replace(noise_row=jnp.int32(first))
    operands = operands._replace(value=jnp.zeros_like(operands.value))
    spec = _spec(
        {**NOISY, "noise_std": 1.0, "denominator_std": math.inf, "floor": 1.0, "ball": None}
    )
    out, _ = jax.jit(lambda operands: mosaic_gpu.forward(operands, spec))(operands)
    wanted, _ = reference.noise_field(operands.noise_key, 2, 200, 4, width, first)
    assert np.max(np.abs(np.asarray(out, np.float32) - wanted) / (np.abs(wanted) + 0.1)) < 2.0**-8


@pytest.mark.gpu
def test_column_squares_is_the_reference():
    operands, spec = _operands(keys=200), _spec({**NOISY, "scale": 0.1, "is_causal": True})
    found = jax.jit(lambda operands: mosaic_gpu.column_squares(operands, spec))(operands)
    assert _relative(found, reference.plain_column_squares(operands, spec)) < 1e-5


@pytest.mark.gpu
def test_forward_under_vmap_is_a_loop_over_forward():
    spec = _spec({**NOISY, "is_causal": True})
    one, other = _operands(keys=700), _operands(keys=700)._replace(noise_key=jnp.asarray(KEY) ^ 1)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)

    def run(operands):
        return mosaic_gpu.forward(operands, spec)[0]

    found = np.asarray(jax.jit(jax.vmap(run))(both), np.float32)
    for out, operands in zip(found, (one, other), strict=True):
        np.testing.assert_array_equal(out, np.asarray(jax.jit(run)(operands), np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "causal", "several groups, narrow", "rows"])
def test_backward_takes_the_residuals_of_forward(name):
    shapes, changes = CASES[name]
    operands, spec = _operands(**shapes), _spec(changes)

    def gradients(module):
        def run(operands):
            out, residuals = module.forward(operands, spec)
            cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return module.backward(operands, spec, residuals, cotangent.astype(out.dtype))[:4]

        return jax.jit(run)(operands)

    for found, wanted in zip(gradients(mosaic_gpu), gradients(reference), strict=True):
        assert _relative(found, wanted) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "keys"), [(64, 300), (80, 300), (128, 1100), (256, 1100)])
def test_queries_of_a_longer_call_have_the_noise_of_their_rows(width, keys):
    spec = _spec({**NOISY, "noise_std": 30.0, "denominator_std": 30.0, "floor": 1.0})
    operands = _operands(width=width, keys=keys)._replace(noise_row=jnp.int32(4112))
    _, (_, mass, *_) = jax.jit(lambda o: mosaic_gpu.forward(o, spec))(operands)
    wanted = reference.forward(operands, spec)[1][1]
    assert _relative(jnp.swapaxes(mass, 1, 2), wanted) < 1e-3
    unmoved = reference.forward(operands._replace(noise_row=None), spec)[1][1]
    assert _relative(unmoved, wanted) > 0.1
