"""Which statement is kept true? Records on eight devices are one release, as on one (CP1)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import dpfa_jax
from dpfa_jax import accounting, context, random, reference, releases
from dpfa_jax.doubleword import grid_step

KEY = jax.random.key(11)
SHARDS, B, N, K, H, WIDTH = 8, 2, 2, 1, 4, 3
T, S = 16, 40
INDEPENDENT = dpfa_jax.IndependentNoise(0.5, value_bound=1.0, score_cap=1.0)
CLIPPED = dpfa_jax.ClippedContributions(0.5, value_bound=1.0, score_cap=1.0, clip_norm=2.0)
ROWS = P(None, "seq")


def mesh(*sizes, names=("seq",)):
    return jax.make_mesh(sizes or (SHARDS,), names, axis_types=(AxisType.Auto,) * len(names))


def arrays(seed=0, keys=S, queries=T, memories=B):
    source = np.random.default_rng(seed)
    shapes = (B, queries, N, H), (memories, keys, K, H), (memories, keys, K, WIDTH)
    return [jnp.asarray(source.normal(size=shape), jnp.float32) for shape in shapes]


def sharded(mechanism, *, shard_queries=False, on=None, extra=(), out=None, **options):
    """The call over shards; `extra` names further array arguments and their specs."""
    spec = ROWS if shard_queries else P()

    def attend(query, key, value, rng, *more):
        given = dict(zip(dict(extra), more, strict=True))
        return dpfa_jax.context_parallel_attention(
            query,
            key,
            value,
            axis_name="seq",
            mechanism=mechanism,
            rng=rng,
            queries="public",
            shard_queries=shard_queries,
            **options,
            **given,
        )

    specs = (spec, ROWS, ROWS, P(), *dict(extra).values())
    out = spec if out is None else out
    return jax.shard_map(attend, mesh=on or mesh(), in_specs=specs, out_specs=out)


def whole(mechanism, extra=(), **options):
    def attend(query, key, value, rng, *more):
        given = dict(zip(dict(extra), more, strict=True))
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, queries="public", **options, **given
        )

    return attend


def both(attend):
    """Answer and gradients of one call."""

    def loss(query, key, value, *rest):
        out = attend(query, key, value, *rest)
        return jnp.sum(jnp.sin(jnp.nan_to_num(out))), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


# name: (backend, mechanism, shard_queries, options)
CASES = {
    "causal": ("xla", INDEPENDENT, False, {"is_causal": True}),
    "window of clipped": ("xla", CLIPPED, True, {"local_window_size": (6, 3)}),
    "kernel, causal": ("triton", INDEPENDENT, True, {"is_causal": True}),
    "kernel, window of clipped": ("triton", CLIPPED, False, {"local_window_size": (6, 3)}),
}


@pytest.mark.parametrize("name", CASES)
def test_context_parallel_attention_equals_the_unsharded_call(name):
    backend, mechanism, shard_queries, options = CASES[name]
    # Little noise: its public grid is finer than float32, and its size, which the number of
    # shards moves in the last digits, hides nothing.
    mechanism = dataclasses.replace(mechanism, noise_multiplier=1e-5, floor=0.5)
    given = (*arrays(), KEY)
    options = {**options, "backend": backend}
    (_, got), got_grads = both(sharded(mechanism, shard_queries=shard_queries, **options))(*given)
    (_, want), want_grads = both(whole(mechanism, **options))(*given)
    for ours, theirs in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert np.max(np.abs(ours - theirs)) <= 2e-6 * np.max(np.abs(theirs))
    # A shard that took its own positions for those of the whole would answer otherwise.
    masked = jax.jit(whole(mechanism, backend=backend))(*given)
    assert np.max(np.abs(masked - want)) > 0.05


def test_what_shards_mask_is_left_out():
    # Five records on the last shard but one, none on the last; NaN, −∞ and False here and there.
    query, key, value = arrays()
    lengths = jnp.asarray([35, 17])
    source = np.random.default_rng(3)
    weights = np.log(source.uniform(0.1, 1, (B, S)))
    weights[0, 3] = -np.inf
    mask = jnp.asarray(source.random((B, 1, T, S)) < 0.8)
    ids = source.integers(0, 2, (B, T)), source.integers(0, 2, (B, S))
    key, value = key.at[1, 16, 0, 1].set(jnp.nan), value.at[0, 20, 0, 2].set(jnp.inf)
    query = query.at[0, 5, 1, 0].set(jnp.nan)
    extra = {
        "key_value_seq_lengths": P(),
        "key_log_weights": ROWS,
        "mask": P(None, None, None, "seq"),
        "segment_ids": (P(), ROWS),
    }
    more = (lengths, jnp.asarray(weights), mask, tuple(map(jnp.asarray, ids)))
    turned = dataclasses.replace(
        INDEPENDENT, noise_multiplier=1e-5, floor=0.5, adjacency=dpfa_jax.REPLACE_ONE
    )
    given = (query, key, value, KEY, *more)
    got = np.asarray(jax.jit(sharded(turned, extra=extra, backend="xla"))(*given))
    want = np.asarray(jax.jit(whole(turned, extra=extra, backend="xla"))(*given))
    assert np.all(np.isnan(want[0, 5, 1])) and np.isnan(want).sum() == WIDTH
    assert np.allclose(got, want, rtol=0, atol=2e-6, equal_nan=True)


# Noise -------------------------------------------------------------------------------------------


def _folded(query, key, value, rng):
    """A wrong version: what private_attention does on every shard, and a mean."""
    shard = whole(INDEPENDENT, backend="xla")(query, key, value, rng)
    return jax.lax.pmean(shard, "seq")


@pytest.mark.parametrize("shard_queries", [False, True])
def test_noise_is_drawn_once_from_the_words_of_the_unsharded_call(shard_queries):
    # Without a record the numerator is the noise, in steps of the public grid.
    query, key, value = arrays()
    mechanism = dataclasses.replace(INDEPENDENT, denominator_weight=0.0, floor=1e6)
    call = releases.Call.of(query.shape, key.shape, value.shape)
    none = jnp.full_like(key, jnp.nan)
    out = jax.jit(sharded(mechanism, shard_queries=shard_queries, backend="xla"))(
        query, none, value, KEY
    )
    matrix, _ = reference.noise_field(random.key_data(KEY), *out.shape)
    std = context.noise_std(mechanism, call, shards=SHARDS, rounding=reference.rounding)
    assert np.max(np.abs(out * 1e6 - std * matrix)) <= 0.51 * grid_step(std)
    # Every shard's own noise, or none, is far away.
    wrong = jax.shard_map(_folded, mesh=mesh(), in_specs=(P(), ROWS, ROWS, P()), out_specs=P())
    assert np.max(np.abs(wrong(query, none, value, KEY) - out)) > 0.1


def test_every_shard_has_the_same_answer():
    query, key, value = arrays()

    def attend(*given):
        out = context.context_parallel_attention(
            *given[:3], axis_name="seq", mechanism=CLIPPED, rng=given[3], queries="public"
        )
        return jax.lax.pcast(out[None], "seq", to="varying")

    run = jax.shard_map(attend, mesh=mesh(), in_specs=(P(), ROWS, ROWS, P()), out_specs=P("seq"))
    copies = np.asarray(jax.jit(run)(query, key, value, KEY))
    assert copies.shape[0] == SHARDS
    assert all(np.array_equal(copies[0], other) for other in copies[1:])


def test_other_mesh_axes_are_calls_of_their_own():
    query, key, value = arrays()
    two = [jnp.concatenate([x, x]) for x in (query, key, value)]
    names = ("data", "a", "b")

    def attend(query, key, value, rng):
        return context.context_parallel_attention(
            query,
            key,
            value,
            axis_name=("a", "b"),
            mechanism=INDEPENDENT,
            rng=rng,
            queries="public",
            is_causal=True,
        )

    rows = P("data", ("a", "b"))
    run = jax.shard_map(
        attend,
        mesh=mesh(2, 2, 2, names=names),
        in_specs=(P("data"), rows, rows, P()),
        out_specs=P("data"),
    )
    out = jax.jit(run)(*two, KEY)
    for index in range(2):
        alone = jax.jit(whole(INDEPENDENT, is_causal=True, backend="xla"))(
            query, key, value, random.fold_in(KEY, index)
        )
        assert np.max(np.abs(out[B * index : B * index + B] - alone)) < 0.01
    event = INDEPENDENT.event(query.shape, key.shape, value.shape)
    assert accounting.events(run, *two, KEY) == accounting.Repeated(event, 2)


def test_vmap_gives_every_example_noise_of_its_own():
    query, key, value = arrays(memories=1)
    three = jnp.stack([query] * 3)
    run = jax.vmap(sharded(INDEPENDENT, backend="xla"), (0, None, None, None))
    out = np.asarray(jax.jit(run)(three, key, value, KEY))
    assert len(np.unique(out[:, 0, 0, 0, 0])) == 3
    event = INDEPENDENT.event(query.shape, key.shape, value.shape)
    assert accounting.events(run, three, key, value, KEY) == accounting.Repeated(event, 3)


# What it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_queries", [False, True])
@pytest.mark.parametrize("mechanism", [INDEPENDENT, CLIPPED])
def test_events_count_one_release_of_the_whole_sequence(mechanism, shard_queries):
    given = (*arrays(), KEY)
    found = accounting.events(sharded(mechanism, shard_queries=shard_queries), *given)
    assert found == mechanism.event(*(x.shape for x in given[:3]))
    # The same call for each shard alone is charged for each.
    alone = jax.shard_map(
        whole(mechanism), mesh=mesh(), in_specs=(P(), ROWS, ROWS, P()), out_specs=ROWS
    )
    assert isinstance(accounting.events(alone, *given), accounting.Repeated)


@pytest.mark.parametrize("adjacency", [dpfa_jax.ZERO_OUT, dpfa_jax.REPLACE_ONE, dpfa_jax.GROUP(3)])
@pytest.mark.parametrize("mechanism", [INDEPENDENT, CLIPPED])
def test_noise_std_covers_every_changed_shard(mechanism, adjacency):
    mechanism = dataclasses.replace(mechanism, adjacency=adjacency)
    call = releases.Call(2, 64, 4, 2, 2**20, 2, 64, 64)
    delta = mechanism.l2_sensitivity(call)
    exact = context.noise_std(mechanism, call, shards=8, rounding=lambda keys: 0.0)
    # One more for every record of a group, each of which may lie on a shard of its own.
    added = (exact / mechanism.noise_multiplier - delta) / adjacency.rows
    assert 1e-6 < added < 0.01 * delta
    one = dataclasses.replace(mechanism, adjacency=dpfa_jax.ZERO_OUT)
    alone = context.noise_std(one, call, shards=8, rounding=lambda keys: 0.0)
    if adjacency.kind == "GROUP":
        assert math.isclose(exact, 3 * alone, rel_tol=1e-12)
    # A backend that rounds more for few keys than for many is charged for the shard's own.
    few = context.noise_std(mechanism, call, shards=8, rounding=lambda keys: 1e4 / keys)
    assert few >= mechanism.noise_multiplier * delta * (1 + 1e4 / 2**17)


# What is refused ---------------------------------------------------------------------------------


def _ask(specs, *, check_vma=True, out=None, mechanism=INDEPENDENT, axis="seq", **options):
    def attend(query, key, value, rng):
        return context.context_parallel_attention(
            query,
            key,
            value,
            axis_name=axis,
            mechanism=mechanism,
            rng=rng,
            queries="public",
            **options,
        )

    run = jax.shard_map(
        attend, mesh=mesh(), in_specs=specs, out_specs=out or P(), check_vma=check_vma
    )
    return jax.eval_shape(run, *arrays(), options.pop("rng", KEY))


def test_records_that_every_shard_has_are_refused():
    # Each would count eight times and be charged once.
    for specs in ((P(), P(), ROWS, P()), (P(), P(), P(), P()), (P(), ROWS, P(), P())):
        with pytest.raises(ValueError, match=r"a part of its own on every shard|one value row"):
            _ask(specs)
    with pytest.raises(ValueError, match="query to be a part of its own"):
        _ask((P(), ROWS, ROWS, P()), shard_queries=True)


def test_keys_that_differ_between_shards_are_refused():
    def attend(query, key, value, rngs):
        return context.context_parallel_attention(
            query,
            key,
            value,
            axis_name="seq",
            mechanism=INDEPENDENT,
            rng=rngs[0],
            queries="public",
        )

    run = jax.shard_map(attend, mesh=mesh(), in_specs=(P(), ROWS, ROWS, P("seq")), out_specs=P())
    with pytest.raises(ValueError, match="rng to be the same on all shards"):
        jax.eval_shape(run, *arrays(), random.split(KEY, SHARDS))
    with pytest.raises(ValueError, match="query to be the same on all shards"):
        _ask((ROWS, ROWS, ROWS, P()))


def test_a_key_that_is_a_constant_is_refused():
    def attend(query, key, value):
        return context.context_parallel_attention(
            query, key, value, axis_name="seq", mechanism=INDEPENDENT, rng=KEY, queries="public"
        )

    run = jax.shard_map(attend, mesh=mesh(), in_specs=(P(), ROWS, ROWS), out_specs=P())
    with pytest.raises(ValueError, match="argument of the function being traced"):
        jax.jit(run)(*arrays())


def test_places_where_nothing_can_be_checked_are_refused():
    good = (P(), ROWS, ROWS, P())
    with pytest.raises(ValueError, match="check_vma=False"):
        _ask(good, check_vma=False)
    with pytest.raises(ValueError, match="manual mesh axis"):
        _ask(good, axis="other")
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        context.context_parallel_attention(
            *arrays(), axis_name="seq", mechanism=INDEPENDENT, rng=KEY, queries="public"
        )
    mapped = functools.partial(
        context.context_parallel_attention,
        axis_name="seq",
        mechanism=INDEPENDENT,
        queries="public",
    )
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        jax.vmap(lambda k: mapped(arrays()[0], k, k, rng=KEY), axis_name="seq")(
            jnp.stack([arrays()[1]] * 4)
        )
    with pytest.raises(ValueError, match="different mesh axes"):
        _ask(good, axis=())
    with pytest.raises(ValueError, match="different mesh axes"):
        _ask(good, axis=("seq", "seq"))


@pytest.mark.parametrize(
    "mechanism",
    [
        dpfa_jax.GaussianProcessNoise(0.5, value_bound=1.0, key_bound=2.0),
        dpfa_jax.SoftmaxNoise(0.5, value_bound=1.0, score_bound=1.0),
        dpfa_jax.SequenceRelease(0.5, clip_norm=1.0),
        dpfa_jax.NonPrivate(),
    ],
)
def test_mechanisms_without_sums_to_add_are_refused(mechanism):
    with pytest.raises(NotImplementedError, match="private_attention on gathered records"):
        _ask((P(), ROWS, ROWS, P()), mechanism=mechanism)


def test_a_backend_without_sums_is_refused():
    with pytest.raises(NotImplementedError, match="no sums"):
        _ask((P(), ROWS, ROWS, P()), backend="mosaic_gpu")


def test_lengths_of_single_shards_are_refused():
    def attend(query, key, value, rng, lengths):
        return context.context_parallel_attention(
            query,
            key,
            value,
            axis_name="seq",
            mechanism=INDEPENDENT,
            rng=rng,
            queries="public",
            key_value_seq_lengths=lengths[0],
        )

    specs = (P(), ROWS, ROWS, P(), P("seq"))
    run = jax.shard_map(attend, mesh=mesh(), in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="key_value_seq_lengths to be the same on all shards"):
        jax.eval_shape(run, *arrays(), KEY, jnp.zeros((SHARDS, B), jnp.int32))
