"""The kernels as they run: compiled, on an NVIDIA GPU. `make test-gpu`.

What the interpreter cannot show: the machine's own exp2 and matrix unit, masks of real loads, and
that answers do not depend on what lay in memory before.
"""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import random, reference
from dpfa_jax._typing import Operands, Spec
from dpfa_jax.pallas import triton
from tests import test_audit, test_triton
from tests.pallas import fuzz, suite

pytestmark = pytest.mark.gpu

RUNS = 4_000_000
SHAPES, PARTS = 1000, 20
# Of the norm of an answer or a gradient: sums of a few hundred terms, and for the narrow formats
# one rounding of each weight and of each answer.
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


@pytest.mark.parametrize("name", suite.VARIANTS)
def test_compiled_kernels_equal_the_definition(name):
    suite.check(triton, suite.VARIANTS[name])


def test_noise_words_are_those_of_the_cpu():
    key = jnp.asarray(suite.KEY_DATA)
    address = tuple(jnp.arange(4096, dtype=jnp.uint32) + i for i in range(4))
    ours = [np.asarray(word) for word in jax.jit(random.chacha_block)(key, address)]
    with jax.default_device(jax.devices("cpu")[0]):
        want = random.chacha_block(jnp.asarray(suite.KEY_DATA), tuple(map(np.asarray, address)))
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


def _all(module, spec, operands, cotangent):
    out, residuals = module.forward(operands, spec)
    return (out, *module.backward(operands, spec, residuals, cotangent)[:4])


@functools.cache
def _unit_noise():
    return tuple(
        map(np.asarray, reference.noise_field(jnp.asarray(suite.KEY_DATA), **fuzz.LARGEST))
    )


def _distance(seed):
    """The largest distance of an answer or gradient from the definition's, in what is allowed."""
    operands, spec, cotangent = fuzz.case(seed)
    readers = operands.query.shape[1] * operands.query.shape[2] // operands.key.shape[2]
    given = operands, jnp.asarray(cotangent, operands.query.dtype)
    found = jax.jit(functools.partial(_all, triton, spec))(*given)
    expected = fuzz.definition(operands, spec, cotangent, _unit_noise())
    allowed = ALLOWED[str(operands.key.dtype)]
    ratios = []
    for ours, want in zip(found, expected, strict=True):
        # Where every gradient is 0, as with a single key, what is left is the rounding of as many
        # terms of size 1 as there are queries.
        scale = np.linalg.norm(want) + 0.05 * np.sqrt(want.size * readers)
        ratios.append(np.linalg.norm(np.asarray(ours, np.float64) - want) / scale / allowed)
    return np.nan_to_num(np.max(ratios), nan=np.inf)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls_equal_the_reference(part):
    _unit_noise()
    seeds = range(part * SHAPES // PARTS, (part + 1) * SHAPES // PARTS)
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        distances = dict(zip(seeds, pool.map(_distance, seeds), strict=True))
    wrong = {seed: round(float(d), 2) for seed, d in distances.items() if not d <= 1}
    assert not wrong, f"seeds of fuzz.case and how far they are off: {wrong}"


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
