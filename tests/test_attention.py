import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dpfa_jax
from dpfa_jax import accounting, attention, clipping, random, reference, releases
from dpfa_jax._typing import Operands, Spec
from tests import naive

B, T, N, K, H, WIDTH, S = 2, 4, 2, 1, 4, 3, 20
KEY = jax.random.key(11)


def _arrays(seed=0, keys=S, memories=B):
    source = np.random.default_rng(seed)
    shapes = (B, T, N, H), (memories, keys, K, H), (memories, keys, K, WIDTH)
    return tuple(jnp.asarray(source.normal(size=shape), jnp.float32) for shape in shapes)


INDEPENDENT = dpfa_jax.IndependentNoise(0.5, value_bound=1.0, score_cap=1.0)
CLIPPED = dpfa_jax.ClippedContributions(0.5, value_bound=1.0, score_cap=1.0, clip_norm=2.0)
PROCESS = dpfa_jax.GaussianProcessNoise(0.5, value_bound=1.0, key_bound=2.0)
SOFTMAX = dpfa_jax.SoftmaxNoise(0.5, value_bound=1.0, score_bound=1.0)
SEQUENCE = dpfa_jax.SequenceRelease(0.5, clip_norm=1.0)
ROWS = dpfa_jax.SequenceRelease(0.5, clip_norm=1.0, clip="row")
NON_PRIVATE = dpfa_jax.NonPrivate()
NOISY = {
    "independent": INDEPENDENT,
    "clipped": CLIPPED,
    "process": PROCESS,
    "softmax": SOFTMAX,
    "sequence": SEQUENCE,
    "rows": ROWS,
}
MEMORIES = {name: NOISY[name] for name in ("independent", "clipped", "process")}


@functools.cache
def _compiled(mechanism, options=()):
    def call(query, key, value, rng):
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, queries="public", **dict(options)
        )

    return jax.jit(call)


def _call(mechanism, query, key, value, rng=KEY, **options):
    return _compiled(mechanism, tuple(options.items()))(query, key, value, rng)


# The answer is what the statements say -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "jax_options"),
    [
        ({}, {}),
        ({"is_causal": True}, {"is_causal": True}),
        ({"local_window_size": (1, 3)}, {"local_window_size": (1, 3)}),
        ({"scale": 0.3}, {"scale": 0.3}),
    ],
)
def test_private_attention_without_noise_is_dot_product_attention(options, jax_options):
    query, key, value = _arrays()
    value = jnp.pad(value, ((0, 0),) * 3 + ((0, H - WIDTH),))
    want = jax.nn.dot_product_attention(query, key, value, **jax_options)
    got = _call(NON_PRIVATE, query, key, value, None, **options)
    assert np.max(np.abs(got - want)) < 1e-6


def test_private_attention_takes_lengths_and_masks_as_jax_does():
    query, key, value = _arrays()
    value = jnp.pad(value, ((0, 0),) * 3 + ((0, H - WIDTH),))
    lengths = jnp.array([3, 20], jnp.int32)
    mask = jnp.asarray(np.random.default_rng(0).random((B, N, T, S)) < 0.7)
    want = jax.nn.dot_product_attention(query, key, value, mask=mask, key_value_seq_lengths=lengths)
    got = dpfa_jax.private_attention(
        query,
        key,
        value,
        mechanism=NON_PRIVATE,
        rng=None,
        queries="public",
        mask=mask,
        key_value_seq_lengths=lengths,
    )
    assert np.max(np.abs(got - want)) < 1e-6


def _by_definition(mechanism, query, key, value):
    """Steps of theory.md section 2 in float64, with the noise field of the key of this call."""
    reads = B * T * N
    bound, cap = mechanism.value_bound, mechanism.score_cap
    weight = bound * WIDTH**-0.25
    arrays = [np.asarray(a, np.float64) for a in (query, key, value)]
    norms = np.linalg.norm(arrays[2], axis=-1)
    log_weights = np.minimum(0, np.log(bound / norms))
    delta = math.sqrt(reads) * math.hypot(bound, weight)
    if isinstance(mechanism, releases.ClippedContributions):
        delta = mechanism.clip_norm
        with jax.enable_x64(True):
            w, _ = naive.weights(arrays[0], arrays[1], log_weights, scale=1 / math.sqrt(H), cap=cap)
        # One kv head; every batch element's memory may hold the same person: C/√B a row.
        used = np.sqrt(np.sum(np.asarray(w) ** 2, axis=(1, 2))) * np.hypot(norms[..., 0], weight)
        limit = np.log(mechanism.clip_norm / math.sqrt(B) / used)
        log_weights = log_weights + np.minimum(0, limit)[..., None]
    std = mechanism.noise_multiplier * delta * (1 + reference.rounding(S))
    data = random.key_data(KEY)
    noise, mass_noise = (
        np.asarray(x, np.float64) for x in reference.noise_field(data, B, T, N, WIDTH)
    )
    with jax.enable_x64(True):
        return naive.answer(
            *arrays,
            log_weights,
            (std * noise, std / weight * mass_noise),
            scale=1 / math.sqrt(H),
            cap=cap,
            floor=std / weight,
            ball=bound,
        )


@pytest.mark.parametrize("mechanism", [INDEPENDENT, CLIPPED], ids=["independent", "clipped"])
def test_private_attention_is_the_definition_plus_its_noise(mechanism):
    arrays = _arrays()
    got = _call(mechanism, *arrays)
    want = np.asarray(_by_definition(mechanism, *arrays))
    assert np.max(np.abs(got - want)) < 1e-5 * np.max(np.abs(want))


def test_gaussian_process_answer_is_the_definition_plus_its_noise():
    query, key, value = _arrays()
    gamma, weight = 1 / math.sqrt(H), WIDTH**-0.25
    q, k, v = (np.asarray(a, np.float64) for a in (query, key, value))
    norm = math.hypot(1.0, weight)
    call = releases.Call.of(query.shape, key.shape, value.shape)
    process = PROCESS.process(call, gamma=gamma)
    # Two memories that may hold the same person: √2 times the noise of one, and rounding.
    assert math.isclose(process.noise_std, 0.5 * math.sqrt(2) * norm, rel_tol=0.02)
    got = np.asarray(_call(PROCESS, query, key, value))
    for b in range(B):
        rows = q[b].reshape(-1, H)  # (T, N) flattened: one kv head
        distance = ((rows[:, None] - k[b, :, 0]) ** 2).sum(-1)
        limit = np.hypot(np.linalg.norm(v[b, :, 0], axis=-1), weight)
        u = np.minimum(np.exp(gamma * ((k[b, :, 0] ** 2).sum(-1) - 4.0) / 2), norm / limit)
        sums = (u * np.exp(-gamma * distance / 2)) @ np.c_[v[b, :, 0], np.ones(S)]
        gram = np.exp(-gamma * ((rows[:, None] - rows) ** 2).sum(-1) / 2)
        lower = np.linalg.cholesky(gram + process.jitter * np.eye(len(rows)))
        z = np.asarray(
            random.matrix_normals(random.key_data(KEY), b, 0, jnp.arange(T * N), WIDTH + 1)
        )
        noisy = sums + process.noise_std * (lower @ z) / np.r_[np.ones(WIDTH), weight]
        ratio = noisy[:, :WIDTH] / np.maximum(noisy[:, WIDTH:], process.floor)
        want = ratio * np.minimum(1, 1 / np.linalg.norm(ratio, axis=1, keepdims=True))
        assert np.max(np.abs(got[b].reshape(-1, WIDTH) - want)) < 1e-5


def test_sequence_release_is_the_clipped_answer_plus_its_noise():
    query, key, value = _arrays()
    clean = np.asarray(_call(NON_PRIVATE, query, key, value, None), np.float64)
    noise = np.asarray(reference.noise_field(random.key_data(KEY), B, T, N, WIDTH)[0])
    for mechanism, axes, factor in ((SEQUENCE, (1, 2, 3), 1), (ROWS, 3, math.sqrt(T * N))):
        norms = np.sqrt(np.sum(clean**2, axis=axes, keepdims=True))
        std = 0.5 * 2 * math.sqrt(B) * factor * (1 + reference.WEIGHT_ERROR)
        want = clean * np.minimum(1, 1 / norms) + std * noise
        assert np.max(np.abs(_call(mechanism, query, key, value) - want)) < 1e-5 * std


# What must not happen to records -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_record_that_is_not_finite_is_null(name, bad):
    query, key, value = _arrays()
    gone = _call(MEMORIES[name], query, key.at[:, 5].set(bad), value)
    assert np.all(np.isfinite(gone))
    assert np.array_equal(gone, _call(MEMORIES[name], query, key, value.at[:, 5, 0, 1].set(bad)))
    weights = jnp.zeros(S).at[5].set(-jnp.inf)
    masked = dpfa_jax.private_attention(
        query,
        key,
        value,
        mechanism=MEMORIES[name],
        rng=KEY,
        queries="public",
        key_log_weights=weights,
    )
    assert np.allclose(gone, masked, atol=1e-6)
    assert not np.allclose(gone, _call(MEMORIES[name], query, key, value), atol=1e-4)


@pytest.mark.parametrize("name", [*MEMORIES, "softmax"])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(name):
    query, key, value = _arrays()
    clean = np.asarray(_call(NOISY[name], query, key, value))
    spoiled = np.asarray(_call(NOISY[name], query.at[0, 1, 0, 2].set(np.nan), key, value))
    assert np.all(np.isnan(spoiled[0, 1, 0]))
    others = np.ones((B, T, N), bool)
    others[0, 1, 0] = False
    assert np.all(np.isfinite(spoiled[others]))
    if name != "clipped":  # there every record's weight depends on all (public) queries
        limit = 0.2 if name == "process" else 1e-6  # S5: the noise of later rows moves with L
        same = np.abs(spoiled - clean)[others] <= limit
        assert same.all() if name != "process" else same[:2].all()


def test_a_private_query_that_is_not_finite_is_not_shown():
    query, key, value = _arrays()
    answers = _call(SEQUENCE, query.at[0, 1, 0, 2].set(np.nan), key, value)
    assert np.all(np.isfinite(answers))


@pytest.mark.parametrize("name", MEMORIES)
def test_rows_of_any_size_keep_the_answer_in_the_ball(name):
    query, key, value = _arrays()
    value = value.at[:, 3].set(3e38).at[:, 4].set(-1e30).at[:, 5].set(0.0).at[:, 6].set(1e-42)
    key = key.at[:, 7].set(3e38).at[:, 8].set(0.0)
    answers = np.asarray(_call(MEMORIES[name], query, key, value), np.float64)
    assert np.all(np.isfinite(answers))
    assert np.max(np.linalg.norm(answers, axis=-1)) <= 1 + 2**-12


@pytest.mark.parametrize("name", MEMORIES)
def test_an_empty_memory_gives_noise(name):
    query, key, value = _arrays(keys=0)
    answers = np.asarray(_call(MEMORIES[name], query, key, value))
    assert answers.shape == (B, T, N, WIDTH) and np.all(np.isfinite(answers))
    assert np.std(answers) > 0


def test_a_fully_masked_row_gives_noise_and_not_the_mean_of_the_values():
    query, key, value = _arrays()
    quiet = dataclasses.replace(INDEPENDENT, noise_multiplier=1e-6, floor=1.0)
    answers = dpfa_jax.private_attention(
        query,
        key,
        value,
        mechanism=quiet,
        rng=KEY,
        queries="public",
        mask=jnp.zeros((1, 1, 1, S), bool),
    )
    assert np.max(np.abs(answers)) < 1e-3 < np.max(np.abs(np.mean(value, axis=1)))


def test_replacing_a_row_beyond_the_bound_moves_no_more_than_the_sensitivity():
    # A record weight shrinks numerator and denominator alike, so a huge row (1, ~0) against a
    # short one (−1, 1) differs by √(4Cv² + c²): more than S2's max(2Cv, √(Cv² + c²)). Under
    # REPLACE_ONE value rows are therefore scaled, not weighted.
    mechanism = dataclasses.replace(INDEPENDENT, adjacency=dpfa_jax.REPLACE_ONE)
    call = releases.Call.of((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
    weight = mechanism.weight(call)
    claimed = mechanism.l2_sensitivity(call)
    moved = {}
    for kind in (mechanism, INDEPENDENT):
        found = []
        for value in (1e6, -1.0):
            operands = Operands(
                jnp.ones((1, 1, 1, 1)),
                jnp.full((1, 1, 1, 1), 5.0),
                jnp.full((1, 1, 1, 1), value),
                jnp.zeros((1, 1, 1)),
            )
            bounded = attention._bounded_values(operands, kind)
            (high, _), (mass, _) = reference.sums(bounded, Spec(1.0, 1.0))
            found.append((float(high.squeeze()), weight * float(mass.squeeze())))
        moved[kind] = math.dist(*found)
    assert math.isclose(moved[mechanism], claimed, rel_tol=1e-4) and claimed < 2 + 1e-9
    assert moved[INDEPENDENT] > 1.3 * claimed  # what record weights would have done


def test_key_log_weights_above_zero_buy_no_influence():
    query, key, value = _arrays()
    plain = _call(INDEPENDENT, query, key, value)
    for weights in (jnp.full(S, 5.0), jnp.full(S, jnp.inf)):
        raised = dpfa_jax.private_attention(
            query,
            key,
            value,
            mechanism=INDEPENDENT,
            rng=KEY,
            queries="public",
            key_log_weights=weights,
        )
        assert np.allclose(plain, raised, atol=1e-6)


# Noise under transformations ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISY)
def test_vmap_with_one_key_gives_every_example_its_own_noise(name):
    query, key, value = _arrays()
    three = jnp.stack([query] * 3)
    call = functools.partial(_compiled(NOISY[name]), rng=KEY)
    batched = np.asarray(jax.vmap(lambda q: call(q, key, value))(three))
    looped = np.stack(
        [_call(NOISY[name], query, key, value, random.fold_in(KEY, i)) for i in range(3)]
    )
    assert np.allclose(batched, looped, atol=1e-5)
    assert len(np.unique(batched[:, 0, 0, 0, 0])) == 3


def test_nested_vmap_with_one_key_gives_every_example_its_own_noise():
    query, key, value = _arrays()
    call = functools.partial(_compiled(INDEPENDENT), rng=KEY)
    for order in ((0, None, None), (None, 0, None)), ((None, 0, None), (0, None, None)):
        nested = jax.vmap(jax.vmap(call, order[0]), order[1])
        answers = nested(jnp.stack([query] * 2), jnp.stack([key] * 3), value)
        assert len(np.unique(answers[:, :, 0, 0, 0, 0])) == 6


def test_vmap_over_keys_equals_a_loop_over_them():
    query, key, value = _arrays()
    keys = random.split(KEY, 3)
    batched = jax.vmap(_compiled(INDEPENDENT), (None, None, None, 0))(query, key, value, keys)
    looped = [_call(INDEPENDENT, query, key, value, rng) for rng in keys]
    assert np.allclose(batched, np.stack(looped), atol=1e-6)


def test_grad_remat_and_jacrev_see_one_release():
    query, key, value = _arrays()

    def answer(q):
        return _compiled(INDEPENDENT)(q, key, value, KEY)[0, 0]

    plain, pull = jax.vjp(answer, query)
    # jacrev maps the pull-back over cotangents: folding the key again there would be another noise.
    rows = jax.jacrev(answer)(query)
    for index in np.ndindex(N, WIDTH):
        cotangent = jnp.zeros((N, WIDTH)).at[index].set(1.0)
        assert np.allclose(rows[index], pull(cotangent)[0], atol=1e-6)
    again, pull_again = jax.vjp(jax.checkpoint(answer), query)
    assert np.array_equal(plain, again)
    assert np.allclose(pull_again(plain)[0], pull(plain)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["independent", "process"])
def test_gradients_hold_the_noise_fixed(name):
    # Central differences of the compiled answer itself, key and so noise unchanged. For S5 the
    # query moves its own noise, which the gradient leaves out: differentiate in the value there.
    query, key, value = _arrays()
    direction = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), jnp.float32)
    call = _compiled(MEMORIES[name])

    def loss(v):
        return jnp.sum(call(query, key, v, KEY) ** 2)

    slope = float(jnp.sum(jax.grad(loss)(value) * direction))
    step = 1e-2
    measured = float(loss(value + step * direction) - loss(value - step * direction)) / (2 * step)
    assert math.isclose(slope, measured, rel_tol=0.03, abs_tol=1e-3)


def _mesh(*shape):
    names = ("a", "b")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["independent", "process"])
def test_shard_map_gives_every_shard_its_own_noise(name, check_vma):
    query, key, value = _arrays()
    eight = [jnp.stack([x[0]] * 8) for x in (query, key, value)]
    call = functools.partial(_compiled(NOISY[name]), rng=KEY)
    spec = P(("a", "b"))
    sharded = jax.shard_map(
        call, mesh=_mesh(4, 2), in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma
    )
    answers = jax.jit(sharded)(*eight)
    assert len(np.unique(answers[:, 0, 0, 0])) == 8


def test_shard_map_over_queries_of_one_memory_has_the_right_gradient():
    query, key, value = _arrays(memories=1)
    quiet = dataclasses.replace(INDEPENDENT, noise_multiplier=1e-6, floor=0.1)

    def call(q, k, v):
        return dpfa_jax.private_attention(q, k, v, mechanism=quiet, rng=KEY, queries="public")

    sharded = jax.shard_map(
        call, mesh=_mesh(2), in_specs=(P("a"), P(), P()), out_specs=P("a"), check_vma=True
    )
    grads = [
        jax.jit(jax.grad(lambda k, v, f=f: jnp.sum(f(query, k, v) ** 2), (0, 1)))(key, value)
        for f in (sharded, call)
    ]
    for left, right in zip(*grads, strict=True):
        assert np.allclose(left, right, atol=2e-4 * np.max(np.abs(right)))


def test_replicated_operands_are_one_release_under_shard_map():
    query, key, value = _arrays()
    call = functools.partial(_compiled(INDEPENDENT), rng=KEY)
    replicated = jax.shard_map(
        call, mesh=_mesh(4), in_specs=(P(), P(), P()), out_specs=P(), check_vma=True
    )
    assert np.allclose(jax.jit(replicated)(query, key, value), call(query, key, value), atol=1e-6)


def test_pmap_gives_every_device_its_own_noise():
    query, key, value = _arrays()
    four = [jnp.stack([x] * 4) for x in (query, key, value)]
    answers = jax.pmap(functools.partial(_compiled(INDEPENDENT), rng=KEY))(*four)
    assert len(np.unique(np.asarray(answers)[:, 0, 0, 0, 0])) == 4


def test_scan_over_split_keys_draws_new_noise_each_step():
    query, key, value = _arrays()

    def step(carry, rng):
        return carry, _compiled(INDEPENDENT)(query, key, value, rng)[0, 0, 0, 0]

    _, drawn = jax.lax.scan(step, 0, random.split(KEY, 5))
    assert len(np.unique(drawn)) == 5


# What it costs -----------------------------------------------------------------------------------


def test_event_counts_batch_time_and_query_heads():
    shapes = (3, 5, 8, 4), (3, 9, 2, 4), (3, 9, 2, 6)
    assert INDEPENDENT.count(*shapes) == 3 * 5 * 8
    assert INDEPENDENT.count((3, 5, 8, 4), (1, 9, 2, 4)) == 3 * 5 * 8
    disjoint = dataclasses.replace(INDEPENDENT, disjoint_batch=True)
    assert disjoint.count(*shapes) == 5 * 8
    assert disjoint.count((3, 5, 8, 4), (1, 9, 2, 4)) == 3 * 5 * 8
    assert INDEPENDENT.event(*shapes) == accounting.Gaussian(0.5, 3 * 5 * 8 * 7)


def test_sensitivity_grows_with_the_queries_counted():
    def delta(mechanism, *shapes):
        return mechanism.l2_sensitivity(releases.Call.of(*shapes))

    one = delta(INDEPENDENT, (1, 1, 1, 4), (1, 9, 1, 4))
    assert math.isclose(delta(INDEPENDENT, (2, 3, 4, 4), (1, 9, 1, 4)), math.sqrt(24) * one)
    assert math.isclose(delta(INDEPENDENT, (2, 3, 4, 4), (2, 9, 2, 4)), math.sqrt(24) * one)
    disjoint = dataclasses.replace(INDEPENDENT, disjoint_batch=True)
    assert math.isclose(delta(disjoint, (2, 3, 4, 4), (2, 9, 2, 4)), math.sqrt(12) * one)


def test_accounting_events_finds_the_releases_of_a_program():
    query, key, value = _arrays()

    def program(query, rng):
        first, second = random.split(rng)
        answer = _compiled(INDEPENDENT)(query, key, value, first)

        def step(carry, rng):
            return carry, _compiled(CLIPPED)(query, key, value, rng)

        return answer, jax.lax.scan(step, 0, random.split(second, 5))[1]

    one = INDEPENDENT.event(query.shape, key.shape, value.shape)
    assert accounting.mu(accounting.events(program, query, KEY)) == pytest.approx(
        accounting.mu(one) * math.sqrt(6)
    )
    batched = jax.vmap(program, (0, None))
    assert accounting.mu(accounting.events(batched, jnp.stack([query] * 2), KEY)) == pytest.approx(
        accounting.mu(one) * math.sqrt(12)
    )
    free = accounting.events(lambda q: _compiled(NON_PRIVATE)(q, key, value, None), query)
    assert accounting.epsilon(free, 1e-5) == math.inf


def test_guarantee_names_the_promise_the_count_and_what_is_not_protected():
    text = PROCESS.guarantee((B, T, N, H), (B, S, K, H), (B, S, K, WIDTH), delta=1e-5)
    for part in ("public", f"{B * T * N} queries", "S5", "ε = ", "δ = 1e-05", "Not protected"):
        assert part in text
    assert repr(PROCESS) == PROCESS.guarantee()
    assert "ε = ∞" in repr(NON_PRIVATE)


# Hostile inputs ----------------------------------------------------------------------------------

_Q, _K, _V = _arrays()
HOSTILE = {
    "int query": ({"query": jnp.ones((B, T, N, H), jnp.int32)}, TypeError, "float32"),
    "complex query": ({"query": jnp.ones((B, T, N, H), complex)}, TypeError, "astype"),
    "three axes": ({"query": _Q[0]}, ValueError, "reshape"),
    "key width": ({"key": _K[..., :-1]}, ValueError, "one width"),
    "value rows": ({"value": _V[:, :-1]}, ValueError, "one value row"),
    "key batch": ({"key": jnp.ones((3, S, K, H)), "value": _V[:1]}, ValueError, "one value row"),
    "memories": ({"query": jnp.ones((3, T, N, H))}, ValueError, "key batch"),
    "heads": ({"key": jnp.repeat(_K, 3, 2), "value": jnp.repeat(_V, 3, 2)}, ValueError, "multiple"),
    "empty queries": ({"query": _Q[:, :0]}, ValueError, "empty axis"),
    "no key": ({"rng": None}, TypeError, "no default key"),
    "int key": ({"rng": 0}, TypeError, "secure_key"),
    "legacy key": ({"rng": jax.random.PRNGKey(0)}, TypeError, "wrap_key_data"),
    "no promise": ({"queries": "secret"}, ValueError, "'public', 'private'"),
    "private queries": ({"queries": "private"}, ValueError, "SequenceRelease"),
    "nan scale": ({"scale": math.nan}, ValueError, "scale"),
    "infinite scale": ({"scale": math.inf}, ValueError, "scale"),
    "float mask": ({"mask": jnp.ones((B, 1, T, S))}, TypeError, "astype"),
    "mask shape": ({"mask": jnp.ones((B, T, S), bool)}, ValueError, "broadcast"),
    "mask of wrong length": ({"mask": jnp.ones((B, 1, T, S - 1), bool)}, ValueError, "broadcast"),
    "negative window": ({"local_window_size": -1}, ValueError, "local_window_size"),
    "long window": ({"local_window_size": (1, 2, 3)}, ValueError, "left, right"),
    "segments shape": ({"segment_ids": jnp.zeros((B, T), jnp.int32)}, ValueError, "key segment"),
    "float lengths": ({"key_value_seq_lengths": jnp.ones(B)}, ValueError, "integers"),
    "lengths shape": ({"key_value_seq_lengths": jnp.ones(3, jnp.int32)}, ValueError, "integers"),
    "int weights": ({"key_log_weights": jnp.zeros(S, jnp.int32)}, TypeError, "floating"),
    "weights shape": ({"key_log_weights": jnp.zeros(S - 1)}, ValueError, "key_log_weights"),
    "backend": ({"backend": "cuda"}, ValueError, "backend"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_private_attention_refuses_what_it_cannot_honour(case):
    changes, error, says = HOSTILE[case]
    arguments = {
        "query": _Q,
        "key": _K,
        "value": _V,
        "mechanism": INDEPENDENT,
        "rng": KEY,
        "queries": "public",
        **changes,
    }
    with pytest.raises(error, match=says):
        dpfa_jax.private_attention(**arguments)


def test_private_attention_wants_a_mechanism_and_a_promise():
    with pytest.raises(TypeError):
        dpfa_jax.private_attention(_Q, _K, _V, mechanism=1.0, rng=KEY, queries="public")
    with pytest.raises(TypeError, match="queries"):
        dpfa_jax.private_attention(_Q, _K, _V, mechanism=INDEPENDENT, rng=KEY)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"local_window_size": 2},
        {"mask": jnp.ones((1, 1, T, S), bool)},
        {"mask": jnp.ones((1, N, 1, S), bool)},
    ],
    ids=["causal", "window", "mask by query", "mask by head"],
)
@pytest.mark.parametrize("mechanism", [PROCESS, SOFTMAX], ids=["process", "softmax"])
def test_masks_that_break_a_statement_are_refused(mechanism, options):
    with pytest.raises(ValueError, match="guarantee would not hold"):
        dpfa_jax.private_attention(
            _Q, _K, _V, mechanism=mechanism, rng=KEY, queries="public", **options
        )


def test_gaussian_process_noise_takes_masks_on_keys_and_segments():
    mask = jnp.arange(S)[None, None, None] < 7
    call = functools.partial(
        dpfa_jax.private_attention, mechanism=PROCESS, rng=KEY, queries="public"
    )
    masked = call(_Q, _K, _V, mask=mask)
    lengths = call(_Q, _K, _V, key_value_seq_lengths=jnp.full(B, 7))
    short = call(_Q, _K[:, :7], _V[:, :7])
    assert np.allclose(masked, short, atol=2e-3) and np.allclose(lengths, masked, atol=1e-6)
    # Queries of different segments share no record, so their noise must not correlate either.
    ids = (jnp.zeros((B, T), jnp.int32).at[:, 2:].set(1), jnp.zeros((B, S), jnp.int32))
    split = call(_Q, _K, _V, segment_ids=ids)
    assert np.allclose(split[:, :2], call(_Q[:, :2], _K, _V), atol=2e-3)


_POSITIVE = {
    "independent": ("noise_multiplier", "value_bound"),
    "clipped": ("noise_multiplier", "value_bound", "clip_norm"),
    "process": ("noise_multiplier", "value_bound", "key_bound", "key_scale"),
    "softmax": ("noise_multiplier", "value_bound", "score_bound"),
    "sequence": ("noise_multiplier", "clip_norm"),
}


@pytest.mark.parametrize("name", _POSITIVE)
def test_mechanisms_refuse_parameters_that_would_mean_less_noise(name):
    for field in _POSITIVE[name]:
        for bad in (0.0, -1.0, math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=field):
                dataclasses.replace(NOISY[name], **{field: bad})
        for bad in ("1", None, True):
            with pytest.raises(TypeError):
                dataclasses.replace(NOISY[name], **{field: bad})


def test_mechanisms_refuse_traced_parameters():
    def call(noise):
        return dpfa_jax.IndependentNoise(noise, value_bound=1.0, score_cap=0.0)

    with pytest.raises(TypeError):
        jax.jit(call)(1.0)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("denominator_weight", -1.0),
        ("denominator_weight", math.nan),
        ("floor", 0.0),
        ("floor", math.nan),
        ("score_cap", math.nan),
        ("score_cap", math.inf),
    ],
)
def test_optional_parameters_are_checked_too(field, bad):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(INDEPENDENT, **{field: bad})


def test_adjacencies_without_a_statement_are_refused():
    for mechanism in (INDEPENDENT, CLIPPED, PROCESS):
        with pytest.raises(ValueError, match="SEQUENCE"):
            dataclasses.replace(mechanism, adjacency=dpfa_jax.SEQUENCE)
    with pytest.raises(ValueError, match="rows"):
        dpfa_jax.GROUP(0)


def test_a_named_backend_never_falls_back():
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        dpfa_jax.private_attention(
            _Q, _K, _V, mechanism=INDEPENDENT, rng=KEY, queries="public", backend="mosaic_gpu"
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_get_their_noise_before_the_cast(dtype):
    narrow = [x.astype(dtype) for x in (_Q, _K, _V)]
    wide = _call(INDEPENDENT, *(x.astype(jnp.float32) for x in narrow))
    got = _call(INDEPENDENT, *narrow)
    assert got.dtype == dtype
    assert np.array_equal(got, wide.astype(dtype))


# Clipping ----------------------------------------------------------------------------------------


def test_clip_rows_holds_for_every_finite_row():
    source = np.random.default_rng(0)
    rows = source.normal(size=(500, 33)) * 10.0 ** source.uniform(-44, 38, (500, 1))
    rows = np.clip(rows, -3e38, 3e38).astype(np.float32)
    for run in (clipping.clip_rows, jax.jit(clipping.clip_rows, static_argnums=1)):
        clipped = np.asarray(run(jnp.asarray(rows), 0.7), np.float64)
        assert np.all(np.isfinite(clipped))
        assert np.max(np.linalg.norm(clipped, axis=1)) <= 0.7 * (1 + 2**-13)


def test_log_row_norms_of_huge_rows_are_not_flushed_to_zero():
    # 1/3e38 is a denormal number, which XLA flushes: a norm by rows/max came out as 0.
    rows = jnp.array([[3e38, 3e38], [0.0, 1e38], [1e-37, 0.0]])
    want = [math.log(3e38) + math.log(2) / 2, math.log(1e38), math.log(1e-37)]
    assert np.allclose(clipping.log_row_norms(rows), want, atol=1e-4)


def test_stable_sum_is_accurate_for_a_million_terms():
    values = np.random.default_rng(0).random(1_000_003, np.float32)
    exact = values.astype(np.float64).sum()
    assert abs(float(clipping.stable_sum(jnp.asarray(values))) / exact - 1) < 2**-13
