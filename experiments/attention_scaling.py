"""How does private attention scale with the length of the sequence, and over devices?

    python experiments/attention_scaling.py            # on all GPUs of the machine, 2 minutes
    python experiments/attention_scaling.py --smoke    # tiny, on any device
    python experiments/attention_scaling.py --plot     # the picture of the last run

Lengths: one GPU, kernel time by CUPTI, batch × length fixed. Devices: the sequence sharded over 1,
2, … GPUs by `context_parallel_attention` with sharded queries, once for each `exchange`, wall-clock
time of whole calls; "strong" keeps the length, "weak" the records of one device. Beside each of
these rows stand three numbers: `exchange_milliseconds`, what the call takes longer than attention
over as many pairs of queries and records as one device has, noise included; what the call's
collectives take alone, `collectives_milliseconds`; and `hidden`, the share of that which the call
does not take longer. No line is written if a sharded answer differs from the unsharded one by more
than rounding.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import _common
import jax
import jax.numpy as jnp

import dpfa_jax

AXIS = "sequence"
EXCHANGES = ("records", "sums")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      lengths: of queries and keys on one device.
      tokens: batch × length there.
      heads: query and key heads.
      width: of rows.
      length: of the sequence that is sharded; of one device's part of it where scaling is weak.
      batch: of the sharded calls.
      iterations: timed calls of one device; the median is reported.
      calls: timed calls over devices, whose times differ more.
      dtype: of query, key and value.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    tokens: int = 16384
    heads: int = 16
    width: int = 128
    length: int = 16384
    batch: int = 1
    iterations: int = 5
    calls: int = 25
    dtype: str = "bfloat16"


SMOKE = Settings(
    lengths=(64,), tokens=64, heads=2, width=16, length=64, iterations=2, calls=2, dtype="float32"
)


def _mechanism() -> dpfa_jax.IndependentNoise:
    return dpfa_jax.IndependentNoise(1.0, value_bound=30.0, score_cap=4.0)


@functools.partial(jax.jit, static_argnames="backend")
def _attend(query, key, value, data, *, backend: str) -> jax.Array:
    return dpfa_jax.private_attention(
        query,
        key,
        value,
        mechanism=_mechanism(),
        rng=dpfa_jax.random.wrap_key_data(data),
        queries="public",
        backend=backend,
    )


@jax.jit
def _cudnn(query, key, value, data) -> jax.Array:
    del data
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@functools.cache
def _mesh(devices: int) -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), (AXIS,), axis_types=auto, devices=jax.devices()[:devices])


@functools.cache
def _sharded(mesh: jax.sharding.Mesh, exchange: str) -> Callable:
    def attend(query, key, value, data):
        return dpfa_jax.context_parallel_attention(
            query,
            key,
            value,
            axis_name=AXIS,
            mechanism=_mechanism(),
            rng=dpfa_jax.random.wrap_key_data(data),
            queries="public",
            shard_queries=True,
            exchange=exchange,
        )

    part = jax.sharding.PartitionSpec(None, AXIS)
    specs = (part, part, part, jax.sharding.PartitionSpec())
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=part))


@functools.cache
def _collectives(mesh: jax.sharding.Mesh) -> Callable:
    """What a sharded call sends: arrays that are gathered, and sums that are added."""

    def send(gathered, sums):
        gathered = [jax.lax.all_gather(x, AXIS, axis=1, tiled=True)[None] for x in gathered]
        sums = [jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True) for x in sums]
        return gathered, sums

    part, own = jax.sharding.PartitionSpec(None, AXIS), jax.sharding.PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(send, mesh=mesh, in_specs=(part, own), out_specs=(own, part)))


@functools.partial(jax.jit, static_argnames=("size", "dtype"))
def _normals(key: jax.Array, size: int, dtype: str) -> jax.Array:
    return jax.random.normal(key, (size,), dtype)


def _arrays(settings: Settings, batch: int, length: int) -> tuple[jax.Array, ...]:
    shape = (batch, length, settings.heads, settings.width)
    keys = jax.random.split(jax.random.key(1), 3)
    # Of one size for many shapes: a program less to compile.
    rows = (_normals(key, math.prod(shape), settings.dtype).reshape(shape) for key in keys)
    return (*rows, jnp.arange(8, dtype=jnp.uint32))


def _shapes(settings: Settings, batch: int, length: int, keys: int) -> tuple:
    """Of the arrays of one device's call."""
    query, key = (
        jax.ShapeDtypeStruct((batch, size, settings.heads, settings.width), settings.dtype)
        for size in (length, keys)
    )
    return query, key, key, jax.ShapeDtypeStruct((8,), jnp.uint32)


def _compiled(programs: dict) -> dict:
    """The programs of the same names, compiled side by side; what cannot be done is left out."""
    lowered = {}
    for name, (fun, specs) in programs.items():
        try:
            lowered[name] = fun.lower(*specs)
        except NotImplementedError as reason:
            print(f"{name} left out: {reason}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        made = pool.map(lambda program: program.compile(), lowered.values())
        return dict(zip(lowered, made, strict=True))


def check(settings: Settings, devices: int) -> float:
    """Largest difference of the sharded answer from the unsharded one, relative to the value bound.

    Raises:
      RuntimeError: if it is more than the dtype's rounding explains.
    """
    arrays = _arrays(settings, 2, 48 * devices)
    wanted = _attend(*arrays, backend="xla").astype(jnp.float32)
    errors = [
        jnp.max(jnp.abs(_sharded(_mesh(devices), name)(*arrays).astype(jnp.float32) - wanted))
        for name in EXCHANGES
    ]
    error = max(map(float, errors)) / _mechanism().value_bound
    if not error < 0.02:
        raise RuntimeError(f"The sharded answer is {error} away from the unsharded one.")
    return error


def _wall(run: Callable, arrays: tuple, iterations: int) -> list[float]:
    """Milliseconds of calls one after another; the first, which compiles, is not among them."""
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _kernels(run: Callable, arrays: tuple, iterations: int) -> list[float]:
    """Milliseconds of the kernels on a GPU; of the calls elsewhere."""
    if jax.default_backend() != "gpu":
        return _wall(run, arrays, iterations)
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(run(*arrays))
    _, times = profiler.measure(run, iterations=iterations)(*arrays)
    return times or []


def _row(settings: Settings, mode: str, implementation: str, times: list[float], **more) -> dict:
    middle = statistics.median(times)
    tokens = more["batch"] * more["length"]
    row = {
        "mode": mode,
        "implementation": implementation,
        **more,
        "heads": settings.heads,
        "head_dim": settings.width,
        "milliseconds": round(middle, 4),
        "spread": round((max(times) - min(times)) / middle, 4),
        "tokens_per_second": round(1e3 * tokens / middle),
    }
    print(f"{mode:8} {implementation:24} {more} {row['milliseconds']:10.4f} ms", flush=True)
    return row


def _jitted(backend: str) -> Any:
    return jax.jit(functools.partial(_attend, backend=backend))


def over_lengths(settings: Settings) -> Iterator[dict]:
    """Rows of one device, all implementations that can do a length."""
    kinds = {"private": _jitted("auto")}
    if jax.default_backend() == "gpu":
        kinds |= {"triton_private": _jitted("triton"), "cudnn": _cudnn}
    batches = {length: max(1, settings.tokens // length) for length in settings.lengths}
    programs = _compiled(
        {
            (name, length): (fun, _shapes(settings, batch, length, length))
            for length, batch in batches.items()
            for name, fun in kinds.items()
        }
    )
    for length, batch in batches.items():
        arrays = _arrays(settings, batch, length)
        for name in kinds:
            if (name, length) in programs:
                times = _kernels(programs[name, length], arrays, settings.iterations)
                yield _row(settings, "length", name, times, devices=1, batch=batch, length=length)


def _placed_shapes(settings: Settings, devices: int, length: int) -> tuple[tuple, dict]:
    """Of a call sharded over devices, and of what it sends."""
    mesh, batch = _mesh(devices), settings.batch
    part, own, whole = (
        jax.NamedSharding(mesh, spec) for spec in (jax.P(None, AXIS), jax.P(AXIS), jax.P())
    )

    def placed(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = (batch, length, settings.heads, settings.width)
    query, data = placed(rows, settings.dtype, part), placed((8,), jnp.uint32, whole)
    weights = placed(rows[:3], jnp.float32, part)
    words = [placed((devices * batch, *shape[1:]), jnp.int32, own) for shape in (rows, rows[:3])]
    # Two words of each sum.
    sent = {"records": ([query, query, weights], []), "sums": ([query], [*words, *words])}
    return (query, query, query, data), sent


def over_devices(settings: Settings) -> Iterator[dict]:
    """Rows of 1, 2, 4, … devices: the whole length kept, then one device's part of it."""
    # The kernels that the sharded call takes.
    alone = _jitted("auto")
    counts = [2**i for i in range(10) if 2**i <= jax.device_count()]
    cases = {
        (mode, devices): settings.length * (devices if mode == "weak" else 1)
        for mode in ("strong", "weak")
        for devices in counts
    }
    programs = {}
    for (mode, devices), length in cases.items():
        mesh = _mesh(devices)
        call, sent = _placed_shapes(settings, devices, length)
        own = _shapes(settings, settings.batch, length // devices, length)
        programs["alone", mode, devices] = alone, own
        for name in EXCHANGES:
            programs[name, mode, devices] = _sharded(mesh, name), call
            programs[f"{name} sent", mode, devices] = _collectives(mesh), sent[name]
    programs = _compiled(programs)

    def times(kind, mode, devices, *arrays):
        return _wall(programs[kind, mode, devices], arrays, settings.calls)

    for (mode, devices), length in cases.items():
        call, sent = _placed_shapes(settings, devices, length)
        arrays = _arrays(settings, settings.batch, length)
        placed = jax.device_put(arrays, tuple(spec.sharding for spec in call))
        # What one device does at least: its queries against all records.
        own = (arrays[0][:, : length // devices], *arrays[1:])
        least = statistics.median(times("alone", mode, devices, *own))
        for name in EXCHANGES:
            found = times(name, mode, devices, *placed)
            zeros = jax.tree.map(
                lambda spec: jnp.zeros(spec.shape, spec.dtype, device=spec.sharding), sent[name]
            )
            alone_sent = statistics.median(times(f"{name} sent", mode, devices, *zeros))
            sizes = {"devices": devices, "batch": settings.batch, "length": length}
            row = _row(settings, mode, name, found, **sizes)
            longer = row["milliseconds"] - least
            row |= {"exchange_milliseconds": round(longer, 4)}
            if devices > 1:
                hidden = min(1.0, max(0.0, 1 - longer / alone_sent))
                row["collectives_milliseconds"] = round(alone_sent, 4)
                row["hidden"] = round(hidden, 4)
                print(f"         collectives {alone_sent:.4f} ms, not hidden {longer:.4f} ms")
            yield row


def plot(folder: pathlib.Path, figures: pathlib.Path) -> pathlib.Path:
    """Draws the last run: time per token against the length, time against the devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads((folder / "attention_scaling.jsonl").read_text().splitlines()[-1])["metrics"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(row["implementation"] for row in rows if row["mode"] == "length"):
        mine = [r for r in rows if r["mode"] == "length" and r["implementation"] == name]
        rates = [r["tokens_per_second"] for r in mine]
        left.loglog([r["length"] for r in mine], rates, marker="o", label=name)
    left.set(xlabel="length", ylabel="tokens a second, one device")
    left.legend()
    for mode, name in itertools.product(("strong", "weak"), EXCHANGES):
        mine = [r for r in rows if r["mode"] == mode and r["implementation"] == name]
        # One device has nothing to send: both are held against what is faster there.
        alone = [r for r in rows if r["mode"] == mode and r["devices"] == 1]
        best = min(r["milliseconds"] for r in alone)
        # Every query reads every record: with n parts n times the work falls to each device.
        work = (1 / r["devices"] if mode == "strong" else r["devices"] for r in mine)
        share = [best * w / r["milliseconds"] for r, w in zip(mine, work, strict=True)]
        right.plot([r["devices"] for r in mine], share, marker="o", label=f"{mode}, {name}")
    right.set(xlabel="devices", ylabel="efficiency", ylim=(0, None))
    right.legend()
    figures.mkdir(parents=True, exist_ok=True)
    path = figures / "attention_scaling.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--results", "--output", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--figures", type=pathlib.Path, default=_common.FIGURES)
    given = parser.parse_args()
    if given.plot:
        print(plot(given.results, given.figures))
        return
    settings, watch = SMOKE if given.smoke else Settings(), _common.Stopwatch()
    if jax.default_backend() != "gpu" and not given.smoke:
        sys.exit("Timings need NVIDIA GPUs. Pass --smoke to run tiny calls on this device.")
    error = check(settings, jax.device_count())
    print(f"largest difference from the unsharded answer: {error:.2e} of the value bound")
    run_id = uuid.uuid4().hex[:12]
    rows = [row | {"run_id": run_id} for row in (*over_lengths(settings), *over_devices(settings))]
    _common.append_line(given.results, "attention_scaling", settings, rows, watch.seconds())


if __name__ == "__main__":
    main()
