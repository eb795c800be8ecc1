"""What does a clipped gradient cost beside the plain one, in time and memory?

    python experiments/train_speed.py            # all cases on the default GPU, under 3 minutes
    python experiments/train_speed.py --smoke    # a small model on any device

One gradient of a GPT-2, compiled; wall clock, median, all methods in one process. The sums of the
methods are compared on a small model first, and then those of every case; a case whose sums differ
writes no line. Attention is cuDNN's for every method alike. A row of optax's is its aggregator over
`jax.vmap` of gradients; `jax_privacy` has rows where it is installed.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib
import importlib.util
import math
import os
import pathlib
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import _common
import _gpt2
import jax
import jax.numpy as jnp
import optax.contrib

from dpfa_jax import clipping


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and batch.

    Attributes:
      model: a name of `SIZES`.
      batch: rows.
      length: tokens of a row.
      remat: whether blocks are computed again in the backward pass.
      methods: what is timed, in this order; all but "plain" clip.
      microbatch: rows at a time of method "vmap", for whose gradients there must be room.
      clip_norm: of a row's gradient; at the start of training all are longer.
      iterations: timed runs of each program; the median is reported.
    """

    model: str
    batch: int
    length: int
    remat: bool
    methods: tuple[str, ...]
    microbatch: int = 8
    clip_norm: float = 0.5
    iterations: int = 5


SIZES = {
    # 50,257 symbols, padded to a multiple of 64 for every method alike
    "gpt2": _gpt2.Size(layers=12, width=768, heads=12, vocabulary=50304),
    "gpt2-2": _gpt2.Size(layers=2, width=768, heads=12, vocabulary=50304),
    "1b": _gpt2.Size(layers=18, width=2048, heads=16, vocabulary=50304),
    "smoke": _gpt2.Size(layers=1, width=32, heads=2, vocabulary=96),
}

CASES = (
    Case("gpt2", 64, 256, False, ("plain", "auto", "one_pass", "two_pass", "optax")),
    Case("gpt2", 32, 1024, False, ("plain", "auto", "one_pass", "optax")),
    Case("gpt2", 256, 128, False, ("plain", "auto", "one_pass")),
    # Two layers, because method "vmap" of twelve takes minutes to compile
    Case("gpt2-2", 64, 256, False, ("plain", "auto", "one_pass", "two_pass", "optax", "vmap")),
    Case("gpt2", 32, 1024, True, ("plain", "auto", "one_pass")),
    Case("1b", 8, 2048, True, ("plain", "auto", "one_pass")),
    Case("gpt2", 64, 256, True, ("plain", "auto", "one_pass")),
)
_OURS = ("vmap", "two_pass", "one_pass", "auto")
GATE = Case("smoke", 4, 16, False, ("vmap", "one_pass"))
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA for small models on a CPU, where compiling is what takes time."""
_FARTHEST = 2 * 2.0**-6
"""Allowed distance of sums, in clip norms a row: the margin for bfloat16, and as much again."""


def _sum_function(case: Case, name: str, loss: Callable, used: list[str]) -> Callable:
    """(params, tokens) -> the sum of clipped gradients; for "plain" the gradient of the mean.

    `used` gets the method that "auto" chose while it is traced.
    """
    if name == "plain":
        return jax.grad(loss)
    if name in _OURS:
        rows = case.microbatch if name == "vmap" else None
        run = clipping.clipped_grad(
            loss, clip_norm=case.clip_norm, method=name, microbatch_size=rows
        )

        def ours(params, tokens):
            clipped = run(params, tokens)
            used.append(clipped.method)
            return clipped.tree

        return ours
    if name == "optax":
        aggregate = optax.contrib.differentially_private_aggregate(case.clip_norm, 0.0, key=0)
        rows = jax.vmap(jax.grad(loss), (None, 0))

        def total(params, tokens):
            mean, _ = aggregate.update(rows(params, tokens), aggregate.init(params))
            return jax.tree.map(lambda leaf: case.batch * leaf, mean)

        return total
    peer = importlib.import_module("jax_privacy.clipping")
    return peer.clipped_grad(
        loss, l2_clip_norm=case.clip_norm, batch_argnums=1, keep_batch_dim=False
    )


def _methods(case: Case) -> tuple[str, ...]:
    has_peer = importlib.util.find_spec("jax_privacy") is not None
    return (*case.methods, "jax_privacy") if has_peer else case.methods


@jax.jit
def _square(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(first.astype(jnp.float32) - second.astype(jnp.float32)))


def _apart(case: Case, first: Any, second: Any) -> float:
    """Distance of two sums, in clip norms a row.

    Raises:
      RuntimeError: if it is more than the rounding of bfloat16 explains.
    """
    squares = jax.tree.map(_square, first, second)
    apart = math.sqrt(sum(map(float, jax.tree.leaves(squares)))) / (case.clip_norm * case.batch)
    if not apart < _FARTHEST:
        raise RuntimeError(f"Two methods' sums are {apart} clip norms a row apart.")
    return apart


def _tokens(case: Case) -> jax.Array:
    """Symbols as rare as words are: the rank-r one with probability about 1/r."""
    size = SIZES[case.model].vocabulary
    uniform = jax.random.uniform(jax.random.key(1), (case.batch, case.length + 1))
    return jnp.minimum(jnp.exp(uniform * jnp.log(size)).astype(jnp.int32), size) - 1


@dataclasses.dataclass(frozen=True)
class _Programs:
    """A case while its programs compile: method -> program; methods that are one share one."""

    case: Case
    init: concurrent.futures.Future
    programs: dict[str, concurrent.futures.Future]

    def all(self) -> list[concurrent.futures.Future]:
        return [self.init, *self.programs.values()]


def _compile(
    case: Case, attention: Any, pool: Any, options: Any, is_late: Callable[[], bool]
) -> _Programs:
    init, loss = _gpt2.create(SIZES[case.model], case.length, case.remat, attention)
    params = jax.eval_shape(init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((case.batch, case.length + 1), jnp.int32)
    programs, known = {}, {}
    for name in _methods(case):
        if name in known:
            programs[name] = known[name]
        elif not is_late():
            used = []
            lowered = jax.jit(_sum_function(case, name, loss, used)).lower(params, tokens)
            programs[name] = known[used[0] if used else name] = pool.submit(
                lowered.compile, options
            )
    start = pool.submit(jax.jit(init).lower(jax.random.key(0)).compile, options)
    return _Programs(case, start, programs)


def _timed(program: Any, arguments: tuple, iterations: int) -> tuple[float, Any]:
    out = jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


def _row(case: Case, name: str, program: Any, seconds: float, run: str) -> dict[str, Any]:
    microbatch = case.microbatch if name == "vmap" else case.batch
    memory = program.memory_analysis()
    row = {
        "model": case.model,
        "batch": case.batch,
        "length": case.length,
        "remat": case.remat,
        "method": name,
        "microbatch": microbatch,
        "milliseconds": round(1e3 * seconds, 3),
        "temp_bytes": memory.temp_size_in_bytes,
        "tokens_per_second": round(case.batch * case.length / seconds),
        "run_id": run,
    }
    print(
        f"{case.model:5} {case.batch:3} x {case.length:4} remat {case.remat:1} {name:11}"
        f" {1e3 * seconds:9.2f} ms {row['temp_bytes'] / 2**30:7.2f} GiB",
        flush=True,
    )
    return row


def _time(found: _Programs, run: str, left: Callable[[], float]) -> list[dict[str, Any]]:
    case, rows, first = found.case, [], None
    params = found.init.result(timeout=left())(jax.random.key(0))
    tokens = _tokens(case)
    for name, future in found.programs.items():
        try:
            program = future.result(timeout=left())
            seconds, out = _timed(program, (params, tokens), case.iterations)
        except (TimeoutError, jax.errors.JaxRuntimeError) as why:
            print(f"{name} left out: {type(why).__name__} {str(why)[:300]}", flush=True)
            continue
        if name != "plain":
            first = out if first is None else first
            _apart(case, first, out)
        rows.append(_row(case, name, program, seconds, run))
        del out
    return rows


def measure(
    cases: tuple[Case, ...],
    attention: Any,
    folder: pathlib.Path,
    limit: float,
    options: dict[str, Any] | None = None,
) -> None:
    """Times every method of every case and appends one line for each case that is done.

    Raises:
      RuntimeError: if methods disagree.
    """
    watch, run = _common.Stopwatch(), uuid.uuid4().hex[:12]

    def left() -> float:
        return max(0.1, limit - watch.seconds())

    pool = concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2))
    compiling = []

    def is_late() -> bool:
        return watch.seconds() > 0.7 * limit

    for case in (GATE, *cases):
        compiling.append(_compile(case, attention, pool, options, is_late))
        print(
            f"{watch.seconds():.0f} s: traced {case.model} {case.batch} x {case.length}", flush=True
        )
    # Nothing is timed while XLA tries kernels out on the same device.
    concurrent.futures.wait([each for found in compiling for each in found.all()], left())
    print(f"{watch.seconds():.0f} s: compiled", flush=True)
    gate, *compiling = compiling
    if len(_time(gate, run, lambda: limit)) != len(_methods(GATE)):
        raise RuntimeError("A method did not run on the small model.")
    for found in compiling:
        rows = _time(found, run, left)
        if rows:
            _common.append_line(folder, "train_speed", found.case, rows, watch.seconds())
    pool.shutdown(wait=False, cancel_futures=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small model, on any device")
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--seconds", type=float, default=600.0, help="what is later is left out")
    parser.add_argument("--cases", default="0,1,2,3,4,5,6", help="numbers of the cases")
    given = parser.parse_args(arguments)
    if given.smoke:
        small = dataclasses.replace(GATE, methods=("plain",), iterations=2)
        measure((small,), "xla", given.results, given.seconds, QUICK)
        return
    if jax.default_backend() != "gpu":
        sys.exit("Timings need an NVIDIA GPU. Pass --smoke for a small model on this device.")
    chosen = tuple(CASES[int(number)] for number in given.cases.split(","))
    measure(chosen, "cudnn", given.results, given.seconds)
    sys.stdout.flush()
    os._exit(0)  # threads may still compile what was left out


if __name__ == "__main__":
    main()
