"""What does a clipped gradient cost beside the plain one, in time and memory?

    python experiments/train_speed.py            # all cases on the default GPU, 3 minutes
    python experiments/train_speed.py --devices  # the same work on 1, 2, ... GPUs: train_scaling
    python experiments/train_speed.py --smoke    # a small model on any device

One gradient of a GPT-2, compiled; wall clock, median, all methods in one process. The sums of the
methods are compared on a small model first, and then those of every case; a case whose sums differ
writes no line. Attention is cuDNN's for every method alike. "method/8" takes 8 rows at a time. A
row of optax's is its aggregator over `jax.vmap` of gradients; one of jax_privacy's is its
`clipped_grad`, where it is installed.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import sys
import uuid
from collections.abc import Callable
from typing import Any

import _common
import _gpt2
import _train_devices
import jax
import jax.numpy as jnp
from _train_programs import (
    HAS_PEER,
    SIZES,
    Case,
    apart,
    methods_of,
    row,
    split,
    sum_function,
    timed,
    tokens_of,
)

CASES = (
    Case(
        "gpt2",
        64,
        256,
        False,
        ("plain", "auto", "one_pass", "two_pass", "optax", "jax_privacy/4", "jax_privacy/32"),
    ),
    Case(
        "gpt2",
        32,
        1024,
        False,
        ("plain", "auto", "one_pass", "jax_privacy/4", "jax_privacy/32"),
    ),
    Case("gpt2", 256, 128, False, ("plain", "auto", "one_pass")),
    # Two layers: programs over `jax.vmap` of gradients take long to compile.
    Case(
        "gpt2-2",
        64,
        256,
        False,
        (
            "plain",
            "auto",
            "one_pass",
            "two_pass",
            "optax",
            "vmap/8",
            "jax_privacy/1",
            "jax_privacy/8",
            "jax_privacy/64",
        ),
    ),
    Case("gpt2", 32, 1024, True, ("plain", "auto", "one_pass")),
    Case("1b", 8, 2048, True, ("plain", "auto", "one_pass/1", "one_pass/2")),
    Case("gpt2", 64, 256, True, ("plain", "auto", "one_pass")),
)
GATE = Case("smoke", 4, 16, False, ("vmap/2", "one_pass", "two_pass", "optax", "jax_privacy/2"))
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA for small models on a CPU, where compiling is what takes time."""


_SLOW = ("optax", "jax_privacy", "vmap")
"""Programs over `jax.vmap` of gradients: XLA takes a minute or two for twelve layers, most of it to
fuse and to generate code. They are traced first, so that the others compile meanwhile."""


class _Programs:
    """A case while its programs compile: method -> program; methods that are one share one."""

    def __init__(self, case: Case, attention: Any, pool: Any, options: Any):
        self.case, self.pool, self.options = case, pool, options
        init, self.loss = _gpt2.create(SIZES[case.model], case.length, case.remat, attention)
        self.params = jax.eval_shape(init, jax.random.key(0))
        self.init = pool.submit(jax.jit(init).lower(jax.random.key(0)).compile, options)
        self.programs: dict[str, concurrent.futures.Future] = {}
        self.known: dict[str, concurrent.futures.Future] = {}

    def add(self, method: str) -> None:
        tokens = jax.ShapeDtypeStruct((self.case.batch, self.case.length + 1), jnp.int32)
        used: list[str] = []
        run = jax.jit(sum_function(self.case, method, self.loss, used))
        lowered = run.lower(self.params, tokens)
        same = used[0] if used else method
        if same not in self.known:
            self.known[same] = self.pool.submit(lowered.compile, self.options)
        self.programs[method] = self.known[same]

    def all(self) -> list[concurrent.futures.Future]:
        return [self.init, *self.programs.values()]


def _time(found: _Programs, run: str, left: Callable[[], float]) -> list[dict[str, Any]]:
    case, rows, first = found.case, [], None
    params = found.init.result(timeout=left())(jax.random.key(0))
    tokens = tokens_of(case)
    for method in (each for each in methods_of(case) if each in found.programs):
        try:
            program = found.programs[method].result(timeout=left())
            seconds, out = timed(program, (params, tokens), case.iterations)
        except (TimeoutError, jax.errors.JaxRuntimeError) as why:
            print(f"{method} left out: {type(why).__name__} {str(why)[:300]}", flush=True)
            continue
        if method != "plain":
            first = out if first is None else first
            apart(case, first, out)
        rows.append(row(case, method, program, seconds, run))
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
    if not HAS_PEER:
        print("jax_privacy is not installed here: its rows are left out.", flush=True)

    def left() -> float:
        return max(0.1, limit - watch.seconds())

    pool = concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2))
    gate, *compiling = [_Programs(case, attention, pool, options) for case in (GATE, *cases)]
    tasks = [(found, method) for found in (gate, *compiling) for method in methods_of(found.case)]
    for found, method in sorted(tasks, key=lambda task: split(task[1])[0] not in _SLOW):
        if watch.seconds() > 0.6 * limit and found is not gate:
            print(f"{found.case.model} {method} left out: no time to compile it.", flush=True)
            continue
        found.add(method)
    print(f"{watch.seconds():.0f} s: traced", flush=True)
    # Nothing is timed while XLA tries kernels out on the same device, unless that takes too long.
    every = [each for found in (gate, *compiling) for each in found.all()]
    concurrent.futures.wait(every, max(0.1, 0.85 * limit - watch.seconds()))
    print(f"{watch.seconds():.0f} s: compiled", flush=True)
    if len(_time(gate, run, lambda: limit)) != len(methods_of(GATE)):
        raise RuntimeError("A method did not run on the small model.")
    for found in compiling:
        rows = _time(found, run, left)
        if rows:
            _common.append_line(folder, "train_speed", found.case, rows, watch.seconds())
    pool.shutdown(wait=False, cancel_futures=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small model, on any device")
    parser.add_argument("--devices", action="store_true", help="over 1, 2, ... devices")
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--seconds", type=float, default=600.0, help="what is later is left out")
    parser.add_argument("--cases", default=None, help="numbers of the cases, as 0,3")
    given = parser.parse_args(arguments)
    if given.smoke and given.devices:
        _train_devices.measure(_train_devices.SMOKE, "xla", given.results, given.seconds, QUICK)
        return
    if given.smoke:
        small = dataclasses.replace(GATE, methods=("plain",), iterations=2)
        measure((small,), "xla", given.results, given.seconds, QUICK)
        return
    if jax.default_backend() != "gpu":
        sys.exit("Timings need an NVIDIA GPU. Pass --smoke for a small model on this device.")
    cases = _train_devices.CASES if given.devices else CASES
    numbers = range(len(cases)) if given.cases is None else map(int, given.cases.split(","))
    chosen = tuple(cases[number] for number in numbers)
    run = _train_devices.measure if given.devices else measure
    run(chosen, "cudnn", given.results, given.seconds)
    sys.stdout.flush()
    os._exit(0)  # threads may still compile what was left out


if __name__ == "__main__":
    main()
