"""Samplers: the exact law by enumeration, the way from words to a value, statistics of draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats
from jax import lax

from dpfa_jax import mechanisms, random, sensitivity
from tests import oracles

KEY = jax.random.key(20, impl=random.IMPL)
FALSE_ALARM = 1e-6


def words_of(value, count):
    """The uint32 words that a sampler reads for this value under KEY, as Python integers."""
    own = mechanisms._own_key(KEY, *jax.tree.leaves(value))
    shape = jnp.shape(value)
    return [np.asarray(w).astype(object) for w in mechanisms._words(own, shape, count)]


def assert_fits(counts, probabilities):
    """Pearson's test at false alarm rate 1e-6; cells expected fewer than 10 times are merged."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    expected = probabilities * counts.sum()
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    used = expected > 0
    assert counts[~used].sum() == 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    assert statistic < scipy.stats.chi2.isf(FALSE_ALARM, used.sum() - 1)


SAMPLERS = {
    "gaussian": (
        lambda rng, x: mechanisms.gaussian(rng, x, noise_std=2.0),
        functools.partial(jnp.zeros, dtype=jnp.float32),
    ),
    "laplace": (
        lambda rng, x: mechanisms.laplace(rng, x, noise_scale=2.0),
        functools.partial(jnp.zeros, dtype=jnp.float32),
    ),
    "discrete_gaussian": (
        lambda rng, x: mechanisms.discrete_gaussian(rng, x, noise_std=20.0),
        functools.partial(jnp.zeros, dtype=jnp.int32),
    ),
    "exponential": (
        lambda rng, x: mechanisms.exponential(
            rng,
            lambda x, _: (x[..., None] + jnp.zeros(1000), jnp.ones(1000, bool)),
            x,
            blocks=1,
            score_bound=1.0,
        ),
        functools.partial(jnp.zeros, dtype=jnp.float32),
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_give_every_vmapped_example_its_own_noise(name):
    sample, zeros = SAMPLERS[name]
    nested = jax.vmap(jax.vmap(sample, in_axes=(None, 0)), in_axes=(None, 0))
    drawn = jax.jit(nested)(KEY, zeros((2, 2, 50)))
    assert len({bytes(np.asarray(row)) for row in drawn.reshape(4, 50)}) == 4


def test_samplers_mapped_over_keys_equal_a_loop():
    sample, zeros = SAMPLERS["discrete_gaussian"]
    keys, alone = random.split(KEY, 3), jax.jit(sample)
    looped = jnp.stack([alone(key, zeros(50)) for key in keys])
    np.testing.assert_array_equal(jax.jit(jax.vmap(sample))(keys, zeros((3, 50))), looped)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_the_same_bits_under_jit(name):
    sample, zeros = SAMPLERS[name]
    eager, compiled = sample(KEY, zeros((3, 7))), jax.jit(sample)(KEY, zeros((3, 7)))
    np.testing.assert_allclose(eager, compiled, rtol=1e-6)
    if name != "gaussian":  # XLA may fuse x + s·z into one rounding
        np.testing.assert_array_equal(eager, compiled)
    assert not np.array_equal(eager, sample(random.fold_in(KEY, 1), zeros((3, 7))))


@pytest.mark.parametrize("name", ["laplace", "discrete_gaussian", "exponential"])
def test_samplers_read_no_address_that_depends_on_the_draw(name):
    sample, zeros = SAMPLERS[name]
    text = str(jax.make_jaxpr(sample)(KEY, zeros(5)))
    for primitive in ("gather", "cond[", "sort[", "scatter"):
        assert primitive not in text
    assert text.count("while[") == text.count("while[cond")  # nothing hidden in another spelling


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_samplers_refuse_a_bad_noise(bad):
    floats, integers = jnp.zeros(2), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="noise_std"):
        mechanisms.gaussian(KEY, floats, noise_std=bad)
    with pytest.raises(ValueError, match="noise_scale"):
        mechanisms.laplace(KEY, floats, noise_scale=bad)
    with pytest.raises(ValueError, match="noise_std"):
        mechanisms.discrete_gaussian(KEY, integers, noise_std=bad)
    with pytest.raises(ValueError, match="score_bound"):
        mechanisms.exponential_score_bound(score_bound=bad or -1.0)


def test_samplers_refuse_other_dtypes():
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        mechanisms.gaussian(KEY, jnp.zeros(2, jnp.int32), noise_std=1.0)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        mechanisms.laplace(KEY, jnp.zeros(2, jnp.int32), noise_scale=1.0)
    with pytest.raises(TypeError, match="int32"):
        mechanisms.discrete_gaussian(KEY, jnp.zeros(2), noise_std=1.0)


# gaussian ---------------------------------------------------------------------------------------


def test_gaussian_has_the_standard_deviation_it_names():
    count, noise_std = 1_000_000, 3.0
    noise = np.asarray(
        mechanisms.gaussian(KEY, jnp.full(count, 5.0), noise_std=noise_std), np.float64
    )
    tail = scipy.stats.norm.isf(FALSE_ALARM / 4)  # two two-sided tests

    def fits(sample):
        mean_ok = abs(sample.mean() - 5.0) < tail * noise_std / math.sqrt(count)
        return mean_ok and abs(sample.std() / noise_std - 1) < tail / math.sqrt(2 * count)

    assert fits(noise)
    assert not fits(5.0 + 1.01 * (noise - 5.0))  # negative control: σ wrong by 1 %


def test_gaussian_adds_in_float32_whatever_the_value_is():
    value = jnp.full(1000, 200.0, jnp.bfloat16)
    noisy = mechanisms.gaussian(KEY, value, noise_std=0.01)
    assert noisy.dtype == jnp.float32
    # In bfloat16 the spacing at 200 is 1: every noise of 0.01 would vanish.
    assert len(np.unique(np.asarray(noisy))) > 500


# discrete_gaussian ------------------------------------------------------------------------------


@functools.cache
def ideal_discrete_gaussian(noise_std, largest):
    """P(|X| = k), k ≤ largest, and P(|X| > largest), to 50 digits, from the definition."""
    with mpmath.workdps(50):

        def weight(k):
            return mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(noise_std) ** 2))

        reach = int(25 * noise_std) + 25
        weights = [weight(0)] + [2 * weight(k) for k in range(1, reach)]
        total = mpmath.fsum(weights)
        return [w / total for w in weights[: largest + 1]], mpmath.fsum(
            weights[largest + 1 :]
        ) / total


def discrete_gaussian_law(noise_std):
    """The sampler's exact law of |X|: the table is all it compares a 64-bit integer with."""
    table = [0, *mechanisms._gaussian_table(noise_std), 1 << 64]
    assert table == sorted(table)
    return [mpmath.mpf(b - a) / 2**64 for a, b in itertools.pairwise(table)]


@pytest.mark.parametrize("noise_std", [0.05, 0.4, 1.0, 7.3, 64.0, 500.0])
def test_discrete_gaussian_is_as_close_to_its_ideal_as_it_says(noise_std):
    with mpmath.workdps(50):
        law = discrete_gaussian_law(noise_std)
        ideal, beyond = ideal_discrete_gaussian(noise_std, len(law) - 1)
        distance = (mpmath.fsum(abs(a - b) for a, b in zip(law, ideal, strict=True)) + beyond) / 2
    assert distance <= (9.3 * noise_std + 4) * 2.0**-65
    # Negative control: the law of a σ that is 10⁻¹² larger is farther away than that.
    if noise_std >= 0.4:
        with mpmath.workdps(50):
            other, _ = ideal_discrete_gaussian(noise_std * (1 + 1e-12), len(law) - 1)
            far = mpmath.fsum(abs(a - b) for a, b in zip(law, other, strict=True)) / 2
        assert far > (9.3 * noise_std + 4) * 2.0**-65


def test_discrete_gaussian_compares_two_words_as_integers_do():
    edges = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
    wide = [(high, low) for high in edges for low in edges]
    pairs = [(*a, *b) for a in wide for b in wide]
    columns = [jnp.array(np.array(column, np.uint32)) for column in zip(*pairs, strict=True)]
    said = mechanisms._less((columns[0], columns[1]), (columns[2], columns[3]))
    np.testing.assert_array_equal(said, [(a, b) < (c, d) for a, b, c, d in pairs])


@pytest.mark.parametrize("noise_std", [0.4, 7.3])
def test_discrete_gaussian_reads_its_table_as_integers_do(noise_std):
    value = jnp.arange(2000, dtype=jnp.int32)
    high, low, sign = words_of(value, 3)
    table = mechanisms._gaussian_table(noise_std)
    expected = []
    for x, a, b, s in zip(range(2000), high, low, sign, strict=True):
        magnitude = sum((a << 32) + b >= entry for entry in table)
        expected.append(x - magnitude if s & 1 else x + magnitude)
    noisy = mechanisms.discrete_gaussian(KEY, value, noise_std=noise_std)
    np.testing.assert_array_equal(noisy, expected)


def test_discrete_gaussian_draws_fit_the_definition():
    noise_std, count = 2.5, 200_000
    drawn = np.asarray(
        mechanisms.discrete_gaussian(KEY, jnp.zeros(count, jnp.int32), noise_std=noise_std)
    )
    ks = np.arange(-20, 21)
    weights = np.exp(-(ks**2) / (2 * noise_std**2))
    counts = np.array([(drawn == k).sum() for k in ks])
    assert_fits(counts, weights / weights.sum())
    wrong = np.exp(-(ks**2) / (2 * (1.03 * noise_std) ** 2))
    with pytest.raises(AssertionError):  # negative control: σ wrong by 3 %
        assert_fits(counts, wrong / wrong.sum())


# laplace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_scale", [1.0, 1.999, 3e-7, 1e19])
def test_laplace_is_as_close_to_its_ideal_as_it_says(noise_scale):
    grid = mechanisms.laplace_grid(noise_scale=noise_scale)
    assert math.frexp(grid)[0] == 0.5 and noise_scale / 2**17 < grid <= noise_scale / 2**16
    zero, *bits = mechanisms._laplace_thresholds(noise_scale)
    with mpmath.workdps(50):
        scale = mpmath.mpf(noise_scale) / mpmath.mpf(grid)
        q = mpmath.exp(-1 / scale)
        # Independent events, each off by its own total variation: they add.
        error = abs(mpmath.mpf(zero) / 2**64 - (1 - q) / (1 + q))
        for i, bit in enumerate(bits):
            error += abs(mpmath.mpf(bit) / 2**64 - q ** (2**i) / (1 + q ** (2**i)))
        error += q ** (2 ** len(bits))  # what lies beyond the last bit
        assert error <= 25 * mpmath.mpf(2) ** -64

        # The product of the bits' probabilities is the geometric law, by its definition.
        def law(k):
            if k == 0:
                return mpmath.mpf(zero) / 2**64
            product = 1 - mpmath.mpf(zero) / 2**64
            for i, bit in enumerate(bits):
                p = mpmath.mpf(bit) / 2**64
                product *= p if (k - 1) >> i & 1 else 1 - p
            return product

        for k in (0, 1, 2, 3, 1000, 65_537, 500_000):
            ideal = (1 - q) / (1 + q) * q**k * (2 if k else 1)
            assert abs(law(k) / ideal - 1) < 1e-13


def test_laplace_reads_its_thresholds_as_integers_do():
    noise_scale, value = 1.7, jnp.linspace(-40, 40, 500)
    words = words_of(value, 49)
    zero, *bits = mechanisms._laplace_thresholds(noise_scale)
    grid = mechanisms.laplace_grid(noise_scale=noise_scale)
    expected = []
    for at, x in enumerate(np.asarray(value, np.float64)):
        uniform = [(words[2 * i][at] << 32) + words[2 * i + 1][at] for i in range(24)]
        magnitude = 1 + sum((uniform[1 + i] < bit) << i for i, bit in enumerate(bits))
        magnitude = 0 if uniform[0] < zero else magnitude
        steps = round(x / grid) + (-magnitude if words[48][at] & 1 else magnitude)
        expected.append(np.float32(steps * grid))
    noisy = mechanisms.laplace(KEY, value, noise_scale=noise_scale)
    np.testing.assert_array_equal(noisy, np.array(expected))


def test_laplace_draws_fit_the_definition():
    count, noise_scale = 200_000, 0.5
    noise = np.asarray(
        mechanisms.laplace(KEY, jnp.full(count, 1.25), noise_scale=noise_scale), np.float64
    )
    edges = np.linspace(-4, 4, 65) + 1e-6
    counts = np.histogram(noise - 1.25, np.concatenate([[-np.inf], edges, [np.inf]]))[0]

    def cells(scale):
        cdf = scipy.stats.laplace.cdf(edges, scale=scale)
        return np.diff(np.concatenate([[0], cdf, [1]]))

    assert_fits(counts, cells(noise_scale))
    with pytest.raises(AssertionError):  # negative control: scale wrong by 3 %
        assert_fits(counts, cells(1.03 * noise_scale))


def test_laplace_keeps_values_far_beyond_its_grid():
    value = jnp.array([3e38, -1e30, 1e6, 0.0])
    noisy = mechanisms.laplace(KEY, value, noise_scale=1e-3)
    np.testing.assert_allclose(noisy, value, rtol=1e-6, atol=0.1)


# exponential ------------------------------------------------------------------------------------


def draw(scores, *, score_bound, size=None, visible=None, shape=(), rng=KEY):
    """Independent draws, one per element of `shape`, from one row of scores."""
    scores = jnp.asarray(scores, jnp.float32)
    visible = jnp.ones(scores.shape, bool) if visible is None else jnp.asarray(visible)
    size = scores.size if size is None else size

    def block(operands, index):
        rows = [lax.dynamic_slice(row, (index * size,), (size,)) for row in operands]
        return jnp.broadcast_to(rows[0], (*shape, size)), rows[1]

    blocks = scores.size // size
    return jax.jit(
        lambda rng, operands: mechanisms.exponential(
            rng, block, operands, blocks=blocks, score_bound=score_bound
        )
    )(rng, (scores, visible))


def test_exponential_multiplies_as_integers_do():
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 0xFFFF, 0x10000, 0xFFFFFFFE, 0xFFFFFFFF]
    cases = [
        (a, b, c, d, e)
        for a in edges
        for b in edges
        for c in edges[::3]
        for d in edges
        for e in edges
    ]
    cases += rng.integers(0, 2**32, size=(2000, 5)).tolist()
    columns = [jnp.array(np.array(c, np.uint32)) for c in zip(*cases, strict=True)]
    high, low = mechanisms._fraction(columns[:3], (columns[3], columns[4]))
    said = [int(h) << 32 | int(lo) for h, lo in zip(np.asarray(high), np.asarray(low), strict=True)]
    true = [((a << 64) + (b << 32) + c) * ((d << 32) + e) >> 96 for a, b, c, d, e in cases]
    assert said == true


def test_exponential_adds_weights_as_integers_do():
    # The largest block of the largest weights, where 32 bits overflow 2¹⁴ times.
    weights = np.full(1 << 16, 1 << 30, np.uint32)
    weights[1::3] = 12_345
    sums = mechanisms._running_sums(jnp.array(weights))
    said = np.asarray(sums[0]).astype(object) * 2**32 + np.asarray(sums[1]).astype(object)
    assert (said == np.cumsum(weights.astype(object))).all()
    total = mechanisms._sum(jnp.array(weights))
    assert int(total[0]) << 32 | int(total[1]) == weights.sum(dtype=object)


@pytest.mark.parametrize("size", [12, 4, 1])
def test_exponential_inverts_the_running_totals_as_integers_do(size):
    score_bound, scores = 2.0, np.linspace(-2.5, 2.5, 12)
    visible = np.arange(12) % 5 != 2
    drawn = draw(scores, score_bound=score_bound, size=size, visible=visible, shape=(300,))
    own = mechanisms._own_key(KEY, jnp.asarray(scores, jnp.float32), jnp.asarray(visible))
    words = [np.asarray(w).astype(object) for w in mechanisms._words(own, (300,), 3)]
    weights = mechanisms._integer_weights(
        jnp.asarray(scores, jnp.float32), jnp.asarray(visible), score_bound
    )
    totals = np.cumsum(np.asarray(weights).astype(object))
    point = ((words[0] << 64) + (words[1] << 32) + words[2]) * totals[-1] >> 96
    np.testing.assert_array_equal(drawn, [(totals <= p).sum() for p in point])


@pytest.mark.parametrize("score_bound", [0.0, 0.5, 3.0, 8.0, 30.0])
def test_exponential_score_bound_covers_the_integer_weights(score_bound):
    scores = jnp.linspace(-score_bound, score_bound, 200_001, dtype=jnp.float32)
    scores = jnp.concatenate([scores, jnp.array([-jnp.inf, jnp.inf, jnp.nan, 1e30], jnp.float32)])
    visible = jnp.ones(scores.shape, bool)
    weights = np.asarray(mechanisms._integer_weights(scores, visible, score_bound)).astype(float)
    assert weights.min() >= 1
    spread = math.log(weights.max() / weights.min()) / 2
    bound = mechanisms.exponential_score_bound(score_bound=score_bound)
    assert spread <= bound
    assert bound <= max(score_bound + math.exp(2 * score_bound) * 2.0**-30 + 2e-6, 1e-6) or (
        bound < 10.4 and score_bound > 8
    )
    assert spread > 0.999 * bound or score_bound == 0


@pytest.mark.parametrize("candidates", [2, 5])
def test_exponential_never_costs_more_than_it_is_charged(candidates):
    # Exact law of the worst pair: integer weights over their total, then the 96-bit draw.
    score_bound = 3.0
    rest = {"high": score_bound, "low": -score_bound}
    worst = 0.0
    for others in rest.values():
        laws = []
        for own in (score_bound, -score_bound):
            scores = jnp.array([own] + [others] * (candidates - 1), jnp.float32)
            weights = np.asarray(
                mechanisms._integer_weights(scores, jnp.ones(candidates, bool), score_bound)
            ).astype(object)
            edges = [0, *np.cumsum(weights)]
            # Smallest 96-bit integers whose point reaches each edge: exact counts of draws.
            starts = [-(-(edge << 96) // edges[-1]) for edge in edges]
            laws.append([b - a for a, b in itertools.pairwise(starts)])
        for a, b in zip(*laws, strict=True):
            worst = max(worst, abs(float(mpmath.log(mpmath.mpf(a) / b))))
    bound = mechanisms.exponential_score_bound(score_bound=score_bound)
    epsilon = sensitivity.sampled_attention(score_bound=bound, candidates=candidates)
    assert 0.999 * epsilon < worst <= epsilon


def test_exponential_draws_fit_the_softmax():
    scores = np.array([0.3, -1.0, 2.0, 0.0, 1.5, -2.0])
    drawn = np.asarray(draw(scores, score_bound=2.0, size=2, shape=(200_000,)))
    counts = np.bincount(drawn, minlength=6)
    assert_fits(counts, np.exp(oracles.log_softmax(scores)))
    with pytest.raises(AssertionError):  # negative control: one score off by 0.05
        assert_fits(counts, np.exp(oracles.log_softmax(scores + np.eye(6)[3] * 0.05)))


def test_exponential_draws_only_candidates():
    visible = np.array([False, True, False, True, False, False])
    drawn = np.asarray(
        draw(np.full(6, np.nan), score_bound=1.0, size=3, visible=visible, shape=(500,))
    )
    assert set(drawn) == {1, 3}
    none = draw(np.zeros(6), score_bound=1.0, visible=np.zeros(6, bool), shape=(3,))
    np.testing.assert_array_equal(none, [-1, -1, -1])


def test_exponential_reads_many_blocks():
    count = 200_000
    scores = np.where(np.arange(count) == 150_001, 8.0, -8.0)
    drawn = np.asarray(draw(scores, score_bound=8.0, size=1000, shape=(64,)))
    assert ((drawn >= 0) & (drawn < count)).all()
    # One candidate outweighs the others by e¹⁶/2e5 = 44 to 1.
    assert (drawn == 150_001).mean() > 0.5
    with pytest.raises(ValueError, match="65536"):
        draw(np.zeros(70_000), score_bound=1.0)


def test_samplers_refuse_a_key_that_is_a_constant_of_a_jitted_function():
    key = jax.random.key(0)
    for sampler, value in (
        (functools.partial(mechanisms.gaussian, noise_std=1.0), jnp.zeros(2)),
        (functools.partial(mechanisms.laplace, noise_scale=1.0), jnp.zeros(2)),
        (functools.partial(mechanisms.discrete_gaussian, noise_std=1.0), jnp.zeros(2, jnp.int32)),
    ):
        with pytest.raises(ValueError, match="an argument of the function being traced"):
            jax.jit(lambda x, f=sampler: f(key, x))(value)
        assert jax.jit(sampler)(key, value).shape == (2,)
        assert jax.vmap(functools.partial(sampler, key))(value).shape == (2,)
