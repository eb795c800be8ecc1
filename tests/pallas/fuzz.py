"""Do random calls of a kernel backend, forward and backward, equal the definition in float64?

    python3 -m tests.pallas.fuzz                          # 1,000 calls on a GPU, within 4 minutes
    python3 -m tests.pallas.fuzz --first 17 --count 1     # the one that failed
    JAX_PLATFORMS=cpu python3 -m tests.pallas.fuzz --count 5     # interpreted

The definition is plain NumPy, so that a thousand shapes cost no compilation but the kernels'; it
shares nothing with the library but the meaning of `Operands` and `Spec`, and the unit noise. What
takes the time is compiling three kernels a call: processes share it, since tracing and lowering
hold the interpreter's lock.
"""

import argparse
import collections
import concurrent.futures
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import reference
from dpfa_jax._typing import Operands, Spec
from tests.pallas import suite

LARGEST = {"batch": 3, "length": 459, "heads": 9, "width": 256}
"""Of the noise that `case` may ask for: that of a smaller call is its corner."""

ALLOWED = {"float32": 1e-4, "bfloat16": 2 * 2.0**-8, "float16": 2 * 2.0**-11}
"""Of the norm of an answer or a gradient and of its terms: two roundings of each term, and in
float32 what the device's normals differ by (2⁻¹⁴ of one, where floors are five of their std)."""

_LAST_CALL = 15.0
"""Seconds that one call may take: none begins later than this before the time is up."""


def case(seed: int) -> tuple[Operands, Spec, np.ndarray]:
    """A random call: operands, spec and cotangent, NumPy's arrays."""
    source = np.random.default_rng(seed)

    def pick(*options):
        return options[source.integers(len(options))]

    batch, kv_heads, group = source.integers(1, 4), source.integers(1, 4), pick(1, 1, 2, 3)
    queries = int(pick(1, 16, 64, 128, source.integers(1, 300)))
    keys = int(pick(queries, 1, 64, source.integers(1, 300), source.integers(300, 1500)))
    width, value_width = (8 * int(pick(8, 16, source.integers(1, 33))) for _ in range(2))
    value_width = pick(width, value_width)
    memories = pick(batch, 1)
    heads = kv_heads * group
    # A kernel of float32 takes three times as long to compile as others.
    dtype = jnp.dtype(pick(*3 * ("bfloat16", "float16"), "float32"))
    # NumPy's arrays throughout: on a device every conversion is a program to compile.
    query, key, value, cotangent = (
        source.normal(size=shape).astype(dtype)
        for shape in (
            (batch, queries, heads, width),
            (memories, keys, kv_heads, width),
            (memories, keys, kv_heads, value_width),
            (batch, queries, heads, value_width),
        )
    )
    weights = -source.exponential(size=(memories, keys, kv_heads)).astype(np.float32)
    weights[source.random(weights.shape) < 0.1] = -np.inf
    extra = {}
    if source.random() < 0.2:
        shape = (pick(1, batch), pick(1, heads), pick(1, queries), keys)
        extra["mask"] = source.random(shape) < 0.8
    if source.random() < 0.2:
        extra["query_segments"] = source.integers(0, 3, (batch, queries), np.int32)
        extra["key_segments"] = source.integers(0, 3, (memories, keys), np.int32)
    if source.random() < 0.2:
        extra["key_lengths"] = source.integers(0, keys + 1, batch, np.int32)
    noise = pick("none", "sums", "sums", "rows")
    capped = noise == "sums" or pick(True, False)
    spec = Spec(
        scale=width**-0.5,
        score_cap=float(source.uniform(0, 3)) if capped else None,
        is_causal=pick(True, False),
        window=pick(None, None, (int(source.integers(0, 100)), int(source.integers(0, 100)))),
        noise=noise,
        noise_std=0.01,
        denominator_std=pick(0.01, float("inf")) if noise == "sums" else 0.0,
        # Denominators that lie on one side of it in one format, on the other in another, are rare.
        floor=0.05 if capped else 1e-30,
        row_clip=1.0 if noise == "rows" else None,
    )
    operands = Operands(query, key, value, weights, noise_key=np.asarray(suite.KEY_DATA), **extra)
    if source.random() < 0.2:
        operands = operands._replace(noise_row=np.int32(16 * source.integers(0, 11)))
    return operands, spec, cotangent


def _visible(operands: Operands, spec: Spec) -> np.ndarray:
    """Boolean (B, N, T, S)."""
    batch, length, heads, _ = operands.query.shape
    keys = operands.key.shape[1]
    rows, columns = np.arange(length)[:, None], np.arange(keys)[None, :]
    seen = np.ones((batch, heads, length, keys), bool)
    if spec.is_causal:
        seen &= columns <= rows
    if spec.window is not None:
        seen &= (columns >= rows - spec.window[0]) & (columns <= rows + spec.window[1])
    if operands.mask is not None:
        seen &= np.asarray(operands.mask)
    if operands.query_segments is not None:
        ours, theirs = np.asarray(operands.query_segments), np.asarray(operands.key_segments)
        seen &= (ours[:, :, None] == theirs[:, None, :])[:, None]
    if operands.key_lengths is not None:
        seen &= (columns < np.asarray(operands.key_lengths)[:, None, None])[:, None]
    return seen


class Definition(NamedTuple):
    """What is expected of a call, float64.

    Attributes:
      cotangent: (B, T, N, h), 0 for queries so near an edge (of the floor, of the row clip) that
        rounding decides on which side of it their gradient is taken.
      values: the answer, and gradients in query, key, value and log_weights.
      terms: for each entry of these the root of the sum of squares of the terms it is the sum of,
        which is how rounding each of them shows.
    """

    cotangent: np.ndarray
    values: tuple
    terms: tuple


def definition(operands: Operands, spec: Spec, cotangent: np.ndarray, noise: tuple) -> Definition:
    """Answer and gradients as they should be.

    Args:
      operands: from `case`.
      spec: from `case`.
      cotangent: (B, T, N, h).
      noise: unit noise of N and of D, in the corners of arrays (B, T, N, h) and (B, T, N).
    """
    batch, length, heads, _ = operands.query.shape
    memories, _, kv_heads, _ = operands.key.shape
    group = heads // kv_heads

    def wide(array):
        array = np.asarray(array, np.float64)
        array = np.broadcast_to(array, (batch, *array.shape[1:]))
        return np.repeat(np.moveaxis(array, 2, 1), group, axis=1)  # (B, N, S, ...)

    def narrow(array):
        array = array.reshape(batch, kv_heads, group, *array.shape[2:]).sum(2)
        array = np.moveaxis(array, 1, 2)
        return array if memories == batch else array.sum(0, keepdims=True)

    query = np.moveaxis(np.asarray(operands.query, np.float64), 2, 1)
    key, value, extra = wide(operands.key), wide(operands.value), wide(operands.log_weights)
    cotangent = np.moveaxis(np.asarray(cotangent, np.float64), 2, 1)
    seen = _visible(operands, spec) & (extra > -np.inf)[:, :, None, :]
    scores = spec.scale * query @ np.swapaxes(key, 2, 3)
    if spec.score_cap is None:
        best = np.max(np.where(seen, scores, -np.inf), -1, keepdims=True)
        level = scores - np.where(np.isfinite(best), best, 0.0)
    else:
        level = np.minimum(scores, spec.score_cap) - spec.score_cap
    level = level + np.where(extra > -np.inf, extra, 0.0)[:, :, None, :]
    weights = np.exp(np.where(seen, level, -np.inf))
    top, mass = weights @ value, weights.sum(-1)
    first = 0 if operands.noise_row is None else int(operands.noise_row)
    rows = slice(first, first + length)
    matrix, row = (np.moveaxis(z[:batch, rows, :heads], 2, 1).astype(np.float64) for z in noise)
    matrix = matrix[..., : value.shape[3]]
    if spec.noise == "sums":
        top = top + spec.noise_std * matrix
        if spec.denominator_std < np.inf:
            mass = mass + spec.denominator_std * row
    released = spec.denominator_std < np.inf
    below = np.maximum(mass, spec.floor) if released else np.full_like(mass, spec.floor)
    ratio = top / below[..., None]
    sure = 8 * suite.ROUNDOFF[str(operands.key.dtype)]
    near = released & (np.abs(mass - spec.floor) <= sure * np.abs(mass))
    factor = 1.0
    if spec.row_clip is not None:
        norm = np.linalg.norm(ratio, axis=-1)
        near |= np.abs(norm - spec.row_clip) <= sure * norm
        factor = np.minimum(1.0, spec.row_clip / np.maximum(norm, 1e-300))[..., None]
    cotangent = np.where(near[..., None], 0.0, cotangent)
    answer, d_ratio, d_ratio_squares = ratio * factor, cotangent, np.square(cotangent)
    if spec.row_clip is not None:
        unit = ratio / np.maximum(norm, 1e-300)[..., None]
        along = np.sum(unit * cotangent, -1, keepdims=True) * unit
        along = np.where(factor < 1, along, 0.0)
        d_ratio = factor * (cotangent - along)
        d_ratio_squares = np.square(factor) * (np.square(cotangent) + np.square(along))
    if spec.noise == "rows":
        answer = answer + spec.noise_std * matrix
    d_top = d_ratio / below[..., None]
    flows = released & (mass > spec.floor)
    d_mass = -np.sum(d_top * ratio, -1) * flows
    d_weights = d_top @ np.swapaxes(value, 2, 3)
    free = spec.scale if spec.score_cap is None else spec.scale * (scores < spec.score_cap)

    def columns(rows, others):
        return narrow(np.swapaxes(rows, 2, 3) @ others)

    d_level = weights * (d_weights + d_mass[..., None])
    d_scores = d_level * free
    # The terms of the same products, before any takes away what another brought.
    top_terms = d_ratio_squares / np.square(below)[..., None]
    mass_terms = np.sum(top_terms * np.square(ratio), -1) * flows + np.square(d_mass)
    level_terms = top_terms @ np.square(np.swapaxes(value, 2, 3)) + np.square(d_weights)
    level_terms = np.square(weights) * (level_terms + mass_terms[..., None])
    score_terms = level_terms * np.square(free)
    values = (
        np.moveaxis(answer, 1, 2),
        np.moveaxis(d_scores @ key, 1, 2),
        columns(d_scores, query),
        columns(weights, d_top),
        narrow(d_level.sum(2)),
    )
    squares = (
        np.moveaxis(np.square(weights) @ np.square(value) / np.square(below)[..., None], 1, 2),
        np.moveaxis(score_terms @ np.square(key), 1, 2),
        columns(score_terms, np.square(query)),
        columns(np.square(weights), top_terms),
        narrow(level_terms.sum(2)),
    )
    return Definition(np.moveaxis(cotangent, 1, 2), values, tuple(map(np.sqrt, squares)))


def unit_noise() -> tuple[np.ndarray, np.ndarray]:
    """Of N and of D, as large as any `case` wants; computed on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        drawn = reference.noise_field(jnp.asarray(suite.KEY_DATA), **LARGEST)
        return np.asarray(drawn[0]), np.asarray(drawn[1])


def distance(module: Any, seed: int, noise: tuple) -> float | None:
    """The largest distance of an answer or gradient from the definition's, in what is allowed.

    Args:
      module: of a kernel backend.
      seed: of `case`.
      noise: from `unit_noise`.

    Returns:
      A number that is to be at most 1, or None where the backend says that it cannot do the call.
    """
    operands, spec, cotangent = case(seed)
    if module.supports(operands, spec) is not None:
        return None

    def both(operands, cotangent):
        out, residuals = module.forward(operands, spec)
        return (out, *module.backward(operands, spec, residuals, cotangent)[:4])

    expected = definition(operands, spec, cotangent, noise)
    found = jax.device_get(jax.jit(both)(operands, expected.cotangent.astype(cotangent.dtype)))
    far = []
    for ours, want, terms in zip(found, expected.values, expected.terms, strict=True):
        scale = np.linalg.norm(want) + np.linalg.norm(terms)
        error = np.linalg.norm(np.asarray(ours, np.float64) - want)
        # Where nothing is seen, nothing is what is expected.
        far.append(error / scale if scale > 0 else (0.0 if error == 0 else np.inf))
    worst = np.nan_to_num(np.max(far), nan=np.inf)
    return float(worst) / ALLOWED[str(operands.key.dtype)]


def _answer(backend: str, seed: int, folder: str, end: float) -> tuple[int, str, float]:
    """(seed, what became of it, its distance), in a process of its own."""
    if time.time() > end:
        return seed, "late", 0.0
    noise = tuple(np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("matrix", "row"))
    module = importlib.import_module(f"dpfa_jax.pallas.{backend}")
    try:
        found = distance(module, seed, noise)
    except Exception as reason:  # whatever stopped it is what this seed found
        return seed, f"{type(reason).__name__}: {str(reason)[:300]}", np.inf
    if found is None:
        return seed, "left out", 0.0
    return seed, "right" if found <= 1 else "wrong", found


def run(backend: str, seeds: range, seconds: float, processes: int) -> int:
    """Prints what is wrong, then a summary; 0 if every seed was answered and right or left out."""
    start = time.time()
    # For the processes, which import afresh: each has one core and takes memory as it needs it.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_force_compilation_parallelism=1".strip()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    found, worst = collections.Counter(), 0.0
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool,
    ):
        for name, noise in zip(("matrix", "row"), unit_noise(), strict=True):
            np.save(f"{folder}/{name}.npy", noise)
        end = start + seconds - _LAST_CALL
        waiting = [pool.submit(_answer, backend, seed, folder, end) for seed in seeds]
        for done in concurrent.futures.as_completed(waiting):
            seed, became, far = done.result()
            if far > 1:
                print(f"seed {seed}: {became}, {far:.3g} of what is allowed", flush=True)
                became = "wrong"
            else:
                worst = max(worst, far)
            found[became] += 1
    print(
        f"{backend}: {found['right']} of {len(seeds)} seeds from {seeds.start} right, "
        f"{found['wrong']} wrong, {found['left out']} left out, {found['late']} not reached in "
        f"{time.time() - start:.0f} s; the farthest that is right {worst:.2f} of what is allowed"
    )
    return int(found["wrong"] + found["late"] > 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=1000, help="how many seeds")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit")
    parser.add_argument("--processes", type=int, default=cores, help="that compile side by side")
    parser.add_argument("--backend", choices=("triton", "mosaic_gpu"), default="triton")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.count)
    processes = min(given.processes, given.count)
    sys.exit(run(given.backend, seeds, given.seconds, processes))


if __name__ == "__main__":
    main()
