"""Which statement is kept true? Shards that read the records of all make one release (CP2)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import dpfa_jax
from dpfa_jax import accounting, admission, random, reference, releases
from dpfa_jax.doubleword import grid_step
from dpfa_jax.pallas import mosaic_gpu

KEY = jax.random.key(11)
SHARDS, B, N, K, H, WIDTH = 4, 2, 2, 1, 4, 3
T, S = 64, 40
ROWS = P(None, "seq")
INDEPENDENT = dpfa_jax.IndependentNoise(0.5, value_bound=1.0, score_cap=1.0)
CLIPPED = dpfa_jax.ClippedContributions(0.5, value_bound=1.0, score_cap=1.0, clip_norm=2.0)
# Little noise, as in test_context.
QUIET = {
    "independent": dataclasses.replace(INDEPENDENT, noise_multiplier=1e-7, floor=0.5),
    "replaced": dataclasses.replace(
        INDEPENDENT, noise_multiplier=1e-7, floor=0.5, adjacency=dpfa_jax.REPLACE_ONE
    ),
    "clipped": dataclasses.replace(CLIPPED, noise_multiplier=1e-7, floor=0.5),
    "clipped, lengths": dataclasses.replace(CLIPPED, noise_multiplier=1e-7, floor=0.5),
}
MASKS = {
    "independent": {"is_causal": True, "key_value_seq_lengths": np.array([33, 16])},
    "replaced": {"key_value_seq_lengths": np.array([13, 36])},
    "clipped": {"local_window_size": (16, 3), "precision": "fp8"},
    "clipped, lengths": {"key_value_seq_lengths": np.array([13, 36])},
}


def _arrays(dtype=jnp.float32, batch=B, memories=B):
    source = np.random.default_rng(0)
    shapes = (batch, T, N, H), (memories, S, K, H), (memories, S, K, WIDTH)
    return [jnp.asarray(source.normal(size=shape), dtype) for shape in shapes]


def _mesh(*sizes, names=("seq",)):
    devices = jax.devices()[: int(np.prod(sizes or (SHARDS,)))]
    auto = (AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes or (SHARDS,), names, axis_types=auto, devices=devices)


def _sharded(mechanism, *, exchange="records", names=(), specs=(), mesh=None, rows=ROWS, **options):
    options = {"axis_name": "seq", "shard_queries": True, "queries": "public"} | options

    def one(query, key, value, rng, *more):
        return dpfa_jax.context_parallel_attention(
            *(query, key, value),
            mechanism=mechanism,
            rng=rng,
            exchange=exchange,
            **options,
            **dict(zip(names, more, strict=True)),
        )

    mesh = _mesh() if mesh is None else mesh
    spec = rows if options["shard_queries"] else P()
    return jax.shard_map(one, mesh=mesh, in_specs=(spec, rows, rows, P(), *specs), out_specs=spec)


def _whole(mechanism, names=(), **options):
    def one(query, key, value, rng, *more):
        given = options | dict(zip(names, more, strict=True))
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, queries="public", **given
        )

    return one


def _both(call, arrays):
    """Answer and gradients."""

    def loss(query, key, value, rng):
        out = call(query, key, value, rng)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = run(*arrays, KEY)
    return out, *grads


@functools.cache
def _unsharded(name):
    return _both(_whole(QUIET[name], backend="xla", **MASKS[name]), _arrays())


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("xla", "independent"),
        ("xla", "clipped"),
        ("xla", "replaced"),
        ("triton", "independent"),
        pytest.param("triton", "clipped", marks=pytest.mark.slow),
        ("xla", "clipped, lengths"),
    ],
)
@pytest.mark.parametrize("exchange", ["records", "sums"])
def test_answers_and_gradients_equal_those_of_the_unsharded_call(backend, name, exchange):
    call = _sharded(QUIET[name], exchange=exchange, backend=backend, **MASKS[name])
    found = _both(call, _arrays())
    for ours, theirs in zip(found, _unsharded(name), strict=True):
        assert np.max(np.abs(ours - theirs)) <= 3e-6 * np.max(np.abs(theirs))


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_what_shards_mask_is_left_out(backend):
    # NaN, −∞ and segments here and there; one memory that the whole batch reads.
    query, key, value = _arrays(memories=1)
    source = np.random.default_rng(3)
    weights = np.log(source.uniform(0.1, 1, (1, S)))
    weights[0, 3] = -np.inf
    key, value = key.at[0, 16, 0, 1].set(jnp.nan), value.at[0, 30, 0, 2].set(jnp.inf)
    query = query.at[0, 37, 1, 0].set(jnp.nan)
    ids = source.integers(0, 2, (B, T)), source.integers(0, 2, (1, S))
    given = {
        "key_log_weights": jnp.asarray(weights),
        "segment_ids": tuple(jnp.asarray(x, jnp.int32) for x in ids),
    }
    mechanism, more = QUIET["independent"], (query, key, value, KEY, *given.values())
    run = _sharded(mechanism, names=given, specs=(ROWS, (ROWS, ROWS)), backend=backend)
    got = np.asarray(jax.jit(run)(*more))
    want = np.asarray(jax.jit(_whole(mechanism, names=given, backend="xla"))(*more))
    assert np.all(np.isnan(got[0, 37, 1])) and np.isnan(got).sum() == WIDTH
    assert np.allclose(got, want, rtol=0, atol=3e-6, equal_nan=True)


def _primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def _collectives(run, arrays):
    closed = jax.make_jaxpr(run)(*arrays, KEY)
    names = ("all_gather", "psum", "reduce_scatter")
    return {name for name, _ in _primitives(closed.jaxpr) if name.startswith(names)}


def test_records_cross_devices_and_no_sums():
    arrays = _arrays()
    assert _collectives(_sharded(INDEPENDENT, backend="xla"), arrays) == {"all_gather"}
    sums = _collectives(_sharded(INDEPENDENT, exchange="sums", backend="xla"), arrays)
    assert any(name.startswith("reduce_scatter") for name in sums)


def test_auto_sends_what_is_less():
    # Rows of 4 and 3 numbers: 40 records on four shards, and sums for 64 queries or for 16.
    few = [x[:, :16] if i == 0 else jnp.tile(x, (1, 9, 1, 1)) for i, x in enumerate(_arrays())]
    run = functools.partial(_sharded, INDEPENDENT, exchange="auto", backend="xla")
    assert _collectives(run(), _arrays()) == {"all_gather"}
    assert len(_collectives(run(), few)) == 2
    # Queries that do not fill blocks of noise words, masks, and queries that every shard answers.
    odd = [jnp.concatenate([x, x[:, :4]], 1) if i == 0 else x for i, x in enumerate(_arrays())]
    assert len(_collectives(run(), odd)) == 2
    masked = run(names=("mask",), specs=(P(None, None, None, "seq"),))
    closed = jax.make_jaxpr(masked)(*_arrays(), KEY, jnp.ones((1, 1, T, S), bool))
    assert any(name.startswith("reduce_scatter") for name, _ in _primitives(closed.jaxpr))
    same = run(shard_queries=False)
    assert "all_gather" not in _collectives(same, _arrays())


def test_auto_sends_sums_where_a_backend_has_no_kernel_for_all_records(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    shape = (1, SHARDS * 40_000, 2, 64)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    run = _sharded(INDEPENDENT, exchange="auto", backend="mosaic_gpu")
    assert any(name.startswith("reduce_scatter") for name in _collectives(run, arrays))
    with pytest.raises(NotImplementedError, match="round by more than is charged"):
        jax.eval_shape(_sharded(INDEPENDENT, backend="mosaic_gpu"), *arrays, KEY)


@pytest.mark.parametrize(
    ("options", "queries", "match"),
    [
        ({"shard_queries": False}, T, "pass shard_queries=True"),
        ({}, T + 4, "noise goes by 16 rows, and a shard has 17"),
        ({"exchange": "keys"}, T, "exchange"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused(options, queries, match):
    _, key, value = _arrays()
    query = jnp.ones((B, queries, N, H))
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(_sharded(INDEPENDENT, **options), query, key, value, KEY)


def test_a_mask_by_query_cannot_go_with_the_records():
    run = _sharded(INDEPENDENT, names=("mask",), specs=(P(None, None, None, "seq"),))
    with pytest.raises(ValueError, match="pairs of each shard's own records alone"):
        jax.eval_shape(run, *_arrays(), KEY, jnp.ones((1, 1, T, S), bool))


# Noise -------------------------------------------------------------------------------------------

BARE = dataclasses.replace(INDEPENDENT, denominator_weight=0.0, floor=1e6)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_noise_is_that_of_one_call_of_all_records(backend):
    # Without records and without a denominator the answer is the noise over the floor.
    query, key, value = _arrays()
    key = jnp.full_like(key, jnp.nan)
    out = jax.jit(_sharded(BARE, backend=backend))(query, key, value, KEY)
    call = releases.Call.of(query.shape, key.shape, value.shape)
    module = {"xla": reference, "triton": dpfa_jax.attention.module_of("triton")}[backend]
    std = admission.sums_noise_std(BARE, call, module.rounding(S))
    words, _ = reference.noise_field(random.key_data(KEY), B, T, N, WIDTH)
    assert np.max(np.abs(np.asarray(out) * 1e6 / std - words)) <= 0.51 * grid_step(std) / std + 1e-5


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_denominators_have_the_noise_of_their_rows(backend):
    # Values of 0: an answer is its numerator's noise over its noisy denominator.
    noisy = dataclasses.replace(INDEPENDENT, denominator_weight=1.0, floor=1e-3)
    query, key, value = _arrays()
    arrays = query, key, 0 * value
    found = jax.jit(_sharded(noisy, backend=backend))(*arrays, KEY)
    want = jax.jit(_whole(noisy, backend=backend))(*arrays, KEY)
    assert np.allclose(found, want, rtol=1e-4, atol=1e-4)


def test_noise_differs_between_other_axes_and_examples():
    query, key, value = (jnp.concatenate([x, x]) for x in _arrays())
    key = jnp.full_like(key, jnp.nan)
    mesh = _mesh(2, 2, 2, names=("data", "a", "b"))
    rows = P("data", ("a", "b"))
    run = _sharded(BARE, mesh=mesh, rows=rows, axis_name=("a", "b"), backend="xla")
    run = jax.vmap(run, (0, None, None, None))
    given = jnp.stack([query] * 3), key, value, KEY
    out = np.asarray(jax.jit(run)(*given)).reshape(6, B, T, N, WIDTH)
    keys = [random.fold_in(random.fold_in(KEY, data), i) for i in range(3) for data in range(2)]
    call = releases.Call.of(query[:B].shape, key[:B].shape, value[:B].shape)
    std = admission.sums_noise_std(BARE, call, reference.rounding(S))
    for found, rng in zip(out, keys, strict=True):
        words, _ = reference.noise_field(random.key_data(rng), B, T, N, WIDTH)
        assert np.max(np.abs(found * 1e6 / std - words)) <= 0.51 * grid_step(std) / std + 1e-5
    event = BARE.event((B, T, N, H), (B, S, K, H), (B, S, K, WIDTH))
    assert accounting.events(run, *given) == accounting.Repeated(event, 6)


@pytest.mark.parametrize("mechanism", [INDEPENDENT, CLIPPED])
def test_events_count_one_release_of_the_whole_sequence(mechanism):
    given = (*_arrays(), KEY)
    found = accounting.events(_sharded(mechanism), *given)
    assert found == mechanism.event(*(x.shape for x in given[:3]))


# Attacks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["records", "sums"])
def test_no_record_that_plays_with_rounding_contributes_more_than_its_clip(exchange):
    # Long keys, orthogonal to the query that all queries are: scores are what products round, and
    # another order of additions makes another weight of it.
    clipped = dpfa_jax.ClippedContributions(
        *(1e-9, 1.0, 0.0), clip_norm=1.0, denominator_weight=0.0, floor=1e3
    )
    source = np.random.default_rng(0)
    queries, keys, width = 16 * SHARDS, 8 * SHARDS, 2048
    query = source.normal(size=width).astype(np.float32)
    rows = source.normal(size=(keys, width))
    rows -= (rows @ query)[:, None] * query / (query.astype(np.float64) @ query)
    rows = (1e6 * rows).astype(np.float32)
    query = np.broadcast_to(query, (1, queries, 1, width))
    run = jax.jit(_sharded(clipped, exchange=exchange, scale=1.0, backend="xla"))
    found = []
    for alone in range(keys):
        key = np.full((1, keys, 1, width), np.nan, np.float32)
        key[0, alone] = rows[alone]
        out = run(query, key, np.ones((1, keys, 1, 1), np.float32), KEY)
        found.append(1e3 * np.linalg.norm(np.asarray(out, np.float64)))
    assert max(found) <= 1.001
    # Some records contribute as much as they may.
    assert max(found) >= 0.99


def test_empty_shards_are_refused():
    _, key, value = (x[:, :0] for x in _arrays())
    with pytest.raises(ValueError, match="at least one record on every shard"):
        jax.eval_shape(_sharded(INDEPENDENT), _arrays()[0], key, value, KEY)


# Kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["records", "sums"])
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("mechanism", [INDEPENDENT, CLIPPED])
def test_hopper_kernels_lower_over_shards_with_their_gradients(
    mechanism, precision, exchange, monkeypatch
):
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    options = {"precision": precision, "key_value_seq_lengths": np.array([700, 1900])}
    run = _sharded(mechanism, backend="mosaic_gpu", exchange=exchange, **options)
    arrays = [jnp.ones((2, SHARDS * 512, 2, 64), jnp.bfloat16)] * 3

    def loss(*given):
        return jnp.sum(run(*given, KEY).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_forward_kernel" in text and "dpfa_mosaic_gradient_kernel" in text
