"""Which statement does this file keep true? One release, bounded; its file holds nothing else."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import accounting, sensitivity
from dpfa_jax.memory import RandomFeatureMemory, RandomFeatures
from tests import oracles

QUIET = RandomFeatures(
    noise_multiplier=1e-7,
    value_bound=1.0,
    key_bound=1.0,
    features=5,
    denominator_weight=0.75,
    key_scale=1.25,
)
KEY, PUBLIC = jax.random.key(7), jax.random.key(1)
release = functools.partial(RandomFeatureMemory.release, rng=KEY, feature_rng=PUBLIC)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ROWS = draw(6, 2, 3), draw(6, 2, 2, seed=1)
QUERY = draw(2, 4, 3, seed=2)


def columns(memory):
    """The sums with the denominator's column times c, as S6 counts them."""
    return np.asarray(memory.sums, np.float64) * [1, 1, 0.75]


def test_random_feature_memory_holds_the_clipped_sums_and_answers_with_them():
    memory = release(*ROWS, mechanism=QUIET)
    gamma, frequencies = memory.settings.scale, np.asarray(memory.frequencies, np.float64)
    clip, radius = np.hypot(1, 0.75), gamma * 1.25**2
    expected = []
    for head in range(2):
        sums = oracles.random_feature_sums(
            frequencies,
            np.asarray(ROWS[0], np.float64)[:, head] * 1.25,
            np.asarray(ROWS[1], np.float64)[:, head],
            np.ones(6),
            gamma=gamma,
            denominator_weight=0.75,
            clip_norm=clip * np.exp(radius / 2),
        )
        expected.append(sums * np.exp(-radius / 2))
    # Angles below 16 in float32, 6 records of norm 1, and noise of 1e-7.
    np.testing.assert_allclose(columns(memory), expected, rtol=0, atol=6 * 16 * 2.0**-23 + 1e-6)
    rows = np.asarray(QUERY, np.float64) / 1.25
    angles = rows @ frequencies.T
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1) / np.sqrt(5)
    noisy = np.einsum("tkgf,kfc->tkgc", features.reshape(2, 2, 2, 10), columns(memory))
    noisy = noisy.reshape(2, 4, 3)
    floor = memory.settings.process.floor
    ratio = noisy[..., :2] / np.maximum(noisy[..., 2:] / 0.75, floor)
    answer = memory.attend(QUERY)
    np.testing.assert_allclose(answer, oracles.into_ball(ratio, 1.0), rtol=0, atol=1e-4)
    assert memory.attend(QUERY[None].astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_random_feature_memory_approaches_the_kernel():
    many = dataclasses.replace(QUIET, value_bound=9.0, key_bound=3.0, features=4096)
    memory = release(*ROWS, mechanism=many)
    gamma = memory.settings.scale
    rows, keys = np.asarray(QUERY[0, :2], np.float64) / 1.25, np.asarray(ROWS[0][:, 0]) * 1.25
    distance = ((rows[:, None] - keys[None]) ** 2).sum(-1)
    weights = np.exp(gamma * ((keys**2).sum(1) - (1.25 * 3.0) ** 2) / 2 - gamma * distance / 2)
    values, mass = np.asarray(ROWS[1][:, 0], np.float64), weights.sum(1)[:, None]
    exact = weights @ values / mass
    # cos(w·(q−k)) has a variance of at most 1 around its mean; the ratio is linear around the
    # exact one in the sums' errors. Six deviations: a false alarm in 5e8 runs.
    record = np.exp(gamma * ((keys**2).sum(1) - (1.25 * 3.0) ** 2) / 2)
    apart = np.linalg.norm(values[None] - exact[:, None], axis=-1)
    deviation = np.sqrt((record**2 * apart**2).sum(1)) / mass[:, 0] / np.sqrt(4096)
    error = np.linalg.norm(memory.attend(QUERY)[0, :2] - exact, axis=-1)
    assert (error <= 6 * deviation).all()
    few = release(*ROWS, mechanism=dataclasses.replace(many, features=5)).attend(QUERY)
    assert (np.linalg.norm(few[0, :2] - exact, axis=-1) > error).all()


@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0, 1e15])
def test_random_feature_memory_moves_by_at_most_the_clip_norm_and_as_much(size):
    # The same noise on both sides cancels; what is left is the record, and its rounding.
    key = ROWS[0].at[0].set(draw(2, 3, seed=5) * 2)
    value = ROWS[1].at[0].multiply(size)
    there = release(key, value, mechanism=QUIET)
    here = release(key.at[0, 1, 0].set(jnp.nan), value, mechanism=QUIET)
    moved = np.sqrt(np.sum((columns(there) - columns(here)) ** 2, axis=(1, 2)))
    clip = np.hypot(1, 0.75)
    bound = sensitivity.random_features(clip_norm=clip, adjacency=dpfa_jax.ZERO_OUT, memories=2)
    noise_std = there.settings.process.noise_std
    total = np.linalg.norm(moved)
    assert total <= noise_std / QUIET.noise_multiplier
    assert total <= bound * (1 + 2.0**-8)
    if size >= 1:
        assert total >= bound * (1 - 2.0**-8)


def test_random_feature_memory_is_charged_once():
    noise = RandomFeatures(noise_multiplier=2.0, value_bound=1.0, key_bound=1.0, features=5)
    event = accounting.events(lambda k, v, rng: release(k, v, rng=rng, mechanism=noise), *ROWS, KEY)
    memory = release(*ROWS, mechanism=noise)
    assert event == memory.event == accounting.Gaussian(2.0, 2 * 2 * 5 * 3)
    assert accounting.events(memory.attend, QUERY) == accounting.NoRelease()
    for adjacency, factor in ((dpfa_jax.REPLACE_ONE, 2), (dpfa_jax.GROUP(3), 3)):
        other = RandomFeatures(
            noise_multiplier=2.0, value_bound=1.0, key_bound=1.0, features=5, adjacency=adjacency
        )
        numbers = {"gamma": 1.0, "keys": 6, "kv_heads": 2, "value_dim": 2}
        ratio = other.process(**numbers).noise_std / noise.process(**numbers).noise_std
        assert abs(ratio - factor) < 1e-9


def test_random_feature_memory_is_differentiable_in_the_query():
    memory = release(*ROWS, mechanism=RandomFeatures(1.0, 9.0, 1.0, 5, floor=0.5))
    direction = draw(2, 4, 3, seed=9)
    loss = jax.jit(lambda query: jnp.sum(jnp.square(memory.attend(query))))
    slope = jnp.vdot(jax.grad(loss)(QUERY), direction)
    step = 2.0**-7
    measured = (loss(QUERY + step * direction) - loss(QUERY - step * direction)) / (2 * step)
    assert abs(slope - measured) <= 0.02 * abs(slope)
    batched = jax.vmap(memory.attend)(QUERY[:, None])
    np.testing.assert_allclose(batched[:, 0], memory.attend(QUERY), rtol=0, atol=1e-6)


def test_random_feature_memory_saves_the_release_and_nothing_else(tmp_path):
    loud = RandomFeatures(noise_multiplier=1.0, value_bound=1.0, key_bound=1.0, features=5)
    memory = release(*ROWS, mechanism=loud)
    path = tmp_path / "memory.npz"
    memory.save(path)
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert set(arrays) == {"sums", "frequencies", "settings", "event", "guarantee"}
    assert arrays["sums"].shape == (2, 10, 3) and arrays["frequencies"].shape == (5, 3)
    np.testing.assert_array_equal(arrays["sums"], memory.sums)
    expected = dpfa_jax.random.normal(PUBLIC, (5, 3)) * np.float32(np.sqrt(3**-0.5))
    np.testing.assert_allclose(arrays["frequencies"], expected, rtol=2.0**-22)
    # The sums as saved are a noise away from those without: not even one entry is exact.
    quiet = RandomFeatures(noise_multiplier=1e-7, value_bound=1.0, key_bound=1.0, features=5)
    exact = np.asarray(release(*ROWS, mechanism=quiet).sums)
    apart = (arrays["sums"] - exact) / memory.settings.process.noise_std
    assert np.abs(apart).min() > 1e-4 and 0.5 < apart[..., :2].std() < 1.6
    settings = json.loads(str(arrays["settings"]))
    assert set(settings) == {
        *("format", "mechanism", "scale", "keys", "kv_heads", "query_dim", "value_dim")
    }
    assert str(arrays["guarantee"]) == memory.guarantee() and "6 records" in memory.guarantee()
    assert str(arrays["event"]) == str(memory.event)
    # No record and no key word stands in the file, in any order of the bytes.
    raw = path.read_bytes()
    secret = np.asarray(dpfa_jax.random.key_data(KEY))
    for private in (*np.asarray(ROWS[0]).reshape(-1), *np.asarray(ROWS[1]).reshape(-1), *secret):
        assert private.tobytes() not in raw and private.tobytes()[::-1] not in raw
    loaded = RandomFeatureMemory.load(path)
    assert loaded.settings == memory.settings and loaded.guarantee() == memory.guarantee()
    np.testing.assert_array_equal(loaded.attend(QUERY), memory.attend(QUERY))


@pytest.mark.parametrize("broken", ["extra", "missing", "shape", "nan", "format"])
def test_random_feature_memory_loads_no_broken_file(tmp_path, broken):
    path = tmp_path / "memory.npz"
    release(*ROWS, mechanism=QUIET).save(path)
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    match broken:
        case "extra":
            arrays["key"] = np.zeros(3)
        case "missing":
            del arrays["event"]
        case "shape":
            arrays["sums"] = arrays["sums"][:1]
        case "nan":
            arrays["sums"][0, 0, 0] = np.nan
        case "format":
            settings = json.loads(str(arrays["settings"]))
            arrays["settings"] = np.array(json.dumps({**settings, "format": 0}))
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="Expected"):
        RandomFeatureMemory.load(path)


def test_random_feature_memory_refuses_features_from_the_noise_key():
    with pytest.raises(ValueError, match="feature_rng to differ"):
        release(*ROWS, mechanism=QUIET, feature_rng=KEY)
    traced = jax.jit(lambda rng: release(*ROWS, mechanism=QUIET, rng=rng).sums)
    assert np.isnan(traced(PUBLIC)).all() and np.isfinite(traced(KEY)).all()


def test_random_feature_memory_ignores_records_that_are_not_finite_and_takes_none():
    key, value = ROWS
    absent = release(key.at[0].set(jnp.nan), value, mechanism=QUIET)
    for rows in ((key.at[0, 1, 1].set(jnp.inf), value), (key, value.at[0, 0, 0].set(jnp.nan))):
        np.testing.assert_array_equal(release(*rows, mechanism=QUIET).sums, absent.sums)
    # A key too long for its weight to be computed is no key.
    np.testing.assert_array_equal(
        release(key.at[0].set(3e38), value, mechanism=QUIET).sums[1], absent.sums[1]
    )
    empty = release(key[:0], value[:0], mechanism=QUIET)
    assert np.abs(columns(empty)).max() < 1e-5 and np.abs(columns(empty)).min() > 0
    answer = absent.attend(QUERY.at[0, 1, 2].set(jnp.nan))
    assert np.isnan(answer[0, 1]).all() and np.isnan(answer).sum() == 2


def test_random_feature_memory_says_what_to_pass():
    good = {"noise_multiplier": 1.0, "value_bound": 1.0, "key_bound": 1.0, "features": 5}
    for name, value in (
        ("noise_multiplier", 0.0),
        ("noise_multiplier", float("nan")),
        ("value_bound", -1.0),
        ("key_bound", float("inf")),
        ("features", 0),
        ("denominator_weight", -1.0),
        ("floor", 0.0),
    ):
        with pytest.raises(ValueError, match=name):
            RandomFeatures(**{**good, name: value})
    with pytest.raises(ValueError, match="SEQUENCE"):
        RandomFeatures(**good, adjacency=dpfa_jax.SEQUENCE)
    # Under the signature checks of these tests the words are the checker's.
    for wrong in ({"mechanism": dpfa_jax.NonPrivate()}, {"mechanism": QUIET, "rng": 3}):
        with pytest.raises(TypeError):
            release(*ROWS, **wrong)
    with pytest.raises(ValueError, match="N a multiple of 2, H = 3"):
        release(*ROWS, mechanism=QUIET).attend(jnp.zeros((1, 3, 3)))
    no_sums = RandomFeatures(**good, denominator_weight=0.0)
    memory = release(*ROWS, mechanism=no_sums)
    assert memory.sums.shape == (2, 10, 2) and memory.event.coordinates == 2 * 10 * 2
    assert memory.attend(QUERY).shape == (2, 4, 2)
    assert "Array" not in repr(memory)
