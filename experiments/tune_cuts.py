"""Which cut of the Hopper forward kernel is fastest on this GPU?

    python experiments/tune_cuts.py             # on an H100 or H200, within 3 minutes
    python experiments/tune_cuts.py --only D64  # some of the shapes
    python experiments/tune_cuts.py --smoke     # lowers two cuts of a small call on any device

Time of the forward kernel alone by CUPTI, as private calls run it, for the cut in use
(`mosaic_gpu.cut`), for the same but that no tiles are shared, and for cuts that change one field of
that. Such a change leaves every bit of the answers as it is: a cut whose answers differ is not
timed, and is an error at the end; so is the one in use if its answers differ by more than shared
sums round. What is found here is written into `mosaic_gpu.cut` by hand.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import statistics
import sys
from typing import Any

# Every process takes the memory that it needs, and no more.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _common
import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import mosaic_gpu

KERNEL = "dpfa_mosaic_forward_kernel"
SHARED = "used"
"""The cut in use, the only one in which tiles may be shared: its last bits hang on which are."""

_CLOSE = 2.0**-7
"""Relative root mean square by which answers in bfloat16 may differ that were summed otherwise."""

_GPU: Any = None
"""Held by the process that runs something on the GPU."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: sizes, whether causal, scores of eight bits; as many queries as keys, or fewer."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    causal: bool = False
    float8: bool = False
    queries: int | None = None

    def operands(self) -> Operands:
        """Shapes of what a call hands over once its records are weighed."""
        row, count = jnp.bfloat16, (self.batch, self.length, self.kv_heads)
        key = jax.ShapeDtypeStruct((*count, self.width), row)
        queries = self.length if self.queries is None else self.queries
        query = jax.ShapeDtypeStruct((self.batch, queries, self.heads, self.width), row)
        weights = jax.ShapeDtypeStruct(count, jnp.float32)
        data = jax.ShapeDtypeStruct((8,), jnp.uint32)
        flags = jax.ShapeDtypeStruct((self.batch, 1), jnp.int32)
        return Operands(query, key, key, weights, noise_key=data, flags=flags)

    def spec(self) -> Spec:
        return Spec(
            scale=self.width**-0.5,
            score_cap=4.0,
            is_causal=self.causal,
            noise="sums",
            noise_std=1.0,
            denominator_std=1.0,
            floor=1.0,
            ball=1.0,
            on_grid=True,
            mark_queries=True,
            float8_scores=self.float8,
        )

    def cuts(self) -> dict[str, mosaic_gpu.Shape]:
        """The one in use without shared tiles, those that differ in one field, the one in use."""
        shared = mosaic_gpu.cut(self.operands(), self.spec())
        used = dataclasses.replace(shared, shares=False)
        one = 4 * self.length * self.width  # bytes of a head's keys and values
        found = {"whole tiles": used}
        for early in (None, *range(0, used.block_k // 2 + 1, 8)):
            found[f"early={early}"] = dataclasses.replace(used, early=early)
        for heads in (1, 2, 4, 8, 24):
            found[f"heads={heads}"] = dataclasses.replace(used, nearby=heads * one)
        if used.compute == 2:
            found["turns"] = dataclasses.replace(used, turns=not used.turns)
        if used.drawing > 1:
            found["drawing=1"] = dataclasses.replace(used, drawing=1)
        if used.noise == "shared" and used.slots == 1:
            found["global noise"] = dataclasses.replace(used, noise="global", slots=2)
        cuts = {n: shape for n, shape in found.items() if n == "whole tiles" or shape != used}
        return cuts | {SHARED: shared}


CASES = {
    "D128": Case(4, 4096, 16, 16, 128),
    "D128 T1024": Case(16, 1024, 16, 16, 128),
    "D128 T2048": Case(8, 2048, 16, 16, 128),
    "D128 causal": Case(4, 4096, 16, 16, 128, causal=True),
    "D128 T8192 causal": Case(2, 8192, 16, 16, 128, causal=True),
    "D128 T16384": Case(1, 16384, 16, 16, 128),
    "D64": Case(4, 4096, 32, 32, 64),
    "D64 causal": Case(4, 4096, 32, 32, 64, causal=True),
    "BERT-Large": Case(32, 512, 16, 16, 64),
    "GPT-3 13B": Case(4, 2048, 40, 40, 128, causal=True),
    "ViT-Huge": Case(64, 256, 16, 16, 80),
    "Llama GQA": Case(2, 8192, 32, 8, 128, causal=True),
    "D96 T512": Case(32, 512, 16, 16, 96),
    "128 queries": Case(1, 16384, 16, 16, 128, queries=128),
}
CASES |= {
    f"{name} fp8": dataclasses.replace(CASES[name], float8=True)
    for name in ("D128", "D128 T8192 causal", "D128 T16384", "D64")
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
      names: of `CASES`.
      iterations: timed runs of each cut; the median counts.
    """

    names: tuple[str, ...] = tuple(CASES)
    iterations: int = 8


def _lowered(case: Case, shape: mosaic_gpu.Shape) -> Any:
    spec = case.spec()

    def forward(operands):
        return mosaic_gpu.forward(operands, spec, shape=shape)[0]

    traced = jax.jit(forward).trace(case.operands())
    if jax.default_backend() == "gpu":
        return traced.lower()
    return traced.lower(lowering_platforms=("cuda",))


def _arrays(case: Case) -> Operands:
    shapes = case.operands()
    ks = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, x.shape, x.dtype) for k, x in zip(ks, shapes[:3], strict=True)
    )
    weights, flags = jnp.zeros(shapes.log_weights.shape), jnp.zeros((case.batch, 1), jnp.int32)
    data = jnp.arange(8, dtype=jnp.uint32)
    return Operands(query, key, value, weights, noise_key=data, flags=flags)


def _times(program: Any, given: Operands, iterations: int) -> list[float]:
    from jax.experimental.mosaic.gpu import profiler

    runs = profiler.measure(program, iterations=iterations, aggregate=False)(given)[1]
    found = [sum(t for name, t in run if KERNEL in name) for run in runs or ()]
    if not found or not min(found):
        raise RuntimeError(f"CUPTI saw no kernel named {KERNEL}.")
    return found


def _share(lock: Any) -> None:
    global _GPU
    _GPU = lock


def _measured(name: str, iterations: int) -> tuple[list[dict], list[str]]:
    """Of one case, in a process of its own: what is compiled and timed of `CASES[name]`."""
    case, programs = CASES[name], {}
    for label, shape in case.cuts().items():
        # CUPTI does not see the kernels in what XLA records to launch at once.
        try:
            compiled = _lowered(case, shape).compile({"xla_gpu_enable_command_buffer": ""})
        except jax.errors.JaxRuntimeError as reason:
            print(f"{name:22} {label:14} left out: {str(reason)[:120]}", flush=True)
            continue
        programs[label] = shape, compiled
    rows, wrong, wanted = [], [], None
    with _GPU:
        given = _arrays(case)
        for label, (shape, program) in programs.items():
            out = np.asarray(program(given), np.float32)
            wanted = out if wanted is None else wanted
            apart = np.linalg.norm(out - wanted) / np.linalg.norm(wanted)
            if not (apart <= _CLOSE if label == SHARED else np.array_equal(out, wanted)):
                wrong.append(f"{name}, {label}")
                continue
            times = _times(program, given, iterations)
            middle = statistics.median(times)
            row = {"case": name, "change": label, **dataclasses.asdict(case)}
            row |= {"cut": dataclasses.asdict(shape), "milliseconds": round(middle, 5)}
            rows.append(row | {"spread": round((max(times) - min(times)) / middle, 4)})
            print(f"{name:22} {label:14} {middle:8.4f} ms", flush=True)
    return rows, wrong


def measure(settings: Settings) -> tuple[list[dict], list[str]]:
    """One dictionary for each case and cut, and the names of those with other answers.

    A process for each case lowers and compiles, which takes far longer than the timed runs; these
    have the GPU one process at a time.
    """
    context = multiprocessing.get_context("spawn")
    count = min(len(settings.names), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=_share, initargs=(context.Lock(),)
    ) as pool:
        waiting = [pool.submit(_measured, name, settings.iterations) for name in settings.names]
        found = [future.result() for future in waiting]
    return [x for rows, _ in found for x in rows], [x for _, wrong in found for x in wrong]


def smoke() -> list[dict]:
    """Whole and shared tiles of a small call, lowered for a GPU and not run: no times."""
    case = Case(1, 1024, 2, 1, 128)
    rows = []
    cuts = list(case.cuts().items())
    for label, shape in (cuts[0], cuts[-1]):
        if KERNEL not in _lowered(case, shape).as_text():
            raise RuntimeError(f"The cut {shape} has no kernel named {KERNEL}.")
        rows.append({"case": "smoke", "change": label, "cut": dataclasses.asdict(shape)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", help="some of the shapes")
    parser.add_argument("--results", "--output", type=pathlib.Path, default=_common.RESULTS)
    given = parser.parse_args()
    watch, wrong = _common.Stopwatch(), []
    settings = Settings() if given.only is None else Settings(names=tuple(given.only))
    if given.smoke:
        rows = smoke()
    else:
        if getattr(jax.devices()[0], "compute_capability", "") != "9.0":
            sys.exit("Timings need an H100 or H200. Pass --smoke to lower two cuts on this device.")
        rows, wrong = measure(settings)
    _common.append_line(given.results, "tune_cuts", settings, rows, watch.seconds())
    if wrong:
        sys.exit("These cuts answer otherwise than the one in use:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
