"""Which statement does `clipping.adaptive` keep true? One noisy count a step, and no more."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax import GROUP, REPLACE_ONE, SEQUENCE, accounting, clipping, random

RNG = random.wrap_key_data(jnp.arange(8, dtype=jnp.uint32))
SETTINGS: dict[str, Any] = dict(
    target_quantile=0.5,
    learning_rate=0.2,
    count_noise_std=1.0,
    expected_batch_size=100.0,
    low=1e-3,
    high=1e3,
)


def _certificate(examples, clipped, nonfinite=0, norm=2.0):
    counts = [jnp.int32(each) for each in (examples, clipped, nonfinite)]
    groups = (clipping.Group("all parameters", None),)
    return clipping.Clipped(
        jnp.zeros(3), *counts, traced_clip_norm=jnp.float32(norm), groups=groups
    )


def _adapt(rng, certificate, **changes):
    return clipping.adapt_clip_norm(rng, certificate, **(SETTINGS | changes))


def test_threshold_event_is_what_one_unit_moves_the_count_by():
    assert clipping.threshold_event(3.0) == accounting.Gaussian(6.0, 1, 64)
    assert clipping.threshold_event(3.0, REPLACE_ONE) == accounting.Gaussian(3.0, 1, 64)
    assert clipping.threshold_event(3.0, GROUP(4)) == accounting.Gaussian(1.5, 1, 64)
    with pytest.raises(ValueError, match="SEQUENCE"):
        clipping.threshold_event(3.0, SEQUENCE)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="count_noise_std"):
            clipping.threshold_event(bad)
    # One unit that is there and clipped, there and not clipped, or not finite, against NULL.
    for present in ((1, 1, 0), (1, 0, 0), (1, 0, 1)):
        norms = [
            float(_adapt(RNG, _certificate(*each), learning_rate=50.0, count_noise_std=1e-3))
            for each in (present, (0, 0, 0))
        ]
        moved = abs(math.log(norms[0] / norms[1])) / 50.0 * 100.0
        assert math.isclose(moved, 0.5, rel_tol=1e-3)


def test_adapt_clip_norm_is_the_formula_of_the_paper():
    for examples, over, bad in ((100, 100, 0), (80, 20, 10), (120, 0, 0), (0, 0, 0)):
        got = float(_adapt(RNG, _certificate(examples, over, bad), count_noise_std=1e-4))
        share = (examples - over - bad - examples / 2) / 100 + 0.5
        assert math.isclose(got, 2.0 * math.exp(-0.2 * (share - 0.5)), rel_tol=1e-5)
    assert float(_adapt(RNG, _certificate(0, 0), high=1.5)) == 1.5
    assert float(_adapt(RNG, _certificate(0, 0), low=100.0, high=100.0)) == 100.0


def test_adapt_clip_norm_finds_the_quantile():
    norms = jnp.asarray(np.random.default_rng(0).lognormal(1.0, 0.5, 400), jnp.float32)[:, None]
    loss = lambda w, x: jnp.sum(w * x)  # noqa: E731

    @jax.jit
    def step(clip_norm, rng):
        made = clipping.clipped_grad(loss, clip_norm=clip_norm)(jnp.zeros(1), norms)
        return _adapt(rng, made, target_quantile=0.7, expected_batch_size=400.0), made

    clip_norm = jnp.float32(0.01)
    for rng in random.split(RNG, 80):
        clip_norm, made = step(clip_norm, rng)
    assert abs(float(jnp.mean(norms <= clip_norm)) - 0.7) < 0.05
    assert made.static_clip_norm is None and made.sensitivity(REPLACE_ONE) > made.clip_norm


def test_adapt_clip_norm_is_charged_where_it_is_called():
    spec = jax.ShapeDtypeStruct((), RNG.dtype)
    found = accounting.events(lambda rng: _adapt(rng, _certificate(5, 1)), spec)
    assert found == accounting.Gaussian(2.0, 1, 64)


def test_adapt_clip_norm_refuses_what_it_cannot_answer_for():
    for bad in (
        dict(target_quantile=1.5),
        dict(learning_rate=0.0),
        dict(expected_batch_size=math.nan),
        dict(count_noise_std=0.0),
        dict(low=0.0),
        dict(low=2.0, high=1.0),
    ):
        with pytest.raises(ValueError):
            _adapt(RNG, _certificate(5, 1), **bad)
    two = (clipping.Group("a", 1.0), clipping.Group("b", 1.0))
    with pytest.raises(ValueError, match="one group"):
        _adapt(RNG, dataclasses.replace(_certificate(5, 1), groups=two))
