"""Which statement do packed rows keep true? CL14: segments are apart before the loss sees them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import clipping
from tests import _clipping_common as common

C = 0.5
IDS = jnp.array([[1, 1, 2, 2, 2, 0], [2, 1, 2, 1, 3, 3], [0, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3]])
OWNERS = jnp.array([[4, 4, 1, 1, 1, 0], [0, 2, 0, 2, 4, 4], [7] * 6, [3] * 6])


def _unpacked(x, ids=IDS, owners=OWNERS, segments=3, length=6):
    return clipping.unpack({"x": x, "owner": owners}, ids, segments=segments, length=length)


def _rows(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 6, 3)), jnp.float32)


@pytest.mark.parametrize(("segments", "length"), [(3, 6), (2, 2), (5, 1)])
def test_unpack_is_the_loop_over_rows_and_segments(segments, length):
    x = _rows()
    unpack = functools.partial(clipping.unpack, segments=segments, length=length)
    made = jax.jit(unpack)({"x": x, "i": jnp.arange(24).reshape(4, 6)}, IDS)
    for row in range(4):
        for k in range(1, segments + 1):
            where = np.flatnonzero(np.asarray(IDS[row]) == k)[:length]
            at, count = row * segments + k - 1, len(where)
            np.testing.assert_array_equal(made.rows["x"][at][:count], x[row][where])
            assert made.rows["i"][at].tolist() == [*(6 * row + where), *[0] * (length - count)]
            assert not np.any(made.rows["x"][at][count:])
            assert made.present[at].tolist() == [True] * count + [False] * (length - count)
            assert bool(made.mask[at]) == (count > 0)


def _loss(w, row, present):
    """Mixes all positions that it is given."""
    mean = jnp.sum(jnp.where(present[:, None], row["x"], 0.0), axis=0)
    return jnp.sum(jnp.tanh(mean @ w)) * 3.0


def _clipped(x, **options):
    made = _unpacked(x)
    run = clipping.clipped_grad(_loss, clip_norm=C, **options)
    ids = dict(unit_ids=made.rows["owner"][:, 0]) if "unit" in options else {}
    return run(jnp.full((3, 2), 0.1), made.rows, made.present, mask=made.mask, **ids)


@pytest.mark.parametrize("by", ["segment", "owner"])
def test_a_unit_in_packed_rows_moves_the_sum_by_its_clip_norm(by):
    options = dict(unit=5) if by == "owner" else {}
    run = jax.jit(lambda x: _clipped(x, **options).tree)
    largest = 0.0
    for seed, scale in ((0, 1.0), (1, 100.0), (2, 10.0)):
        x = _rows(seed) * scale
        whole = np.float64(run(x))
        for row, k in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (3, 3)):
            mine = (jnp.arange(4)[:, None] == row) & (IDS == k)
            gone = (OWNERS == OWNERS[mine][0]) & (IDS > 0) if by == "owner" else mine
            other = np.float64(run(jnp.where(gone[..., None], 0.0, x)))
            largest = max(largest, float(np.linalg.norm(whole - other)))
            # NaN in one segment is that unit's loss, and nobody else's.
            poisoned = np.float64(run(jnp.where(gone[..., None], jnp.nan, x)))
            assert np.linalg.norm(poisoned - other) <= C * 2.0**-16
    assert 0.99 * C <= largest <= C
    made = _clipped(_rows(), **options)
    assert int(made.examples) == (5 if by == "owner" else 6) and made.clip_norm == C


def test_packed_rows_clipped_as_they_are_are_seen_to_move_by_more():
    # Negative control: the longer of two opposite segments turns the row's one gradient round.
    x = jnp.zeros((1, 6, 3)).at[0, :3].set(100.0).at[0, 3:].set(-200.0)
    ids = jnp.array([[1, 1, 1, 2, 2, 2]])
    w = jnp.full((3, 2), 1e-4)

    def tree(x, packed):
        made = clipping.unpack(
            {"x": x}, jnp.ones_like(ids) if packed else ids, segments=2, length=6
        )
        run = clipping.clipped_grad(_loss, clip_norm=C)
        return np.float64(run(w, made.rows, made.present, mask=made.mask).tree)

    gone = x.at[0, 3:].set(0.0)
    apart = [tree(each, packed=False) for each in (x, gone)]
    together = [tree(each, packed=True) for each in (x, gone)]
    assert np.linalg.norm(apart[0] - apart[1]) <= C
    assert np.linalg.norm(together[0] - together[1]) > 1.5 * C


def test_unpacked_segments_are_those_that_were_packed():
    x = _rows(3)
    made = _unpacked(x)
    alone = [
        x[row][np.flatnonzero(np.asarray(IDS[row]) == k)]
        for row in range(4)
        for k in (1, 2, 3)
        if np.any(np.asarray(IDS[row]) == k)
    ]
    want = np.zeros((3, 2))
    for piece in alone:
        grad = jax.grad(_loss)(jnp.full((3, 2), 0.1), {"x": piece}, jnp.ones(len(piece), bool))
        want += np.float64(grad) * min(1.0, C / common.length([grad]))
    assert common.distance(_clipped(x).tree, [want]) <= 2.0**-9 * common.length([want])
    assert int(jnp.sum(made.mask)) == len(alone)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"segment_ids": IDS.astype(jnp.float32)}, TypeError),
        ({"segment_ids": IDS[0]}, ValueError),
        ({"segment_ids": IDS[:, :5]}, ValueError),
        ({"rows": {}}, ValueError),
        ({"rows": jnp.zeros(4)}, ValueError),
        ({"segments": 0}, ValueError),
        ({"length": 0}, ValueError),
        ({"length": 7}, ValueError),
        ({"length": math.nan}, TypeError),
    ],
)
def test_unpack_refuses_what_does_not_fit(changes, error):
    given = dict(rows=_rows(), segment_ids=IDS, segments=3, length=6) | changes
    rows, ids = given.pop("rows"), given.pop("segment_ids")
    with pytest.raises(error, match="Expected"):
        clipping.unpack(rows, ids, **given)
