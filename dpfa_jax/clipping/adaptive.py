"""A clip norm that follows a quantile of the gradient norms, and what that costs.

Which statement this makes true: the threshold depends on the data through one noisy count a step,
whose event is named and charged beside the gradient's.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import _check, _primitives, doubleword, mechanisms, random
from dpfa_jax.accounting import event
from dpfa_jax.adjacency import ZERO_OUT, Adjacency
from dpfa_jax.clipping.certificate import Clipped


def threshold_event(count_noise_std: float, adjacency: Adjacency = ZERO_OUT) -> event.Gaussian:
    """What one step of `adapt_clip_norm` is charged as, before sampling.

    Each unit moves the count by ½ (there or NULL), by 1 if replaced. The count and the clipped sum
    are of the same sample, so they are one Gaussian release: `calibrate.adaptive_clip_split` says
    how much noise is left for the gradients, and `optim.privatize(count_noise_std=...)` charges
    both.

    Args:
      count_noise_std: standard deviation of the noise on the count, > 0.
      adjacency: ZERO_OUT, REPLACE_ONE or GROUP(r).

    Returns:
      Gaussian of multiplier 2·count_noise_std, count_noise_std or 2·count_noise_std/r.

    Raises:
      ValueError: for SEQUENCE, or noise that is not positive.

    Guarantee: CL5 (adaptive.md).

    Example:
      >>> threshold_event(5.0).noise_multiplier
      10.0
    """
    std = _check.real("count_noise_std", count_noise_std, low=0, open_low=True)
    if adjacency.kind == "SEQUENCE":
        raise ValueError("Expected adjacency ZERO_OUT, REPLACE_ONE or GROUP(rows), got SEQUENCE.")
    moved = 1.0 if adjacency.kind == "REPLACE_ONE" else 0.5 * adjacency.rows
    return event.Gaussian(std / moved, 1, random.WIDE_RADIUS_BITS)


def adapt_clip_norm(
    rng: jax.Array,
    clipped: Clipped,
    *,
    target_quantile: float,
    learning_rate: float,
    count_noise_std: float,
    expected_batch_size: float,
    low: float,
    high: float,
    adjacency: Adjacency = ZERO_OUT,
) -> jax.Array:
    """The clip norm for the next step: C·exp(−η·(b − γ)), b the noisy share of unclipped units.

    Tell the transformation of it, `optim.privatize(count_noise_std=...)`: its account sees the
    gradients alone, and ε would be too small.

    Args:
      rng: one typed key, used for nothing else.
      clipped: of this step and all shards (after `psum`), with one group.
      target_quantile: γ in [0, 1], the share of units to leave unclipped.
      learning_rate: η > 0; 0.2 is the paper's.
      count_noise_std: standard deviation of the noise on the count of units, > 0.
      expected_batch_size: public divisor of the count, > 0.
      low, high: public bounds of the result, 1e-15 ≤ low ≤ high ≤ 1e30.
      adjacency: what `threshold_event` charges.

    Returns:
      float32 scalar in [low, high], to pass as the next `clip_norm`. It is a private release.

    Raises:
      ValueError: for numbers outside their ranges, or a certificate with several groups.

    Guarantee: CL5 (adaptive.md).
    Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv:1905.03871, Algorithm 1.
    """
    quantile = _check.real("target_quantile", target_quantile, low=0, high=1)
    rate = _check.real("learning_rate", learning_rate, low=0, open_low=True)
    size = _check.real("expected_batch_size", expected_batch_size, low=0, open_low=True)
    low = _check.real("low", low, low=1e-15)
    high = _check.real("high", high, low=low, high=1e30)
    charged = threshold_event(count_noise_std, adjacency)
    if len(clipped.groups) != 1:
        raise ValueError(
            f"Expected a certificate with one group, got {len(clipped.groups)}: a quantile of the "
            "whole norm says nothing about the norms of parts."
        )
    # Σ (bᵢ − ½): with the share ½ taken off, how many units there were moves nothing.
    unclipped = clipped.examples - clipped.clipped - clipped.nonfinite
    count = unclipped.astype(jnp.float32) - 0.5 * clipped.examples.astype(jnp.float32)
    noisy = mechanisms.gaussian(
        rng, count, noise_std=count_noise_std, radius_bits=charged.radius_bits
    )
    noisy = doubleword.to_grid(noisy, doubleword.grid_step(count_noise_std))
    noisy = _primitives.private_release(noisy, charged)
    share = noisy / size + 0.5
    norm: Any = clipped.clip_norm
    # Factors past e^±50 are cut, so that no noise makes the norm overflow.
    step = jnp.clip(-rate * (share - quantile), -50.0, 50.0)
    return jnp.clip(norm * jnp.exp(step), low, high).astype(jnp.float32)
