"""What the tests of private training share: certificates made by hand, and one compiled step."""

import jax
import jax.numpy as jnp
import optax

from dpfa_jax import optim, sampling
from dpfa_jax.clipping import Clipped

SAMPLER = sampling.Poisson(128, 0.125)  # an expected batch of 16: division by it is exact
PARAMS = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(5)}
COORDINATES = 17


def certificate(tree, clip_norm=1.0):
    """A certificate as `clipped_grad` makes it, of a sum that the test chose."""
    count = jnp.int32(0)
    norms = (
        {"traced_clip_norm": clip_norm}
        if isinstance(clip_norm, jax.Array)
        else {"static_clip_norm": clip_norm}
    )
    return Clipped(tree, count, count, count, units=16, **norms)


def private(noise_multiplier=2.0, *, seed=0, sampler=SAMPLER, target=None):
    return optim.privatize(
        noise_multiplier=noise_multiplier,
        sampling=sampler,
        rng=jax.random.key(seed),
        target=target,
    )


def stepper(tx, clip_norm=1.0):
    """A jitted step (params, state, sums) -> (params, state) that makes its certificate inside."""

    @jax.jit
    def step(params, state, sums):
        c = certificate(sums, clip_norm)
        updates, state = tx.update(c.tree, state, params, clipped=c)
        return optax.apply_updates(params, updates), state

    return step
