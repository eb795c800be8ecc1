"""The fuzz of the kernels: right calls pass, slightly wrong ones do not."""

import dataclasses
import functools
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from dpfa_jax.pallas import triton
from tests.pallas import fuzz

UNIT_NOISE = functools.cache(fuzz.unit_noise)
SEEDS = {5: "one key", 9: "clipped rows", 11: "noisy sums", 302: "queries of a longer call"}


@pytest.mark.parametrize("seed", SEEDS)
def test_distance_of_a_random_call_is_below_one(seed):
    found = fuzz.distance(triton, seed, UNIT_NOISE())
    assert found is not None and found < 0.5


@pytest.mark.parametrize("wrong", ("query", "log_weights", "causal", "noise_row"))
def test_distance_of_a_slightly_wrong_call_is_above_one(wrong):
    def changed(operands, spec):
        if wrong == "causal":
            return operands, dataclasses.replace(spec, is_causal=not spec.is_causal)
        if wrong == "noise_row":
            return operands._replace(noise_row=operands.noise_row - 16), spec
        # The last query or the first key of 64, as where an edge is masked wrongly.
        place, edge = {"query": (-1, 0.0), "log_weights": (0, -jnp.inf)}[wrong]
        return operands._replace(**{wrong: getattr(operands, wrong).at[:, place].set(edge)}), spec

    def forward(operands, spec):
        return triton.forward(*changed(operands, spec))

    def backward(operands, spec, residuals, cotangent):
        return triton.backward(*changed(operands, spec), residuals, cotangent)

    module = SimpleNamespace(supports=triton.supports, forward=forward, backward=backward)
    seed = 302 if wrong == "noise_row" else 11
    assert fuzz.distance(module, seed, UNIT_NOISE()) > 1
