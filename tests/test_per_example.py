"""Which statement does `per_example` keep true? The norm is that of the whole gradient of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dpfa_jax import per_example
from dpfa_jax.clipping._batch import inner_jaxprs

VOCABULARY, WIDTH = 7, 3
TOKENS = jnp.array([[1, 1, 1, 5], [0, 6, 2, 2], [4, 4, 0, 0]])


def _compare(loss, params, rows, rules):
    """Norms by the plan's rules against those of the gradients themselves; `rules` by leaf."""
    leaves, tree = jax.tree.flatten(params)

    def flat(leaves, row):
        return (loss(jax.tree.unflatten(tree, leaves), row),)

    closed = jax.make_jaxpr(flat)(leaves, rows[0])
    made = per_example.plan(closed.jaxpr, len(leaves))
    assert dict(made.rules) == rules, made.reasons
    assert set(made.rules) | set(made.reasons) == set(range(len(leaves)))

    def square(row):
        found, full, _ = per_example.squared_norms(closed, made)(leaves, [row])
        return found + sum(jnp.sum(jnp.square(leaf)) for leaf in full)

    got = np.asarray(jax.jit(jax.vmap(square))(rows), np.float64)
    with jax.enable_x64(True):
        exact = [np.asarray(leaf, np.float64) for leaf in leaves]
        inputs = np.asarray(rows)
        inputs = inputs if inputs.dtype.kind == "i" else inputs.astype(np.float64)
        grads = [jax.grad(lambda p, row: flat(p, row)[0])(exact, row) for row in inputs]
        want = [sum(np.sum(np.square(np.asarray(leaf))) for leaf in each) for each in grads]
    # 2⁻²⁰·(Σ‖x‖‖dy‖)² is added on purpose; the sum has at most 8 terms.
    assert np.all(got >= np.asarray(want) * (1 - 2**-20)) and np.allclose(got, want, rtol=2**-14)
    return made


def _table(seed=0, shape=(VOCABULARY, WIDTH)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _cross_entropy(logits, tokens):
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1))


@pytest.mark.parametrize("way", ["transposed", "contracted", "left operand", "one matrix per jit"])
def test_norms_of_a_tied_embedding_are_those_of_the_whole_gradient(way):
    def loss(params, tokens):
        table = params["table"]
        x = jnp.tanh(jnp.take(table, tokens, axis=0) @ params["mix"])
        if way == "transposed":
            logits = x @ table.T
        elif way == "contracted":
            logits = jnp.einsum("td,vd->tv", x, table)
        elif way == "left operand":
            logits = jax.lax.dot_general(table, x, (((1,), (1,)), ((), ()))).T
        else:
            logits = jax.jit(lambda x, table: x @ table.T)(x, table)
        return _cross_entropy(logits, tokens)

    params = {"mix": _table(1, (WIDTH, WIDTH)), "table": _table()}
    _compare(loss, params, TOKENS, {0: "matrix product", 1: "tied embedding"})


def test_norms_without_the_cross_term_of_a_tied_embedding_would_be_wrong():
    # Negative control: the two parts of the gradient are far from orthogonal.
    def loss(tables, tokens):
        return _cross_entropy(jnp.take(tables[0], tokens, axis=0) @ tables[1].T, tokens)

    parts = jax.grad(loss)((_table(), _table()), TOKENS[0])
    together, apart = (
        jnp.sum(jnp.square(parts[0] + parts[1])),
        sum(jnp.sum(jnp.square(part)) for part in parts),
    )
    assert abs(together / apart - 1) > 0.1


def test_parameters_used_in_other_ways_get_gradients_in_full():
    def loss(params, x):
        square, twice, shift, gain, sliced, scanned, stopped, product = params
        y = jnp.tanh(x @ square) @ twice @ twice + shift
        y = y * gain + x @ sliced[:, :4]
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ scanned), None), y, None, length=2)
        y = y + jax.lax.stop_gradient(product.sum())
        return jnp.sum(jnp.square(y @ (stopped * 2.0)))

    params = tuple(
        _table(i, shape)
        for i, shape in enumerate([(4, 4), (4, 4), (4,), (4,), (4, 6), (4, 4), (4, 2), (4, 4)])
    )
    made = _compare(loss, params, _table(9, (3, 2, 4)), {0: "matrix product"})
    assert made.reasons[1] == "used 2 times"
    assert "slice" in made.reasons[4] and "scan" in made.reasons[5] and "mul" in made.reasons[6]


def test_a_table_that_is_not_tied_in_the_usual_way_gets_its_gradient_in_full():
    table = _table(0, (WIDTH, WIDTH))
    tokens = TOKENS % WIDTH
    ways = {
        "contracts the first axis": lambda x, table: x @ table,
        "two look-ups": lambda x, table: x + jnp.take(table, tokens[0], axis=0),
        "sum of the table": lambda x, table: x + jnp.sum(table),
    }
    for name, use in ways.items():

        def loss(params, row, use=use):
            x = jnp.take(params[0], row, axis=0)
            return jnp.sum(jnp.tanh(use(x, params[0])) ** 2)

        made = _compare(loss, (table,), tokens, {})
        assert made.reasons, name


def test_regularisers_of_parameters_are_part_of_the_gradient():
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params[0])) + 0.5 * jnp.sum(params[0] ** 2)

    _compare(loss, (_table(0, (3, 2)),), _table(1, (2, 4, 3)), {})


@pytest.mark.parametrize("remat", ["nothing", "block"])
def test_norms_of_layers_in_blocks_and_casts(remat):
    def block(params, x):
        return jnp.tanh(x @ params["w"].astype(jnp.float32).reshape(4, 6)[None][0] + params["b"])

    layer = jax.checkpoint(block) if remat == "block" else block

    def loss(params, x):
        kernel = params["heads"]
        y = jnp.einsum("td,dhk->thk", layer(params, x), kernel)
        z = jnp.einsum("dp,td->pt", params["left"], y.reshape(-1, 4))
        return jnp.sum(jnp.sin(z)) + jnp.sum(jnp.sin(x[0] @ params["once"]))

    params = {
        "w": _table(0, (24,)),
        "b": _table(1, (6,)),
        "heads": _table(2, (6, 2, 2)),
        "left": _table(3, (4, 5)),
        "once": _table(4, (4, 2)),
    }
    numbers = {name: i for i, name in enumerate(sorted(params))}
    rules = {numbers[name]: "matrix product" for name in ("heads", "left", "once", "w")}
    _compare(loss, params, _table(5, (3, 5, 4)), rules)


@pytest.mark.parametrize(("remat", "heavy"), [(False, 3), (True, 5)])
def test_pairs_compute_again_light_work_and_what_the_loss_computes_again(remat, heavy):
    def block(w, x):
        return jnp.cos(jnp.sin(jnp.cumsum(x, axis=0)) @ w)

    def loss(params, x):
        for w in params:
            x = (jax.checkpoint(block) if remat else block)(w, x)
        return (jnp.sum(x * x),)

    params, x = [_table(0, (4, 4)), _table(1, (4, 4))], _table(2, (3, 4))
    closed = jax.make_jaxpr(loss)(params, x)
    made = per_example.plan(closed.jaxpr, 2)
    assert [use.in_remat for use in made.uses.values()] == [remat, remat]
    run = per_example.pairs(closed, made)
    found, _, _ = jax.jit(run)(params, [x])
    want = jax.grad(lambda p: loss(p, x)[0])(params)
    for (met, dy), grad in zip([found[path] for path in sorted(found)], want, strict=True):
        assert np.allclose(met.T @ dy, grad, rtol=1e-5, atol=1e-6)
    # Of each block one sine for the loss, one for the derivative of the cosine, and one computed
    # again; one running sum, of the second its transpose, and one more where the loss says so.
    text = str(jax.make_jaxpr(run)(params, [x]))
    assert (text.count(" sin "), text.count(" cumsum[")) == (6, heavy)


def _centred(x):
    off = x - jnp.mean(x, axis=1, keepdims=True)
    return off * jax.lax.rsqrt(1 + jnp.var(x, axis=1))[:, None]


def _blocks(params, x, has_norm):
    """Residual blocks: perhaps a norm, a product with a bias, an activation, a product."""
    for first, bias, second in params:
        y = _centred(x) if has_norm else x
        x = x + jax.nn.gelu(y @ first + bias) @ second
    return (jnp.sum(jnp.sin(x)),)


def _block_params(blocks):
    return [
        (_table(i, (4, 16)), _table(i + 1, (16,)), _table(i + 2, (16, 4)))
        for i in range(0, 3 * blocks, 3)
    ]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from _equations(inner)


@pytest.mark.parametrize("has_norm", [True, False])
def test_pairs_keep_products_and_the_residual_stream_and_no_activation(has_norm):
    blocks = 3
    params, x = _block_params(blocks), _table(9, (5, 4))
    flat = jax.tree.leaves(params)

    def loss(leaves, x):
        return _blocks(jax.tree.unflatten(jax.tree.structure(params), leaves), x, has_norm)

    closed = jax.make_jaxpr(loss)(flat, x)
    run = per_example.pairs(closed, per_example.plan(closed.jaxpr, len(flat)))
    lines = list(_equations(jax.make_jaxpr(run)(flat, [x]).jaxpr))
    again = [line for line in lines if line.primitive.name == "remat2"]
    met = {atom for line in again for atom in line.invars if not isinstance(atom, core.Literal)}
    shapes = [getattr(atom.aval, "shape", None) for atom in met]
    # Behind the first product of each block it and its cotangent, and nothing of the activation.
    assert shapes.count((5, 16)) <= 2 * blocks
    # The stream before each block and its cotangents, nothing of the norm and no term of the sum.
    assert shapes.count((5, 4)) <= 2 * blocks


def test_pairs_are_those_of_the_gradient_through_dropout_loops_and_rectifiers():
    def loss(leaves, x, seed):
        first, bias, second = leaves
        y = jax.nn.relu(jnp.exp(0.1 * x) @ first + bias)
        y = jnp.where(jax.random.bernoulli(seed, 0.5, y.shape), 2.0 * y, 0.0)
        y, _ = jax.lax.scan(lambda y, _: (jnp.sin(y) + y, None), y, None, length=3)
        z = jax.jit(lambda y: jnp.tanh(jnp.cos(y) @ second))(jax.nn.silu(y) * y)
        return (jnp.sum(z * x) + jnp.sum(jax.nn.softmax(y)[0] * bias),)

    leaves, x, seed = list(_block_params(1)[0]), _table(9, (5, 4)), jax.random.key(3)
    closed = jax.make_jaxpr(loss)(leaves, x, seed)
    made = per_example.plan(closed.jaxpr, 3)
    assert dict(made.rules) == {0: "matrix product", 2: "matrix product"}
    found, full, _ = jax.jit(per_example.pairs(closed, made))(leaves, [x, seed])
    want = jax.grad(lambda leaves: loss(leaves, x, seed)[0])(leaves)
    (first, second), bias = [met.T @ dy for _, (met, dy) in sorted(found.items())], full[0]
    for got, grad in zip((first, bias, second), want, strict=True):
        assert np.allclose(got, grad, rtol=1e-5, atol=1e-6)


def test_reads_outside_a_table_have_no_gradient():
    def loss(params, row):
        x = params[0].at[row].get(mode="fill", fill_value=1.0)
        return jnp.sum(jnp.sin(x) * jnp.arange(1.0, 4.0))

    rows = jnp.array([[0, 1, 90], [2, -90, 2], [6, 6, 6]])
    _compare(loss, (_table(),), rows, {0: "look-up"})

    def clipped(params, row):
        return jnp.sum(jnp.sin(params[0].at[row].get(mode="clip")) * jnp.arange(1.0, 4.0))

    _compare(clipped, (_table(),), rows, {0: "look-up"})


@pytest.mark.parametrize("shape", [(1, 5, 4), (6, 40, 30), (40, 3, 4), (3, 1, 1)])
def test_product_norm_is_the_norm_of_the_product(shape):
    rows, d, p = shape
    source = np.random.default_rng(0)
    x = np.asarray(source.normal(size=(rows, d)))
    dy = np.asarray(source.normal(size=(rows, p)))
    got = float(per_example.product_norm(jnp.float32(x), jnp.float32(dy)))
    want = np.sum(np.matmul(x.T, dy) ** 2)
    slack = 2.0**-20 * np.sum(np.linalg.norm(x, axis=1) * np.linalg.norm(dy, axis=1)) ** 2
    assert want * (1 - 2**-20) <= got <= want * (1 + 2**-18) + slack * (rows > 1) * 1.01


def test_product_norm_is_no_smaller_than_a_gradient_that_cancels():
    # Rows that cancel to a millionth: Gram matrices keep no digit of what is left.
    source = np.random.default_rng(1)
    x, dy = source.normal(size=(1, 50)), source.normal(size=(1, 60))
    x = np.float32(np.repeat(x, 8, axis=0))
    dy = np.repeat(dy, 8, axis=0) * np.array([[1], [-1]] * 4) + source.normal(size=(8, 60)) * 1e-6
    dy = np.float32(dy)
    want = np.sum(np.matmul(np.float64(x).T, np.float64(dy)) ** 2)
    assert float(per_example.product_norm(jnp.asarray(x), jnp.asarray(dy))) >= want
    indices = jnp.zeros(8, jnp.int32)
    want = np.sum(np.sum(np.float64(dy), axis=0) ** 2)
    assert float(per_example.look_up_norm(indices, jnp.asarray(dy))) >= want


def test_sum_of_squares_of_many_terms_keeps_its_digits():
    # One long sum in float32 stops growing at 2²⁴ ones.
    ones = jnp.ones((3, 2**13, 2**12), jnp.bfloat16).at[1, 0, 0].set(jnp.nan)
    got = jax.jit(jax.vmap(per_example.sum_of_squares))(ones)
    assert np.all(np.abs(np.asarray(got[::2], np.float64) / 2**25 - 1) <= 2**-12)
    assert np.isnan(got[1])


def test_costs_prefer_gradients_in_full_where_rows_are_long():
    for length, full_is_cheaper in ((4, False), (4096, True)):
        spec = jax.ShapeDtypeStruct((length, 32), jnp.float32)
        weight = jax.ShapeDtypeStruct((32, 32), jnp.float32)
        closed = jax.make_jaxpr(lambda w, x: jnp.sum(jnp.sin(x @ w)))(weight, spec)
        (cost,) = per_example.costs(per_example.plan(closed.jaxpr, 1), [32 * 32])
        assert cost.leaf == 0 and (cost.in_full < cost.norm) == full_is_cheaper
