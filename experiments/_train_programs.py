"""The programs that train_speed times: models, batches, ways to a clipped sum, and their check."""

import dataclasses
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import _gpt2
import jax
import jax.numpy as jnp
import optax.contrib

from dpfa_jax import clipping

SIZES = {
    # 50,257 symbols, padded to a multiple of 64 for every method alike
    "gpt2": _gpt2.Size(layers=12, width=768, heads=12, vocabulary=50304),
    "gpt2-2": _gpt2.Size(layers=2, width=768, heads=12, vocabulary=50304),
    "1b": _gpt2.Size(layers=18, width=2048, heads=16, vocabulary=50304),
    "smoke": _gpt2.Size(layers=1, width=32, heads=2, vocabulary=96),
}
OURS = ("vmap", "two_pass", "one_pass", "auto")
HAS_PEER = importlib.util.find_spec("jax_privacy") is not None
_FARTHEST = 2 * 2.0**-6
"""Allowed distance of sums, in clip norms a row: the margin for bfloat16, and as much again."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and batch.

    Attributes:
      model: a name of `SIZES`.
      batch: rows.
      length: tokens of a row.
      remat: whether blocks are computed again in the backward pass.
      methods: what is timed, in this order; all but "plain" clip. "vmap/8" takes 8 rows at a time,
        without a number all are taken at once.
      clip_norm: of a row's gradient; at the start of training all are longer.
      iterations: timed runs of each program; the median is reported.
    """

    model: str
    batch: int
    length: int
    remat: bool
    methods: tuple[str, ...]
    clip_norm: float = 0.5
    iterations: int = 5


def split(method: str) -> tuple[str, int | None]:
    """("vmap", 8) for "vmap/8", ("vmap", None) for "vmap"."""
    name, _, rows = method.partition("/")
    return name, int(rows) if rows else None


def methods_of(case: Case) -> tuple[str, ...]:
    """Those that can run here: jax_privacy's where it is installed."""
    return tuple(each for each in case.methods if HAS_PEER or split(each)[0] != "jax_privacy")


def clipped(case: Case, method: str, loss: Callable) -> Callable:
    """(params, tokens) -> this library's certificate."""
    name, rows = split(method)
    return clipping.clipped_grad(loss, clip_norm=case.clip_norm, method=name, microbatch_size=rows)


def sum_function(case: Case, method: str, loss: Callable, used: list[str]) -> Callable:
    """(params, tokens) -> the sum of clipped gradients; for "plain" the gradient of the mean.

    `used` gets the method that "auto" chose while it is traced.
    """
    name, rows = split(method)
    if name == "plain":
        return jax.grad(loss)
    if name in OURS:
        run = clipped(case, method, loss)

        def ours(params, tokens):
            made = run(params, tokens)
            used.append(f"{made.method}/{rows}")
            return made.tree

        return ours
    if name == "optax":
        aggregate = optax.contrib.differentially_private_aggregate(case.clip_norm, 0.0, key=0)
        each = jax.vmap(jax.grad(loss), (None, 0))

        def total(params, tokens):
            mean, _ = aggregate.update(each(params, tokens), aggregate.init(params))
            return jax.tree.map(lambda leaf: case.batch * leaf, mean)

        return total
    peer = importlib.import_module("jax_privacy.clipping")
    return peer.clipped_grad(
        loss,
        l2_clip_norm=case.clip_norm,
        batch_argnums=1,
        keep_batch_dim=False,
        microbatch_size=rows,
    )


@jax.jit
def _square(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(first.astype(jnp.float32) - second.astype(jnp.float32)))


def apart(case: Case, first: Any, second: Any) -> float:
    """Distance of two sums, in clip norms a row.

    Raises:
      RuntimeError: if it is more than the rounding of bfloat16 explains.
    """
    squares = jax.tree.map(_square, first, second)
    distance = math.sqrt(sum(map(float, jax.tree.leaves(squares)))) / (case.clip_norm * case.batch)
    if not distance < _FARTHEST:
        raise RuntimeError(f"Two methods' sums are {distance} clip norms a row apart.")
    return distance


def tokens_of(case: Case) -> jax.Array:
    """Symbols as rare as words are: the rank-r one with probability about 1/r."""
    size = SIZES[case.model].vocabulary
    uniform = jax.random.uniform(jax.random.key(1), (case.batch, case.length + 1))
    return jnp.minimum(jnp.exp(uniform * jnp.log(size)).astype(jnp.int32), size) - 1


def timed(program: Any, arguments: tuple, iterations: int) -> tuple[float, Any]:
    """(median of seconds of a call, the first call's result)."""
    out = jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


def row(case: Case, method: str, program: Any, seconds: float, run: str) -> dict[str, Any]:
    """One measured number, which is printed as well."""
    name, rows = split(method)
    made = {
        "model": case.model,
        "batch": case.batch,
        "length": case.length,
        "remat": case.remat,
        "method": name,
        "microbatch": rows or case.batch,
        "milliseconds": round(1e3 * seconds, 3),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "tokens_per_second": round(case.batch * case.length / seconds),
        "run_id": run,
    }
    print(
        f"{case.model:6} {case.batch:3} x {case.length:4} remat {case.remat:1} {method:14}"
        f" {1e3 * seconds:9.2f} ms {made['temp_bytes'] / 2**30:7.2f} GiB",
        flush=True,
    )
    return made
