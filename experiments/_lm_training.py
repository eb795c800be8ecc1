"""How `train_lm` takes a step: the sampler, the noise, and programs that compile in the background.

A step is two programs. The sum over a drawn batch is most of the work and the same for every ε, so
it is compiled once; noise and Adam are small, and every ε has its own.
"""

import concurrent.futures
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import _language_models
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpfa_jax as dp
from dpfa_jax import clipping, optim, sampling


class Training(NamedTuple):
    """Everything that a resumed run needs to go on as if it had never stopped."""

    params: Any
    opt_state: Any
    sampler: Any


class Run(NamedTuple):
    """One run, ready to start.

    Attributes:
      sampler: of its batches.
      noise_multiplier: 0 without privacy.
      steps: of the optimizer.
      every: steps between two looks.
      method: how gradients are clipped; None without privacy.
      start: its state before the first step.
      step: (state, records) -> state.
      bits: (parameters, windows) -> bits per byte.
    """

    sampler: Any
    noise_multiplier: float
    steps: int
    every: int
    method: str | None
    start: Training
    step: Callable[[Training, Any], Training]
    bits: Callable[[Any, Any], Any]


class Programs:
    """Programs by name, each compiled once, in the background."""

    def __init__(self):
        self.pool = concurrent.futures.ThreadPoolExecutor(4)
        self.made: dict[Any, tuple[Any, Any]] = {}

    def add(self, name: Any, fun: Callable[..., Any], *arguments: Any) -> tuple[Callable, Any]:
        """(the function, which waits until it is compiled; shapes of its results)."""
        if name not in self.made:
            lowered = jax.jit(fun).lower(*arguments)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lowered.out_info
            )
            self.made[name] = self.pool.submit(lowered.compile), shapes
        program, shapes = self.made[name]
        return lambda *arguments: program.result()(*arguments), shapes


def make_sampler(settings: Any, records: int) -> Any:
    """Poisson batches of the expected size; batches of exactly their size without privacy."""
    if settings.epsilon is None:
        return sampling.WithoutReplacement(records, settings.batch // settings.plain_split)
    rate = settings.batch / records
    capacity = sampling.truncation_capacity(
        records=records,
        sampling_rate=rate,
        steps=settings.steps,
        epsilon=settings.epsilon,
        delta=settings.delta,
        multiple_of=_units(settings),
    )
    return sampling.TruncatedPoisson(records, rate, capacity)


def _units(settings: Any) -> int:
    """Units whose gradients are held at a time."""
    windows = settings.windows_per_file if settings.unit == "file" else 1
    return max(1, settings.microbatch // windows)


def noise_for(settings: Any, sampler: sampling.TruncatedPoisson, coordinates: int) -> float:
    """The smallest noise multiplier whose `steps` steps keep to the target, by Rényi curves."""

    def whole(noise_multiplier: float) -> dp.accounting.Event:
        step = sampler.event(noise_multiplier, coordinates, dp.random.WIDE_RADIUS_BITS)
        return dp.accounting.Repeated(step, settings.steps)

    return dp.accounting.calibrate.smallest(
        whole, epsilon=settings.epsilon, delta=settings.delta, low=0.2, high=200.0, tolerance=1e-4
    )


def _adam(peak: float, steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)
    return optax.adam(rate, b2=0.99)


def _mean_gradient(logits: Callable, sampler: Any, most: int) -> Callable:
    """(parameters, sampler state, records) -> (gradient of a batch's mean loss, sampler state)."""
    slots = sampler.slots
    blocks = next(n for n in range(1, slots + 1) if slots % n == 0 and slots // n <= most)

    def draw(params, state, data):
        batch, state = sampler.next(state)

        def add(total, part):
            def losses(params):
                return jnp.sum(_language_models.record_nats(logits, params, part))

            return jax.tree.map(jnp.add, total, jax.grad(losses)(params)), None

        tokens = batch.gather(data)
        parts = tokens.reshape(blocks, -1, *tokens.shape[1:])
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(lambda leaf: leaf / slots, total), state

    return draw


def _clipped_sum(logits: Callable, sampler: Any, settings: Any) -> Callable:
    """(parameters, sampler state, records) -> (a batch's clipped sum, sampler state)."""
    clipped = clipping.clipped_grad(
        lambda params, tokens: _language_models.nats(logits, params, tokens),
        clip_norm=settings.clip_norm,
        normalize=settings.normalize,
        microbatch_size=_units(settings),
        method=settings.method,
    )

    def draw(params, state, data):
        batch, state = sampler.next(state)
        return clipped(params, batch.gather(data), mask=batch.mask), state

    return draw


def create(settings: Any) -> tuple[Any, Callable[[Any, jax.Array], Any]]:
    """(first parameters, logits), the same for every ε."""
    size = _language_models.Size(
        settings.layers, settings.width, settings.heads, settings.dtype, settings.backend
    )
    seed = jax.random.fold_in(jax.random.key(settings.seed), 0)
    return _language_models.create(size, seed, settings.api)


def prepare(settings: Any, model: tuple, programs: Programs, data: Any, windows: Any) -> Run:
    """A run at its start; its programs begin to compile.

    Args:
      settings: of the run.
      model: what `create` returned.
      programs: where they compile.
      data: the records, or their shape.
      windows: held-out windows of one look, or their shape.
    """
    tx: Any
    seed, (params, logits) = jax.random.key(settings.seed), model
    sampler = make_sampler(settings, data.shape[0])
    draws = sampler.init(dp.random.fold_in(seed, 2))
    if settings.epsilon is None:
        split, multiplier = settings.plain_split, 0.0
        draw = _mean_gradient(logits, sampler, _units(settings))
        tx = _adam(settings.plain_learning_rate, settings.steps * split)
    else:
        split = 1
        multiplier = noise_for(settings, sampler, sum(x.size for x in jax.tree.leaves(params)))
        private = optim.privatize(
            noise_multiplier=multiplier,
            sampling=sampler,
            rng=dp.random.fold_in(seed, 1),
            target=(settings.epsilon, settings.delta),
        )
        draw = _clipped_sum(logits, sampler, settings)
        tx = optax.chain(private, _adam(settings.learning_rate, settings.steps))

    def change(params, opt_state, gradient):
        if settings.epsilon is None:
            updates, opt_state = tx.update(gradient, opt_state, params)
        else:
            updates, opt_state = tx.update(gradient.tree, opt_state, params, clipped=gradient)
        return optax.apply_updates(params, updates), opt_state

    def bits(params, windows):
        blocks = windows.reshape(-1, min(64, windows.shape[0]), 1, windows.shape[-1])
        each = jax.lax.map(lambda x: _language_models.record_nats(logits, params, x), blocks)
        return jnp.mean(each) / math.log(2.0)

    start = Training(params, tx.init(params), draws)
    drawn, (shapes, _) = programs.add(("draw", sampler), draw, params, draws, data)
    changed, _ = programs.add(("change", settings.epsilon), change, params, start.opt_state, shapes)
    look, _ = programs.add("bits", bits, params, windows)

    def step(training, data):
        gradient, state = drawn(training.params, training.sampler, data)
        params, opt_state = changed(training.params, training.opt_state, gradient)
        return Training(params, opt_state, state)

    method = None if settings.epsilon is None else shapes.method
    return Run(
        sampler,
        multiplier,
        settings.steps * split,
        settings.every * split,
        method,
        start,
        step,
        look,
    )


def check_clipping(settings: Any, records: np.ndarray) -> None:
    """Fails unless a clipped sum of four records is that of one gradient after the other."""
    layers = min(settings.layers - 1, 1)  # a smoke run has no second to compile attention twice
    size = _language_models.Size(layers, 16, 2, "float32", settings.backend)
    params, logits = _language_models.create(size, jax.random.key(1), settings.api)

    def loss(params, tokens):
        return _language_models.nats(logits, params, tokens)

    four = jnp.asarray(records[:4])
    mask = jnp.array([True, True, False, True])
    bound, more = 0.5 * settings.clip_norm, settings.normalize
    clipped = clipping.clipped_grad(loss, clip_norm=bound, normalize=more, method=settings.method)
    found = jax.jit(clipped)(params, four, mask=mask).tree
    gradient = jax.jit(jax.grad(loss))
    wanted = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for row in (0, 1, 3):
        one = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient(params, four[row]))
        norm = math.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(one)))
        factor = min(1.0, bound / norm) if more is None else bound / (norm + more)
        wanted = jax.tree.map(lambda total, leaf, f=factor: total + f * leaf, wanted, one)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if not np.allclose(np.asarray(a), b, rtol=0, atol=2e-2 * bound):
            raise SystemExit(
                f"The clipped sum is off by {np.abs(np.asarray(a) - b).max()} from a loop over its "
                "examples in float64: no line is written."
            )
