"""Which tiles of the Triton kernels are fastest on this GPU?

    python experiments/tune_tiles.py              # on the default GPU, within 100 seconds
    python experiments/tune_tiles.py --smoke      # one small case, on any device, no timings kept

Kernel time by CUPTI of the private forward and of the gradients, for widths, causal or not, short
and long memories; a tile counts only if its answers equal those of the tile in use up to rounding.
The table of tiles (`dpfa_jax/pallas/tiles.json`) gets what is faster than the tile in use by more
than the runs of one program differ; every timing goes to the results.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import _common
import jax
import jax.numpy as jnp

from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import tiling, triton
from dpfa_jax.pallas.tiling import Tile

TABLE = _common.ROOT / "dpfa_jax" / "pallas" / "tiles.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
      widths: padded widths of rows.
      lengths: (length class, queries and keys).
      tokens: batch × length × heads × width of each case.
      iterations: timed runs of each program; the median counts.
      gain: share of the time in use that a tile must save to replace it.
      seconds: after which nothing more is timed.
    """

    widths: tuple[int, ...] = (64, 128)
    lengths: tuple[tuple[str, int], ...] = (("short", 512), ("long", 4096))
    tokens: int = 1 << 25
    iterations: int = 5
    gain: float = 0.02
    seconds: float = 100.0


SMOKE = Settings(widths=(64,), lengths=(("short", 32),), tokens=1 << 11, iterations=1)

FORWARD = (
    *(Tile(64, 64, 4, stages) for stages in (2, 3, 4)),
    *(Tile(128, 64, 8, stages) for stages in (2, 3)),
    *(Tile(64, 32, 4, 3), Tile(64, 128, 4, 2), Tile(128, 32, 8, 3), Tile(128, 128, 8, 2)),
)
BACKWARD = (
    *(Tile(64, 64, 4, stages) for stages in (1, 2, 3)),
    *(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2)),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    which: str
    width: int
    causal: bool
    length: str
    keys: int

    def tiles(self) -> tuple[Tile, ...]:
        """The one in use, then all others."""
        used = self.used()
        others = FORWARD if self.which == "forward" else BACKWARD
        return used, *(tile for tile in others if tile != used)

    def used(self) -> Tile:
        pick = tiling.forward_tile if self.which == "forward" else tiling.backward_tile
        return pick(
            capability=_capability(),
            width=self.width,
            item_bytes=2,
            causal=self.causal,
            keys=self.keys,
        )

    def spec(self) -> Spec:
        return Spec(
            scale=self.width**-0.5,
            score_cap=4.0,
            is_causal=self.causal,
            noise="sums",
            noise_std=1.0,
            denominator_std=1.0,
            floor=1.0,
            on_grid=True,
        )


def _capability() -> int:
    text = getattr(jax.devices()[0], "compute_capability", "0")
    return round(10 * float(text))


def _arrays(settings: Settings, case: Case) -> tuple[jax.Array, ...]:
    heads = 2 if settings is SMOKE else 16
    batch = max(1, settings.tokens // (case.keys * heads * case.width))
    shape = (batch, case.keys, heads, case.width)
    ks = jax.random.split(jax.random.key(0), 4)
    rows = [jax.random.normal(k, shape, jnp.bfloat16) for k in ks]
    return *rows, jnp.zeros(shape[:3]), jnp.arange(8, dtype=jnp.uint32)


def _program(case: Case, tile: Tile) -> Callable:
    """The forward's answer, or gradients from residuals that are given."""
    spec = case.spec()

    def forward(query, key, value, cotangent, weights, data):
        del cotangent
        operands = Operands(query, key, value, weights, noise_key=data)
        return triton.forward(operands, spec, tile=tile)

    def backward(query, key, value, cotangent, weights, data, residuals):
        operands = Operands(query, key, value, weights, noise_key=data)
        return triton.backward(operands, spec, residuals, cotangent, tile=tile)[:4]

    return jax.jit(forward if case.which == "forward" else backward)


@functools.partial(jax.jit)
def _distance(ours: Any, theirs: Any) -> jax.Array:
    def far(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm(x - y) / (jnp.linalg.norm(y) + 1e-30)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(far, ours, theirs))))


def _time(run: Callable, given: tuple, iterations: int) -> list[float]:
    if jax.default_backend() != "gpu":
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        return [1e3 * (time.perf_counter() - start)]
    from jax.experimental.mosaic.gpu import profiler

    _, times = profiler.measure(run, iterations=iterations)(*given)
    return times or []


def _compile(case: Case, tile: Tile, given: tuple, pool: concurrent.futures.Executor) -> Any:
    """A program, or the reason why there is none: a tile may need more memory than there is."""
    lowered = _program(case, tile).lower(*given)

    def one():
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as reason:
            return str(reason)

    return pool.submit(one)


def measure(settings: Settings, watch: _common.Stopwatch) -> list[dict]:
    """One dictionary for each case and tile that answers as it should."""
    cases = [
        Case(which, width, causal, length, keys)
        for which in ("forward", "backward")
        for width in settings.widths
        for causal in (False, True)
        for length, keys in settings.lengths
    ]
    rows, residuals = [], {}
    for which in ("forward", "backward"):
        mine = [case for case in cases if case.which == which]
        programs, given = {}, {}
        # What is lowered compiles while the next is lowered.
        with concurrent.futures.ThreadPoolExecutor(15) as pool:
            for case in mine:
                arrays = _arrays(settings, case)
                place = dataclasses.replace(case, which="forward")
                given[case] = arrays if which == "forward" else (*arrays, residuals[place])
                for tile in case.tiles()[: 2 if settings is SMOKE else None]:
                    programs[case, tile] = _compile(case, tile, given[case], pool)
        programs = {name: found.result() for name, found in programs.items()}
        for case in mine:
            wanted = programs[case, case.used()](*given[case])
            if which == "forward":
                residuals[case] = wanted[1]
            for tile in (tile for other, tile in programs if other == case):
                row = {"pass": which, "capability": _capability(), "width": case.width}
                row |= {"causal": case.causal, "length": case.length}
                row |= dataclasses.asdict(tile)
                run = programs[case, tile]
                if isinstance(run, str) or watch.seconds() > settings.seconds:
                    why = run.splitlines()[0][:120] if isinstance(run, str) else "no time left"
                    print(f"{row} left out: {why}", flush=True)
                    continue
                error = float(_distance(run(*given[case]), wanted))
                if not error < 0.01:
                    print(f"{row} is WRONG by {error}", flush=True)
                    continue
                times = _time(run, given[case], settings.iterations)
                spread = (max(times) - min(times)) / statistics.median(times)
                row |= {"milliseconds": round(statistics.median(times), 4)}
                rows.append(row | {"spread": round(spread, 4), "used": tile == case.used()})
                print(rows[-1], flush=True)
    return rows


def chosen(rows: list[dict], gain: float) -> list[dict]:
    """Rows of the table: of each case the fastest tile, if it saves enough, else the one in use."""
    names = ("pass", "capability", "width", "causal", "length")
    sizes = [field.name for field in dataclasses.fields(Tile)]
    found = {}
    for row in sorted(rows, key=lambda row: (row["milliseconds"], not row["used"])):
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    best = []
    for case in found.values():
        used = next((row for row in case if row["used"]), None)
        if used is None:
            continue
        first = case[0]
        saved = 1 - first["milliseconds"] / used["milliseconds"]
        best.append(first if saved > max(gain, first["spread"]) else used)
    return [{name: row[name] for name in (*names, *sizes)} for row in best]


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """Rows of the table replaced by those of the same case; other cases stay."""
    names = ("pass", "capability", "width", "causal", "length")
    table = {tuple(row[n] for n in names): row for row in (*json.loads(path.read_text()), *rows)}
    text = ",\n".join("  " + json.dumps(row) for row in table.values())
    path.write_text(f"[\n{text}\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--results", "--output", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--table", type=pathlib.Path, default=TABLE, help="changed in place")
    parser.add_argument("--seconds", type=float, default=Settings.seconds)
    given = parser.parse_args()
    if jax.default_backend() != "gpu" and not given.smoke:
        sys.exit("Timings need an NVIDIA GPU. Pass --smoke to run one small case on this device.")
    settings = SMOKE if given.smoke else Settings(seconds=given.seconds)
    watch = _common.Stopwatch()
    rows = measure(settings, watch)
    best = chosen(rows, settings.gain)
    print("\n".join(map(json.dumps, best)))
    _common.append_line(given.results, "tune_tiles", settings, rows, watch.seconds())
    if not given.smoke:
        write(given.table, best)


if __name__ == "__main__":
    main()
