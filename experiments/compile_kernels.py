"""Do the kernels compile for an H200 without spilling registers, on a machine with no GPU?

    make aot

Runs in an environment of its own with CUDA's compiler and JAX's CUDA plugin, but no driver. Each
program is compiled to machine code; ptxas reports registers and spills, and more spilled bytes than
`ALLOWED` says is a failure. So is more memory than `MEMORY` says, as the compiler reckons it. The
loops of matrix products of the Hopper kernels are looked at in the machine's code: an operand's
address that ptxas keeps in each thread's registers or in local memory holds up the matrix unit.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import stat
import sys
import tempfile
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import mosaic_gpu, mosaic_gpu_gradients, mosaic_gpu_records, norms, triton

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""

# name: (length, heads, kv heads, width, dtype, changes to the spec)
NOISY = {"score_cap": 4.0, "noise": "sums", "noise_std": 1.0, "denominator_std": 1.0, "ball": 1.0}
PROGRAMS = {
    "D64": (2048, 2, 2, 64, "bfloat16", NOISY),
    "D64 causal": (2048, 2, 2, 64, "bfloat16", {**NOISY, "is_causal": True}),
    "D64 long": (8192, 2, 2, 64, "bfloat16", NOISY),
    "D80": (256, 2, 2, 80, "bfloat16", NOISY),
    "D128": (2048, 2, 2, 128, "bfloat16", NOISY),
    "D128 causal": (2048, 2, 2, 128, "bfloat16", {**NOISY, "is_causal": True}),
    "D128 long": (8192, 4, 1, 128, "bfloat16", NOISY),
    "D128 plain": (2048, 2, 2, 128, "bfloat16", {}),
    "D128 float16": (2048, 2, 2, 128, "float16", NOISY),
    "D64 float32": (2048, 2, 2, 64, "float32", NOISY),
}

PRIVATE = {**NOISY, "on_grid": True}
ROWS = {"noise": "rows", "noise_std": 1.0, "row_clip": 1.0, "on_grid": True}
# Kernels of backend="mosaic_gpu", gradients where it has its own, written in the same way.
HOPPER = {
    "D64 hopper": (2048, 2, 2, 64, "bfloat16", PRIVATE),
    "D64 hopper causal": (2048, 2, 2, 64, "bfloat16", {**PRIVATE, "is_causal": True}),
    "D64 hopper short": (512, 2, 2, 64, "bfloat16", PRIVATE),
    "D80 hopper": (256, 2, 2, 80, "bfloat16", PRIVATE),
    "D96 hopper": (512, 2, 2, 96, "bfloat16", PRIVATE),
    "D128 hopper": (4096, 2, 2, 128, "bfloat16", PRIVATE),
    "D128 hopper causal": (2048, 4, 1, 128, "bfloat16", {**PRIVATE, "is_causal": True}),
    "D128 hopper short": (512, 2, 2, 128, "bfloat16", PRIVATE),
    "D128 hopper plain": (2048, 2, 2, 128, "bfloat16", {}),
    "D128 hopper rows": (2048, 2, 2, 128, "bfloat16", ROWS),
    "D128 hopper float16": (2048, 2, 2, 128, "float16", PRIVATE),
    "D128 hopper window": (2048, 2, 2, 128, "bfloat16", {**PRIVATE, "window": (256, 0)}),
    "D64 hopper window": (2048, 2, 2, 64, "bfloat16", {**PRIVATE, "window": (256, 0)}),
    "D128 hopper float8": (4096, 2, 2, 128, "bfloat16", {**PRIVATE, "float8_scores": True}),
    "D128 hopper float8 causal": (
        *(2048, 4, 1, 128, "bfloat16"),
        {**PRIVATE, "float8_scores": True, "is_causal": True},
    ),
    "D192 hopper": (4096, 2, 2, 192, "bfloat16", PRIVATE),
    "D256 hopper": (4096, 2, 2, 256, "bfloat16", PRIVATE),
    "D256 hopper causal": (2048, 4, 1, 256, "bfloat16", {**PRIVATE, "is_causal": True}),
    "D256 hopper long": (65536, 2, 2, 256, "bfloat16", PRIVATE),
    "D256 hopper plain": (2048, 2, 2, 256, "bfloat16", {}),
    "D256 hopper short": (512, 2, 2, 256, "bfloat16", PRIVATE),
}

# What `context_parallel_attention` runs there: sums without noise, written in the same way.
SUMS = {
    "sums D64": (8192, 2, 2, 64, "bfloat16", NOISY),
    "sums D128": (8192, 4, 1, 128, "bfloat16", NOISY),
    "sums D256": (40000, 2, 2, 256, "bfloat16", {**NOISY, "float8_scores": True}),
}

# What `private_attention` runs on backend="mosaic_gpu", the branch for rows that are not finite
# included: (batch, length, heads, kv heads, width, changes to the spec), and the most memory that
# forward and forward with gradients may hold, over that of their arguments and answers.
MEMORY = {
    "memory D128": ((4, 4096, 16, 16, 128, PRIVATE), (1.05, 1.27)),
    "memory D128 T2048": ((8, 2048, 16, 16, 128, PRIVATE), (1.05, 1.27)),
    "memory D128 T16384": ((1, 16384, 16, 16, 128, PRIVATE), (1.05, 1.27)),
    # The third sums are double words.
    "memory D128 T65536": ((1, 65536, 16, 16, 128, PRIVATE), (1.05, 1.27)),
    "memory D64": ((4, 4096, 32, 32, 64, PRIVATE), (1.05, 1.28)),
    "memory BERT": ((32, 512, 16, 16, 64, PRIVATE), (1.05, 1.28)),
    "memory ViT": ((64, 256, 16, 16, 80, PRIVATE), (1.05, 1.28)),
    "memory GQA": ((2, 8192, 32, 8, 128, {**PRIVATE, "is_causal": True}), (1.05, 1.42)),
    # Keys in eight bits; gradients have queries and keys that were rounded, besides.
    "memory float8": ((4, 4096, 16, 16, 128, {**PRIVATE, "float8_scores": True}), (1.175, 1.52)),
}
SPILLED = 172
"""Bytes that kernels of `MEMORY` may spill: they mark queries, clear what is not finite, or take
shares of a tile's keys, once in a call."""

# Norms of gradients, (batch, rows, d, p): from Gram tiles, and from tiles of the product.
NORMS = {
    "norm Gram": (64, 256, 768, 3072),
    "norm Gram, tails": (64, 200, 776, 3080),
    "norm direct": (8, 2048, 768, 768),
    "norm direct, tails": (8, 2000, 776, 776),
}

# Record weights, (memories, length, heads, width).
RECORDS = {
    "records D64": (2, 1000, 16, 64),
    "records D80": (2, 1000, 12, 80),
    "records D128": (2, 1000, 40, 128),
}

# (program, kernel): bytes that may be spilled; what is not here may spill nothing.
ALLOWED: dict[tuple[str, str], int] = {
    ("D80", "dpfa_key_gradient_kernel"): 60,
    ("D128", "dpfa_forward_kernel"): 68,
    ("D128", "dpfa_key_gradient_kernel"): 40,
    ("D128 causal", "dpfa_key_gradient_kernel"): 128,
    # Of the double word, once in 4096 keys: the loop over tiles spills one register.
    ("D128 long", "dpfa_forward_kernel"): 868,
    ("D128 long", "dpfa_key_gradient_kernel"): 76,
    ("D128 float16", "dpfa_forward_kernel"): 68,
    ("D128 float16", "dpfa_key_gradient_kernel"): 44,
    ("D64 hopper", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 4,
    ("D64 hopper short", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 4,
    ("D80 hopper", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 8,
    ("D96 hopper", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 8,
    ("D128 hopper causal", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 12,
    ("D128 hopper short", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 8,
    ("D128 hopper plain", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 4,
    ("D128 hopper rows", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 4,
    ("D64 hopper causal", "dpfa_mosaic_column_kernel_mosaic_gpu_kernel"): 16,
    # Of the outer accumulator, at the end of a group of keys only, and where a tile begins.
    ("D128 hopper", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 68,
    ("D128 hopper float8", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 8,
    ("D128 hopper float16", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 68,
    ("D128 hopper causal", "dpfa_mosaic_column_kernel_mosaic_gpu_kernel"): 12,
    ("D128 hopper window", "dpfa_mosaic_column_kernel_mosaic_gpu_kernel"): 20,
    ("D128 hopper window", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 52,
    ("norm Gram, tails", "dpfa_gram_kernel"): 200,
    ("D128 hopper causal", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 32,
    ("D64 hopper window", "dpfa_mosaic_column_kernel_mosaic_gpu_kernel"): 20,
    ("D128 hopper float8 causal", "dpfa_mosaic_column_kernel_mosaic_gpu_kernel"): 12,
    ("D128 hopper float8 causal", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 56,
    ("D128 hopper float8 causal", "dpfa_mosaic_gradient_kernel_mosaic_gpu_kernel"): 12,
    # Beside the last noise, once in 8192 keys, where sums in memory are passed on, where a tile
    # begins, and, where there are shares of tiles, beside their sums.
    ("D256 hopper", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 2568,
    ("D192 hopper", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 468,
    ("D256 hopper causal", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 312,
    ("D256 hopper long", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 1628,
    ("D256 hopper short", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 16,
    ("sums D256", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 464,
    # Of the branch for rows that are not finite.
    ("memory ViT", "dpfa_mosaic_forward_kernel_repair_mosaic_gpu_kernel"): 312,
    ("memory ViT, gradients", "dpfa_mosaic_forward_kernel_repair_mosaic_gpu_kernel"): 312,
    ("memory ViT, gradients", "dpfa_key_gradient_kernel_repair"): 212,
}

# Detours of loops with matrix products, where there are any.
DETOURS = {
    "dpfa_mosaic_column_kernel_mosaic_gpu_kernel": 9,
    # Addresses of sixteen steps of a product, of which no uniform registers are left for some.
    ("D192 hopper", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 4,
    ("D256 hopper", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 17,
    ("D256 hopper causal", "dpfa_mosaic_column_kernel_mosaic_gpu_kernel"): 24,
    ("D256 hopper causal", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 19,
    ("D256 hopper long", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 14,
    ("D256 hopper short", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 17,
    # With two tiles of keys, which are faster there than three.
    ("memory BERT", "dpfa_mosaic_forward_kernel_repair_mosaic_gpu_kernel"): 3,
    ("memory BERT, gradients", "dpfa_mosaic_forward_kernel_repair_mosaic_gpu_kernel"): 3,
    ("memory ViT", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 8,
    ("memory ViT, gradients", "dpfa_mosaic_forward_kernel_mosaic_gpu_kernel"): 8,
}

# (program, kernel) whose matrix products ptxas puts one after another: slower than need be.
WAITING = {
    ("D64 causal", "dpfa_query_gradient_kernel"),
    ("D128 causal", "dpfa_query_gradient_kernel"),
}

_REPORTS = "PTXAS_REPORTS"
_WRAPPER = f"""#!/bin/sh
# Keeps the report of every call, in the folder that the caller names, beside passing it on.
if [ -z "${_REPORTS}" ]; then exec "$0.real" "$@"; fi
case "$*" in *--version*) exec "$0.real" "$@";; esac
"$0.real" "$@" -v > "${_REPORTS}/report.$$" 2>&1; code=$?
cat "${_REPORTS}/report.$$" >&2
exit $code
"""


def _keep_reports(folder: str) -> None:
    """Puts a script before this environment's own ptxas that writes down what it says."""
    tools = [pathlib.Path(path) / "nvidia" for path in sys.path]
    found = [ptxas for tool in tools for ptxas in tool.glob("*/bin/ptxas")]
    if not found:
        sys.exit("No ptxas in this environment. Run `make aot`, which installs it.")
    ptxas = found[0]
    real = ptxas.with_name("ptxas.real")
    if not real.exists():
        ptxas.rename(real)
    os.environ[_REPORTS] = folder
    ptxas.write_text(_WRAPPER)
    ptxas.chmod(ptxas.stat().st_mode | stat.S_IXUSR)


def _programs(case):
    length, heads, kv_heads, width, dtype, changes = case
    spec = Spec(**{"scale": width**-0.5, "score_cap": None, **changes})
    query = jax.ShapeDtypeStruct((1, length, heads, width), dtype)
    key = jax.ShapeDtypeStruct((1, length, kv_heads, width), dtype)
    weights = jax.ShapeDtypeStruct((1, length, kv_heads), jnp.float32)
    data = jax.ShapeDtypeStruct((8,), jnp.uint32)

    def both(query, key, value, weights, data, cotangent):
        operands = Operands(query, key, value, weights, noise_key=data)
        out, residuals = triton.forward(operands, spec)
        columns = None if spec.score_cap is None else triton.column_squares(operands, spec)
        return out, triton.backward(operands, spec, residuals, cotangent)[:4], columns

    return both, (query, key, key, weights, data, query)


def _hopper(case):
    *_, width, _, changes = case
    spec = Spec(**{"scale": width**-0.5, "score_cap": None, **changes})
    _, arrays = _programs(case)

    def run(query, key, value, weights, data, cotangent):
        operands = Operands(query, key, value, weights, noise_key=data)
        out, residuals = mosaic_gpu.forward(operands, spec)
        columns = None if spec.score_cap is None else mosaic_gpu.column_squares(operands, spec)
        clean, mass, factor, _ = residuals
        grads = None
        if mosaic_gpu_gradients.lacking(operands, spec) is None:
            grads = mosaic_gpu_gradients.fused(operands, spec, residuals, cotangent)[:4]
        return out, clean, mass, factor, columns, grads

    return run, arrays


def _sums(case):
    *_, width, _, changes = case
    spec = Spec(**{"scale": width**-0.5, **changes})
    _, (*arrays, _, _) = _programs(case)

    def run(*arrays):
        return mosaic_gpu.sums(Operands(*arrays), spec)

    return run, arrays


def _calls(case):
    """A call with and without gradients, and their arguments."""
    batch, length, heads, kv_heads, width, changes = case
    spec = Spec(**{"scale": width**-0.5, "mark_queries": True, **changes})
    query = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((batch, length, kv_heads, width), jnp.bfloat16)
    data = jax.ShapeDtypeStruct((8,), jnp.uint32)
    # As `private_attention` does: keys are judged where they are rounded, or in the forward kernel.
    spec = dataclasses.replace(spec, judge_keys=not spec.float8_scores)

    def weigh(key, value):
        if spec.float8_scores:
            return mosaic_gpu.narrow_records(key, value, 30.0)
        found = mosaic_gpu.value_log_weights(value, 30.0)
        assert found is not None
        return found

    def call(query, key, value, data):
        weights, flags, *narrow = weigh(key, value)
        operands = Operands(query, key, value, weights, noise_key=data, flags=flags)
        if narrow:
            operands = operands._replace(narrow_key=narrow[0])
        out, residuals = mosaic_gpu.forward(operands, spec)
        return operands, out, residuals

    def forward(*arrays):
        return call(*arrays)[1]

    def both(query, key, value, data, cotangent):
        operands, out, residuals = call(query, key, value, data)
        grads = mosaic_gpu.backward(operands, spec, residuals, cotangent)[:4]
        pull = jax.vjp(lambda value: weigh(key, value)[0], value)[1]
        return out, *grads[:2], grads[2] + pull(grads[3])[0]

    arrays = query, key, key, data
    return (forward, arrays), (both, (*arrays, query))


def _norms(case):
    batch, rows, *widths = case
    specs = tuple(jax.ShapeDtypeStruct((batch, rows, width), jnp.bfloat16) for width in widths)
    return jax.vmap(norms.product_norm), specs


def _records(case):
    rows = jax.ShapeDtypeStruct(case, jnp.bfloat16)

    def run(key, value):
        return mosaic_gpu_records.narrow_records(key, value, 1.0)

    return run, (rows, rows)


@contextlib.contextmanager
def _kept_output(folder: str):
    """Mosaic GPU compiles in this process and prints its reports: they go to a file beside."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(pathlib.Path(folder) / "printed", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for stream, number in zip(kept, (1, 2), strict=True):
                os.dup2(stream, number)
                os.close(stream)


_DETOURS = ("R2UR", "LDL", "STL")
"""Instructions that bring a number to where all threads of a warp have it, and local memory's."""


def _detours(code: str) -> int:
    """The most `_DETOURS` of an innermost loop with matrix products, in a kernel's machine code."""
    places, lines, worst = {}, [], 0
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)([^;]*)", line)
        if label:
            places[label[1]] = len(lines)
        elif instruction:
            lines.append(instruction.groups())
    loops = []
    for place, (name, rest) in enumerate(lines):
        target = re.search(r"\.L_x_\d+", rest)
        if name == "BRA" and target and places.get(target[0], place + 1) <= place:
            loops.append((places[target[0]], place))
    for first, last in loops:
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        names = [name for name, _ in lines[first : last + 1]]
        if not inner and any(name.endswith("GMMA") for name in names):
            worst = max(worst, sum(name in _DETOURS for name in names))
    return worst


def _reports(folder: str) -> dict[str, tuple[int, int, bool, int]]:
    """What was said since the last call: kernel → numbers.

    Returns:
      Registers, spilled bytes, whether products wait for each other, and what `_detours` counts.
    """
    found, detours = {}, {}
    for path in pathlib.Path(folder).iterdir():
        text = path.read_text()
        path.unlink()
        for code in text.split("\t.section\t.text.")[1:]:
            detours[re.split(r'[,"\s]', code)[0]] = _detours(code)
        waiting = set(re.findall(r"instructions are serialized .* in the function '(\w+)'", text))
        for block in text.split("Compiling entry function '")[1:]:
            registers = re.search(r"Used (\d+) registers", block)
            spilled = re.search(r"(\d+) bytes spill stores", block)
            if registers and spilled:
                name = block.split("'")[0]
                found[name] = (int(registers[1]), int(spilled[1]), name in waiting)
    # The machine's code of Mosaic's kernels only is printed.
    looked_at = {name: 0 for name in found if not name.endswith("_mosaic_gpu_kernel")} | detours
    if set(found) - set(looked_at):
        sys.exit("No machine code was printed. Run `make aot`, which installs nvdisasm.")
    return {name: (*numbers, looked_at[name]) for name, numbers in found.items()}


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    failed = []
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        _keep_reports(folder)
        made = {name: _programs(case) for name, case in PROGRAMS.items()}
        made |= {name: _hopper(case) for name, case in HOPPER.items()}
        made |= {name: _sums(case) for name, case in SUMS.items()}
        made |= {name: _norms(case) for name, case in NORMS.items()}
        made |= {name: _records(case) for name, case in RECORDS.items()}
        limits = {}
        for name, (case, allowed) in MEMORY.items():
            names = name, f"{name}, gradients"
            made |= dict(zip(names, _calls(case), strict=True))
            limits |= dict(zip(names, allowed, strict=True))
        for name, (fun, specs) in made.items():
            specs = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in specs]
            with _kept_output(folder):
                program = jax.jit(fun, out_shardings=place).lower(*specs).compile()
            kernels = {k: v for k, v in _reports(folder).items() if k.startswith("dpfa_")}
            if not kernels:
                failed.append(f"{name}: no report of any kernel")
            for kernel, (registers, spilled, waits, detours) in sorted(kernels.items()):
                more = ", products wait" * waits + f", {detours} detours" * (detours > 0)
                print(f"{name:29} {kernel:55} {registers} registers, {spilled} spilled{more}")
                if waits and (name, kernel) not in WAITING:
                    failed.append(f"{name}: a product of {kernel} waits for the one before it")
                if detours > DETOURS.get((name, kernel), DETOURS.get(kernel, 0)):
                    failed.append(f"{name}: {detours} detours in a loop of {kernel}")
                if spilled > ALLOWED.get((name, kernel), SPILLED if name in limits else 0):
                    failed.append(f"{name}: {kernel} spills {spilled} bytes")
            if name in limits:
                sizes: Any = program.memory_analysis()
                given = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
                held = 1 + sizes.temp_size_in_bytes / given
                print(f"{name:29} holds {held:.4f} times its arguments and answers")
                if held > limits[name]:
                    failed.append(f"{name}: holds {held:.4f} times its arguments and answers")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
