"""The rounding terms F1 and F2 against actual float32 arithmetic, searched by an adversary."""

import numpy as np
import pytest

from dpfa_jax import sensitivity
from dpfa_jax.adjacency import GROUP, REPLACE_ONE, ZERO_OUT
from tests import oracles

RELATIONS = [ZERO_OUT, REPLACE_ONE, GROUP(3)]


def sums_f32(rows, tile, order):
    """Tiled float32 sums of rows (n, d): each tile in the given order, tiles in a double word."""
    partial = np.stack([order(rows[start : start + tile]) for start in range(0, len(rows), tile)])
    high, low = oracles.join_tiles(partial)
    return high.astype(np.float64) + low.astype(np.float64)


def in_sequence(rows):
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def in_pairs(rows):
    while len(rows) > 1:
        odd = rows[len(rows) // 2 * 2 :]
        rows = np.concatenate([rows[0 : len(rows) - len(odd) : 2] + rows[1::2], odd])
    return rows[0]


def rounding_excess(rows, changed, tile, order):
    """How far rounding moves the difference of two neighbours' sums, in units of a unit record."""
    neighbour = rows.copy()
    neighbour[0] = changed
    moved = sums_f32(rows, tile, order) - sums_f32(neighbour, tile, order)
    exact = rows[0].astype(np.float64) - changed.astype(np.float64)
    return float(np.linalg.norm(moved - exact))


@pytest.mark.parametrize("order", [in_sequence, in_pairs])
@pytest.mark.parametrize(("keys", "tile"), [(8, 8), (128, 128), (1000, 32)])
def test_summation_rounding_is_not_exceeded_by_an_adversary(keys, tile, order):
    # Coordinate search over the rows' last bits and the changed record, from sums that sit just
    # above a power of two, where a float32 ulp is largest against the sum.
    rng = np.random.default_rng(keys)
    bound = sensitivity.summation_rounding(keys=keys, tile=tile)
    worst = 0.0
    for _ in range(6):
        rows = rng.uniform(0.5, 1.0, size=(keys, 2)).astype(np.float32) / np.float32(np.sqrt(2))
        changed = np.zeros(2, np.float32)
        found = rounding_excess(rows, changed, tile, order)
        for _ in range(60):
            trial = rows.copy()
            at = rng.integers(keys, size=8)
            trial[at] = rng.uniform(0, 0.7, size=(8, 2)).astype(np.float32)
            trial[0] = rng.uniform(0, 0.7, size=2).astype(np.float32)
            now = rounding_excess(trial, changed, tile, order)
            if now >= found:
                rows, found = trial, now
        worst = max(worst, found)
    assert 0 < worst <= bound


def test_summation_rounding_bounds_the_error_of_one_tile():
    # A sum whose every addition rounds up by half a unit in the last place reaches a good part of
    # γ_(b+1)·Σ|x|, and no order of additions exceeds it.
    tile = 128
    rows = np.ones((tile, 1), np.float32)
    for j in range(1, tile):
        partial = np.float64(in_sequence(rows[:j])[0])
        ulp = np.float64(np.spacing(np.float32(partial + 1)))
        rows[j] = np.float32(1 - ulp * 0.499) if ulp > 2.0**-23 else rows[j]
    per_side = sensitivity.summation_rounding(keys=tile, tile=tile) / 2
    for order in (in_sequence, in_pairs, lambda r: in_sequence(r[::-1])):
        error = abs(float(order(rows)[0]) - rows.astype(np.float64).sum())
        assert error <= per_side
    assert abs(float(in_sequence(rows)[0]) - rows.astype(np.float64).sum()) > 0.2 * per_side


def test_summation_rounding_joins_tiles_with_two_roundoffs_squared_per_step():
    # Joldes, Muller, Popescu 2017: adding a word to a double word errs by at most 2u² relative.
    rng = np.random.default_rng(0)
    count = 400_000
    high = rng.uniform(1, 2, count).astype(np.float32)
    low = (np.spacing(high) * rng.uniform(-0.5, 0.5, count)).astype(np.float32)
    high, low = high + low, low - ((high + low) - high)  # normalised
    word = (rng.uniform(0.25, 2, count) * rng.choice([-1, 1], count)).astype(np.float32)
    total, error = oracles.two_sum(high, word)
    error = low + error
    new_high = total + error
    new_low = error - (new_high - total)
    pieces = [part.astype(np.longdouble) for part in (high, low, word, new_high, new_low)]
    exact = pieces[0] + pieces[1] + pieces[2]
    relative = np.abs((pieces[3] + pieces[4] - exact) / exact) / 2.0**-48
    assert 0.9 < relative.max() <= 2


def test_summation_rounding_needs_its_term_for_joining_tiles():
    # float16 words, tiles of one key: no tile errs, so what is left is the joining, which grows
    # with the number of tiles until it exceeds all that is charged for tiles.
    rng = np.random.default_rng(2)
    keys, unit_roundoff = 4000, 2.0**-11
    bound = sensitivity.summation_rounding(keys=keys, tile=1, unit_roundoff=unit_roundoff)
    for_tiles = sensitivity.summation_rounding(keys=1, tile=1, unit_roundoff=unit_roundoff)
    worst = 0.0
    for _ in range(5):
        rows = rng.uniform(0, 1, size=(keys, 8)).astype(np.float16)
        neighbour = rows.copy()
        neighbour[0] = 0
        sums = [
            sum(word.astype(np.float64) for word in oracles.join_tiles(side))
            for side in (rows, neighbour)
        ]
        worst = max(worst, float(np.abs(sums[0] - sums[1] - rows[0]).max()))
    assert 2 * for_tiles < worst <= bound


def test_summation_rounding_catches_a_plain_running_sum():
    # Negative control: the same tiles added to one float32 word break the bound.
    rng = np.random.default_rng(1)
    keys, tile = 200_000, 16
    rows = rng.uniform(0.5, 1.0, size=(keys, 1)).astype(np.float32)
    neighbour = rows.copy()
    neighbour[0] = 0
    exact = float(rows[0, 0])
    partial = [side.reshape(-1, tile).sum(1, dtype=np.float32) for side in (rows, neighbour)]
    bound = sensitivity.summation_rounding(keys=keys, tile=tile)

    def moved(add):
        return abs(add(partial[0]) - add(partial[1]) - exact)

    def double_word(tiles):
        high, low = oracles.join_tiles(tiles)
        return float(high) + float(low)

    assert moved(double_word) <= bound
    assert moved(lambda tiles: float(np.cumsum(tiles, dtype=np.float32)[-1])) > bound
    # One word before the noise is a term of its own.
    rounded = moved(lambda tiles: float(oracles.join_tiles(tiles)[0]))
    assert rounded <= sensitivity.summation_rounding(keys=keys, tile=tile, one_word=True)


def test_summation_rounding_stays_under_one_percent_up_to_a_million_keys():
    for keys in (1, 127, 128, 10**4, 10**6):
        assert 0 < sensitivity.summation_rounding(keys=keys) < 0.01
    assert sensitivity.summation_rounding(keys=10**6, one_word=True) > 0.1
    with pytest.raises(ValueError, match="smaller tiles"):
        sensitivity.summation_rounding(keys=100, unit_roundoff=2.0**-4)


@pytest.mark.parametrize("adjacency", RELATIONS, ids=str)
def test_gaussian_process_rounding_is_reached_and_not_exceeded(adjacency):
    # Nearly equal queries: the Gram matrix is all ones plus λ, and weight errors that alternate
    # in sign point along its smallest eigenvalue.
    queries, jitter, weight_error, sum_error = 64, 1e-6, 2.0**-9, 1e-4
    gram = np.ones((queries, queries)) + jitter * np.eye(queries)
    jitter_error = 0.3 * jitter
    factor = np.linalg.cholesky(gram - jitter_error * np.eye(queries))
    signs = np.resize([1.0, -1.0], queries)
    rows = 1 if adjacency.kind != "GROUP" else adjacency.rows
    sides = 2 if adjacency.kind == "REPLACE_ONE" else 1
    # Under replacement with κ = 0 the records are orthogonal; in one column their shift adds.
    exact = rows * (np.sqrt(2) if sides == 2 else 1)
    error = sides * rows * weight_error + 2 * rows * sum_error
    shift = exact * np.ones(queries) + error * signs
    moved = np.linalg.norm(np.linalg.solve(factor, shift))
    bound = exact * sensitivity.gaussian_process_rounding(
        queries=queries,
        jitter=jitter,
        jitter_error=jitter_error,
        weight_error=weight_error,
        sum_error=sum_error,
        adjacency=adjacency,
    )
    assert moved <= bound
    assert moved >= 0.8 * bound
    # Negative control: with the certificate's slack forgotten the charge is too small.
    along_error = np.linalg.norm(np.linalg.solve(factor, error * signs))
    forgotten = exact * (
        sensitivity.gaussian_process_rounding(
            queries=queries,
            jitter=jitter,
            jitter_error=0.0,
            weight_error=weight_error,
            sum_error=sum_error,
            adjacency=adjacency,
        )
        - 1
    )
    assert along_error > forgotten


def test_gaussian_process_rounding_refuses_a_certificate_as_large_as_the_jitter():
    with pytest.raises(ValueError, match="jitter_error"):
        sensitivity.gaussian_process_rounding(
            queries=1,
            jitter=1e-4,
            jitter_error=1e-4,
            weight_error=0.0,
            sum_error=0.0,
            adjacency=ZERO_OUT,
        )
