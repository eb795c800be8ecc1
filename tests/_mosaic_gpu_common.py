"""Calls of the Hopper kernel that its tests compile and compare."""

import math

import jax.numpy as jnp
import numpy as np

import dpfa_jax
from dpfa_jax._typing import Operands, Spec

NOISY = {
    "score_cap": 2.0,
    "noise": "sums",
    "noise_std": 0.1,
    "denominator_std": 0.2,
    "floor": 0.2,
    "ball": 1.0,
}
ROWS = {"score_cap": None, "noise": "rows", "noise_std": 0.1, "row_clip": 0.1, "on_grid": True}
KEY = np.arange(8, dtype=np.uint32) * 77777 + 5


def make_operands(
    *,
    queries=200,
    keys=300,
    heads=4,
    kv_heads=2,
    width=64,
    value_width=None,
    dtype="bfloat16",
    **more,
):
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape, np.float32), dtype)

    weights = -draw.exponential(size=(2, keys, kv_heads)).astype(np.float32)
    return Operands(
        normal(2, queries, heads, width),
        normal(2, keys, kv_heads, width),
        normal(2, keys, kv_heads, value_width or width),
        jnp.asarray(weights),
        noise_key=jnp.asarray(KEY),
        **more,
    )


def _segments(length):
    ids = jnp.arange(length, dtype=jnp.int32) * 4 // length
    return jnp.broadcast_to(ids, (2, length))


CASES = {
    "plain": ({}, {"score_cap": None}),
    "causal": ({"keys": 200, "width": 128}, {**NOISY, "is_causal": True}),
    "several groups": ({"keys": 1100, "width": 128}, {**NOISY, "noise_std": 1.0, "floor": 1.0}),
    "several groups, causal": (
        {"queries": 1300, "keys": 1300, "width": 128},
        {**NOISY, "noise_std": 1.0, "floor": 1.0, "is_causal": True},
    ),
    "several runs": (
        {"queries": 100, "keys": 16500, "width": 128, "kv_heads": 4},
        {**NOISY, "noise_std": 1.0, "floor": 1.0},
    ),
    "several runs in double words": (
        {"queries": 70, "keys": 33000, "width": 128, "kv_heads": 4},
        {**NOISY, "noise_std": 1.0, "floor": 1.0},
    ),
    "several runs, narrow": ({"queries": 100, "keys": 9000}, {**NOISY, "noise_std": 1.0}),
    "several groups, float16": ({"keys": 1100, "width": 96, "dtype": "float16"}, NOISY),
    "several groups, narrow": ({"keys": 700}, NOISY),
    "float16": ({"dtype": "float16"}, NOISY),
    "rows": ({}, ROWS),
    "width 80": ({"width": 80}, NOISY),
    "wide": ({"width": 256, "kv_heads": 4}, NOISY),
    "wide, several groups": ({"keys": 1100, "width": 256}, {**NOISY, "noise_std": 1.0}),
    "wide, several groups, causal": (
        {"queries": 1300, "keys": 1300, "width": 192},
        {**NOISY, "noise_std": 1.0, "is_causal": True},
    ),
    "wide, several runs": ({"queries": 100, "keys": 9000, "width": 144}, NOISY),
    "wide, several runs in double words": (
        {"queries": 70, "keys": 33000, "width": 256, "kv_heads": 4},
        {**NOISY, "noise_std": 1.0, "floor": 1.0},
    ),
    "wide keys": ({"keys": 1100, "width": 192, "value_width": 128}, NOISY),
    "wide, float8 scores": ({"keys": 1100, "width": 256}, {**NOISY, "float8_scores": True}),
    "wide, plain": ({"width": 256}, {"score_cap": None}),
    "segments and window": (
        {"keys": 200, "query_segments": _segments(200), "key_segments": _segments(200)},
        {**NOISY, "window": (60, 30)},
    ),
    "lengths": ({"key_lengths": jnp.array([150, 70], jnp.int32)}, NOISY),
    "float8 scores": ({"keys": 1100, "width": 128}, {**NOISY, "float8_scores": True}),
    "float8 scores, causal, width 80": (
        {"keys": 200, "width": 80},
        {**NOISY, "float8_scores": True, "is_causal": True},
    ),
    "float8 scores, plain": ({}, {"score_cap": None, "float8_scores": True}),
    "no denominator": ({}, {**NOISY, "denominator_std": math.inf, "floor": 50.0}),
}


_SUMS = {"noise_multiplier": 0.1, "value_bound": 5.0, "score_cap": 2.0}
MECHANISMS = {
    "without privacy": dpfa_jax.NonPrivate(),
    "S7 row": dpfa_jax.SequenceRelease(0.1, clip_norm=1.0, clip="row"),
    "S7": dpfa_jax.SequenceRelease(0.1, clip_norm=1.0, clip="sequence"),
    "S2": dpfa_jax.IndependentNoise(**_SUMS),
    "S2 REPLACE_ONE": dpfa_jax.IndependentNoise(**_SUMS, adjacency=dpfa_jax.REPLACE_ONE),
    "S3": dpfa_jax.ClippedContributions(**_SUMS, clip_norm=2.0),
    "S3 REPLACE_ONE": dpfa_jax.ClippedContributions(
        **_SUMS, clip_norm=2.0, adjacency=dpfa_jax.REPLACE_ONE
    ),
}


def private_call(mechanism, backend="mosaic_gpu", **options):
    """`private_attention` as a function of rows, the key's words and perhaps log-weights."""

    def call(query, key, value, words, weights=None):
        rng = dpfa_jax.random.wrap_key_data(words)
        return dpfa_jax.private_attention(
            query,
            key,
            value,
            mechanism=mechanism,
            rng=None if isinstance(mechanism, dpfa_jax.NonPrivate) else rng,
            queries="public",
            key_log_weights=weights,
            backend=backend,
            **options,
        )

    return call


def make_spec(changes):
    return Spec(**{"scale": 0.3, **changes})


def relative(found, wanted):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
