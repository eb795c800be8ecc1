import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpfa_jax import random

ROUNDS = (8, 12, 20)


def _words(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))


def _block(key: bytes, address: bytes, rounds: int) -> bytes:
    words = random.chacha_block(
        tuple(jnp.uint32(w) for w in _words(key)),
        tuple(jnp.uint32(w) for w in _words(address)),
        rounds=rounds,
    )
    return b"".join(int(w).to_bytes(4, "little") for w in words)


def _chacha_oracle(key: bytes, address: bytes, rounds: int) -> bytes:
    """RFC 8439 section 2.3 in Python integers, one quarter round a line."""
    mask = 0xFFFFFFFF
    state = [*_words(b"expand 32-byte k"), *_words(key), *_words(address)]
    x = list(state)

    def turn(a, b, c, d):
        for first, second, third, count in (
            (a, b, d, 16),
            (c, d, b, 12),
            (a, b, d, 8),
            (c, d, b, 7),
        ):
            x[first] = (x[first] + x[second]) & mask
            mixed = x[third] ^ x[first]
            x[third] = ((mixed << count) | (mixed >> (32 - count))) & mask

    for _ in range(rounds // 2):
        for a, b, c, d in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            turn(a, b, c, d)
        for a, b, c, d in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            turn(a, b, c, d)
    return b"".join(((a + b) & mask).to_bytes(4, "little") for a, b in zip(x, state, strict=True))


def test_chacha_block_gives_the_vectors_of_rfc_8439():
    # Section 2.3.2, and appendix A.1 vectors 1 and 2.
    key = bytes(range(32))
    address = bytes.fromhex("01000000" + "000000090000004a00000000")
    block = "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    block += "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    assert _block(key, address, 20).hex() == block
    zero = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    zero += "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    assert _block(bytes(32), bytes(16), 20).hex() == zero
    one = "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    one += "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    assert _block(bytes(32), bytes([1]) + bytes(15), 20).hex() == one


@pytest.mark.parametrize("rounds", ROUNDS)
def test_chacha_block_equals_integer_arithmetic(rounds):
    source = np.random.default_rng(rounds)
    for _ in range(3):
        key, address = source.bytes(32), source.bytes(16)
        assert _block(key, address, rounds) == _chacha_oracle(key, address, rounds)


def test_chacha_block_is_the_same_unrolled():
    key = tuple(jnp.uint32(i) for i in range(8))
    address = (jnp.arange(5, dtype=jnp.uint32), *(jnp.uint32(i) for i in range(3)))
    rolled = random.chacha_block(key, address)
    unrolled = jax.jit(lambda: random.chacha_block(key, address, unroll=True))()
    assert np.array_equal(np.stack(rolled), np.stack(unrolled))


def _normal_oracle(first: int, second: int) -> tuple[float, float]:
    n = (first << 8) | (second >> 24)
    k = second & 0xFFFFFF
    k = k - (1 << 24) if k >= 1 << 23 else k
    u = (n + 0.5) / 2**40
    # math.log1p keeps the digits of 1 - u, which float64 has to 2**-52.
    log = math.log(u) if u < 0.5 else math.log1p(-((2**40 - 1 - n) + 0.5) / 2**40)
    radius, angle = math.sqrt(-2 * log), 2 * math.pi * (k + 0.5) / 2**24
    return radius * math.cos(angle), radius * math.sin(angle)


def test_normal_pair_equals_box_muller_at_the_edges_and_inside():
    edges = [0, 1, 255, 2**24, 2**31 - 1, 2**31, 2**32 - 2**25, 2**32 - 2, 2**32 - 1]
    seconds = [0, 1, 2**23 - 1, 2**23, 2**24 - 1, 2**24, 2**31, 2**32 - 1]
    grid = [(a, b) for a in edges for b in seconds]
    inside = np.random.default_rng(0).integers(0, 2**32, (2000, 2)).tolist()
    words = np.array(grid + inside, np.uint32)
    got = np.stack(random.normal_pair(jnp.asarray(words[:, 0]), jnp.asarray(words[:, 1])), 1)
    want = np.array([_normal_oracle(int(a), int(b)) for a, b in words])
    radius = np.hypot(*want.T)[:, None]
    # The worst is log(1 - x) just above x = 1/64: rounding 1 - x costs 2**-25 of 2**-6, half of it
    # in the radius. Everything else is under ten roundings of 2**-24.
    assert np.all(np.isfinite(got))
    assert np.max(np.abs(got - want) / radius) < 2**-20 + 10 * 2**-24


def test_normal_pair_never_loses_its_noise_near_u_one():
    # float32(1 - 2**-25) is 1: without the smaller of u and 1 - u these 256 pairs would be (0, 0).
    first = jnp.full(256, 2**32 - 1, jnp.uint32)
    second = jnp.arange(256, dtype=jnp.uint32) << 24
    x, y = random.normal_pair(first, second)
    radius = np.hypot(np.asarray(x, np.float64), np.asarray(y, np.float64))
    assert np.all(radius > 9e-7) and len(np.unique(radius)) == 256


def test_normal_pair_ends_at_the_stated_radius():
    x, y = random.normal_pair(jnp.uint32(0), jnp.uint32(0))
    largest = math.hypot(float(x), float(y))
    # n = 0 is u = 2**-41, half a step beyond the 40 bits.
    assert math.isclose(largest, math.sqrt(2 * 41 * math.log(2)), rel_tol=1e-6)


@pytest.fixture(scope="module")
def sample():
    return np.asarray(random.normal(jax.random.key(7), (1000, 1000)), np.float64)


def test_normal_has_the_moments_of_a_normal(sample):
    # z-scores against the exact sampling deviations; |z| < 5.7 fails one run in 10^8 a moment.
    n = sample.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        z = (np.mean(sample**power) - mean) / math.sqrt(variance / n)
        assert abs(z) < 5.7, power


def test_normal_passes_ks_which_rejects_a_one_percent_wrong_std(sample):
    # False-alarm rate 1e-6. sup|Φ(x) − Φ(x/1.01)| = 2.4e-3 against a critical value of 2.6e-3 at
    # 10^6: use the statistic on |x|, where the distance doubles.
    values = np.abs(sample.ravel())
    threshold = stats.kstwobign.isf(1e-6) / math.sqrt(values.size)
    assert stats.kstest(values, stats.halfnorm.cdf).statistic < threshold
    assert stats.kstest(1.01 * values, stats.halfnorm.cdf).statistic > threshold
    assert stats.kstest(0.99 * values, stats.halfnorm.cdf).statistic > threshold


def test_normal_columns_rows_and_pairs_are_uncorrelated(sample):
    # Correlations of neighbours within a block (pair, j, t, chunk) and across rows: |z| < 5.7.
    n = sample.size
    for shift in (1, 2, 8, 64):
        assert abs(np.sum(sample[:, :-shift] * sample[:, shift:])) < 5.7 * math.sqrt(n)
        assert abs(np.sum(sample[:-shift] * sample[shift:])) < 5.7 * math.sqrt(n)
        squares = (sample[:, :-shift] ** 2 - 1) * (sample[:, shift:] ** 2 - 1)
        assert abs(np.sum(squares)) < 5.7 * 2 * math.sqrt(n)


def test_matrix_normals_are_a_function_of_the_global_index():
    data = random.key_data(jax.random.key(3))
    whole = np.asarray(random.matrix_normals(data, 0, 5, jnp.arange(9), 200))
    # Narrower and shorter matrices, and rows taken alone, are parts of it.
    for columns in (1, 3, 9, 65):
        part = np.asarray(random.matrix_normals(data, 0, 5, jnp.arange(4), columns))
        assert np.array_equal(part, whole[:4, :columns]), columns
    alone = np.asarray(random.matrix_normals(data, 0, 5, jnp.array([7]), 200))
    assert np.array_equal(alone[0], whole[7])


def test_matrix_normals_stand_where_the_address_says():
    data = random.key_data(jax.random.key(4))
    batch, head, row, column = 6, 3, 11, 64 + 8 * 5 + 2 * 3 + 1
    address = (row, (column >> 6) << 2 | (column >> 1) & 3, batch, 1 << 24 | head)
    words = random.chacha_block(
        tuple(data[i] for i in range(8)), tuple(jnp.uint32(a) for a in address)
    )
    j = (column >> 3) & 7
    want = random.normal_pair(words[2 * j], words[2 * j + 1])[column & 1]
    got = random.matrix_normals(data, batch, head, jnp.array([row]), 128)[0, column]
    assert float(got) == float(want)


def test_row_normals_stand_where_the_address_says_and_apart_from_the_matrix():
    data = random.key_data(jax.random.key(4))
    batch, head, row = 2, 1, 16 + 13
    words = random.chacha_block(
        tuple(data[i] for i in range(8)),
        tuple(jnp.uint32(a) for a in (row >> 4, 0, batch, 2 << 24 | head)),
    )
    want = random.normal_pair(words[2 * (row & 7)], words[2 * (row & 7) + 1])[(row >> 3) & 1]
    rows = random.row_normals(data, batch, head, 40)
    assert float(rows[row]) == float(want)
    matrix = random.matrix_normals(data, batch, head, jnp.arange(40), 64)
    assert not np.intersect1d(np.asarray(rows), np.asarray(matrix)).size


def test_normal_is_distinct_over_batches_heads_and_rows():
    noise = np.asarray(random.normal(jax.random.key(0), (3, 4, 5, 6)))
    assert len(np.unique(noise)) == noise.size


def test_normal_is_the_same_eager_jitted_and_vmapped():
    keys = random.split(jax.random.key(1), 3)
    eager = np.stack([random.normal(key, (4, 5)) for key in keys])
    assert np.array_equal(eager, jax.jit(jax.vmap(lambda key: random.normal(key, (4, 5))))(keys))


def test_keys_work_in_jax_random():
    key = random.secure_key()
    assert jax.random.split(key, 3).shape == (3,)
    assert jax.random.key_impl(key) == random.IMPL
    assert jax.random.bits(key, (3,), "uint8").dtype == jnp.uint8
    uniform = np.asarray(jax.random.uniform(key, (10_000,)))
    # Mean of 10^4 uniforms, |z| < 5.7.
    assert abs(uniform.mean() - 0.5) < 5.7 / math.sqrt(12 * 10_000)

    def step(carry, _):
        carry, used = jax.random.split(carry)
        return carry, random.bits(used)

    _, drawn = jax.lax.scan(step, key, None, length=8)
    assert len(np.unique(np.asarray(drawn))) == 8


def test_split_fold_in_and_bits_never_meet():
    key = jax.random.key(2)
    data = [random.key_data(k) for k in random.split(key, 50)]
    data += [random.key_data(random.fold_in(key, i)) for i in range(50)]
    words = np.stack([np.asarray(d) for d in data])
    drawn = np.asarray(random.bits(key, (800,)))
    every = np.concatenate([words.ravel(), drawn])
    # 1600 words: a chance collision of two has probability 3e-4; blocks would give 8 or 16.
    assert every.size - len(np.unique(every)) <= 2


def test_bits_of_every_width_use_fresh_words():
    key = random.secure_key()
    with jax.enable_x64(True):
        wide = np.asarray(jax.random.bits(key, (1000,), "uint64"))
    narrow = np.asarray(jax.random.bits(key, (2000,), "uint32"))
    assert not np.intersect1d(wide & 0xFFFFFFFF, narrow).size


def test_key_data_takes_ours_as_it_is_and_expands_others():
    data = jnp.arange(8, dtype=jnp.uint32)
    assert np.array_equal(random.key_data(random.wrap_key_data(data)), data)
    seen = [np.asarray(random.key_data(jax.random.key(0, impl=i))) for i in ("threefry2x32", "rbg")]
    assert not np.array_equal(*seen)
    assert np.array_equal(seen[0], random.key_data(jax.random.key(0)))


def test_python_int_seeds_hold_32_bits():
    # What the documentation warns of: two seeds, one key.
    assert not jax.config.jax_enable_x64
    same = jax.random.key_data(jax.random.key(5)) == jax.random.key_data(jax.random.key(2**32 + 5))
    assert bool(same.all())


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (0, TypeError, "int 0"),
        (None, TypeError, "no default key"),
        (np.zeros(2, np.uint32), TypeError, "wrap_key_data"),
        ("key", TypeError, "typed JAX key"),
    ],
)
def test_key_data_refuses_what_is_no_key(bad, error, says):
    with pytest.raises(error, match=says):
        random.key_data(bad)


def test_key_data_refuses_legacy_keys_and_arrays_of_keys():
    with pytest.raises(TypeError, match="legacy uint32 key"):
        random.key_data(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        random.key_data(jax.random.split(jax.random.key(0)))


def test_secure_key_differs_every_time_and_refuses_to_be_compiled_in():
    assert not np.array_equal(*(random.key_data(random.secure_key()) for _ in range(2)))
    with pytest.raises(RuntimeError, match="tracing"):
        jax.jit(lambda: random.normal(random.secure_key(), (2,)))()


def test_normal_refuses_other_dtypes():
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        random.normal(jax.random.key(0), (2,), jnp.int32)
    assert random.normal(jax.random.key(0), (2,), jnp.bfloat16).dtype == jnp.bfloat16
    assert random.normal(jax.random.key(0), (0, 3)).shape == (0, 3)
