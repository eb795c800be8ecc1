"""Kernels sum keys that begin at any position as the reference does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import reference
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import tiling, triton

TILE = tiling.Tile(16, 16, 4, 2)
B, T, N, K, S, WIDTH = 1, 70, 2, 1, 100, 8
SPEC = Spec(scale=0.4, score_cap=1.0, window=(40, 9), floor=0.3, ball=0.8)


def _operands():
    source = np.random.default_rng(0)
    shapes = (B, T, N, WIDTH), (B, S, K, WIDTH), (B, S, K, WIDTH)
    arrays = [jnp.asarray(source.normal(size=shape), jnp.float32) for shape in shapes]
    weights = -np.abs(source.normal(size=(B, S, K))).astype(np.float32)
    return Operands(*arrays, jnp.asarray(weights))


def _everything(module, **tiles):
    """Sums, answer and gradients of keys that begin at an offset, and their norms."""

    def run(operands, offset):
        operands = operands._replace(key_offset=offset)
        (high, low), (mass, mass_low) = module.sums(operands, SPEC, **tiles)
        out, residuals = module.finish(SPEC, high + low, mass + mass_low)
        grads = module.backward(operands, SPEC, residuals, jnp.cos(out), **tiles)[:4]
        columns = module.column_squares(operands, SPEC, **tiles)
        return high + low, mass + mass_low, out, *grads, columns

    return jax.jit(run)


OURS, REFERENCE = _everything(triton, tile=TILE), _everything(reference)


@pytest.mark.parametrize("offset", [-64, 0, 33, 75, 200])
def test_sums_and_gradients_of_keys_at_an_offset_equal_the_reference(offset):
    found = OURS(_operands(), jnp.int32(offset))
    want = REFERENCE(_operands(), jnp.int32(offset))
    for ours, theirs in zip(found, want, strict=True):
        assert np.max(np.abs(ours - theirs)) <= 1e-5
    # Queries 0 to 69 see from 40 keys before to 9 keys after them: at 75 a few, at 200 none.
    # Below 0 the queries are the later ones of a longer call's.
    assert np.any(want[1] > 0) == (offset < 100)


def test_sums_of_many_keys_keep_both_words():
    keys = tiling.PLAIN_KEYS + 1
    ones = jnp.ones((1, keys, 1, 4))
    operands = Operands(jnp.zeros((1, 16, 1, 4)), ones, ones * 0.1, jnp.zeros((1, keys, 1)))
    spec = Spec(scale=1.0, score_cap=0.0)
    run = jax.jit(lambda o: triton.sums(o, spec, tile=tiling.Tile(16, 128, 4, 2)))
    (high, low), (mass, _) = run(operands)
    exact = keys * float(np.float32(0.1))
    assert np.all(mass == keys)
    # Groups of 256 keys round; what joins them does not, and one word of the result would.
    assert np.all(low != 0)
    assert np.max(np.abs(np.asarray(high, np.float64) + low - exact)) < 1e-3


@pytest.mark.parametrize("offset", [-4500, -8300, 0])
def test_sums_of_several_runs_equal_the_reference(offset):
    # 9000 keys are three runs. At -4500 the 20 queries see keys 100 to 4519 and fewer: both ends
    # are masked, and one run ends between them. At -8300 they see into the third run.
    source = np.random.default_rng(3)
    shapes = (1, 20, 1, 8), (1, 9000, 1, 8), (1, 9000, 1, 8)
    rows = [jnp.asarray(source.normal(size=shape), jnp.float32) for shape in shapes]
    weights = -jnp.abs(jnp.asarray(source.normal(size=(1, 9000, 1)), jnp.float32))
    operands = Operands(*rows, weights, key_offset=jnp.int32(offset))
    spec = Spec(scale=0.4, score_cap=1.0, is_causal=True, window=(4400, 9))
    tile = tiling.Tile(16, 128, 4, 2)
    ours = jax.jit(lambda o: triton.sums(o, spec, tile=tile))(operands)
    want = jax.jit(lambda o: reference.sums(o, spec))(operands)
    for (high, low), (other, other_low) in zip(ours, want, strict=True):
        found, truth = (np.asarray(x, np.float64) + y for x, y in ((high, low), (other, other_low)))
        assert np.max(np.abs(found - truth)) <= 2e-6 * np.max(np.abs(truth))


def test_tiles_of_the_table_keep_the_groups_that_are_charged_for():
    assert tiling.TABLE
    for (which, capability, width, causal, length), tile in tiling.TABLE.items():
        assert tiling.GROUP_KEYS % tile.block_k == 0 and tiling.PLAIN_KEYS % tile.block_k == 0
        pick = {"forward": tiling.forward_tile, "backward": tiling.backward_tile}[which]
        keys = {"short": 256, "long": 4096}[length]
        shape = {"capability": capability, "width": width, "causal": causal, "keys": keys}
        assert pick(**shape, item_bytes=2) == tile


@pytest.mark.parametrize("pick", [tiling.forward_tile, tiling.backward_tile])
@pytest.mark.parametrize("capability", [80, 86, 89, 100, 120, 1])
def test_devices_that_were_not_measured_get_a_tile_that_fits_any(pick, capability):
    for width in (16, 64, 128, 256):
        tile = pick(capability=capability, width=width, item_bytes=2, causal=False, keys=4096)
        # Keys and values in flight and the block of queries, in 99 KiB of shared memory.
        held = 2 * width * (2 * tile.block_k * tile.stages + tile.block_q)
        assert held <= 99 * 1024


@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
def test_groups_of_keys_lie_at_the_same_places_whatever_the_tile(block_k):
    # Beside 2²⁴ a one is lost, several together are not: ones of the same group are lost one by
    # one, those of the next group are summed before they meet it.
    count, tile = tiling.GROUP_KEYS // block_k, tiling.Tile(16, block_k, 4, 2)
    run = jax.jit(lambda o: triton.sums(o, Spec(scale=1.0, score_cap=0.0), tile=tile))
    for group, kept in ((0, 0), (1, count)):
        value = np.zeros((1, 3 * tiling.GROUP_KEYS, 1, 8), np.float32)
        value[0, group * tiling.GROUP_KEYS + block_k * np.arange(count) + block_k - 1] = 1.0
        value[0, 0] = 2.0**24
        zeros = jnp.zeros_like(value)
        operands = Operands(zeros[:, :16], zeros, jnp.asarray(value), zeros[..., 0])
        (high, _), _ = run(operands)
        assert np.all(np.asarray(high, np.float64) == 2.0**24 + kept)
