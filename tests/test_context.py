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
from dpfa_jax.pallas import mosaic_gpu

KEY = jax.random.key(11)
SHARDS, B, N, K, H, WIDTH = 8, 2, 2, 1, 4, 3
T, S = 16, 40
INDEPENDENT = dpfa_jax.IndependentNoise(0.5, value_bound=1.0, score_cap=1.0)
CLIPPED = dpfa_jax.ClippedContributions(0.5, value_bound=1.0, score_cap=1.0, clip_norm=2.0)
ROWS = P(None, "seq")


def mesh(*sizes, names=("seq",)):
    return jax.make_mesh(sizes or (SHARDS,), names, axis_types=(AxisType.Auto,) * len(names))


def arrays():
    source = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, WIDTH)
    return [jnp.asarray(source.normal(size=shape), jnp.float32) for shape in shapes]


def attend(mechanism, axes="seq", names=(), **options):
    """The call of one shard; `names` says what its further arguments are."""

    def one(query, key, value, rng, *more):
        return dpfa_jax.context_parallel_attention(
            query,
            key,
            value,
            axis_name=axes,
            mechanism=mechanism,
            rng=rng,
            queries="public",
            **options,
            **dict(zip(names, more, strict=True)),
        )

    return one


def sharded(mechanism, *, shard_queries=False, **options):
    spec = ROWS if shard_queries else P()
    return jax.shard_map(
        attend(mechanism, shard_queries=shard_queries, **options),
        mesh=mesh(),
        in_specs=(spec, ROWS, ROWS, P()),
        out_specs=spec,
    )


def whole(mechanism, names=(), **options):
    def one(query, key, value, rng, *more):
        given = options | dict(zip(names, more, strict=True))
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, queries="public", **given
        )

    return one


def both(call):
    """Answer and gradients of one call."""

    def loss(query, key, value, rng):
        out = call(query, key, value, rng)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = run(*arrays(), KEY)
    return out, *grads


# Little noise: its public grid is finer than float32, and its size, in which backends differ in the
# last digits, hides nothing.
QUIET = {
    "independent": dataclasses.replace(INDEPENDENT, noise_multiplier=1e-7, floor=0.5),
    "clipped": dataclasses.replace(CLIPPED, noise_multiplier=1e-7, floor=0.5),
}
# Causal queries see the first 16 records at most; lengths end inside the third and second shard.
MASKS = {
    "independent": {"is_causal": True, "key_value_seq_lengths": np.array([13, 6])},
    "clipped": {"local_window_size": (6, 3)},
}


@functools.cache
def _unsharded(name):
    return both(whole(QUIET[name], backend="xla", **MASKS[name]))


@pytest.mark.parametrize(
    ("backend", "name", "shard_queries"),
    [
        ("xla", "independent", False),
        pytest.param("xla", "clipped", True, marks=pytest.mark.slow),
        ("triton", "independent", True),
        pytest.param("triton", "clipped", False, marks=pytest.mark.slow),
    ],
)
def test_context_parallel_attention_equals_the_unsharded_call(backend, name, shard_queries):
    call = sharded(QUIET[name], shard_queries=shard_queries, backend=backend, **MASKS[name])
    for ours, theirs in zip(both(call), _unsharded(name), strict=True):
        assert np.max(np.abs(ours - theirs)) <= 3e-6 * np.max(np.abs(theirs))


def test_eight_bit_scores_are_those_of_the_rounded_rows_on_every_shard():
    call = sharded(QUIET["independent"], backend="xla", precision="fp8")
    other = whole(QUIET["independent"], backend="xla", precision="fp8")
    plain = whole(QUIET["independent"], backend="xla")
    ours, theirs, exact = both(call), both(other), both(plain)
    for one, two, three in zip(ours, theirs, exact, strict=True):
        assert np.max(np.abs(one - two)) <= 3e-6 * np.max(np.abs(two))
        assert np.max(np.abs(one - three)) > 1e-3 * np.max(np.abs(two))


def test_what_shards_mask_is_left_out_and_all_have_the_same_answer():
    # Records on the first seven shards alone, five of them on the last of these; NaN, −∞ and False
    # here and there.
    query, key, value = arrays()
    source = np.random.default_rng(3)
    weights = np.log(source.uniform(0.1, 1, (B, S)))
    weights[0, 3] = -np.inf
    key, value = key.at[1, 16, 0, 1].set(jnp.nan), value.at[0, 20, 0, 2].set(jnp.inf)
    query = query.at[0, 5, 1, 0].set(jnp.nan)
    options = {
        "key_value_seq_lengths": (jnp.asarray([35, 17]), P()),
        "key_log_weights": (jnp.asarray(weights), ROWS),
        "mask": (jnp.asarray(source.random((B, 1, T, S)) < 0.8), P(None, None, None, "seq")),
        "segment_ids": (
            (
                jnp.asarray(source.integers(0, 2, (B, T))),
                jnp.asarray(source.integers(0, 2, (B, S))),
            ),
            (P(), ROWS),
        ),
    }
    turned = dataclasses.replace(QUIET["clipped"], adjacency=dpfa_jax.REPLACE_ONE)
    one = attend(turned, names=options, backend="xla")
    copies = jax.shard_map(
        lambda *given: jax.lax.pcast(one(*given)[None], "seq", to="varying"),
        mesh=mesh(),
        in_specs=(P(), ROWS, ROWS, P(), *(spec for _, spec in options.values())),
        out_specs=P("seq"),
    )
    given = (query, key, value, KEY, *(array for array, _ in options.values()))
    got = np.asarray(jax.jit(copies)(*given))
    want = np.asarray(jax.jit(whole(turned, names=options, backend="xla"))(*given))
    assert np.all(np.isnan(want[0, 5, 1])) and np.isnan(want).sum() == WIDTH
    assert np.allclose(got[0], want, rtol=0, atol=2e-6, equal_nan=True)
    assert got.shape[0] == SHARDS
    assert all(np.array_equal(got[0], other, equal_nan=True) for other in got[1:])


def _collectives(jaxpr):
    """(name, dtype) of everything that the equations of a jaxpr add up over a mesh axis."""
    for equation in jaxpr.eqns:
        if "psum" in equation.primitive.name or "reduce_scatter" in equation.primitive.name:
            yield from ((equation.primitive.name, str(x.aval.dtype)) for x in equation.invars)
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _collectives(inner)


@pytest.mark.parametrize("shard_queries", [False, True])
def test_sums_cross_devices_as_integers(shard_queries):
    # What F5 needs: a float32 sum would round by what all records share.
    closed = jax.make_jaxpr(sharded(CLIPPED, shard_queries=shard_queries))(*arrays(), KEY)
    found = list(_collectives(closed.jaxpr))
    assert len(found) == 2 and {dtype for _, dtype in found} == {"int32"}, found


# Noise -------------------------------------------------------------------------------------------

# Without records and without a denominator the answer is the noise over the floor.
BARE = dataclasses.replace(INDEPENDENT, denominator_weight=0.0, floor=1e6)


def _noise(out):
    """The noise of an answer without records, and its grid, in standard deviations."""
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, WIDTH)
    std = context.noise_std(
        BARE, releases.Call.of(*shapes), shards=SHARDS, rounding=reference.rounding
    )
    return np.asarray(out) * 1e6 / std, grid_step(std) / std


def _words(rng):
    return reference.noise_field(random.key_data(rng), B, T, N, WIDTH)[0]


def test_noise_from_any_row_on_has_the_words_of_its_rows():
    data = random.key_data(KEY)
    matrix, row = reference.noise_field(data, B, 40, N, WIDTH)
    for first in (0, 2, 15, 16, 23):
        found = reference.noise_field(data, B, 17, N, WIDTH, jnp.int32(first))
        for ours, want in zip(found, (matrix, row), strict=True):
            assert np.allclose(ours, want[:, first : first + 17], rtol=0, atol=1e-6)


def test_noise_of_sharded_queries_has_the_words_of_their_rows():
    query, key, value = arrays()
    run = sharded(BARE, shard_queries=True, exchange="sums", backend="xla")
    noise, step = _noise(jax.jit(run)(query, jnp.full_like(key, jnp.nan), value, KEY))
    assert np.max(np.abs(noise - _words(KEY))) <= 0.51 * step + 1e-5


def test_noise_is_drawn_once_for_all_shards_and_anew_for_other_axes_and_examples():
    query, key, value = arrays()
    query, key, value = (
        jnp.concatenate([x, x]) for x in (query, jnp.full_like(key, jnp.nan), value)
    )
    rows = P("data", ("a", "b"))
    run = jax.shard_map(
        attend(BARE, axes=("a", "b"), backend="xla", is_causal=True),
        mesh=mesh(2, 2, 2, names=("data", "a", "b")),
        in_specs=(P("data"), rows, rows, P()),
        out_specs=P("data"),
    )
    run = jax.vmap(run, (0, None, None, None))
    given = jnp.stack([query] * 3), key, value, KEY
    noise, step = _noise(jax.jit(run)(*given))
    keys = [
        [random.fold_in(random.fold_in(KEY, data), example) for data in range(2)]
        for example in range(3)
    ]
    want = np.asarray(jax.tree.map(_words, keys)).reshape(noise.shape)
    # Four shards for eight: the noise differs in the last digits.
    assert np.max(np.abs(noise - want)) <= 0.51 * step + 1e-5
    # Noise of every shard, or none, is far from that.
    folded = sum(_words(random.fold_in(keys[0][0], shard)) for shard in range(4))
    for wrong in (folded, folded / 2, 0 * folded):
        assert np.max(np.abs(wrong - noise[0, :B])) > 1
    event = BARE.event((B, T, N, H), (B, S, K, H), (B, S, K, WIDTH))
    assert accounting.events(run, *given) == accounting.Repeated(event, 6)


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
    # One that knows nothing of so long a memory, only of the shards'.
    for known, rest in ((2**17, 0.0), (2**17 - 1, math.inf)):
        limit = context.noise_std(
            mechanism, call, shards=8, rounding=lambda keys, n=known: 0.0 if keys <= n else math.inf
        )
        assert limit == exact + rest


# What is refused ---------------------------------------------------------------------------------


def _ask(specs, *, check_vma=True, mechanism=INDEPENDENT, axes="seq", **options):
    run = jax.shard_map(
        attend(mechanism, axes=axes, **options),
        mesh=mesh(),
        in_specs=specs,
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.eval_shape(run, *arrays(), KEY)


def test_records_that_every_shard_has_are_refused():
    # Each would count eight times and be charged once.
    for specs in ((P(), P(), ROWS, P()), (P(), P(), P(), P()), (P(), ROWS, P(), P())):
        with pytest.raises(ValueError, match=r"a part of its own on every shard|one value row"):
            _ask(specs)
    with pytest.raises(ValueError, match="query to be a part of its own"):
        _ask((P(), ROWS, ROWS, P()), shard_queries=True)


def test_keys_that_differ_between_shards_are_refused():
    one = attend(INDEPENDENT)
    run = jax.shard_map(
        lambda query, key, value, rngs: one(query, key, value, rngs[0]),
        mesh=mesh(),
        in_specs=(P(), ROWS, ROWS, P("seq")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="rng to be the same on all shards"):
        jax.eval_shape(run, *arrays(), random.split(KEY, SHARDS))
    with pytest.raises(ValueError, match="query to be the same on all shards"):
        _ask((ROWS, ROWS, ROWS, P()))


def test_a_key_that_is_a_constant_is_refused():
    one = attend(INDEPENDENT)
    run = jax.shard_map(
        lambda query, key, value: one(query, key, value, KEY),
        mesh=mesh(),
        in_specs=(P(), ROWS, ROWS),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="argument of the function being traced"):
        jax.eval_shape(run, *arrays())


def test_places_where_nothing_can_be_checked_are_refused():
    good = (P(), ROWS, ROWS, P())
    with pytest.raises(ValueError, match="check_vma=False"):
        _ask(good, check_vma=False)
    with pytest.raises(ValueError, match="manual mesh axis"):
        _ask(good, axes="other")
    one = attend(INDEPENDENT)
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        one(*arrays(), KEY)
    query, key, value = arrays()
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        jax.vmap(lambda k: one(query, k, value, KEY), axis_name="seq")(jnp.stack([key] * 4))
    for axes in ((), ("seq", "seq")):
        with pytest.raises(ValueError, match="different mesh axes"):
            _ask(good, axes=axes)


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


def test_a_backend_that_cannot_is_refused(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        _ask((P(), ROWS, ROWS, P()), backend="mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    run = sharded(INDEPENDENT, backend="mosaic_gpu", is_causal=True)
    with pytest.raises(NotImplementedError, match="positions of a longer memory"):
        jax.eval_shape(run, *_narrow(40), KEY)


def _narrow(length):
    return [jnp.ones((2, SHARDS * length, 2, 64), jnp.bfloat16)] * 3


@pytest.mark.parametrize("shard_queries", [False, True])
@pytest.mark.parametrize("mechanism", [INDEPENDENT, CLIPPED])
def test_hopper_kernels_lower_over_shards_with_their_gradients(
    mechanism, shard_queries, monkeypatch
):
    monkeypatch.setattr(mosaic_gpu, "_has_hopper", lambda: True)
    run = sharded(mechanism, shard_queries=shard_queries, backend="mosaic_gpu")

    def loss(*given):
        return jnp.sum(run(*given, KEY).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = step.trace(*_narrow(512)).lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_mosaic_forward_kernel" in text and "dpfa_mosaic_gradient_kernel" in text


def test_lengths_of_single_shards_are_refused():
    one = attend(INDEPENDENT, names=("key_value_seq_lengths",))
    run = jax.shard_map(
        lambda *given: one(*given[:4], given[4][0]),
        mesh=mesh(),
        in_specs=(P(), ROWS, ROWS, P(), P("seq")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="key_value_seq_lengths to be the same on all shards"):
        jax.eval_shape(run, *arrays(), KEY, jnp.zeros((SHARDS, B), jnp.int32))
