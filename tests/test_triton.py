import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import reference
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import tiling, triton
from tests.pallas import suite

TILE = tiling.Tile(32, 32, 4, 2)


@pytest.mark.parametrize("name", suite.VARIANTS)
def test_kernels_equal_the_definition(name):
    suite.check(triton, suite.VARIANTS[name], tile=TILE)


def _noisy(shape=(2, 20, 3, 3, 5, 4, 24), **changes):
    operands, _, _ = suite.build(suite.Variant(shape=shape))
    spec = Spec(
        **{
            "scale": 0.4,
            "score_cap": 1.0,
            "noise": "sums",
            "noise_std": 1.0,
            "denominator_std": 1.0,
            "floor": 0.5,
            **changes,
        }
    )
    return operands, spec


def test_forward_draws_the_noise_of_the_reference():
    operands, spec = _noisy()
    silent = operands._replace(log_weights=jnp.full_like(operands.log_weights, -jnp.inf))
    (_, kept), (_, want) = triton.forward(silent, spec, tile=TILE), reference.forward(silent, spec)
    assert np.array_equal(np.swapaxes(kept[1], 1, 2), want[1])
    unit = Spec(**{**spec.__dict__, "denominator_std": float("inf"), "floor": 1.0})
    ours, _ = triton.forward(silent, unit, tile=TILE)
    assert np.array_equal(ours, reference.forward(silent, unit)[0])


def test_forward_clips_rows_before_their_noise():
    operands, spec = _noisy(noise="rows", score_cap=None, row_clip=0.1, noise_std=0.3)
    ours, residuals = triton.forward(operands, spec, tile=TILE)
    want, _ = reference.forward(operands, spec)
    assert np.max(np.abs(ours - want)) < 2e-6
    assert np.max(np.linalg.norm(residuals[0], axis=-1)) <= 0.1 * (1 + 2.0**-14)


def test_forward_keeps_more_keys_than_one_word_joins():
    # 4097 keys of weight 1 in the double word; the sum of ones is exact in either.
    keys = tiling.PLAIN_KEYS + 1
    ones = jnp.ones((1, keys, 1, 4))
    operands = Operands(jnp.zeros((1, 16, 1, 4)), ones, ones, jnp.zeros((1, keys, 1)))
    tile = tiling.Tile(16, 128, 4, 2)
    spec = Spec(scale=1.0, score_cap=0.0)
    out, residuals = jax.jit(lambda o: triton.forward(o, spec, tile=tile))(operands)
    assert np.all(residuals[1] == keys)
    assert np.all(out == 1.0)


def test_column_squares_equal_the_reference():
    operands, spec = _noisy()
    ours = triton.column_squares(operands, spec, tile=TILE)
    want = reference.plain_column_squares(operands, spec)
    assert np.allclose(ours, want, rtol=1e-5, atol=0)


def test_the_repair_has_the_bits_of_the_first_launch():
    # A record that is not finite must not change the rounding of the sums of the others.
    operands, spec = _noisy()
    run = jax.jit(lambda o: triton.forward(o, spec, tile=TILE))
    first, repaired = (
        run(operands._replace(flags=jnp.full((operands.key.shape[0], 3), flag, jnp.int32)))
        for flag in (0, 1)
    )
    for one, other in zip(*map(jax.tree.leaves, (first, repaired)), strict=True):
        assert np.array_equal(one, other)


def test_kernels_give_the_same_bits_every_time():
    operands, spec, _ = suite.build(suite.VARIANTS["tails and shared heads"])
    grad = jnp.ones((2, 40, 2, 8))

    @jax.jit
    def run(operands):
        out, residuals = triton.forward(operands, spec, tile=TILE)
        return out, triton.backward(operands, spec, residuals, grad, tile=TILE)[:4]

    for one, two in zip(*(jax.tree.leaves(run(operands)) for _ in range(2)), strict=True):
        assert np.array_equal(one, two)


def _with_holes(dtype, huge):
    """Records and queries with NaN and infinities, in one head or another; huge ones on request."""
    source = np.random.default_rng(5)
    query, key, value = (
        source.normal(size=(2, length, 2, 8)).astype(np.float32) for length in (40, 70, 70)
    )
    query[0, 3, 1, 2], query[1, 39, 0, 0] = np.nan, -np.inf
    key[0, 5, 0, 1], key[1, 69, 1, 7] = np.nan, np.inf
    value[0, 33, 1, 0], value[1, 0, 0, 3] = np.inf, np.nan
    if huge:
        value[0, 7], key[1, 9] = 1e30 if dtype != jnp.float16 else 6e4, 1e4
    return [jnp.asarray(x, dtype) for x in (query, key, value)]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("mechanism", ("noise", "plain", "rows"))
def test_rows_that_are_not_finite_are_left_out_as_in_the_reference(mechanism, dtype):
    check_left_out("triton", mechanism, dtype)


def check_left_out(kernels, mechanism, dtype):
    chosen = {
        # Noise far below the rounding of the answers, whose size differs between backends.
        "noise": dpfa_jax.IndependentNoise(1e-9, value_bound=1.0, score_cap=1.0),
        "plain": dpfa_jax.NonPrivate(),
        "rows": dpfa_jax.SequenceRelease(1e-9, clip_norm=1.0, clip="row"),
    }[mechanism]
    queries = "private" if mechanism == "rows" else "public"
    weigh = jnp.asarray(np.random.default_rng(6).normal(size=(2, 40, 2, 8)), jnp.float32)

    def run(backend):
        def loss(*arrays):
            out = dpfa_jax.private_attention(
                *arrays, mechanism=chosen, rng=jax.random.key(1), queries=queries, backend=backend
            )
            known = jnp.where(jnp.isnan(out), 0.0, out.astype(jnp.float32))
            return jnp.sum(known * weigh), out

        # Without a bound on weights and values a huge row is all that would be compared.
        arrays = _with_holes(dtype, huge=mechanism == "noise")
        found = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(x, np.float64) for x in (found[0][1], *found[1])]

    ours, want = run(kernels), run("xla")
    lost = np.isnan(want[0])
    assert np.array_equal(np.isnan(ours[0]), lost)
    assert np.any(lost) == (mechanism != "rows")
    roundoff = {jnp.float32: 2.0**-18, jnp.bfloat16: 2.0**-6, jnp.float16: 2.0**-9}[dtype]
    for mine, other in zip(ours, want, strict=True):
        mine, other = np.where(np.isnan(mine), 0, mine), np.where(np.isnan(other), 0, other)
        assert np.all(np.isfinite(mine))
        assert np.max(np.abs(mine - other)) <= roundoff * np.max(np.abs(other))


# Under transformations ---------------------------------------------------------------------------

_NOISE = dpfa_jax.IndependentNoise(2.0, value_bound=1.0, score_cap=1.0)


def _attend(query, key, value, rng, mechanism=_NOISE, backend="triton"):
    return dpfa_jax.private_attention(
        query, key, value, mechanism=mechanism, rng=rng, queries="public", backend=backend
    )


def _arrays(*lead):
    source = np.random.default_rng(3)
    return [
        jnp.asarray(source.normal(size=(*lead, *shape)), jnp.float32)
        for shape in ((1, 16, 1, 4), (1, 16, 1, 4), (1, 16, 1, 4))
    ]


def test_vmap_gives_every_example_its_own_noise():
    rng = jax.random.key(0)
    query, key, value = _arrays()
    many = jnp.broadcast_to(query, (2, 2, *query.shape))

    def nested(backend):
        def each(query, rng):
            return _attend(query, key, value, rng, backend=backend)

        twice = jax.vmap(jax.vmap(each, (0, None)), (0, None))
        return jax.jit(twice)(many, rng)

    out = nested("triton").reshape(4, -1)
    assert len({bytes(np.asarray(row)) for row in out}) == 4
    # The kernel's noise is scaled by its own rounding term: equal up to that.
    want = nested("xla").reshape(4, -1)
    assert np.corrcoef(out.ravel(), want.ravel())[0, 1] > 0.999


def test_grad_and_remat_equal_the_reference():
    quiet = dpfa_jax.NonPrivate()
    arrays = _arrays()

    def loss(backend, *arrays):
        return jnp.sum(_attend(*arrays, None, quiet, backend) ** 2)

    want = jax.grad(lambda *a: loss("xla", *a), (0, 1, 2))(*arrays)
    remat = jax.checkpoint(lambda *a: loss("triton", *a))
    got = jax.jit(jax.grad(remat, (0, 1, 2)))(*arrays)
    for mine, other in zip(got, want, strict=True):
        assert np.max(np.abs(mine - other)) < 1e-5


def _sharded(fun, mesh, check_vma):
    spec = jax.sharding.PartitionSpec("x")
    return jax.shard_map(fun, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)


def _quiet_gradient(query, key, value):
    def loss(*arrays):
        return jnp.sum(_attend(*arrays, None, dpfa_jax.NonPrivate()))

    return jax.grad(loss, 1)(query, key, value)


def test_shard_map_equals_one_device():
    # `_primitives.closed` keeps JAX's interpreter of kernels from tracking what varies: it cannot.
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = [jnp.concatenate([array, array]) for array in _arrays()]
    got = jax.jit(_sharded(_quiet_gradient, mesh, check_vma=True))(*arrays)
    want = _quiet_gradient(*arrays)
    assert np.max(np.abs(got - want)) < 1e-5


def test_shard_map_that_tracks_what_varies_lowers_for_cuda():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=auto, abstract_device=device)
    arrays = [jax.ShapeDtypeStruct((2, *array.shape[1:]), array.dtype) for array in _arrays()]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(_sharded(_quiet_gradient, mesh, check_vma=True)).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text


# What is taken, and lowering without a GPU -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "spec", "reason"),
    [
        ({"key": (1, 0, 1, 8)}, {}, "empty"),
        ({"query": (1, 4, 1, 264), "key": (1, 4, 1, 264)}, {}, "256"),
        ({}, {"score_low": -1.0}, "SoftmaxNoise"),
        ({}, {"scale": -1.0}, "positive"),
        ({}, {"score_cap": 2000.0}, "1000"),
    ],
)
def test_supports_says_why_not(changes, spec, reason):
    shapes = {"query": (1, 4, 1, 8), "key": (1, 4, 1, 8), "value": (1, 4, 1, 8), **changes}
    arrays = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}
    weights = jax.ShapeDtypeStruct((1, 4, 1), jnp.float32)
    found = triton.supports(
        Operands(**arrays, log_weights=weights), Spec(**{"scale": 1.0, "score_cap": 1.0, **spec})
    )
    assert found is not None and reason in found


def test_named_backend_raises_what_it_cannot_do():
    query, key, value = _arrays()
    noise = dpfa_jax.SoftmaxNoise(1.0, value_bound=1.0, score_bound=1.0)
    with pytest.raises(NotImplementedError, match="SoftmaxNoise"):
        _attend(query, key, value, jax.random.key(0), noise)


def test_auto_takes_no_kernel_without_a_gpu():
    code = (
        "import sys, jax, dpfa_jax, jax.numpy as jnp; q = jnp.ones((1, 2, 1, 4)); "
        "noise = dpfa_jax.IndependentNoise(1.0, value_bound=1.0, score_cap=1.0); "
        "dpfa_jax.private_attention(q, q, q, mechanism=noise, rng=jax.random.key(0), "
        "queries='public'); print('dpfa_jax.pallas.triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["causal", "masks", "running maximum"])
def test_kernels_lower_for_cuda_without_a_gpu(name, dtype):
    variant = suite.VARIANTS[name]
    operands, spec, _ = suite.build(variant)
    operands = operands._replace(
        query=operands.query.astype(dtype),
        key=operands.key.astype(dtype),
        value=operands.value.astype(dtype),
    )
    noise = "rows" if spec.score_cap is None else "sums"
    spec = Spec(**{**spec.__dict__, "noise": noise, "noise_std": 1.0, "denominator_std": 1.0})

    def both(operands):
        out, residuals = triton.forward(operands, spec)
        columns = None if spec.score_cap is None else triton.column_squares(operands, spec)
        return out, triton.backward(operands, spec, residuals, out), columns

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(both).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "query_gradient", "key_gradient"):
        assert f"dpfa_{kernel}_kernel" in text or "__gpu$xla.gpu.triton" in text


# Tiles and rounding ------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(None, None), (None, 0), (3, None), (5, 2), (0, 0), (100, 100)])
def test_sections_hold_every_pair_once_and_mask_the_rest(sides):
    left, right = sides
    for start, length in [(0, 37), (16, 37), (32, 37), (48, 8)]:
        seen = np.zeros(-(-length // 8) * 8 + 64, int)
        for first, end, masked in tiling.sections(start, 16, 8, length, left, right):
            for tile in range(first, end):
                seen[tile * 8 : tile * 8 + 8] += 1
                for i in range(start, start + 16):
                    for j in range(tile * 8, tile * 8 + 8):
                        meets = j < length
                        meets &= left is None or i - left <= j
                        meets &= right is None or j <= i + right
                        assert masked or meets
        assert seen.max(initial=0) <= 1
        for i in range(start, start + 16):
            for j in range(length):
                if (left is None or i - left <= j) and (right is None or j <= i + right):
                    assert seen[j] == 1


@pytest.mark.parametrize("bad", [(24, 32, 4, 2), (8, 32, 4, 2), (32, 512, 4, 2), (32, 32, 4, 0)])
def test_tile_refuses_sizes_that_do_not_fit(bad):
    with pytest.raises(ValueError, match="Expected"):
        tiling.Tile(*bad)


def test_sums_rounding_stays_near_one_percent():
    assert all(tiling.sums_rounding(n) < 0.011 for n in (1, 256, 257, 4096, 4097, 10**6))
    assert tiling.rounding(10**6) < 0.015


def test_sums_rounding_is_not_exceeded_by_a_unit_that_rounds_to_the_worse_side():
    # Steps of 8 keys that each err by 5.5·2⁻²³ of what was added so far, always against us; the
    # groups of a run then join in float32. One record of weight 1 leaves a sum of n. Runs without
    # the changed record have the same bits, and join in a double word.
    for n in (8, 300, 1024, 4096, 100_000):
        error, joined = 0.0, np.float32(0)
        keys = min(n, 4096)
        mass = 0
        for first in range(0, keys, 256):
            inside = 0
            for step in range(first, min(first + 256, keys), 8):
                inside += min(8, keys - step)
                if first == 0:  # the changed record's group
                    error += 5.5 * 2.0**-23 * inside
            mass += inside
            joined = np.float32(joined + np.float32(inside))
            error += 2.0**-24 * mass if first else 0.0
        assert 2 * error <= tiling.sums_rounding(n)
