"""Which statement does this file keep true? The kernels' normals are those of the definition.

The text that the kernels hand to the assembler is executed here, one operation at a time.
"""

import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import random
from dpfa_jax.pallas import ptx

WITHIN = 2.0**-17
"""What the normals may differ by with exact special functions; kernels say 2⁻¹⁴ with their own."""


def _constant(text):
    if text.startswith("0f"):
        return np.frombuffer(struct.pack("<I", int(text[2:], 16)), np.float32)[0]
    return np.uint32(int(text, 0))


def _bytes(low, high, selector):
    """PTX's prmt without signs: four of eight bytes."""
    both = low.astype(np.uint64) | (np.uint64(high) << np.uint64(32))
    found = np.zeros_like(low)
    for place in range(4):
        number = np.uint64(int(selector) >> 4 * place & 7)
        byte = both >> (number * np.uint64(8)) & np.uint64(0xFF)
        found |= byte.astype(np.uint32) << np.uint32(8 * place)
    return found


def _fused(a, b, c):
    # The product of two float32 is exact in float64.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _field(word, first, count):
    left = np.uint32(32 - int(first) - int(count))
    return (word << left).view(np.int32) >> np.int32(32 - int(count))


def _special(function):
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


OPERATIONS = {
    "prmt.b32": _bytes,
    "mov.b32": lambda x: x.view(np.float32),
    "fma.rn.f32": _fused,
    "mul.rn.f32": lambda a, b: a * b,
    "cvt.rn.f32.s32": lambda x: x.view(np.int32).astype(np.float32),
    "cvt.rn.f32.u32": lambda x: x.view(np.uint32).astype(np.float32),
    "lg2.approx.ftz.f32": _special(np.log2),
    "sqrt.approx.ftz.f32": _special(np.sqrt),
    "cos.approx.ftz.f32": _special(np.cos),
    "sin.approx.ftz.f32": _special(np.sin),
    "setp.ge.u32": lambda a, b: a >= b,
    "selp.f32": lambda a, b, which: np.where(which, a, b),
    "abs.f32": np.abs,
    "bfe.s32": _field,
}


def _run(text, *given):
    """What the text makes of its operands $1, $2, …"""
    values = {f"${number + 1}": value for number, value in enumerate(given)}
    for line in text.strip(" {}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = [part.strip() for part in operands.split(",")]
        numbers = [values[x] if x in values else _constant(x) for x in sources]
        values[target] = OPERATIONS[name](*numbers)
    return values["$0"]


def _words():
    """Words of no pattern, and those at the ends of both halves of (0, 1) and of the series."""
    draw = np.random.default_rng(0)
    first, second = (draw.integers(0, 1 << 32, 60_000, np.uint32) for _ in range(2))
    small = first[:20_000] >> draw.integers(0, 32, 20_000).astype(np.uint32)
    first[:10_000], first[10_000:20_000] = small[:10_000], ~small[10_000:]
    edges = [0, 1, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 2]
    edges += [(1 << 32) - (1 << 25) + step for step in (-2, -1, 0, 1)]
    places = np.array(np.meshgrid(edges, [0, (1 << 24) - 1, 0xFF << 24, (1 << 32) - 1, 1 << 23]))
    ends = places.reshape(2, -1).astype(np.uint32)
    return np.concatenate([first, ends[0]]), np.concatenate([second, ends[1]])


@pytest.mark.parametrize("scale", (1.0, 0.03))
def test_normals_of_the_kernels_are_those_of_the_definition(scale):
    first, second = _words()
    radius = _run(ptx.radius(scale), first, second)
    ours = np.stack([_run(ptx.projected(name), radius, second) for name in ("cos", "sin")])
    wanted = np.stack(random.normal_pair(jnp.asarray(first), jnp.asarray(second)))
    np.testing.assert_allclose(ours, scale * wanted, rtol=0, atol=WITHIN * scale)
    assert radius.min() > 0 and np.isfinite(radius).all()


@pytest.mark.parametrize("first", (0, (1 << 32) - 1))
def test_radii_keep_their_digits_at_both_ends_of_the_unit_interval(first):
    # A float32 of u would be 1 for all words at the upper end: no noise at all.
    second = np.arange(256, dtype=np.uint32) << np.uint32(24)
    radius = _run(ptx.radius(), np.full(256, first, np.uint32), second)
    number = (np.arange(256) if first == 0 else np.arange(256)[::-1]) + 0.5
    logarithm = np.log(number * 2.0**-40) if first == 0 else np.log1p(-number * 2.0**-40)
    np.testing.assert_allclose(radius, np.sqrt(-2 * logarithm), rtol=2.0**-20)
    assert len(np.unique(radius)) == 256


@pytest.mark.parametrize("scale", (0.0, -1.0, 9e-39, 2.9e38, float("inf"), float("nan")))
def test_noise_that_would_vanish_or_be_infinite_is_refused(scale):
    with pytest.raises(ValueError, match="pass values, and their bound, in a unit"):
        ptx.radius(scale)
    ptx.radius(1e-38), ptx.radius(2.8e38)


def test_constants_are_written_bit_for_bit():
    for number in (1.0, -0.5, 2.0**-41 - 2.0**-17, 1e-38):
        text = ptx.hex_float(number)
        assert re.fullmatch("0f[0-9A-F]{8}", text) and _constant(text) == np.float32(number)
