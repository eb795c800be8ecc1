"""Noise in shares: every shard adds a part of a step's noise to its own sum, before all are added.

Which statement this makes true: the sum over the shards has the noise that the step is charged for,
in whatever order the devices add; and what a device sends has its share of it already.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import _primitives, random
from dpfa_jax.clipping import Clipped, partition
from dpfa_jax.optim import words

SHARDS = 1 << 10
"""Most shards of one step. The end of their noise is charged for as many, so that the account of a
run does not depend on how many there are."""

_TAG = 0x73686172
_FINE_BITS = 20
_MOST_UNITS = float(1 << 18)  # times clip norm over noise_std
_LARGEST = float(1 << 30)  # steps of the grid, of any sum

type _Steps = tuple[jax.Array, jax.Array]


def axes_of(shares: Any) -> tuple[str, ...]:
    """The mesh axes whose shards each add a share; none for None.

    Args:
      shares: None, the name of a mesh axis, or several.

    Returns:
      Their names.

    Raises:
      TypeError: for anything but names.
      ValueError: for no name, or one twice.

    Guarantee: O7 (shares.md).
    """
    if shares is None:
        return ()
    names = (shares,) if isinstance(shares, str) else shares
    is_named = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    if not is_named:
        raise TypeError(f"Expected shares to be a mesh axis or a tuple of them, got {shares!r}.")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Expected shares to be different mesh axes, at least one, got {shares}.")
    return tuple(names)


def check_unsummed(clipped: Clipped, names: tuple[str, ...]) -> None:
    """An error unless the certificate is of each shard's own sum, not yet added up.

    Args:
      clipped: the certificate.
      names: of `axes_of`, at least one.

    Raises:
      ValueError: for an axis that is not there, a sum that is the same on its shards or in parts,
        too many shards, or a certificate that does not say how many units it may hold.

    Guarantee: O7 (shares.md).
    """
    known = _primitives.manual_axes()
    for name in names:
        if name not in known:
            raise ValueError(
                f"Expected to add noise in shares along a manual mesh axis, got {name!r} where "
                f"there are {list(known)}. Call update inside jax.shard_map over that axis, or "
                "leave shares out."
            )
        if clipped.split is not None or not all(
            name in _primitives.varying(leaf) for leaf in jax.tree.leaves(clipped.tree)
        ):
            raise ValueError(
                f"Expected each shard's own sum, got one that is the same on all shards of "
                f"{name!r}, or in parts: it was added up before its noise, or every shard has the "
                "same rows. With shares call update without c.psum; it adds the shards up itself."
            )
    if clipped.units is None:
        raise ValueError(
            "Expected a certificate that says how many units its sum may hold, which decides "
            "whether 32 bits hold the sum, got units=None. Take it from clipping.clipped_grad."
        )
    if jax.lax.axis_size(names) > SHARDS:
        raise ValueError(
            f"Expected at most {SHARDS} shards, got {jax.lax.axis_size(names)} along {names}."
        )


def enlarged(noise_multiplier: Any, coordinates: int, units: int) -> Any:
    """The noise multiplier that also pays for the rounding of every shard's sum.

    Args:
      noise_multiplier: a float > 0, or a traced float32 scalar.
      coordinates: parameters of the model.
      units: that the sums of all shards may hold together.

    Returns:
      z·(1 + 2x) for x = z·√P·2⁻³⁰, an upper bound of z/(1 − x): z times the sensitivity and the
      rounding, which is 2⁻³⁰ of the noise a coordinate. A traced one is NaN out of its range.

    Raises:
      ValueError: for a float so large that rounding would outweigh the noise, or so small that 32
        bits would not hold the sum.

    Guarantee: O7 (shares.md).
    """
    rounding = math.sqrt(coordinates) * 2.0 ** (-10 - _FINE_BITS) * (1.0 + 2.0**-20)
    low, high = units / _MOST_UNITS, 0.5 / rounding
    if isinstance(noise_multiplier, jax.Array):
        low, high = np.float32(low * (1.0 + 2.0**-20)), np.float32(high * (1.0 - 2.0**-20))
        share = noise_multiplier * np.float32(rounding * (1.0 + 2.0**-20))
        larger = noise_multiplier * ((1.0 + 2.0 * share) * (1.0 + 2.0**-21))
        return jnp.where((low <= noise_multiplier) & (noise_multiplier <= high), larger, jnp.nan)
    if not low <= noise_multiplier <= high:
        raise ValueError(
            f"Expected noise_multiplier in [{low:.3g}, {high:.3g}] for noise in shares on sums of "
            f"up to {units} units and {coordinates} parameters, got {noise_multiplier:g}: they are "
            "added as integers of 32 bits. Draw fewer units, or add the noise after c.psum, "
            "without shares."
        )
    return noise_multiplier * (1.0 + 2.0 * noise_multiplier * rounding)


def to_steps(value: jax.Array, step: Any) -> _Steps:
    """A float32 number as two integers: whole steps of a grid, and parts of 2⁻²⁰ of a step.

    Args:
      value: float32.
      step: a power of two.

    Returns:
      int32 arrays, of magnitude at most 2³⁰ and 2¹⁹: within half a part of a value that is below
      2³⁰ steps.

    Guarantee: O7 (shares.md).
    """
    steps = jnp.clip(value * (1.0 / step), -_LARGEST, _LARGEST)
    whole = jnp.round(steps)
    parts = jnp.round((steps - whole) * 2.0**_FINE_BITS)
    return whole.astype(jnp.int32), parts.astype(jnp.int32)


def own_share(
    leaves: Sequence[jax.Array], data: jax.Array, std: Any, step: Any, names: tuple[str, ...]
) -> list[_Steps]:
    """This shard's sum with its share of the noise, in integers.

    Args:
      leaves: float32, whole, this shard's own sum.
      data: uint32[8] key data of the step: the same on all shards, or a key of each shard's own.
      std: standard deviation of all shares together: float32 scalar, the same on all shards.
      step: the public grid of the release.
      names: of `axes_of`.

    Returns:
      As `to_steps` gives them, of each leaf.

    Guarantee: O7 (shares.md).
    """
    tagged = random.fold_in_data(data, jnp.uint32(_TAG))
    own = random.fold_in_data(tagged, jax.lax.axis_index(names).astype(jnp.uint32))
    whole = tuple(((),) * leaf.ndim for leaf in leaves)
    normals = words.normals(own, [leaf.shape for leaf in leaves], whole)
    # More by 2⁻²² than the roundings of root and product take away.
    share = std * np.float32((1.0 + 2.0**-22) / math.sqrt(jax.lax.axis_size(names)))
    pairs = []
    for sum_of_units, normal in zip(leaves, normals, strict=True):
        mine, noise = to_steps(sum_of_units, step), to_steps(share * normal, step)
        pairs.append((mine[0] + noise[0], mine[1] + noise[1]))
    return pairs


def noisy_sum(
    leaves: Sequence[jax.Array],
    data: jax.Array,
    std: Any,
    step: Any,
    names: tuple[str, ...],
    split: tuple[partition.Axes, ...],
) -> list[jax.Array]:
    """The sum of all shards' sums and shares, added as integers: exactly, in any order.

    Args:
      leaves, data, std, step, names: of `own_share`.
      split: of `partition.split_axes`, how the result is cut.

    Returns:
      float32 multiples of the grid: the whole sum, or this shard's parts of it. All NaN if `std`
      is not finite, or a shard's sum is not or is longer than its units can make it.

    Guarantee: O7 (shares.md).
    """
    pairs = own_share(leaves, data, std, step, names)
    whole = partition.sum_parts([first for first, _ in pairs], names, split)
    parts = partition.sum_parts([second for _, second in pairs], names, split)
    half = 1 << (_FINE_BITS - 1)
    sums = [a + ((b + half) >> _FINE_BITS) for a, b in zip(whole, parts, strict=True)]
    # No integer is NaN or says that it overflowed: what is wrong has to be said beside them.
    good, most = jnp.isfinite(std), step * np.float32(_LARGEST / jax.lax.axis_size(names))
    for leaf in leaves:
        good = good & jnp.all(jnp.abs(leaf) <= most)
    is_whole = jax.lax.psum(jnp.where(good, 0, 1), names) == 0
    return [jnp.where(is_whole, each.astype(jnp.float32) * step, jnp.nan) for each in sums]
