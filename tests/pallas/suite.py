"""What every kernel backend must do, as functions of its module: one line a backend.

Inputs are small and awkward: lengths that are no multiple of a tile, more queries than keys, heads
that share keys. The truth is `tests.naive` in float64.
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax._typing import Operands, Spec
from tests import naive

KEY_DATA = np.arange(8, dtype=np.uint32) * 77777 + 5
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One call: shape and options, with only what differs from the others.

    Attributes:
      dtype: of query, key and value.
      shape: B, T, N, K, S, H, h.
      memories: key batch.
      spec: changes to `Spec`.
      options: of `tests.naive`.
    """

    dtype: str = "float32"
    shape: tuple[int, ...] = (2, 40, 2, 1, 70, 12, 8)
    memories: int = 2
    spec: tuple[tuple[str, object], ...] = ()
    options: tuple[tuple[str, object], ...] = ()


VARIANTS = {
    "tails and shared heads": Variant(),
    "one query and one key": Variant(
        shape=(1, 1, 1, 1, 1, 3, 5), memories=1, spec=(("floor", 0.9), ("ball", None))
    ),
    "shared memory": Variant(shape=(2, 32, 2, 2, 63, 8, 8), memories=1),
    "causal": Variant(shape=(1, 100, 2, 2, 100, 16, 16), memories=1, spec=(("is_causal", True),)),
    "window": Variant(shape=(1, 127, 1, 1, 100, 8, 8), memories=1, spec=(("window", (40, 9)),)),
    # More keys than one accumulator takes, which some blocks of queries begin in its middle.
    "groups of keys": Variant(
        shape=(1, 340, 1, 1, 600, 8, 8), memories=1, spec=(("window", (40, 400)),)
    ),
    "masks": Variant(
        shape=(2, 40, 4, 2, 70, 12, 8),
        # Queries that see nothing have no direction to be projected along.
        spec=(("ball", None),),
        options=(("mask", 1), ("segments", 1), ("lengths", 1)),
    ),
    "running maximum": Variant(
        shape=(1, 70, 2, 1, 100, 8, 8),
        memories=1,
        spec=(("score_cap", None), ("is_causal", True)),
    ),
    "bfloat16": Variant(dtype="bfloat16"),
    "float16": Variant(dtype="float16"),
}


def build(variant: Variant, seed: int = 0):
    """Operands, spec, float64 arrays of the same numbers, and options for `tests.naive`."""
    batch, queries, heads, kv_heads, keys, width, value_width = variant.shape
    source = np.random.default_rng(seed)
    dtype = jnp.dtype(variant.dtype)
    shapes = (
        (batch, queries, heads, width),
        (variant.memories, keys, kv_heads, width),
        (variant.memories, keys, kv_heads, value_width),
    )
    arrays = [jnp.asarray(source.normal(size=shape), dtype) for shape in shapes]
    weights = -np.abs(source.normal(size=(variant.memories, keys, kv_heads))).astype(np.float32)
    weights[:, 5::7] = -np.inf
    spec = Spec(**{"scale": 0.4, "score_cap": 1.0, "floor": 0.3, "ball": 0.8, **dict(variant.spec)})
    extra, options = {}, {"scale": 0.4, "cap": spec.score_cap}
    options |= {"causal": spec.is_causal, "window": spec.window}
    for name, _ in variant.options:
        if name == "mask":
            mask = source.random((batch, heads, queries, keys)) < 0.7
            extra["mask"] = options["mask"] = jnp.asarray(mask)
        elif name == "segments":
            ids = tuple(
                jnp.asarray(source.integers(0, 3, shape), jnp.int32)
                for shape in ((batch, queries), (variant.memories, keys))
            )
            extra["query_segments"], extra["key_segments"] = options["segments"] = ids
        else:
            lengths = jnp.asarray(source.integers(0, keys + 1, batch), jnp.int32)
            extra["key_lengths"] = options["lengths"] = lengths
    operands = Operands(*arrays, jnp.asarray(weights), noise_key=jnp.asarray(KEY_DATA), **extra)
    return operands, spec, options


def check(module: ModuleType, variant: Variant, **tiles) -> None:
    """Answer and gradients err at most twice as much as plain code in the same dtype.

    Plain code may be right by luck; a few roundings of the largest entry are always allowed.
    """
    operands, spec, options = build(variant)
    batch, queries, heads, _ = operands.query.shape
    out_shape = (batch, queries, heads, operands.value.shape[3])
    cotangent = np.random.default_rng(1).normal(size=out_shape)

    @jax.jit
    def both(operands, cotangent):
        out, residuals = module.forward(operands, spec, **tiles)
        grads = module.backward(operands, spec, residuals, cotangent, **tiles)
        return (out, *grads[:4])

    @jax.jit
    def definition(arrays, cotangent):
        given = {"floor": spec.floor, "ball": spec.ball, **options}
        answer = naive.answer(*arrays, (0.0, 0.0), **given)
        return answer, *naive.gradients(*arrays, (0.0, 0.0), cotangent, **given)

    def plain(dtype):
        arrays = [x.astype(dtype) for x in operands[:3]]
        arrays.append(operands.log_weights.astype(jnp.promote_types(dtype, jnp.float32)))
        found = definition(arrays, jnp.asarray(cotangent, dtype))
        return [np.asarray(x, np.float64) for x in found]

    ours = both(operands, jnp.asarray(cotangent, jnp.float32))
    same_dtype = plain(jnp.dtype(variant.dtype))
    with jax.enable_x64(True):
        truth = plain(np.float64)
    for mine, other, true in zip(ours, same_dtype, truth, strict=True):
        mine = np.asarray(mine, np.float64)
        assert np.all(np.isfinite(mine))
        scale = np.max(np.abs(true))
        allowed = 2 * np.max(np.abs(other - true)) + 16 * ROUNDOFF[variant.dtype] * scale
        assert np.max(np.abs(mine - true)) <= allowed
