import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import reference
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.doubleword import add_word, grid_step, to_grid, two_sum
from tests import naive

B, T, N, K, H, WIDTH = 2, 5, 4, 2, 8, 6


def _inputs(keys, memories=B, seed=0):
    source = np.random.default_rng(seed)
    normal = lambda *shape: source.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = -np.abs(normal(memories, keys, K))
    weights[:, ::7] = -np.inf
    arrays = (normal(B, T, N, H), normal(memories, keys, K, H), normal(memories, keys, K, WIDTH))
    return *arrays, weights.astype(np.float32)


# name: (keys, memories, Spec changes, naive options)
_MASK = np.random.default_rng(5).random((B, 1, T, 300)) < 0.5
_SEGMENTS = (
    np.random.default_rng(6).integers(0, 3, (B, T), np.int32),
    np.random.default_rng(7).integers(0, 3, (B, 300), np.int32),
)
_LENGTHS = np.array([0, 200], np.int32)
VARIANTS = {
    "one key": (1, B, {}, {}),
    "tails": (300, B, {}, {}),
    "whole tiles": (256, B, {}, {}),
    "shared memory": (300, 1, {}, {}),
    "causal": (300, B, {"is_causal": True}, {"causal": True}),
    "window": (300, B, {"window": (2, 1)}, {"window": (2, 1)}),
    "bounded scores": (300, B, {"score_low": -0.5, "score_cap": 0.5}, {"low": -0.5, "cap": 0.5}),
    "running maximum": (300, B, {"score_cap": None}, {"cap": None}),
    "mask": (300, B, {}, {"mask": _MASK}),
    "segments": (300, B, {}, {"segments": _SEGMENTS}),
    "lengths": (300, B, {}, {"lengths": _LENGTHS}),
}


def _ours(name):
    keys, memories, changes, options = VARIANTS[name]
    spec = Spec(**{"scale": 0.4, "score_cap": 1.0, "floor": 0.3, "ball": 0.8, **changes})
    query, key, value, weights = _inputs(keys, memories)
    extra = {}
    if "mask" in options:
        extra["mask"] = jnp.asarray(options["mask"])
    if "segments" in options:
        extra["query_segments"], extra["key_segments"] = map(jnp.asarray, options["segments"])
    if "lengths" in options:
        extra["key_lengths"] = jnp.asarray(options["lengths"])
    operands = Operands(*map(jnp.asarray, (query, key, value, weights)), **extra)
    return operands, spec, {"scale": 0.4, "cap": 1.0, **options}


def _truth(fun, arrays, options):
    """fun in float64 and in float32."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            np.asarray, fun(*(np.asarray(a, np.float64) for a in arrays), **options)
        )
    return wide, jax.tree.map(np.asarray, fun(*map(jnp.asarray, arrays), **options))


def _at_most_twice(ours, plain, truth):
    """Design rule: at most twice the error of plain code in the same dtype, both against float64.

    Plain code may be right by luck; a few roundings of the largest entry are always allowed.
    """
    scale = np.max(np.abs(truth), initial=0.0)
    allowed = 2 * np.max(np.abs(plain - truth), initial=0.0) + 16 * 2**-24 * scale
    assert np.max(np.abs(np.asarray(ours, np.float64) - truth), initial=0.0) <= allowed


@pytest.mark.parametrize("name", VARIANTS)
def test_sums_equal_the_definition(name):
    operands, spec, options = _ours(name)
    arrays = [np.asarray(x) for x in operands[:4]]
    truth, plain = _truth(naive.sums, arrays, options)
    (high, low), (mass, mass_low) = reference.sums(operands, spec)
    _at_most_twice(np.asarray(high, np.float64) + low, plain[0], truth[0])
    _at_most_twice(np.asarray(mass, np.float64) + mass_low, plain[1], truth[1])


@pytest.mark.parametrize("name", ["tails", "shared memory", "bounded scores", "running maximum"])
def test_backward_equals_autodiff_of_the_definition(name):
    operands, spec, options = _ours(name)
    arrays = [np.asarray(x) for x in operands[:4]]
    source = np.random.default_rng(3)
    # Noise on the sums comes with a public reference; the maximum cancels in the clean ratio alone.
    size = 0.0 if name == "running maximum" else 0.1
    noise = (size * source.normal(size=(B, T, N, WIDTH)), size * source.normal(size=(B, T, N)))
    cotangent = source.normal(size=(B, T, N, WIDTH))
    clean = reference.sums(operands, spec)
    residuals = tuple(
        words[0] + words[1] + extra.astype(np.float32)
        for words, extra in zip(clean, noise, strict=True)
    )
    options = {**options, "floor": spec.floor, "ball": spec.ball}

    def fun(*args, **options):
        as_given = [x.astype(args[0].dtype) for x in (*noise, cotangent)]
        return naive.gradients(*args, tuple(as_given[:2]), as_given[2], **options)

    truth, plain = _truth(fun, arrays, options)
    ours = reference.backward(operands, spec, residuals, jnp.asarray(cotangent, jnp.float32))
    for got, rough, exact in zip(ours[:4], plain, truth, strict=True):
        finite = np.isfinite(exact)
        _at_most_twice(np.asarray(got)[finite], rough[finite], exact[finite])
    assert ours[4] is None


def test_column_squares_sum_over_queries_and_heads():
    operands, spec, options = _ours("causal")
    arrays = [np.asarray(x) for x in operands[:4]]

    def fun(query, key, value, weights, **options):
        w, _ = naive.weights(query, key, weights, **options)
        grouped = (w**2).sum(2).reshape(B, K, N // K, -1).sum(2)
        return jnp.swapaxes(grouped, 1, 2)

    truth, plain = _truth(fun, arrays, options)
    _at_most_twice(reference.plain_column_squares(operands, spec), plain, truth)


def test_column_squares_cover_scores_that_round_otherwise():
    # Rows of 64 numbers whose products are summed in the opposite order, which is another float32.
    source = np.random.default_rng(1)
    query, key = (source.normal(size=(1, n, 1, 64)).astype(np.float32) for n in (40, 30))
    query[:] = query[:, :1]
    # Orthogonal: long keys have scores of nothing but rounding.
    one = query[0, 0, 0].astype(np.float64)
    key[0, :, 0] -= (key[0, :, 0] @ one)[:, None] * one / (one @ one)
    for size, raises in ((1e-3, False), (1.0, True), (1e6, True)):
        scores = np.zeros((40, 30), np.float32)
        for column in reversed(range(64)):
            scores += query[0, :, 0, column, None] * (size * key)[0, :, 0, column].astype(
                np.float32
            )
        spec = Spec(scale=1.0, score_cap=0.0)
        weights = np.exp(np.minimum(scores, 0.0).astype(np.float64))
        rows = (jnp.asarray(x, jnp.float32) for x in (query, size * key, key))
        operands = Operands(*rows, jnp.zeros((1, 30, 1)))
        found = np.asarray(reference.column_squares(operands, spec), np.float64)[0, :, 0]
        assert np.all(found >= (1 - 2.0**-13) * np.sum(weights**2, axis=0))
        plain = np.asarray(reference.plain_column_squares(operands, spec))[0, :, 0]
        assert np.array_equal(found, plain) != raises
        # Where scores are known it takes what they may be off by, and no more.
        norms = np.linalg.norm(query[0, 0, 0]) * np.linalg.norm(size * key[0, :, 0], axis=-1)
        assert size > 1 or np.all(found <= (1 + 2.0**-13) * plain * np.exp(132 * 2.0**-22 * norms))
        # What was not known of them was all of the weight, for some records.
        assert size < 1e6 or np.any(plain < 0.5 * np.sum(weights**2, axis=0))


def test_sums_hold_nothing_of_size_queries_times_keys():
    # The largest intermediate of the compiled forward is a tile, not the T×S matrix.
    queries = keys = 4096
    shapes = [(1, queries, 1, 8), (1, keys, 1, 8), (1, keys, 1, 8), (1, keys, 1)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    spec = Spec(scale=1.0, score_cap=0.0)
    compiled = jax.jit(lambda *a: reference.sums(Operands(*a), spec)).lower(*arrays).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < queries * keys * 4 / 8


def test_add_word_keeps_what_a_float32_chain_loses():
    values = np.full(2**14, 0.1, np.float32)

    def chain(carry, word):
        return add_word(*carry, word), None

    start = (jnp.float32(0), jnp.float32(0))
    (high, low), _ = jax.jit(lambda v: jax.lax.scan(chain, start, v))(values)
    exact = float(np.sum(values.astype(np.float64)))
    assert float(high) + float(low) == exact
    plain, _ = jax.jit(lambda v: jax.lax.scan(lambda c, w: (c + w, None), start[0], v))(values)
    assert float(plain) != exact


def test_two_sum_is_exact_under_jit():
    source = np.random.default_rng(0)
    a, b = (source.normal(size=1000) * 2.0 ** source.integers(-20, 20, 1000) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    total, error = jax.jit(two_sum)(a, b)
    exact = a.astype(np.float64) + b
    assert np.array_equal(np.asarray(total, np.float64) + np.asarray(error, np.float64), exact)


def test_one_record_moves_one_tile_only():
    # Why rounding is charged for one tile (F1): all other partial sums are the same bits.
    query, key, value, weights = _inputs(300)
    changed = weights.copy()
    changed[:, 200] = -np.inf
    spec = Spec(scale=0.4, score_cap=1.0)
    parts = []
    for log_weights in (weights, changed):
        tiles = []
        for start in (0, 128, 256):
            cut = slice(start, min(start + 128, 300))
            operands = Operands(query, key[:, cut], value[:, cut], log_weights[:, cut])
            tiles.append(np.asarray(reference.sums(operands, spec)[0][0]))
        parts.append(tiles)
    assert np.array_equal(parts[0][0], parts[1][0]) and np.array_equal(parts[0][2], parts[1][2])
    assert not np.array_equal(parts[0][1], parts[1][1])


def test_rounding_stays_under_one_percent_to_a_million_keys():
    for keys in (0, 1, 128, 10_000, 1_000_000):
        assert 0 < reference.rounding(keys) < 0.01


def test_noise_is_the_same_for_any_number_of_keys_and_head_groups():
    data = jnp.arange(8, dtype=jnp.uint32)
    matrix, row = reference.noise_field(data, 2, 7, 4, 6)
    smaller, smaller_row = reference.noise_field(data, 1, 3, 2, 6)
    assert np.array_equal(matrix[:1, :3, :2], smaller)
    assert np.array_equal(row[:1, :3, :2], smaller_row)


@pytest.mark.parametrize("std", [1e-6, 0.3, 1.0, 3.0, 1e7])
def test_to_grid_gives_the_nearest_multiple_of_a_public_step(std):
    step = grid_step(std)
    assert step <= 2.0**-10 * std < 2 * step
    values = np.float32(std) * np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values = np.concatenate([values, [0.0, 0.5 * step, 1.5 * step, -2.5 * step]]).astype(np.float32)
    steps = values.astype(np.float64) / step
    want = np.sign(steps) * np.floor(np.abs(steps) + 0.5) * step
    # Under jit too: a compiler that simplified (x + s) - s to x would undo the release's rounding.
    for run in (to_grid, jax.jit(to_grid, static_argnums=1)):
        assert np.array_equal(np.asarray(run(jnp.asarray(values), step), np.float64), want)


@pytest.mark.parametrize("noise", ["sums", "rows"])
def test_what_is_released_lies_on_the_public_grid(noise):
    operands, spec, _ = _ours("tails")
    operands = operands._replace(noise_key=jnp.arange(8, dtype=jnp.uint32))
    changes = {"noise": noise, "noise_std": 0.7, "denominator_std": 1.3, "on_grid": True}
    spec = Spec(**{**spec.__dict__, **changes, "ball": None, "row_clip": 1.0})
    out, (numerator, denominator) = reference.forward(operands, spec)
    pairs = [(numerator, 0.7), (denominator, 1.3)] if noise == "sums" else [(out, 0.7)]
    for value, std in pairs:
        steps = np.asarray(value, np.float64) / grid_step(std)
        assert np.array_equal(steps, np.round(steps))


def test_a_noisy_denominator_of_zero_is_one_below_the_floor():
    # On a public grid one in some thousands is 0 where no record weighs much; every other backend
    # divides by the floor, and so does the definition for a denominator beside it.
    spec = Spec(scale=1.0, score_cap=1.0, noise="sums", noise_std=1.0, denominator_std=1.0)
    spec = dataclasses.replace(spec, floor=2.0, ball=1e3)
    numerator = jnp.asarray([[[3.0, -4.0]]] * 3).reshape(1, 3, 1, 2)
    found = reference.answer(spec, numerator, jnp.asarray([0.0, -1e-6, 1.0]).reshape(1, 3, 1))
    np.testing.assert_array_equal(found, numerator / 2)
    bare = dataclasses.replace(spec, noise="none", floor=1e-30, ball=None)
    nothing = reference.answer(bare, numerator, jnp.zeros((1, 3, 1)))
    np.testing.assert_array_equal(nothing, 0.0)
