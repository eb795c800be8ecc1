"""Do the kernels read and write only what is theirs, and wait for each other where they must?

    python3 -m tests.pallas.sanitize                           # on a GPU; `make sanitize`
    python3 -m tests.pallas.sanitize --only "memcheck broken"  # one of them

`compute-sanitizer` runs small calls, forward and backward, with its memory and race checkers. A
kernel that writes past its array is run beside them, and has to be caught. Every array has an
allocation of its own, since one beside another hides what goes past an end; memory may still come
in granules, inside which nothing is seen, so the broken kernel goes past the end of one.
"""

import argparse
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import dpfa_jax

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = 1, 130, 200, 2, 1, 64
SECONDS = 120
GRANULE = 2 << 20
"""Bytes that the driver hands out at once, at most."""

SETTINGS = {
    "JAX_PLATFORMS": "cuda,cpu",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
}


def attend(backend: str) -> None:
    """Answer and gradients, with lengths that no tile divides and a record that is not finite."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (
        (BATCH, QUERIES, HEADS, WIDTH),
        (BATCH, KEYS, KV_HEADS, WIDTH),
        (BATCH, KEYS, KV_HEADS, WIDTH),
    )
    rows = [
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    rows[1] = rows[1].at[0, 150, 0, 3].set(jnp.nan)
    mechanism = dpfa_jax.IndependentNoise(1.0, value_bound=5.0, score_cap=2.0)

    def loss(query, key, value, rng):
        out = dpfa_jax.private_attention(
            query,
            key,
            value,
            mechanism=mechanism,
            rng=rng,
            queries="public",
            is_causal=True,
            backend=backend,
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*rows, jax.random.key(1))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))


def write_past_the_end() -> None:
    """A kernel as ours are, but for the mask of its last block."""

    def kernel(x_ref, out_ref):
        place = pl.ds(pl.program_id(0) * 128, 128)
        plgpu.store(out_ref.at[place], plgpu.load(x_ref.at[place]))

    kernel.__name__ = "dpfa_broken"
    x = jnp.ones((GRANULE // 4,))
    call = pl.pallas_call(
        kernel,
        grid=(x.size // 128 + 64,),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name=kernel.__name__,
    )
    jax.block_until_ready(jax.jit(call)(x))


def _programs() -> dict[str, tuple[str, str]]:
    """Name: (tool, what it runs)."""
    backends = ["triton"]
    if getattr(jax.devices()[0], "compute_capability", "") == "9.0":
        backends.append("mosaic_gpu")
    found = {f"{t} {b}": (t, b) for t in ("memcheck", "racecheck") for b in backends}
    return {"memcheck broken": ("memcheck", "broken")} | found


def check(only: str | None = None) -> int:
    """Runs the checkers side by side; prints their reports; 0 if all is as it should be."""
    os.environ |= SETTINGS  # before this process, too, asks for its devices
    programs, running = _programs(), {}
    if only is not None:
        if only not in programs:
            sys.exit(f"Expected --only to be one of {', '.join(programs)}; got {only!r}.")
        programs = {only: programs[only]}
    for name, (tool, what) in programs.items():
        command = (
            *("compute-sanitizer", "--tool", tool, "--kernel-name", "kns=dpfa"),
            *("--report-api-errors", "no", "--error-exitcode", "1", "--print-limit", "10"),
            *(sys.executable, "-m", "tests.pallas.sanitize", "--run", what),
        )
        running[name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    failed = []
    for name, process in running.items():
        try:
            text, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            text += f"\nnot done in {SECONDS} s"
        caught = "Invalid __global__" in text
        right = caught if name.endswith("broken") else process.returncode == 0
        right &= "SUMMARY" in text
        tail = "\n".join(text.strip().splitlines()[-1 if right else -60 :])
        print(f"{name}: {'as it should be' if right else 'WRONG'}\n{tail}", flush=True)
        failed += [] if right else [name]
    return int(bool(failed))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", choices=("triton", "mosaic_gpu", "broken"), help="one program")
    parser.add_argument("--only", help="one of the checks, by the name that it is reported by")
    given = parser.parse_args()
    if given.run is None:
        sys.exit(check(given.only))
    if given.run == "broken":
        write_past_the_end()
    else:
        attend(given.run)


if __name__ == "__main__":
    main()
