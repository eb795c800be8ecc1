"""Which statement does this file keep true? SA1, SA2: batches are the random samples charged for.

Statistical tests raise a false alarm with probability 1e-6 each, and each has a sampler broken on
purpose that it catches.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import PartitionSpec as P

from dpfa_jax import accounting, adjacency, sampling
from dpfa_jax.accounting import subsample

ALARM = 1e-6
SAMPLERS = (
    sampling.Poisson(24, 0.25),
    sampling.TruncatedPoisson(24, 0.25, 16),
    sampling.WithoutReplacement(24, 8),
)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)


def _masks(sampler, draws: int, seed: int = 0) -> np.ndarray:
    """Who took part in each of many successive draws: (draws, records) booleans."""

    def step(state, _):
        batch, state = sampler.next(state)
        present = jnp.zeros(sampler.records, jnp.int32).at[batch.indices].add(batch.mask)
        return state, present

    start = sampler.init(jax.random.key(seed))
    counts = np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, length=draws)[1])(start))
    assert counts.max() <= 1, "a record stands in two slots"
    return counts.astype(bool)


@pytest.mark.parametrize("rate", [2.0**-70, 0.1, 1 / 3, 0.5, 1 - 2.0**-53, 1.0])
def test_below_compares_with_the_rounded_down_rate_as_integers_do(rate):
    threshold = int(rate * 2**64)  # exact: a power-of-two multiple of the float
    words = [
        w for w in (0, threshold - 1, threshold, threshold + 2**32, 2**64 - 1) if 0 <= w < 2**64
    ]
    high = jnp.array([w >> 32 for w in words], jnp.uint32)
    low = jnp.array([w & 0xFFFFFFFF for w in words], jnp.uint32)
    assert sampling._below(high, low, rate).tolist() == [w < threshold for w in words]


def _rates_are_wrong(masks: np.ndarray, rate: float) -> bool:
    """Whether single records, pairs of records, or successive draws deviate from independence."""
    draws, records = masks.shape
    each = scipy.stats.binom(draws, rate)
    both = scipy.stats.binom(draws, rate * rate)
    pairs = list(itertools.combinations(range(records), 2))
    share = ALARM / (records + len(pairs) + 2) / 2
    found = [(masks[:, i].sum(), each) for i in range(records)]
    found += [((masks[:, i] & masks[:, j]).sum(), both) for i, j in pairs]
    for start in (0, 1):  # a pair of draws shares none with the next pair
        overlap = masks[start:-1:2] & masks[start + 1 :: 2]
        found.append((overlap.sum(), scipy.stats.binom(overlap.size, rate * rate)))
    return any(law.cdf(n) < share or law.sf(n - 1) < share for n, law in found)


def test_poisson_takes_every_record_at_its_rate_by_itself():
    rate, records = 0.25, 12
    assert not _rates_are_wrong(_masks(sampling.Poisson(records, rate), 20_000), rate)
    # A fixed size of the same mean couples the records; a kept key repeats the draw.
    fixed = _masks(sampling.WithoutReplacement(records, 3), 20_000)
    assert _rates_are_wrong(fixed, rate)
    assert _rates_are_wrong(np.repeat(_masks(sampling.Poisson(records, rate), 10_000), 2, 0), rate)


def _law_of_truncation(records: int, rate: float, capacity: int) -> dict[frozenset, float]:
    law: dict[frozenset, float] = {}
    for size in range(records + 1):
        for drawn in itertools.combinations(range(records), size):
            weight = rate**size * (1 - rate) ** (records - size)
            kept = list(itertools.combinations(drawn, min(size, capacity)))
            for each in kept:
                law[frozenset(each)] = law.get(frozenset(each), 0.0) + weight / len(kept)
    return law


def _fits(masks: np.ndarray, law: dict[frozenset, float]) -> float:
    seen: dict[frozenset, int] = dict.fromkeys(law, 0)
    for mask in masks:
        drawn = frozenset(np.flatnonzero(mask).tolist())
        if drawn not in seen:
            return 0.0
        seen[drawn] += 1
    expected = np.array([law[each] for each in law]) * len(masks)
    return scipy.stats.chisquare([seen[each] for each in law], expected).pvalue


def test_truncated_poisson_keeps_a_uniform_part_of_what_was_drawn(monkeypatch):
    sampler, law = sampling.TruncatedPoisson(5, 0.5, 2), _law_of_truncation(5, 0.5, 2)
    assert _fits(_masks(sampler, 20_000), law) > ALARM

    def first_ones(rng, records):
        """The records that were drawn in the order of their positions, then the others."""
        high, low = jax.random.bits(rng, (2, records), jnp.uint32)
        order = jnp.argsort(~sampling._below(high, low, 0.5), stable=True)
        return high[order], low[order], order.astype(jnp.int32)

    monkeypatch.setattr(sampling, "_random_order", first_ones)
    assert _fits(_masks(sampler, 20_000, seed=1), law) < ALARM


def test_truncated_poisson_is_poisson_where_nothing_overflows():
    masks = _masks(sampling.TruncatedPoisson(12, 0.25, 12), 20_000)
    assert not _rates_are_wrong(masks, 0.25)


def test_without_replacement_draws_every_set_equally_often():
    sets = [frozenset(each) for each in itertools.combinations(range(6), 3)]
    masks = _masks(sampling.WithoutReplacement(6, 3), 20_000)
    law = dict.fromkeys(sets, 1 / len(sets))
    assert _fits(masks, law) > ALARM
    # The batches of a shuffled epoch are disjoint: each is uniform, and together they are not.
    pairs = np.concatenate([masks[:-1:2], masks[1::2]], 1)
    both = {left | {6 + i for i in right}: 1 / 400 for left in sets for right in sets}
    assert _fits(pairs, both) > ALARM
    epochs = np.concatenate([masks[::2], ~masks[::2]], 1)
    assert _fits(epochs[:, 6:], law) > ALARM and _fits(epochs, both) < ALARM


@every_sampler
def test_next_resumes_from_its_state_and_never_repeats(sampler):
    step = jax.jit(sampler.next)
    states = [sampler.init(jax.random.key(3))]
    batches = []
    for _ in range(4):
        batch, state = step(states[-1])
        batches.append(np.asarray(batch.indices))
        states.append(state)
    saved = sampling.SamplerState(jnp.asarray(np.asarray(states[2].key_data)))
    np.testing.assert_array_equal(step(saved)[0].indices, batches[2])
    assert len({each.tobytes() for each in batches}) == 4
    assert len({np.asarray(each.key_data).tobytes() for each in states}) == 5


@every_sampler
def test_shard_gives_eight_devices_disjoint_parts_of_one_batch(sampler):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = sampler.init(jax.random.key(0))

    def own_part(state):
        batch, following = sampler.next(state)
        return batch.shard(jax.lax.axis_index("data"), 8), following

    outs = (sampling.Batch(P("data"), P("data")), P())
    parts, following = jax.jit(jax.shard_map(own_part, mesh=mesh, in_specs=P(), out_specs=outs))(
        state
    )
    whole, alone = sampler.next(state)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_array_equal(parts.mask, whole.mask)
    np.testing.assert_array_equal(following.key_data, alone.key_data)
    drawn = np.asarray(parts.indices)[np.asarray(parts.mask)]
    assert len(set(drawn.tolist())) == len(drawn)
    by_hand = [np.asarray(whole.shard(i, 8).indices) for i in range(8)]
    np.testing.assert_array_equal(np.concatenate(by_hand), whole.indices)


@pytest.mark.parametrize("rate", [1e-9, 0.5, 1.0])
def test_batches_have_shapes_that_do_not_depend_on_the_draw(rate):
    sampler = sampling.TruncatedPoisson(30, rate, 7)
    batch, _ = sampler.next(sampler.init(jax.random.key(1)))
    assert batch.indices.shape == batch.mask.shape == (sampler.slots,) == (7,)
    assert int(batch.mask.sum()) == {1e-9: 0, 0.5: 7, 1.0: 7}[rate]
    assert np.all(np.asarray(batch.indices)[~np.asarray(batch.mask)] == -1)


def test_gather_fills_empty_slots_with_zeros():
    batch = sampling.Batch(jnp.array([2, -1, 0]), jnp.array([True, False, True]))
    records = {"x": jnp.arange(1.0, 7.0).reshape(3, 2), "y": jnp.array([5, 6, 7], jnp.uint8)}
    taken = batch.gather(records)
    assert taken["x"].tolist() == [[5.0, 6.0], [0.0, 0.0], [1.0, 2.0]]
    assert taken["y"].tolist() == [7, 0, 5] and taken["y"].dtype == jnp.uint8
    nan = {"x": jnp.full((3, 2), jnp.nan)}
    assert batch.gather(nan)["x"][1].tolist() == [0.0, 0.0]


def test_events_name_what_is_drawn():
    poisson, truncated, fixed = SAMPLERS
    gaussian = accounting.Gaussian(1.5, 10)
    assert poisson.event(1.5, 10) == accounting.PoissonSampled(gaussian, 0.25)
    assert truncated.event(1.5, 10) == accounting.TruncatedPoissonSampled(gaussian, 0.25, 24, 16)
    # REPLACE_ONE moves the sum by twice the clip: 1.5 of that is 3 clips.
    assert fixed.event(1.5, 10) == accounting.SampledWithoutReplacement(3.0, 1.0, 8, 24, 10)
    assert (poisson.adjacency, truncated.adjacency) == (adjacency.ZERO_OUT,) * 2
    assert fixed.adjacency == adjacency.REPLACE_ONE
    assert [each.expected_batch_size for each in SAMPLERS] == [6.0, 6.0, 8.0]


@pytest.mark.parametrize(("records", "rate"), [(1000, 0.001), (50_000, 0.01), (200, 0.9)])
def test_truncation_capacity_is_the_smallest_that_costs_next_to_nothing(records, rate):
    steps, epsilon, delta, share = 10_000, 4.0, 1e-6, 2.0**-10
    settings = dict(records=records, sampling_rate=rate, steps=steps, epsilon=epsilon, delta=delta)
    capacity = sampling.truncation_capacity(**settings)

    def cost(slots):
        tail = subsample.poisson_overflow(records, rate, slots)
        return steps * (1 + math.exp(epsilon)) * tail

    assert cost(capacity) <= share * delta < cost(capacity - 1)
    assert sampling.truncation_capacity(**settings, multiple_of=64) == min(
        -(-capacity // 64) * 64, records
    )


def test_truncation_capacity_keeps_epsilon_where_the_rule_of_thumb_does_not():
    records, rate, steps, delta = 1000, 0.001, 10_000, 1e-6
    poisson = sampling.Poisson(records, rate).event(0.6, 0)
    ideal = accounting.epsilon(accounting.Repeated(poisson, steps), delta)

    def charged(capacity):
        event = sampling.TruncatedPoisson(records, rate, capacity).event(0.6, 0)
        return accounting.epsilon(accounting.Repeated(event, steps), delta)

    computed = sampling.truncation_capacity(
        records=records, sampling_rate=rate, steps=steps, epsilon=4.0, delta=delta
    )
    assert ideal <= charged(computed) < ideal * 1.001
    assert charged(7) > 2 * ideal  # qn + 6√(qn)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sampling.Poisson(0, 0.1),
        lambda: sampling.Poisson(2**31, 0.1),
        lambda: sampling.Poisson(10, math.nan),
        lambda: sampling.Poisson(10, 0.0),
        lambda: sampling.Poisson(10, 1.5),
        lambda: sampling.TruncatedPoisson(10, 0.1, 0),
        lambda: sampling.TruncatedPoisson(10, 0.1, 11),
        lambda: sampling.TruncatedPoisson(10, -0.1, 5),
        lambda: sampling.WithoutReplacement(10, 0),
        lambda: sampling.WithoutReplacement(10, 11),
        lambda: SAMPLERS[2].event(math.nan, 0),
        lambda: SAMPLERS[0].event(-1.0, 0),
        lambda: sampling.truncation_capacity(
            records=10, sampling_rate=0.1, steps=0, epsilon=1.0, delta=1e-5
        ),
        lambda: sampling.truncation_capacity(
            records=10, sampling_rate=0.1, steps=1, epsilon=1.0, delta=math.nan
        ),
        lambda: sampling.Batch(jnp.zeros(4, jnp.int32), jnp.ones(4, bool)).split(3),
        lambda: sampling.Batch(jnp.zeros(4, jnp.int32), jnp.ones(4, bool)).shard(2, 2),
    ],
)
def test_sampling_refuses_hostile_numbers(make):
    with pytest.raises(ValueError, match="Expected"):
        make()


@pytest.mark.parametrize("rng", [0, None, np.zeros(2, np.uint32)])
def test_init_refuses_what_is_no_key(rng):
    with pytest.raises(TypeError, match="Expected rng"):
        SAMPLERS[0].init(rng)


@pytest.mark.parametrize("value", ["shuffle", None, range(10), sampling.Poisson])
def test_check_sampler_refuses_shuffled_epochs_and_says_why(value):
    with pytest.raises(TypeError, match="shuffled data have no accounting"):
        sampling.check_sampler("sampling", value)
    assert sampling.check_sampler("sampling", SAMPLERS[0]) is SAMPLERS[0]
