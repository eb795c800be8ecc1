"""The gradients of train_speed over several devices: rows sharded, parameters on each."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import uuid
from typing import Any

import _common
import _gpt2
import jax
import jax.numpy as jnp
from _train_programs import SIZES, Case, apart, clipped, row, timed, tokens_of
from jax.sharding import PartitionSpec as P

from dpfa_jax import optim, sampling

AXIS = "data"
METHODS = ("plain", "one_pass", "private")
"""`plain` is the mean gradient, its shards' added up; `one_pass` the sum of clipped gradients, the
shards' added up; `private` the same with noise, which all devices draw alike, once."""

CASES = (
    Case("gpt2", 64, 256, False, METHODS),
    Case("gpt2", 32, 1024, False, METHODS[:2]),
)
SMOKE = (Case("smoke", 4, 16, False, METHODS, iterations=2),)


def _noise() -> Any:
    """The transformation that adds the noise, of a training set of a million rows."""
    sampler = sampling.Poisson(records=10**6, sampling_rate=1e-4)
    return optim.privatize(noise_multiplier=1.0, sampling=sampler, rng=jax.random.key(7))


def _step(case: Case, method: str, loss: Any) -> Any:
    """(params, tokens of this device, state of the noise) -> gradients, equal on all devices."""

    def plain(params, tokens, state):
        own = jax.lax.pcast(params, AXIS, to="varying")
        return jax.lax.pmean(jax.grad(loss)(own, tokens), AXIS)

    def ours(params, tokens, state):
        made = clipped(case, "one_pass", loss)(params, tokens).psum(AXIS)
        if method == "one_pass":
            return made.tree
        updates, _ = _noise().update(made.tree, state, params, clipped=made)
        return updates

    return plain if method == "plain" else ours


@dataclasses.dataclass(frozen=True)
class _Run:
    """One program: a case's rows spread over some devices."""

    case: Case
    method: str
    mode: str
    mesh: jax.sharding.Mesh

    @property
    def devices(self) -> int:
        return self.mesh.devices.size

    def place(self, tree: Any, spec: P) -> Any:
        return jax.device_put(tree, jax.sharding.NamedSharding(self.mesh, spec))

    def lower(self, attention: Any) -> Any:
        init, loss = _gpt2.create(
            SIZES[self.case.model], self.case.length, self.case.remat, attention
        )
        specs = (P(), P(AXIS), P())
        step = jax.shard_map(
            _step(self.case, self.method, loss), mesh=self.mesh, in_specs=specs, out_specs=P()
        )
        params = jax.eval_shape(init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((self.case.batch, self.case.length + 1), jnp.int32)
        shapes = (params, tokens, jax.eval_shape(_noise().init, params))

        def placed(spec, leaf):
            sharding = jax.sharding.NamedSharding(self.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        given = [
            jax.tree.map(functools.partial(placed, spec), tree)
            for spec, tree in zip(specs, shapes, strict=True)
        ]
        return jax.jit(step).lower(*given)


def _runs(case: Case) -> list[_Run]:
    """One device; then the same rows on more, and as many rows on each."""
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count() and case.batch % n == 0]
    auto = (jax.sharding.AxisType.Auto,)
    found = []
    for count in counts:
        mesh = jax.make_mesh((count,), (AXIS,), auto, devices=jax.devices()[:count])
        for mode in ("strong", "weak")[: 1 if count == 1 else 2]:
            batch = case.batch * (count if mode == "weak" else 1)
            wide = dataclasses.replace(case, batch=batch)
            found += [_Run(wide, method, mode, mesh) for method in case.methods]
    return found


def measure(
    cases: tuple[Case, ...],
    attention: Any,
    folder: pathlib.Path,
    limit: float,
    options: dict[str, Any] | None = None,
) -> None:
    """Times every method on 1, 2, ... devices and appends one line for each case.

    A row's `efficiency` is the time on one device over that on n, per row of a device.

    Raises:
      RuntimeError: if the sums differ between numbers of devices, or a small program does not run.
    """
    watch, run_id = _common.Stopwatch(), uuid.uuid4().hex[:12]
    pool = concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2))
    compiling = {
        case: [(run, pool.submit(run.lower(attention).compile, options)) for run in _runs(case)]
        for case in (*SMOKE, *(case for case in cases if case not in SMOKE))
    }
    print(f"{watch.seconds():.0f} s: traced", flush=True)
    every = [future for runs in compiling.values() for _, future in runs]
    concurrent.futures.wait(every, max(0.1, 0.85 * limit - watch.seconds()))
    print(f"{watch.seconds():.0f} s: compiled", flush=True)
    for case, runs in compiling.items():
        rows = _time(case, runs, run_id, watch, limit)
        if case in SMOKE and len(rows) != len(runs):
            raise RuntimeError("A method did not run on the small model.")
        if case in cases and rows:
            _common.append_line(folder, "train_scaling", case, rows, watch.seconds())
    pool.shutdown(wait=False, cancel_futures=True)


def _time(
    case: Case, runs: list[Any], run_id: str, watch: _common.Stopwatch, limit: float
) -> list[dict[str, Any]]:
    init, _ = _gpt2.create(SIZES[case.model], case.length, case.remat, "xla")
    params = jax.jit(init)(jax.random.key(0))
    state = _noise().init(params)
    rows, alone, one = [], {}, {}
    for run, future in runs:
        tokens = run.place(tokens_of(run.case), P(AXIS))
        given = (run.place(params, P()), tokens, run.place(state, P()))
        try:
            program = future.result(timeout=max(0.1, limit - watch.seconds()))
            seconds, out = timed(program, given, case.iterations)
        except (TimeoutError, jax.errors.JaxRuntimeError) as why:
            print(f"{run.method} left out: {type(why).__name__} {str(why)[:300]}", flush=True)
            continue
        if run.devices == 1:
            alone[run.method] = seconds
        if run.mode == "strong":
            _compare(run, out, one)
        work = run.case.batch / run.devices / case.batch
        made = row(run.case, run.method, program, seconds, run_id)
        made |= {"devices": run.devices, "mode": run.mode}
        if run.method in alone:
            made["efficiency"] = round(work * alone[run.method] / seconds, 4)
            print(f"    {run.devices} devices, {run.mode}: efficiency {made['efficiency']:.3f}")
        rows.append(made)
        del out
    return rows


def _compare(run: _Run, out: Any, one: dict[str, Any]) -> None:
    """The sum of the same rows, and its noise, do not depend on how many devices they are on."""
    out = jax.device_get(out)
    first = one.setdefault(run.method, out)
    case = run.case
    if run.method != "one_pass":
        # Nothing was clipped, or what is left of it is small beside the noise: of the whole length.
        squares = [float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(first)]
        case = dataclasses.replace(case, batch=1, clip_norm=math.sqrt(sum(squares)))
    apart(case, first, out)
