"""The kernels as they run: compiled, on an NVIDIA GPU. `make test-gpu`.

What the interpreter cannot show: the machine's own exp2 and matrix unit, masks of real loads, and
that answers do not depend on what lay in memory before.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import random, reference
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import triton
from tests import test_audit, test_triton
from tests.pallas import suite
from tests.pins import ROOT

pytestmark = pytest.mark.gpu

RUNS = 4_000_000


@pytest.mark.parametrize("name", suite.VARIANTS)
def test_compiled_kernels_equal_the_definition(name):
    suite.check(triton, suite.VARIANTS[name])


def test_noise_words_are_those_of_the_cpu():
    key = tuple(jnp.asarray(suite.KEY_DATA))
    address = tuple(jnp.arange(4096, dtype=jnp.uint32) + i for i in range(4))
    ours = [np.asarray(word) for word in jax.jit(random.chacha_block)(key, address)]
    with jax.default_device(jax.devices("cpu")[0]):
        words = tuple(jnp.asarray(np.asarray(word)) for word in address)
        want = random.chacha_block(tuple(jnp.asarray(suite.KEY_DATA)), words)
    assert all(np.array_equal(one, other) for one, other in zip(ours, want, strict=True))


@pytest.mark.parametrize("width", (16, 40, 64, 128, 256))
def test_kernel_noise_is_that_of_the_cpu(width):
    shape = (2, 300, 3, width)
    rows = jnp.zeros((2, 64, 3, 16)), jnp.zeros((2, 64, 3, width))
    operands = Operands(
        jnp.zeros((2, 300, 3, 16)), *rows, jnp.full((2, 64, 3), -jnp.inf), noise_key=suite.KEY_DATA
    )
    spec = Spec(
        scale=1.0,
        score_cap=1.0,
        noise="sums",
        noise_std=1.0,
        denominator_std=float("inf"),
        floor=1.0,
    )
    ours = np.asarray(jax.jit(lambda o: triton.forward(o, spec))(operands)[0])
    with jax.default_device(jax.devices("cpu")[0]):
        want = np.asarray(reference.noise_field(jnp.asarray(suite.KEY_DATA), *shape)[0])
    # A wrong bit in a word's upper half would move a normal by far more.
    assert np.max(np.abs(ours - want)) < 2.0**-12


def test_kernel_answers_lie_on_the_public_grid():
    # Over a floor of 1 the answer is the noisy sum; its grid is 2⁻¹⁰ of a noise of 1.
    source = np.random.default_rng(0)
    rows = [jnp.asarray(source.normal(size=(2, 300, 3, 64)), jnp.float32) for _ in range(3)]
    operands = Operands(*rows, jnp.zeros((2, 300, 3)), noise_key=jnp.asarray(suite.KEY_DATA))
    spec = Spec(
        scale=0.1,
        score_cap=1.0,
        noise="sums",
        noise_std=1.0,
        denominator_std=float("inf"),
        floor=1.0,
        on_grid=True,
    )
    steps = 2.0**10 * np.asarray(jax.jit(lambda o: triton.forward(o, spec))(operands)[0])
    want = 2.0**10 * np.asarray(jax.jit(lambda o: reference.forward(o, spec))(operands)[0])
    assert np.all(steps == np.rint(steps)) and np.max(np.abs(steps - want)) <= 1


@pytest.mark.parametrize("backend", ("triton",))
def test_random_calls_equal_the_definition(backend):
    # Processes of their own, since tracing a thousand programs in one takes six minutes.
    command = (sys.executable, "-m", "tests.pallas.fuzz", "--backend", backend)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"seeds of fuzz.case and how far they are off:\n{done.stdout}"


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("mechanism", ("noise", "plain", "rows"))
@pytest.mark.parametrize("backend", ("triton", "mosaic_gpu"))
def test_compiled_kernels_leave_out_rows_that_are_not_finite(backend, mechanism, dtype):
    test_triton.check_left_out(backend, mechanism, dtype)


@pytest.mark.parametrize("width", (64, 128))
def test_the_repair_has_the_bits_of_the_first_launch(width):
    # A record that is not finite must not change the rounding of the sums of the others.
    source = np.random.default_rng(0)
    shape = (2, 1024, 2, width)
    rows = [jnp.asarray(source.normal(size=shape), jnp.bfloat16) for _ in range(3)]
    operands = Operands(*rows, jnp.zeros((2, 1024, 2)), noise_key=jnp.asarray(suite.KEY_DATA))
    spec = Spec(
        scale=0.1, score_cap=1.0, noise="sums", noise_std=1e-9, denominator_std=1e-9, floor=0.1
    )
    run = jax.jit(lambda o: triton.forward(o, spec))
    first, repaired = (
        run(operands._replace(flags=jnp.full((2, 64), flag, jnp.int32))) for flag in (0, 1)
    )
    assert np.array_equal(first[0], repaired[0])
    assert np.array_equal(first[1][1], repaired[1][1])


AUDITED = ("S2 ZERO_OUT", "S2 REPLACE_ONE", "S3 ZERO_OUT", "S7 row")


@pytest.mark.parametrize("name", AUDITED)
def test_compiled_kernels_leak_what_their_event_says(name):
    case = test_audit.CASES[name]
    run = test_audit._sampler(name, case.mechanism)
    keys = jax.random.split(jax.random.key(0), 2)
    assert "pallas_call" in str(jax.make_jaxpr(run)(keys, *map(jnp.asarray, case.left)))
    found, claim = test_audit._bound(name, RUNS), test_audit._claim(name)
    assert 0.97 * claim < found <= claim


def test_the_audit_catches_a_little_less_noise():
    name = "S2 ZERO_OUT"
    weaker = dataclasses.replace(test_audit.CASES[name].mechanism, noise_multiplier=0.95)
    assert test_audit._bound(name, RUNS, mechanism=weaker) > test_audit._claim(name)


def test_every_shard_has_noise_of_its_own():
    devices = jax.devices("gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=auto, devices=devices)
    rows = jnp.ones((2 * len(devices), 64, 2, 64), jnp.bfloat16)
    mechanism = dpfa_jax.IndependentNoise(1.0, value_bound=1.0, score_cap=1.0)
    spec = jax.sharding.PartitionSpec("x")

    def attend(rng, query, key, value):
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, queries="public", backend="triton"
        )

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), spec, spec, spec),
        out_specs=spec,
    )
    out = np.asarray(jax.jit(sharded)(jax.random.key(3), rows, rows, rows), np.float32)
    assert len({bytes(part) for part in out}) == len(out)
