"""Which records take part in a step: three ways of drawing them that a theorem accounts for.

Each sampler is a frozen value tied to the event that its draws are charged as, the adjacency that
event speaks of, and the public number that sums are divided by. Draws happen on the device, from
this library's keys, with shapes that never depend on what was drawn. Epochs of shuffled data are
not here: no theorem bounds them at the price of a random sample (`check_sampler` says so).
"""

import dataclasses
import fractions
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax import _check, adjacency, random
from dpfa_jax.accounting import event as events
from dpfa_jax.accounting import subsample

_TAG = 0x73616D70
_PADDING = -1
_MOST_RECORDS = (1 << 31) - 1


class SamplerState(NamedTuple):
    """Where a sampler stands: all that a checkpoint needs for the same batches to come.

    Attributes:
      key_data: uint32[8], renewed by every draw. As secret as the noise: amplification by sampling
        holds against somebody who does not know who was drawn.
    """

    key_data: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The records of one step, in a fixed number of slots. A pytree.

    Attributes:
      indices: int32, the record in each slot; −1 in an empty one.
      mask: bool, whether a slot holds a record. Give it to the clipping: without it the padding
        would count.
    """

    indices: Any
    mask: Any

    def gather(self, records: Any) -> Any:
        """The records of the slots; zeros in the empty ones.

        Args:
          records: pytree of arrays, one record per row of the first axis.

        Returns:
          The same pytree with the slots as the first axis.
        """
        rows = jnp.where(self.mask, self.indices, 0)

        def take(array):
            taken = jnp.take(jnp.asarray(array), rows, axis=0)
            present = self.mask.reshape(self.mask.shape + (1,) * (taken.ndim - self.mask.ndim))
            return jnp.where(present, taken, jnp.zeros((), taken.dtype))

        return jax.tree.map(take, records)

    def shard(self, index: int | jax.Array, count: int) -> "Batch":
        """The slots of one of `count` hosts or devices: disjoint parts that together are the batch.

        Every host draws the whole batch from the same state and keeps its part, so no record is
        drawn twice and none is forgotten.

        Args:
          index: which part, in [0, count); may be traced (`jax.lax.axis_index`).
          count: how many parts; must divide the number of slots.

        Returns:
          A batch of 1/count of the slots.

        Raises:
          ValueError: if the slots cannot be divided evenly, or a static index is out of range.
        """
        count = _check.integer("count", count, low=1)
        if not isinstance(index, jax.Array):
            index = _check.integer("index", index, low=0, high=count - 1)
        parts = self.split(count)
        return jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, index, 0, False), parts)

    def split(self, count: int) -> "Batch":
        """The slots in `count` equal parts along a new first axis, for microbatches or devices.

        Args:
          count: how many parts; must divide the number of slots.

        Returns:
          A batch whose leaves have shape (count, slots/count).

        Raises:
          ValueError: if the slots cannot be divided evenly.
        """
        count = _check.integer("count", count, low=1)
        slots = self.mask.shape[0]
        if slots % count:
            raise ValueError(
                f"Expected a number of parts that divides the {slots} slots, got {count}. Choose "
                "the sampler's capacity as a multiple of it."
            )
        return jax.tree.map(lambda leaf: leaf.reshape(count, slots // count), self)


def _random_order(rng: jax.Array, records: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first two of three random words for each record, and the record, sorted by the words."""
    words = random.bits(rng, (3, records))
    index = lax.iota(jnp.int32, records)
    high, low, _, index = lax.sort((*words, index), num_keys=3)
    return high, low, index


def _below(high: jax.Array, low: jax.Array, rate: float) -> jax.Array:
    """Whether 64-bit integers lie below ⌊rate·2⁶⁴⌋: each with that probability, never a larger."""
    threshold = math.floor(fractions.Fraction(rate) * 2**64)
    if threshold >= 1 << 64:
        return jnp.ones(high.shape, bool)
    first, second = jnp.uint32(threshold >> 32), jnp.uint32(threshold & 0xFFFFFFFF)
    return (high < first) | ((high == first) & (low < second))


class _Sampler:
    """What the samplers share: a state that every draw renews, and a Gaussian that is charged."""

    def init(self, rng: Any) -> SamplerState:
        """The state before the first draw.

        Args:
          rng: one typed key, secret like the noise; a second run needs another.

        Raises:
          TypeError: for anything but a typed key.
        """
        return SamplerState(random.fold_in_data(random.key_data(rng), jnp.uint32(_TAG)))

    def next(self, state: SamplerState) -> tuple[Batch, SamplerState]:
        """The next batch, and the state after it. Works under jit and in scans.

        Args:
          state: of `init` or of the last call.

        Returns:
          (batch, state): the same state always gives the same batch.
        """
        following, own = random.split(random.wrap_key_data(state.key_data))
        return self._draw(own), SamplerState(random.key_data(following))

    def event(
        self, noise_multiplier: float, coordinates: int, radius_bits: int = events.RADIUS_BITS
    ) -> events.Event:
        """What a noised sum over one draw is charged as.

        Args:
          noise_multiplier: noise_std over the sensitivity of the sum under the sampler's
            `adjacency` (the clip norm, twice that under REPLACE_ONE), ≥ 0.
          coordinates: noisy scalars released, ≥ 0.
          radius_bits: where their noise ends, as in `accounting.Gaussian`.
        """
        return self._sampled(events.Gaussian(noise_multiplier, coordinates, radius_bits))

    def _draw(self, rng: jax.Array) -> Batch:
        raise NotImplementedError

    def _sampled(self, gaussian: events.Gaussian) -> events.Event:
        raise NotImplementedError


def _check_records(records: Any) -> int:
    return _check.integer("records", records, low=1, high=_MOST_RECORDS)


class _PoissonSampler(_Sampler):
    """What both Poisson samplers share."""

    records: int
    sampling_rate: float
    adjacency = adjacency.ZERO_OUT

    @property
    def expected_batch_size(self) -> float:
        """What sums are divided by: q·n, public, whatever was drawn."""
        return self.sampling_rate * self.records


@dataclasses.dataclass(frozen=True)
class Poisson(_PoissonSampler):
    """Every record takes part with probability q, by itself. One slot for every record.

    The shapes are those of the whole data set: for small data, and as the definition that
    `TruncatedPoisson` is charged against.

    Attributes:
      records: how many there are, public, in [1, 2³¹).
      sampling_rate: q in (0, 1].

    Guarantee: SA1 (sampling.md), Q1 (subsample.md).

    Example:
      >>> sampler = Poisson(records=6, sampling_rate=0.5)
      >>> batch, state = sampler.next(sampler.init(jax.random.key(0)))
      >>> batch.indices.shape, sampler.expected_batch_size
      ((6,), 3.0)
    """

    records: int
    sampling_rate: float

    def __post_init__(self):
        _check_records(self.records)
        rate = _check.real("sampling_rate", self.sampling_rate, low=0, high=1, open_low=True)
        object.__setattr__(self, "sampling_rate", rate)

    @property
    def slots(self) -> int:
        """Length of a batch's arrays."""
        return self.records

    def _sampled(self, gaussian: events.Gaussian) -> events.Event:
        return events.PoissonSampled(gaussian, self.sampling_rate)

    def _draw(self, rng: jax.Array) -> Batch:
        high, low = random.bits(rng, (2, self.records))
        taken = _below(high, low, self.sampling_rate)
        index = lax.iota(jnp.int32, self.records)
        return Batch(jnp.where(taken, index, _PADDING), taken)


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(_PoissonSampler):
    """Poisson samples in a fixed number of slots: of too many records, `capacity` at random stay.

    Attributes:
      records: how many there are, public, in [1, 2³¹).
      sampling_rate: q in (0, 1].
      capacity: slots of a batch, in [1, records]. `truncation_capacity` says what is enough.

    Guarantee: SA1 (sampling.md), Q1, Q2 (subsample.md).

    Example:
      >>> sampler = TruncatedPoisson(records=50_000, sampling_rate=0.01, capacity=640)
      >>> batch, state = sampler.next(sampler.init(jax.random.key(0)))
      >>> batch.indices.shape, sampler.expected_batch_size
      ((640,), 500.0)
    """

    records: int
    sampling_rate: float
    capacity: int

    def __post_init__(self):
        records = _check_records(self.records)
        rate = _check.real("sampling_rate", self.sampling_rate, low=0, high=1, open_low=True)
        object.__setattr__(self, "sampling_rate", rate)
        _check.integer("capacity", self.capacity, low=1, high=records)

    @property
    def slots(self) -> int:
        """Length of a batch's arrays."""
        return self.capacity

    def _sampled(self, gaussian: events.Gaussian) -> events.Event:
        return events.TruncatedPoissonSampled(
            gaussian, self.sampling_rate, self.records, self.capacity
        )

    def _draw(self, rng: jax.Array) -> Batch:
        high, low, index = (word[: self.capacity] for word in _random_order(rng, self.records))
        taken = _below(high, low, self.sampling_rate)
        return Batch(jnp.where(taken, index, _PADDING), taken)


@dataclasses.dataclass(frozen=True)
class WithoutReplacement(_Sampler):
    """Batches of a fixed size, every set of records equally likely, each batch by itself.

    Under REPLACE_ONE one record moves the sum by twice the clip norm; the noise multiplier is
    noise_std over *that*. Not the batches of a shuffled epoch: those are disjoint, hence dependent.

    Attributes:
      records: how many there are, public, in [1, 2³¹).
      batch_size: in [1, records].

    Guarantee: SA2 (sampling.md), Q3 (subsample.md).

    Example:
      >>> sampler = WithoutReplacement(records=6, batch_size=2)
      >>> batch, state = sampler.next(sampler.init(jax.random.key(0)))
      >>> len(set(batch.indices.tolist()))
      2
    """

    records: int
    batch_size: int
    adjacency = adjacency.REPLACE_ONE

    def __post_init__(self):
        _check.integer("batch_size", self.batch_size, low=1, high=_check_records(self.records))

    @property
    def expected_batch_size(self) -> float:
        """What sums are divided by: the batch size."""
        return float(self.batch_size)

    @property
    def slots(self) -> int:
        """Length of a batch's arrays."""
        return self.batch_size

    def _sampled(self, gaussian: events.Gaussian) -> events.Event:
        # In units of the clip norm: noise_multiplier·2·1 over 1.
        return events.SampledWithoutReplacement(
            2.0 * gaussian.noise_multiplier,
            1.0,
            self.batch_size,
            self.records,
            gaussian.coordinates,
            gaussian.radius_bits,
        )

    def _draw(self, rng: jax.Array) -> Batch:
        _, _, index = _random_order(rng, self.records)
        return Batch(index[: self.batch_size], jnp.ones(self.batch_size, bool))


type Sampler = Poisson | TruncatedPoisson | WithoutReplacement


def check_sampler(name: str, value: Any) -> Sampler:
    """The value if it is one of this module's samplers.

    Args:
      name: the argument's name as the caller wrote it.
      value: anything.

    Returns:
      The value itself.

    Raises:
      TypeError: for anything else, with the reason why a data loader is not accepted.
    """
    if not isinstance(value, Poisson | TruncatedPoisson | WithoutReplacement):
        raise TypeError(
            f"Expected {name} to be Poisson, TruncatedPoisson or WithoutReplacement of "
            f"dpfa_jax.sampling, got {value!r}. Epochs of shuffled data have no accounting here: "
            "their batches are disjoint, so one record's absence shifts which records its "
            "neighbours stand with, and the price of a random sample is known to be too low for "
            "it. Draw every batch with a sampler's `next`."
        )
    return value


def truncation_capacity(
    *,
    records: int,
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    share: float = 2.0**-10,
    multiple_of: int = 1,
) -> int:
    """The smallest capacity of `TruncatedPoisson` whose truncation costs only a share of δ.

    Args:
      records: n ≥ 1, public.
      sampling_rate: q in (0, 1].
      steps: how many batches will be drawn, ≥ 1.
      epsilon: largest ε that the run may reach, nats, in [0, 700].
      delta: δ of the run, in (0, 1).
      share: of δ that truncation may cost, in (0, 1).
      multiple_of: the result is a multiple of it where it is below n (devices, microbatches), ≥ 1.

    Returns:
      Capacity with steps·(1 + e^ε)·P(Bin(n, q) > capacity) ≤ share·δ.

    Raises:
      ValueError: for NaN or an argument outside its range.

    Guarantee: Q2 (subsample.md).

    Example:
      >>> settings = dict(steps=10_000, epsilon=8.0, delta=1e-6)
      >>> truncation_capacity(records=1000, sampling_rate=0.001, **settings)
      18
      >>> truncation_capacity(records=50_000, sampling_rate=0.01, **settings)
      697
    """
    records = _check_records(records)
    rate = _check.real("sampling_rate", sampling_rate, low=0, high=1, open_low=True)
    steps = _check.integer("steps", steps, low=1)
    epsilon = _check.real("epsilon", epsilon, low=0, high=700)
    delta = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    share = _check.real("share", share, low=0, high=1, open_low=True, open_high=True)
    multiple_of = _check.integer("multiple_of", multiple_of, low=1)
    allowed = share * delta / (steps * (1.0 + math.exp(epsilon))) * (1.0 - 2.0**-40)
    low, high = 0, records  # the whole data set never overflows
    while high - low > 1:
        middle = (low + high) // 2
        if subsample.poisson_overflow(records, rate, middle) <= allowed:
            high = middle
        else:
            low = middle
    return min(-(-high // multiple_of) * multiple_of, records)
