import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpfa_jax
from dpfa_jax import admission, random, reference, releases
from dpfa_jax._typing import Operands, Spec
from tests import naive
from tests.attention_common import (
    CLIPPED,
    INDEPENDENT,
    KEY,
    MEMORIES,
    NOISY,
    NON_PRIVATE,
    PROCESS,
    ROWS,
    SEQUENCE,
    SOFTMAX,
    WIDTH,
    B,
    H,
    K,
    N,
    S,
    T,
    arrays,
    ask,
)

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
    query, key, value = arrays()
    value = jnp.pad(value, ((0, 0),) * 3 + ((0, H - WIDTH),))
    want = jax.nn.dot_product_attention(query, key, value, **jax_options)
    got = ask(NON_PRIVATE, query, key, value, None, **options)
    assert np.max(np.abs(got - want)) < 1e-6


def test_private_attention_takes_lengths_and_masks_as_jax_does():
    query, key, value = arrays()
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
    rows = arrays()
    got = ask(mechanism, *rows)
    want = np.asarray(_by_definition(mechanism, *rows))
    # Noisy sums are rounded to 2**-10 of their noise's std at most, and D̃ ≥ one such std.
    assert np.max(np.abs(got - want)) < 2**-10 * (WIDTH**-0.25 + np.max(np.abs(want)))


def test_gaussian_process_answer_is_the_definition_plus_its_noise():
    query, key, value = arrays()
    gamma, weight = 1 / math.sqrt(H), WIDTH**-0.25
    q, k, v = (np.asarray(a, np.float64) for a in (query, key, value))
    norm = math.hypot(1.0, weight)
    call = releases.Call.of(query.shape, key.shape, value.shape)
    process = PROCESS.process(call, gamma=gamma)
    # Two memories that may hold the same person: √2 times the noise of one, and rounding.
    assert math.isclose(process.noise_std, 0.5 * math.sqrt(2) * norm, rel_tol=0.02)
    got = np.asarray(ask(PROCESS, query, key, value))
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
        assert np.max(np.abs(got[b].reshape(-1, WIDTH) - want)) < 2**-10 * (weight + 1)


def test_sequence_release_is_the_clipped_answer_plus_its_noise():
    query, key, value = arrays()
    clean = np.asarray(ask(NON_PRIVATE, query, key, value, None), np.float64)
    noise = np.asarray(reference.noise_field(random.key_data(KEY), B, T, N, WIDTH)[0])
    for mechanism, axes, factor in ((SEQUENCE, (1, 2, 3), 1), (ROWS, 3, math.sqrt(T * N))):
        norms = np.sqrt(np.sum(clean**2, axis=axes, keepdims=True))
        std = 0.5 * 2 * math.sqrt(B) * factor * (1 + reference.WEIGHT_ERROR)
        want = clean * np.minimum(1, 1 / norms) + std * noise
        assert np.max(np.abs(ask(mechanism, query, key, value) - want)) < 2**-10 * std


# What must not happen to records -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_record_that_is_not_finite_is_null(name, bad):
    query, key, value = arrays()
    gone = ask(MEMORIES[name], query, key.at[:, 5].set(bad), value)
    assert np.all(np.isfinite(gone))
    assert np.array_equal(gone, ask(MEMORIES[name], query, key, value.at[:, 5, 0, 1].set(bad)))
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
    assert not np.allclose(gone, ask(MEMORIES[name], query, key, value), atol=1e-4)


@pytest.mark.parametrize("name", [*MEMORIES, "softmax"])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(name):
    query, key, value = arrays()
    clean = np.asarray(ask(NOISY[name], query, key, value))
    spoiled = np.asarray(ask(NOISY[name], query.at[0, 1, 0, 2].set(np.nan), key, value))
    assert np.all(np.isnan(spoiled[0, 1, 0]))
    others = np.ones((B, T, N), bool)
    others[0, 1, 0] = False
    assert np.all(np.isfinite(spoiled[others]))
    if name != "clipped":  # there every record's weight depends on all (public) queries
        limit = 0.2 if name == "process" else 1e-6  # S5: the noise of later rows moves with L
        same = np.abs(spoiled - clean)[others] <= limit
        assert same.all() if name != "process" else same[:2].all()


def test_a_private_query_that_is_not_finite_is_not_shown():
    query, key, value = arrays()
    answers = ask(SEQUENCE, query.at[0, 1, 0, 2].set(np.nan), key, value)
    assert np.all(np.isfinite(answers))


@pytest.mark.parametrize("name", MEMORIES)
def test_rows_of_any_size_keep_the_answer_in_the_ball(name):
    query, key, value = arrays()
    value = value.at[:, 3].set(3e38).at[:, 4].set(-1e30).at[:, 5].set(0.0).at[:, 6].set(1e-42)
    key = key.at[:, 7].set(3e38).at[:, 8].set(0.0)
    answers = np.asarray(ask(MEMORIES[name], query, key, value), np.float64)
    assert np.all(np.isfinite(answers))
    assert np.max(np.linalg.norm(answers, axis=-1)) <= 1 + 2**-12


@pytest.mark.parametrize("name", MEMORIES)
def test_an_empty_memory_gives_noise(name):
    query, key, value = arrays(keys=0)
    answers = np.asarray(ask(MEMORIES[name], query, key, value))
    assert answers.shape == (B, T, N, WIDTH) and np.all(np.isfinite(answers))
    assert np.std(answers) > 0


def test_a_fully_masked_row_gives_noise_and_not_the_mean_of_the_values():
    query, key, value = arrays()
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
            bounded = admission.sanitised(operands, kind)
            (high, _), (mass, _) = reference.sums(bounded, Spec(1.0, 1.0))
            found.append((float(high.squeeze()), weight * float(mass.squeeze())))
        moved[kind] = math.dist(*found)
    assert math.isclose(moved[mechanism], claimed, rel_tol=1e-4) and claimed < 2 + 1e-9
    assert moved[INDEPENDENT] > 1.3 * claimed  # what record weights would have done


def test_key_log_weights_above_zero_buy_no_influence():
    query, key, value = arrays()
    plain = ask(INDEPENDENT, query, key, value)
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


# Hostile inputs ----------------------------------------------------------------------------------

_Q, _K, _V = arrays()
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


@pytest.mark.parametrize("backend", ("xla", "triton"))
@pytest.mark.parametrize("side", (2**30, 2**31 - 1, 2**40))
def test_windows_past_all_positions_are_no_limit(backend, side):
    rows = jax.random.normal(jax.random.key(0), (1, 40, 2, 16))

    def run(window):
        return dpfa_jax.private_attention(
            rows,
            rows,
            rows,
            mechanism=dpfa_jax.NonPrivate(),
            rng=None,
            queries="public",
            local_window_size=window,
            backend=backend,
        )

    np.testing.assert_array_equal(run((side, side)), run((39, 39)))
    np.testing.assert_array_equal(run((3, side)), run((3, 39)))


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
    wide = ask(INDEPENDENT, *(x.astype(jnp.float32) for x in narrow))
    got = ask(INDEPENDENT, *narrow)
    assert got.dtype == dtype
    assert np.array_equal(got, wide.astype(dtype))


def test_private_attention_refuses_a_key_that_repeats_its_noise():
    query, key, value = arrays()
    rng = jax.random.key(0)

    @jax.jit
    def call(query):
        return dpfa_jax.private_attention(
            query, key, value, mechanism=INDEPENDENT, rng=rng, queries="public"
        )

    with pytest.raises(ValueError, match="argument"):
        call(query)


@pytest.mark.parametrize("backend", ("xla", "triton"))
def test_a_query_that_sees_nothing_has_no_gradient(backend):
    query, key, value = (jnp.asarray(x[:1, :4], jnp.float32) for x in arrays())

    def loss(*rows):
        out = dpfa_jax.private_attention(
            *rows,
            mechanism=dpfa_jax.NonPrivate(),
            rng=None,
            queries="public",
            key_value_seq_lengths=jnp.zeros(1, jnp.int32),
            backend=backend,
        )
        return jnp.sum(out**2 + out)

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value):
        assert np.all(gradient == 0)
