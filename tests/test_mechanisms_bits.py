"""What the float32 bits of Gaussian noise give away: the leak that N1 does not claim to close.

A pair of normals shares a 24-bit angle, coarser than a float32 cell, so somebody who knows two
candidate values tests whether a released pair minus a candidate is a point that the generator can
reach. The first test keeps the number in mechanisms.md honest, the second shows that a public
grid hides it from this attack.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import mechanisms, random

PAIRS = 20_000
TURN = 2 * math.pi / 2**24
CANDIDATES = np.array([[0.3, -0.7], [0.35, -0.65]], np.float32)


def released(candidate, noise_std):
    """One pair of coordinates per row, the columns 0 and 1 that share an angle."""
    key = jax.random.key(11, impl=random.IMPL)
    value = jnp.broadcast_to(jnp.array(candidate), (PAIRS, 2))
    return np.asarray(mechanisms.gaussian(key, value, noise_std=noise_std))


def angle_steps(pairs, candidate):
    """The angle of released − candidate in units of the generator's grid, half a step removed."""
    noise = pairs.astype(np.float64) - candidate
    return np.arctan2(noise[:, 1], noise[:, 0]) / TURN - 0.5


def reachable(pairs, candidate, noise_std):
    """Whether some angle and some float32 radius give exactly these bits from this candidate."""
    nearest = np.round(angle_steps(pairs, candidate)).astype(np.int64)
    radius = np.hypot(*(pairs.astype(np.float64) - candidate).T / noise_std).astype(np.float32)
    found = np.zeros(len(pairs), bool)
    scale = np.float32(noise_std)
    for step in (-1, 0, 1):
        turn = (nearest + step + 2**23) % 2**24 - 2**23
        angle = jnp.array((turn.astype(np.float32) + np.float32(0.5)) * np.float32(TURN))
        cosine, sine = np.asarray(jnp.cos(angle)), np.asarray(jnp.sin(angle))
        for ulps in range(-12, 13):
            near = (radius.view(np.int32) + ulps).view(np.float32)
            first = candidate[0] + scale * (near * cosine)
            second = candidate[1] + scale * (near * sine)
            found |= (first == pairs[:, 0]) & (second == pairs[:, 1])
    return found


def test_gaussian_float32_bits_tell_two_known_values_apart():
    for noise_std in (1.0, 1000.0):
        true, false = (
            reachable(released(candidate, noise_std), CANDIDATES[0], noise_std).mean()
            for candidate in CANDIDATES
        )
        assert true > 0.999
        assert 0.7 < true - false < 1  # .84 to .92 over the settings in mechanisms.md


def test_gaussian_bits_on_a_public_grid_hide_the_angle_from_the_same_test():
    # The share of angles near the generator's grid, under either candidate: false alarm rate 1e-6.
    grid = 2.0**-10
    shares = []
    for candidate in CANDIDATES:
        rounded = np.round(released(candidate, 1.0).astype(np.float64) / grid) * grid
        steps = angle_steps(rounded, CANDIDATES[0])
        shares.append((np.abs(steps - np.round(steps)) < 0.25).mean())
    assert abs(shares[0] - shares[1]) < 4.9 * math.sqrt(0.5 / PAIRS)
    # Negative control: without the grid the angles of the same runs give the value away. At
    # noise_std 1000 a float32 cell of the sum is small against a step of the angle.
    near = []
    for candidate in CANDIDATES:
        steps = angle_steps(released(candidate, 1000.0), CANDIDATES[0])
        near.append((np.abs(steps - np.round(steps)) < 0.05).mean())
    assert near[0] - near[1] > 4.9 * math.sqrt(0.5 / PAIRS)
