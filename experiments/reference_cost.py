"""What do the fixed-reference sums cost in time and memory, beside XLA's own attention?

    python experiments/reference_cost.py            a large memory, and two lengths side by side
    python experiments/reference_cost.py --smoke    the same on a small scale, under a minute

Every case is measured in a process of its own, since the peak memory of a process only grows. The
first case, a memory of 100,000 records read by 512 queries, must stay under its limit; the others
report ratios. `peak_gib` is the process's whole peak, runtime and compiler included, and
`peak_above_inputs_gib` what running adds once inputs and compiled code are there.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np

import dpfa_jax as dp


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      records: rows of the large memory, one head.
      queries: rows that read it, jointly.
      width: of queries, keys and values; a usual head.
      limit_gib: peak resident memory the large memory may reach, GiB, runtime included.
      lengths: T = S of the side-by-side cases.
      heads: of the side-by-side cases.
      repeats: timed calls after one untimed; their median is reported.
      seed: of the inputs and the noise.
    """

    records: int = 100_000
    queries: int = 512
    width: int = 64
    limit_gib: float = 2.0
    lengths: tuple[int, ...] = (1024, 4096)
    heads: int = 4
    repeats: int = 5
    seed: int = 0


SMOKE = Settings(records=4096, queries=64, lengths=(256,), repeats=1)

XLA = "jax.nn.dot_product_attention"
GIB = 2.0**30


def mechanism(name: str):
    """The private mechanisms that are timed: the bare sums, and the sums with noise."""
    if name == "NonPrivate":
        return dp.NonPrivate()
    if name == "IndependentNoise":
        return dp.IndependentNoise(noise_multiplier=1.0, value_bound=1.0, score_cap=1.0)
    raise ValueError(f"Expected NonPrivate or IndependentNoise, got {name}.")


def attention(name: str) -> Callable[..., jax.Array]:
    """Attention of (query, key, value, rng) by the named implementation, scores of order one."""
    if name == XLA:
        return lambda query, key, value, rng: jax.nn.dot_product_attention(
            query, key, value, scale=1.0, implementation="xla"
        )
    chosen = mechanism(name)
    return lambda query, key, value, rng: dp.private_attention(
        query, key, value, mechanism=chosen, rng=rng, queries="public", scale=1.0
    )


def gradient(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Gradients in query, key and value of the sum of squares of an attention."""
    return jax.grad(lambda *inputs: (attend(*inputs) ** 2).sum(), argnums=(0, 1, 2))


def inputs(query_shape: tuple[int, ...], key_shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Query, key and value with rows of norm one, float32."""
    generator = np.random.default_rng(seed)
    arrays = []
    for shape in (query_shape, key_shape, key_shape):
        rows = generator.standard_normal(shape, np.float32)
        arrays.append(rows / np.linalg.norm(rows, axis=-1, keepdims=True))
    return arrays


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Softmax attention in float64, one head at a time."""
    answer = np.empty(query.shape, np.float64)
    for batch in range(query.shape[0]):
        for head in range(query.shape[2]):
            q, k, v = (x[batch, :, head].astype(np.float64) for x in (query, key, value))
            weights = np.exp(q @ k.T)
            answer[batch, :, head] = weights @ v / weights.sum(axis=1, keepdims=True)
    return answer


def check(settings: Settings) -> None:
    """The un-noised answer may err at most twice as much as XLA's attention, both from float64.

    Raises:
      SystemExit: if it does; no line is written.
    """
    rng = dp.random.secure_key()
    for length in settings.lengths:
        shape = (1, length, settings.heads, settings.width)
        arrays = inputs(shape, shape, settings.seed)
        truth = exact(*arrays)
        ours, plain = (
            float(np.abs(np.asarray(jax.jit(attention(name))(*arrays, rng)) - truth).max())
            for name in ("NonPrivate", XLA)
        )
        print(f"check at length {length}: error {ours:.2e}, XLA's {plain:.2e}", flush=True)
        if not ours <= 2 * plain:
            raise SystemExit("The sums are further from float64 than twice XLA's: not measured.")


def peak_bytes() -> int:
    """Peak resident memory of this process so far, bytes.

    Linux's VmHWM counts this program only; ru_maxrss may still hold the parent's peak.
    """
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: an implementation, a direction and two lengths."""

    implementation: str
    direction: str
    queries: int
    keys: int
    heads: int

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Runs in a fresh process: seconds and peak memory of this case."""
        attend = attention(self.implementation)
        function = jax.jit(attend if self.direction == "forward" else gradient(attend))
        arrays = [
            jnp.asarray(array)
            for array in inputs(
                (1, self.queries, self.heads, settings.width),
                (1, self.keys, self.heads, settings.width),
                settings.seed,
            )
        ]
        arrays.append(dp.random.secure_key())
        compiled = function.lower(*arrays).compile()
        before = peak_bytes()
        jax.block_until_ready(compiled(*arrays))
        seconds = []
        for _ in range(settings.repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            seconds.append(time.perf_counter() - start)
        peak = peak_bytes()
        return {
            **dataclasses.asdict(self),
            "seconds": round(statistics.median(seconds), 5),
            "peak_gib": round(peak / GIB, 4),
            "peak_above_inputs_gib": round((peak - before) / GIB, 4),
        }


def cases(settings: Settings) -> list[Case]:
    large = Case("IndependentNoise", "forward", settings.queries, settings.records, heads=1)
    pairs = [
        Case(name, direction, length, length, settings.heads)
        for length in settings.lengths
        for direction in ("forward", "gradient")
        for name in (XLA, "NonPrivate", "IndependentNoise")
    ]
    return [large, *pairs]


def measured_apart(case: Case, settings: Settings) -> dict[str, Any]:
    """The case's row, measured in a process of its own."""
    asked = json.dumps([dataclasses.asdict(case), dataclasses.asdict(settings)])
    done = subprocess.run(
        (sys.executable, __file__, "--measure", asked), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"Measuring {case} failed: the reason stands above.")
    return json.loads(done.stdout.splitlines()[-1])


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each side-by-side row its time and memory over those of XLA's attention."""
    same = ("direction", "queries", "keys", "heads")
    plain = {tuple(r[k] for k in same): r for r in rows if r["implementation"] == XLA}
    result = []
    for row in rows:
        base = plain.get(tuple(row[k] for k in same))
        ratios = {}
        if base is not None:
            ratios["time_ratio"] = round(row["seconds"] / base["seconds"], 2)
            ratios["peak_ratio"] = round(row["peak_gib"] / base["peak_gib"], 3)
        result.append(row | ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small scale, under a minute")
    parser.add_argument("--results", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case, settings = json.loads(arguments.measure)
        print(json.dumps(Case(**case).measure(Settings(**settings))))
        return
    settings = SMOKE if arguments.smoke else Settings()
    watch = _common.Stopwatch()
    check(settings)
    rows = []
    for case in _common.track(cases(settings), "cases"):
        rows.append(measured_apart(case, settings))
    rows = with_ratios(rows)
    for row in rows:
        ratio = f"  {row['time_ratio']:6.2f}x time" if "time_ratio" in row else ""
        print(
            f"{row['implementation']:30} {row['direction']:9} T={row['queries']:<6} "
            f"S={row['keys']:<7} {row['seconds']:9.4f} s  peak {row['peak_gib']:.3f} GiB{ratio}"
        )
    if not rows[0]["peak_gib"] < settings.limit_gib:
        raise SystemExit(f"The large memory took more than {settings.limit_gib} GiB: no line.")
    path = _common.append_line(arguments.results, "reference_cost", settings, rows, watch.seconds())
    print(f"appended one line to {path}")


if __name__ == "__main__":
    main()
