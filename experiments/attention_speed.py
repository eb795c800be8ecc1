"""How fast is private attention beside the fastest attention without privacy?

    python experiments/attention_speed.py            # twelve shapes on the default GPU, 4 minutes
    python experiments/attention_speed.py --forward  # without gradients, 2 minutes
    python experiments/attention_speed.py --smoke    # the correctness check alone, on any device
    python experiments/attention_speed.py --plot     # the picture of the last run

GPU kernel time by CUPTI, all implementations in one process, after a check of the private answers
against the definition; no line is written if that fails. The times of `triton_private` and of the
`mosaic` rows are those of the public call: checks of rows, norms, clipping and noise included.
`mosaic_private_fp8` rounds queries and keys to eight bits for the scores, which its rivals do not;
how far that moves answers without noise is `fp8_error`, the root mean square of the difference over
that of the answers. `tokamax` is left out where it is not installed.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import statistics
import sys
import uuid

import _common
import jax
import jax.numpy as jnp

import dpfa_jax


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
      noise_multiplier: σ/Δ; the time does not depend on it.
      value_bound: in the unit of the values, which are N(0, 1).
      score_cap: public reference of the scores.
      iterations: timed runs of each program; the median is reported.
      dtype: of query, key and value.
    """

    noise_multiplier: float = 1.0
    value_bound: float = 30.0
    score_cap: float = 4.0
    iterations: int = 8
    dtype: str = "bfloat16"


# name: batch, length, query heads, kv heads, width, causal
SHAPES = {
    "D128": (4, 4096, 16, 16, 128, False),
    "D128 causal": (4, 4096, 16, 16, 128, True),
    "D128 T8192 causal": (2, 8192, 16, 16, 128, True),
    "D128 T16384": (1, 16384, 16, 16, 128, False),
    "D64": (4, 4096, 32, 32, 64, False),
    "D64 causal": (4, 4096, 32, 32, 64, True),
    "BERT-Large": (32, 512, 16, 16, 64, False),
    "GPT-3 13B": (4, 2048, 40, 40, 128, True),
    "ViT-Huge": (64, 256, 16, 16, 80, False),
    "Llama GQA": (2, 8192, 32, 8, 128, True),
    "Llama-70B": (1, 8192, 64, 8, 128, True),
    "D256": (4, 4096, 8, 8, 256, False),
}
"""Ten shapes of models and papers; one layer of Llama-70B and wide rows, forward alone."""


PASSES = ("forward", "forward_backward")
FORWARD_ONLY = {
    *("triton_plain", "mosaic_plain", "mosaic_plain_fp8", "tokamax_no_max"),
    *("Llama-70B", "D256"),
}
"""Implementations that say where time goes, not how far private calls are from their rivals; a
shape of which only answers a second are asked, and one whose gradients are Triton's."""


def _private(
    settings: Settings, causal: bool, backend: str, noisy: bool, precision, query, key, value, data
):
    mechanism = dpfa_jax.NonPrivate()
    if noisy:
        mechanism = dpfa_jax.IndependentNoise(
            settings.noise_multiplier,
            value_bound=settings.value_bound,
            score_cap=settings.score_cap,
        )
    return dpfa_jax.private_attention(
        query,
        key,
        value,
        mechanism=mechanism,
        rng=dpfa_jax.random.wrap_key_data(data) if noisy else None,
        queries="public",
        is_causal=causal,
        precision=precision,
        backend=backend,
    )


def _cudnn(causal: bool, query, key, value, data):
    del data
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")


def _tokamax(causal: bool, query, key, value, data):
    del data
    # By name: type checkers need not have it.
    tokamax = importlib.import_module("tokamax")
    return tokamax.dot_product_attention(
        query, key, value, is_causal=causal, implementation="mosaic"
    )


def _tokamax_no_max(causal: bool, query, key, value, data):
    del data
    # Its public function has no such option.
    kernels = importlib.import_module("tokamax._src.ops.attention.pallas_mosaic_gpu")
    kernel = kernels.PallasMosaicGpuFlashAttention(use_stable_softmax=False)
    return kernel(query, key, value, is_causal=causal)


def _clip(rows, bound):
    norms = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1, keepdims=True)
    return (rows * jnp.minimum(1.0, bound / norms)).astype(rows.dtype)


def _bolted_on(settings: Settings, causal: bool, query, key, value, data):
    bound = settings.value_bound
    query, key, value = (_clip(rows, bound) for rows in (query, key, value))
    out = _cudnn(causal, query, key, value, data).astype(jnp.float32)
    noise = jax.random.normal(jax.random.wrap_key_data(data[:2]), out.shape)
    return (out + settings.noise_multiplier * noise).astype(query.dtype)


def _implementations(settings: Settings, causal: bool):
    private = functools.partial(_private, settings, causal)
    found = {
        "triton_private": functools.partial(private, "triton", True, None),
        "triton_plain": functools.partial(private, "triton", False, None),
        "mosaic_private": functools.partial(private, "mosaic_gpu", True, None),
        "mosaic_private_fp8": functools.partial(private, "mosaic_gpu", True, "fp8"),
        "mosaic_plain": functools.partial(private, "mosaic_gpu", False, None),
        "mosaic_plain_fp8": functools.partial(private, "mosaic_gpu", False, "fp8"),
        "cudnn": functools.partial(_cudnn, causal),
        "bolted_on": functools.partial(_bolted_on, settings, causal),
    }
    if importlib.util.find_spec("tokamax") is not None:
        found["tokamax"] = functools.partial(_tokamax, causal)
        found["tokamax_no_max"] = functools.partial(_tokamax_no_max, causal)
    return found


def _with_gradient(fun):
    def both(query, key, value, data, cotangent):
        out, pull = jax.vjp(lambda *rows: fun(*rows, data), query, key, value)
        return out, *pull(cotangent)

    return both


def _has_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def check(settings: Settings) -> float:
    """Largest difference of the private answer from the definition's, relative to the value bound.

    Raises:
      RuntimeError: if it is more than bfloat16's rounding explains.
    """
    ks = jax.random.split(jax.random.key(2), 3)
    query, key, value = (jax.random.normal(k, (1, 40, 2, 16)).astype(settings.dtype) for k in ks)
    data = jnp.arange(8, dtype=jnp.uint32)
    kernels = ("triton", "mosaic_gpu") if _has_hopper() else ("triton",)
    errors = []
    for precision in (None, "fp8"):
        *ours, want = (
            _private(settings, True, backend, True, precision, query, key, value, data)
            for backend in (*kernels, "xla")
        )
        want = want.astype(jnp.float32)
        errors += [float(jnp.max(jnp.abs(one.astype(jnp.float32) - want))) for one in ours]
    error = max(errors) / settings.value_bound
    # The noise differs by the two backends' rounding terms, 1 % at most.
    if not error < 0.02:
        raise RuntimeError(f"The private answer is {error} away from its definition.")
    return error


def _specs(settings: Settings, shape, gradient: bool):
    batch, length, heads, kv_heads, width, _ = shape
    query = jax.ShapeDtypeStruct((batch, length, heads, width), settings.dtype)
    key = jax.ShapeDtypeStruct((batch, length, kv_heads, width), settings.dtype)
    data = jax.ShapeDtypeStruct((8,), jnp.uint32)
    return (query, key, key, data) + ((query,) if gradient else ())


def _arrays(settings: Settings, shape):
    batch, length, heads, kv_heads, width, _ = shape
    counts = (heads, kv_heads, kv_heads, heads)
    ks = jax.random.split(jax.random.key(1), 4)
    query, key, value, cotangent = (
        jax.random.normal(k, (batch, length, count, width), settings.dtype)
        for k, count in zip(ks, counts, strict=True)
    )
    return query, key, value, jnp.arange(8, dtype=jnp.uint32), cotangent


def _times(program, given, iterations: int, kernel: str | None) -> list[float]:
    """Kernel milliseconds of so many runs, of which the named kernel must be a part."""
    from jax.experimental.mosaic.gpu import profiler

    runs = profiler.measure(program, iterations=iterations, aggregate=False)(*given)[1]
    if runs is None:
        raise RuntimeError("CUPTI saw no kernel at all.")
    for run in runs:
        if kernel is not None and not any(kernel in name for name, _ in run):
            raise RuntimeError(f"No kernel named {kernel} was seen, only {[x for x, _ in run]}.")
    return [sum(time for _, time in run) for run in runs]


@jax.jit
def _distance(one, other):
    """Root mean square of the difference over that of the other."""
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.sqrt(jnp.mean(jnp.square(one - other)) / jnp.mean(jnp.square(other)))


def measure(settings: Settings, passes: tuple[str, ...] = PASSES) -> list[dict]:
    """One dictionary for each shape, pass and implementation."""
    cases = [
        (name, which, label, fun)
        for name, shape in SHAPES.items()
        for which in passes
        for label, fun in _implementations(settings, shape[-1]).items()
        if which == "forward" or not FORWARD_ONLY & {name, label}
    ]

    def lower(case):
        name, which, label, fun = case
        gradient = which != "forward"
        fun = _with_gradient(fun) if gradient else fun
        try:
            return jax.jit(fun).lower(*_specs(settings, SHAPES[name], gradient))
        except Exception as reason:
            if not isinstance(reason, NotImplementedError) and "tokamax" not in label:
                raise
            print(f"{name:18} {which:17} {label:15} left out: {reason}", flush=True)
            return None

    def compiled(case, program):
        try:
            # CUPTI does not see the kernels in what XLA records to launch at once.
            return program.compile({"xla_gpu_enable_command_buffer": ""})
        except Exception as reason:
            if "tokamax" not in case[2]:
                raise
            print(
                f"{case[0]:18} {case[1]:17} {case[2]:15} left out: {str(reason)[:200]}", flush=True
            )
            return None

    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        # What is lowered compiles while the next is lowered.
        waiting = []
        for case in cases:
            program = lower(case)
            if program is not None:
                waiting.append((case, pool.submit(compiled, case, program)))
        cases = [case for case, _ in waiting]
        programs = [future.result() for _, future in waiting]
    run_id, rows, arrays, held = uuid.uuid4().hex[:12], [], (), ""
    plain = None
    for (name, which, label, _), program in zip(cases, programs, strict=True):
        if program is None:
            continue
        shape = SHAPES[name]
        if name != held:
            arrays, held = _arrays(settings, shape), name
        given = arrays if which != "forward" else arrays[:4]
        out = jax.block_until_ready(program(*given))
        more = {}
        if which == "forward" and label == "mosaic_plain":
            plain = out
        if which == "forward" and label == "mosaic_plain_fp8":
            more["fp8_error"] = round(float(_distance(out, plain)), 6)
        kernel = {"triton": "dpfa_forward", "mosaic": "dpfa_mosaic"}.get(label.split("_")[0])
        try:
            times = _times(program, given, settings.iterations, kernel)
        except RuntimeError as reason:
            print(f"{name:18} {which:17} {label:15} left out: {reason}", flush=True)
            continue
        memory = program.memory_analysis()
        batch, length, heads, kv_heads, width, causal = shape
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
        rows.append(
            {
                "shape": name,
                "batch": batch,
                "q_len": length,
                "kv_len": length,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": width,
                "causal": causal,
                "pass": which,
                "implementation": label,
                "milliseconds": round(statistics.median(times), 5),
                "spread": round((max(times) - min(times)) / statistics.median(times), 4),
                "peak_bytes": peak + memory.temp_size_in_bytes,
                "run_id": run_id,
                **more,
            }
        )
        print(f"{name:18} {which:17} {label:15} {rows[-1]['milliseconds']:9.4f} ms", flush=True)
    return rows


def plot(folder: pathlib.Path, figures: pathlib.Path) -> pathlib.Path:
    """Draws the last run: time divided by that of cuDNN without privacy, for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    line = json.loads((folder / "attention_speed.jsonl").read_text().splitlines()[-1])
    rows, shapes = line["metrics"], list(dict.fromkeys(row["shape"] for row in line["metrics"]))
    times = {(r["pass"], r["shape"], r["implementation"]): r["milliseconds"] for r in rows}
    passes = [which for which in PASSES if any(which == key[0] for key in times)]
    shown = ("triton_private", "mosaic_private", "mosaic_private_fp8", "bolted_on")
    figure, axes = pyplot.subplots(len(passes), 1, figsize=(9, 3.2 * len(passes)), squeeze=False)
    for (ax,), which in zip(axes, passes, strict=True):
        for number, name in enumerate(shown):
            found = [
                (place + 0.21 * (number - 1.5), times[which, shape, name])
                for place, shape in enumerate(shapes)
                if (which, shape, name) in times
            ]
            rivals = [times[which, shapes[round(x)], "cudnn"] for x, _ in found]
            heights = [time / rival for (_, time), rival in zip(found, rivals, strict=True)]
            ax.bar([x for x, _ in found], heights, 0.2, label=name)
        ax.axhline(1.0, color="gray", linestyle=":")
        ax.set(ylabel="time / cuDNN's", title=which.replace("_", " + "))
        ax.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=8)
    axes[0][0].legend()
    figure.suptitle(f"{line['device']}, commit {line['commit']}: 1 is cuDNN without privacy")
    figure.tight_layout()
    figures.mkdir(parents=True, exist_ok=True)
    path = figures / "attention_speed.png"
    figure.savefig(path, dpi=110)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--smoke", action="store_true", help="check the answers, time nothing")
    parser.add_argument("--forward", action="store_true", help="time forward passes only")
    parser.add_argument("--plot", action="store_true", help="draw the last run")
    parser.add_argument("--output", type=pathlib.Path, default=_common.RESULTS)
    parser.add_argument("--figures", type=pathlib.Path, default=_common.FIGURES)
    given = parser.parse_args(arguments)
    if given.plot:
        print(plot(given.output, given.figures))
        return
    settings, watch = Settings(), _common.Stopwatch()
    error = check(settings)
    print(f"largest difference from the definition: {error:.2e} of the value bound")
    if given.smoke:
        return
    if jax.default_backend() != "gpu":
        sys.exit("Timings need an NVIDIA GPU. Pass --smoke to check the answers on this device.")
    rows = measure(settings, PASSES[:1] if given.forward else PASSES)
    _common.append_line(given.output, "attention_speed", settings, rows, watch.seconds())


if __name__ == "__main__":
    main()
