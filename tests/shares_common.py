"""What the tests of noise in shares share: meshes, and one compiled step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpfa_jax import optim
from tests.optim_common import SAMPLER, certificate

SAME, ROWS = P(), P("data")
LARGE = {"w": jnp.zeros((64, 512)), "v": jnp.zeros(64)}


def mesh(*sizes):
    names = ("data", "model")[: len(sizes)]
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=auto, devices=jax.devices()[: math.prod(sizes)])


def in_shares(noise: Any = 2.0, axes: Any = "data", **options) -> Any:
    given: dict[str, Any] = dict(sampling=SAMPLER, rng=jax.random.key(0)) | options
    return optim.privatize(noise_multiplier=noise, shares=axes, **given)


def mapped(tx, devices, state_specs=SAME):
    """One step in shard_map: every shard brings its own sum, one row of each leaf."""

    def step(state, own):
        c = certificate(jax.tree.map(lambda leaf: leaf[0], own))
        return tx.update(c.tree, state, clipped=c)

    outs = (SAME, state_specs)
    run = jax.shard_map(step, mesh=mesh(devices), in_specs=(state_specs, ROWS), out_specs=outs)
    return jax.jit(run)


def on_each(tree, devices):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), tree)
