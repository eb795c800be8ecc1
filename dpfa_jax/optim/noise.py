"""The noise of a private step: added once, scaled by the certificate, charged in the state.

Which statement this makes true: what leaves `update` is the certificate's sum plus Gaussian noise
of noise_multiplier times its sensitivity under the sampler's adjacency, divided by a public number,
and the state that leaves with it counts that release.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpfa_jax import _check, _primitives, random, sampling
from dpfa_jax.clipping import Clipped, partition
from dpfa_jax.doubleword import grid_step, to_grid
from dpfa_jax.optim import account, plan, words
from dpfa_jax.optim import shares as shares_lib

_GRID_BITS = 10


def privatize(
    *,
    noise_multiplier: float | account.Schedule,
    sampling: sampling.Sampler,
    rng: Any,
    target: tuple[float, float] | None = None,
    unit: str = "example",
    partition_specs: Any = None,
    shares: Any = None,
    count_noise_std: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Noise for clipped sums, as the first transformation of an optax chain.

    Called as `tx.update(c.tree, state, params, clipped=c)` with the certificate c of
    `clipping.clipped_grad`; every leaf must *be* the certificate's, so sums that were scaled,
    averaged, cast or never clipped are refused while tracing. What comes out is
    (c.tree + noise)/expected batch size, float32: a private estimate of the mean gradient, with
    which everything after it in the chain may do what it likes.

    The certificate's sum must be over all devices: inside `shard_map` call `c.psum(axis)` first;
    all devices then add the same noise. Where parameters are in parts on the shards of a manual
    mesh, give `partition_specs` here, to `clipping.gather` and to `c.psum`: every shard then adds
    the part of that noise that belongs to its parameters. Under plain jit any sharding is right.
    With `shares` it is the other way round: the certificate must *not* be summed, every shard adds
    its share of the noise to its own sum, and the transformation adds the shards up.

    Do not wrap it: `optax.MultiSteps`, `apply_if_finite`, `conditionally_transform` and `masked`
    around it are refused where tracing shows them (use `optim.accumulate`; mask what comes after).
    A wrapper that keeps the old state after seeing the new updates (a rejected step, a retry)
    cannot be seen here: it takes the account and the key back, and the next step repeats the noise.

    Args:
      noise_multiplier: noise_std over the sensitivity of the sum under the sampler's adjacency, ≥ 0
        (0: no noise, ε = ∞); or an optax schedule of the number of steps released, which must be a
        public function of it.
      sampling: the sampler that the batches really come from.
      rng: one typed key for the noise of the whole run; another run needs another.
      target: (ε, δ) of the whole run, or None. A step that would go beyond it gives zeros, draws on
        no data and costs nothing. With a constant multiplier the number of steps is fixed
        beforehand; with a schedule a filter at one Rényi order decides.
      unit: what one record of the sampler is. "example": one row of the batch. "unit": all rows of
        one person, who is drawn as a whole, and for certificates made with unit ids only. A sampler
        of rows draws somebody with many rows more often than it is charged for.
      partition_specs: a prefix tree of the parameters with PartitionSpecs, those that they have in
        the in_specs of `shard_map`; None: whole on every shard. Outside `shard_map` they change
        nothing.
      shares: None, or the mesh axes, by name, that the batch is split over: the noise is then added
        in shares, so that no device computes, holds or sends a sum of several shards without noise.
        Each shard draws for all parameters and sends two integers of 32 bits for each; the words
        that come out depend on the number of shards, the charge does not. It is no secure
        aggregation: whoever has the state's key can take all the noise away. A `key_data` of each
        shard's own (cut along the axis, uint32[8] a shard) is taken too; whoever has c of the S
        keys then takes c/S of the variance away, and against them noise_multiplier is √((S − c)/S)
        times what it is. Not inside `optim.accumulate`.
      count_noise_std: for clip norms of `clipping.adapt_clip_norm`, the noise on the count that it
        makes of each step's certificate, which is then charged with the step. Nobody can see here
        that a clip norm was learned: without this ε lacks the counts.

    Returns:
      A transformation whose state is a `PrivateState`; read ε with `optim.epsilon`.

    Raises:
      TypeError: for no sampler (shuffled epochs), no key, or numbers that are none.
      ValueError: for NaN or numbers out of range, here or, for what depends on the parameters, in
        `init` and `update`.

    Guarantee: O1, O5 (plan.md), O2 (account.md), O3 (noise.md), O6 (words.md), O7 (shares.md).

    Example:
      >>> from dpfa_jax import clipping
      >>> from dpfa_jax.sampling import Poisson
      >>> sampler = Poisson(records=100, sampling_rate=0.1)
      >>> tx = privatize(noise_multiplier=2.0, sampling=sampler, rng=jax.random.key(0))
      >>> params = {"w": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> loss = lambda params, x: params["w"] @ x
      >>> c = clipping.clipped_grad(loss, clip_norm=1.0)(params, jnp.ones((5, 3)))
      >>> updates, state = tx.update(c.tree, state, params, clipped=c)
      >>> round(account.epsilon(state, 1e-5), 2)
      0.53
    """
    sampler = _check_sampler(sampling)
    data = account.first_key_data(random.key_data(rng))
    goal = plan.Target.of(target)
    plan.make(noise_multiplier, sampler, 1, goal, count_noise_std)
    _check.choice("unit", unit, ("example", "unit"))
    names = shares_lib.axes_of(shares)

    def plan_for(tree: Any, split: tuple[partition.Axes, ...]) -> plan.Plan:
        pairs = zip(jax.tree.leaves(tree), split, strict=True)
        size = sum(math.prod(partition.whole_shape(jnp.shape(leaf), axes)) for leaf, axes in pairs)
        # Every share of the noise ends, so each of them is charged for its end.
        size = size * shares_lib.SHARDS if names else size
        return plan.make(noise_multiplier, sampler, size, goal, count_noise_std)

    def init(params: Any) -> account.PrivateState:
        refuse_masked(params)
        split = partition.split_axes(params, partition_specs)
        for leaf, axes in zip(jax.tree.leaves(params), split, strict=True):
            partition.check_parts(leaf, axes)
        accountant = plan_for(params, split).create()
        return account.PrivateState(data, accountant, jnp.asarray(account.plan_of(accountant)))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        clipped: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, account.PrivateState]:
        del extra_args
        certificate = check_certificate(updates, clipped, names)
        if certificate.unit != unit:
            raise ValueError(
                f"Expected a certificate whose contributions are clipped by {unit}, got one by "
                f"{certificate.unit}. With unit ids the sampler must draw whole units: say so with "
                'privatize(unit="unit"), or clip every row by itself.'
            )
        split = partition.split_axes(updates, partition_specs)
        whole = tuple(((),) * len(axes) for axes in split)
        given = whole if certificate.split is None else certificate.split
        if not names:
            _check_split(given, split)
        if params is not None and certificate.split is not None:
            _check_parts(params, certificate.tree)
        _check_state(state, names)
        own = plan_for(updates, given)
        accountant, go, multiplier = own.spend(state.accountant)
        same = jnp.all(jnp.asarray(state.plan) == account.plan_of(state.accountant))
        following, key = _next_keys(state.key_data)
        if names and not (isinstance(multiplier, float) and multiplier == 0.0):
            units = (certificate.units or 0) * jax.lax.axis_size(names)
            coordinates = own.coordinates // shares_lib.SHARDS
            multiplier = shares_lib.enlarged(multiplier, coordinates, units)
        noise_std = multiplier * certificate.sensitivity(sampler.adjacency)
        noisy = add_noise(updates, key, noise_std, own.event, split, names)
        if names and params is not None and partition_specs is not None:
            _check_parts(params, noisy)
        inverse = 1.0 / sampler.expected_batch_size

        def finish(leaf):
            released = jnp.where(same, leaf * jnp.float32(inverse), jnp.nan)
            return released if go is True else jnp.where(go, released, 0.0)

        out = jax.tree.map(finish, noisy)
        return out, account.PrivateState(following, accountant, state.plan)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_sampler(value: Any) -> sampling.Sampler:
    return sampling.check_sampler("sampling", value)


def refuse_masked(tree: Any) -> None:
    """An error where `optax.masked` or `partition` took a part of the tree away.

    Args:
      tree: parameters or updates as a transformation gets them.

    Raises:
      ValueError: with what to do instead.

    Guarantee: O3 (noise.md).
    """

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    if any(is_masked(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_masked)):
        raise ValueError(
            "Expected the whole tree of parameters, got one with masked parts: their gradients "
            "would leave without noise. Put privatize first in the chain and mask what comes after "
            "it; to train a part only, differentiate the loss in that part only."
        )


def check_certificate(updates: Any, clipped: Any, names: tuple[str, ...] = ()) -> Clipped:
    """The certificate, if the updates are its sum and nothing else.

    Args:
      updates: what the transformation was given.
      clipped: what it was given as `clipped=`.
      names: mesh axes whose shards have sums of their own, which are added later.

    Returns:
      The certificate, its clip norm the largest of those shards'.

    Raises:
      TypeError: if there is no certificate, or a leaf is not float32.
      ValueError: if a leaf is not the certificate's own, is a constant of the function being
        traced, or differs between the shards of a manual mesh.

    Guarantee: O3 (noise.md).
    """
    if not isinstance(clipped, Clipped):
        raise TypeError(
            "Expected clipped= to be the certificate of clipping.clipped_grad, got "
            f"{clipped!r}. Call tx.update(c.tree, state, params, clipped=c)."
        )
    refuse_masked(updates)
    given, structure = jax.tree.flatten(updates)
    own, expected = jax.tree.flatten(clipped.tree)
    same = structure == expected and all(a is b for a, b in zip(given, own, strict=True))
    if not same:
        raise ValueError(
            "Expected updates to be the leaves of the certificate's tree themselves, got others: a "
            "scaled, averaged, accumulated or cast sum has another sensitivity. Call "
            "tx.update(c.tree, state, params, clipped=c) with privatize first in the chain. In "
            "jit pass c alone and take c.tree inside; for microbatches use optim.accumulate."
        )
    for leaf in given:
        if leaf.dtype != jnp.float32:
            raise TypeError(f"Expected a float32 sum, got {leaf.dtype}{list(leaf.shape)}.")
        if _primitives.is_constant(leaf):
            raise ValueError(
                "Expected the certificate to be made where it is used, got one from outside the "
                "function being traced: a condition around privatize (apply_if_finite, "
                "conditionally_transform, lax.cond) or a loop would take its account and its key "
                "back or add the same noise again. Pass it as an argument, and privatize outside."
            )
    if names:
        shares_lib.check_unsummed(clipped, names)
    _check_mesh(clipped, names)
    norm = clipped.traced_clip_norm
    over = tuple(name for name in names if norm is not None and name in _primitives.varying(norm))
    if not over:
        return clipped
    # A maximum may lose a NaN; the sum of the shard that has it is NaN, and poisons the step.
    return dataclasses.replace(clipped, traced_clip_norm=jax.lax.pmax(norm, over))


def _check_mesh(clipped: Clipped, names: tuple[str, ...]) -> None:
    """An error unless every shard has the sum over all shards but `names`, or its part of it."""
    leaves = jax.tree.leaves(clipped.tree)
    split = clipped.split or tuple(((),) * leaf.ndim for leaf in leaves)
    norm = clipped.traced_clip_norm
    norms = [] if norm is None else [(norm, frozenset())]
    values = [*zip(leaves, map(partition.names_of, split), strict=True), *norms]
    for name in _primitives.manual_axes():
        if name not in _primitives.varying(jax.lax.axis_index(name)):
            raise ValueError(
                f"Expected a mesh axis {name!r} whose values are tracked, got shard_map with "
                "check_vma=False (or pmap): nobody can tell there whether the sum is over all "
                "shards. Use check_vma=True, the default, or call update outside of it."
            )
        for value, cut in values:
            if name in _primitives.varying(value) and name not in cut and name not in names:
                raise ValueError(
                    f"Expected a sum over all shards, got one that differs along {name!r}. Call "
                    f"c = c.psum({name!r}) first. Parameters that are in parts along it need their "
                    "PartitionSpecs: c.psum(axis, partition_specs) and "
                    "privatize(partition_specs=...)."
                )
    for leaf, axes in () if names else zip(leaves, split, strict=True):
        partition.check_parts(leaf, axes)


def _check_split(given: tuple[partition.Axes, ...], split: tuple[partition.Axes, ...]) -> None:
    """An error unless the sum is cut as the transformation was told."""
    if split != given:
        raise ValueError(
            f"Expected a sum that is cut along the mesh axes {split}, a tuple for each leaf, as "
            f"the partition_specs of privatize say, got {given}. Give the same specs to "
            "c.psum(axis, partition_specs) and to privatize."
        )


def _check_parts(params: Any, tree: Any) -> None:
    """An error unless the sum is cut as the parameters are."""
    for own, part in zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True):
        given, expected = (jnp.shape(own), _primitives.varying(own)), _primitives.varying(part)
        if given != (part.shape, expected):
            raise ValueError(
                f"Expected sums cut as their parameters are, got a part of shape {part.shape} "
                f"along {sorted(expected)} for one of shape {given[0]} along {sorted(given[1])}. "
                "Give the parameters' own specs of shard_map's in_specs."
            )


def _check_state(state: Any, names: tuple[str, ...]) -> None:
    if not isinstance(state, account.PrivateState):
        raise TypeError(f"Expected state to be a PrivateState, got {type(state).__name__}.")
    data = jnp.asarray(state.key_data)
    differs = _primitives.varying(data) - set(names)
    if differs:
        raise ValueError(
            f"Expected one key for all shards, got one that differs along {sorted(differs)}: each "
            "shard would publish the same sum with noise of its own. Give the state the in_specs "
            "PartitionSpec()."
        )
    _primitives.refuse_constant(
        data, "Pass the optimizer state as an argument (or carry it through the scan)."
    )


def _next_keys(data: Any) -> tuple[jax.Array, jax.Array]:
    """Key data of the step after this one and of this one."""
    following, own = random.split(random.wrap_key_data(jnp.asarray(data, jnp.uint32)))
    return random.key_data(following), random.key_data(own)


def add_noise(
    tree: Any,
    data: jax.Array,
    noise_std: Any,
    event: Any,
    split: tuple[partition.Axes, ...] | None = None,
    names: tuple[str, ...] = (),
) -> Any:
    """The float32 tree plus independent normals, on a public grid, marked as one release.

    Args:
      tree: pytree of float32 arrays.
      data: uint32[8] key data of this step alone.
      noise_std: of every scalar: a float ≥ 0 (0: none is added), or a traced float32 scalar.
      event: what the release is charged as.
      split: of `partition.split_axes` where the leaves are parts; None: they are whole.
      names: mesh axes whose shards have sums of their own and add a share each; the result is the
        sum over them, in parts as `split` says.

    Returns:
      The noisy tree.

    Guarantee: O3 (noise.md), O7 (shares.md).
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return tree
    # Under vmap every example gets a key of its own.
    data = _primitives.stream_key_p.bind(data, *jax.lax.stop_gradient(tuple(leaves)))
    std, step = _noise_scale(noise_std)
    noisy = leaves
    split = split or tuple(((),) * leaf.ndim for leaf in leaves)
    if names and std is None:
        noisy = partition.sum_parts(leaves, names, split)
    elif names:
        noisy = shares_lib.noisy_sum(leaves, data, std, step, names, split)
    elif std is not None:
        normals = words.normals(data, [leaf.shape for leaf in leaves], split)
        noisy = [to_grid(a + std * b, step) for a, b in zip(leaves, normals, strict=True)]
    # The tree is one release on all shards: marking every leaf would charge it again for each.
    largest = max(range(len(noisy)), key=lambda index: noisy[index].size)
    shards = _primitives.manual_axes()
    noisy[largest] = _primitives.private_release(noisy[largest], event, shared=shards)
    return jax.tree.unflatten(structure, noisy)


def _noise_scale(noise_std: Any) -> tuple[Any, Any]:
    """The standard deviation in float32, never below the one charged, and the grid.

    A traced one that float32 does not hold cannot be refused: there is more noise then.
    """
    if not isinstance(noise_std, jax.Array):
        if noise_std == 0.0:
            return None, None
        std = np.float32(noise_std)
        if float(std) < noise_std:
            std = np.nextafter(std, np.float32(np.inf))
        return jnp.float32(std), grid_step(float(std))
    std = noise_std.astype(jnp.float32) * (1.0 + 2.0**-22)
    # A NaN stays one.
    std = jnp.where(std < 2.0**-100, jnp.float32(2.0**-100), std)
    _, exponent = jnp.frexp(std)
    return std, jnp.ldexp(jnp.float32(1.0), exponent - 1 - _GRID_BITS)


def with_certificate(
    tx: optax.GradientTransformationExtraArgs, clipped: Clipped
) -> optax.GradientTransformation:
    """The transformation with its certificate filled in, for callers that pass gradients only.

    For `flax.training.train_state.TrainState`, whose `apply_gradients` hands nothing on:
    `state.replace(tx=with_certificate(tx, c)).apply_gradients(grads=c.tree).replace(tx=tx)`.

    Args:
      tx: `privatize`, or a chain that begins with it.
      clipped: the certificate of this step. Use the result for this step only.

    Returns:
      A transformation of plain gradients.
    """

    def update(updates, state, params=None):
        return tx.update(updates, state, params, clipped=clipped)

    return optax.GradientTransformation(tx.init, update)
