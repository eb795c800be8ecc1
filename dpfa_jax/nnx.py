"""Private attention for flax.nnx: a module that owns its stream of keys, and a layer of its own.

A stream is a key and a count. Noise repeats when the count does not come back: from a copy of the
module, a checkpoint, or a function under plain `jax.jit`. So a module draws keys only where Flax
returns its count (in the code that made it and under nnx.jit, nnx.grad, nnx.scan, ...); everywhere
else it asks for `reseed`, and `apply` does that for functions of a key.
"""

import weakref
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import graphlib

from dpfa_jax import _check, _flax, random, releases

STREAM = "privacy"

# Transformations that run a function once, or see every example (`stream_key`).
_RUN_ONCE = ("grad", "jvp", "vjp", "remat", "vmap", "pmap", "cond", "switch", "checkify")

_RESEED = (
    "or call dpfa_jax.nnx.apply(model, rng, ...), or first dpfa_jax.nnx.reseed(model, rng), with a "
    "new rng each time"
)
_PASS_IT = "Pass nnx.Rngs(params=..., privacy=dpfa_jax.random.secure_key())"


class PrivacyKey(nnx.RngKey):
    """Key data uint32[8] of one stream. It stays with its module: updates and checkpoints skip it.

    What a checkpoint restores was used after it was written; a restored model keeps its new key.
    """

    def _renew(self, data: jax.Array) -> None:
        super().set_raw_value(data)

    def set_raw_value(self, value: Any, *, _unsafe_bypass_check: bool = False) -> None:
        """Nothing: a key is renewed by `reseed` only.

        Args:
          value: without effect.
        """

    def update_from_state(self, variable_state: Any) -> None:
        """Nothing: a key is renewed by `reseed` only.

        Args:
          variable_state: without effect.
        """

    def copy_from(self, other: Any) -> None:
        """Nothing: a key is renewed by `reseed` only.

        Args:
          other: without effect.
        """


class PrivacyCount(nnx.RngCount):
    """How many keys a stream has given out. It never goes back."""

    def _renew(self, count: jax.Array) -> None:
        super().set_raw_value(count)

    def _raise_to(self, value: Any) -> None:
        own = self.get_raw_value()
        if jnp.shape(own) == jnp.shape(value):
            value = jnp.maximum(own, value)
        super().set_raw_value(value)

    def set_raw_value(self, value: Any, *, _unsafe_bypass_check: bool = False) -> None:
        """The larger of the two counts.

        Args:
          value: the new count.
        """
        self._raise_to(value)

    def update_from_state(self, variable_state: Any) -> None:
        """The larger of the two counts.

        Args:
          variable_state: a variable with the new count.
        """
        self._raise_to(variable_state.get_raw_value())

    def copy_from(self, other: Any) -> None:
        """The larger of the two counts.

        Args:
          other: a variable with the new count.
        """
        self._raise_to(other.get_raw_value())


class _Seal:
    """Knows the one module object whose count is the count; copies of the module share it."""

    def __init__(self, home: Any = None):
        self.home = (lambda: None) if home is None else weakref.ref(home)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seal)  # no reason to compile a function again

    def __hash__(self) -> int:
        return hash(_Seal)

    def __reduce__(self):
        return _Seal, ()

    def __repr__(self) -> str:
        return "_Seal()"


def _outer(module: Any) -> tuple[Any, Any]:
    """The module outside the nnx transformation that will update it from this one, and the tag.

    Both are None where there is none.
    """
    for tag, stack in graphlib.GRAPH_CONTEXT.update_context_stacks.items():
        for context in stack:
            inner, outer = context.inner_ref_outer_index, context.outer_index_outer_ref
            if inner is not None and outer is not None and module in inner:
                return outer.get(inner[module]), tag
    return None, None


def _count_comes_back(module: "PrivateAttention") -> bool:
    seen: set[int] = set()
    node: Any = module
    while isinstance(node, PrivateAttention) and id(node) not in seen:
        if node.seal.home() is node:
            return True
        seen.add(id(node))
        node, _ = _outer(node)
    return False


def _may_repeat(module: "PrivateAttention") -> bool:
    """Whether a loop outside may give every step this module's key and count.

    Flax broadcasts into a scan by a carry that never changes, which looks like one that does. Only
    a key that the loop slices from a stack is known to be another in every step.
    """
    seen: set[int] = set()
    node: Any = module
    while node.seal.home() is not node and id(node) not in seen:
        seen.add(id(node))
        outer, tag = _outer(node)
        if not isinstance(outer, PrivateAttention):
            break
        loops = isinstance(tag, str) and tag not in _RUN_ONCE
        if loops and jnp.ndim(outer.key.get_raw_value()) == jnp.ndim(node.key.get_raw_value()):
            return True
        node = outer
    return False


def _make_rng(module: "PrivateAttention") -> jax.Array:
    if not _count_comes_back(module):
        raise ValueError(
            "Expected a module whose count of keys comes back, got a copy (made by nnx.merge, "
            "nnx.clone, jax.jit of a module, or while tracing): it would repeat the noise of its "
            f"original. Use nnx.jit and the other nnx transformations, {_RESEED}."
        )
    if _may_repeat(module):
        raise ValueError(
            "Expected a loop to slice the state of the module from a stack, got one key for all "
            "its steps, which might repeat the noise. Map over all of nnx.RngState (axis 0), or "
            "scan over keys and call dpfa_jax.nnx.apply(model, rng, ...) in the loop."
        )
    data, count = module.key.get_raw_value(), module.count.get_raw_value()
    if jnp.shape(data) != (8,) or jnp.shape(count) != ():
        raise ValueError(
            f"Expected one key, got key data of shape {jnp.shape(data)}: a stack of layers is run "
            "by nnx.scan or nnx.vmap over all of its state, nnx.RngState included."
        )
    if _flax.is_constant(count):
        _flax.refuse_constant(data, f"Pass the module as an argument to nnx.jit, {_RESEED}.")
    module.count._check_can_update()
    module.count._renew(count + jnp.uint32(1))
    return random.fold_in(random.wrap_key_data(data), count)


def _first_key(rngs: nnx.Rngs) -> jax.Array:
    if not isinstance(rngs, nnx.Rngs) or STREAM not in rngs:
        got = sorted(rngs) if isinstance(rngs, nnx.Rngs) else type(rngs).__name__
        raise ValueError(
            f'Expected rngs to have a stream "privacy", got {got}; Flax would take the default '
            f"stream's key. {_PASS_IT}."
        )
    rng = rngs[STREAM]()
    if str(jax.random.key_impl(rng)) != str(random.IMPL):
        raise ValueError(
            f'Expected the stream "privacy" to hold a key of dpfa_jax.random, got one of '
            f"{jax.random.key_impl(rng)}: an int there is a 32-bit seed. {_PASS_IT}; where "
            "reproducibility matters more than secrecy, "
            "privacy=dpfa_jax.random.fold_in(jax.random.key(seed), 0)."
        )
    return rng


class PrivateAttention(nnx.Module):
    """Private attention as `attention_fn=` of `nnx.MultiHeadAttention`, with a stream of its own.

    In `MultiHeadAttention(...)(x)` every token is a query as well as a record: that takes
    `queries="private"` and SequenceRelease. `queries="public"` is for `(inputs_q, inputs_k)` with
    public `inputs_q`, or use `PrivateCrossAttention`. MultiHeadAttention wants `decode=`.

    Args:
      mechanism: what is added and charged, one of dpfa_jax's mechanisms.
      queries: "public", the caller's promise that no query depends on a private record except
        through released answers, or "private".
      scale: factor of the scores; None is 1/√width.
      is_causal: query i sees keys j ≤ i.
      local_window_size: w or (left, right) ≥ 0.
      backend: as in `private_attention`.
      precision: of the score product, such as "fp8"; None takes that of the layer around.
      rngs: with a stream "privacy" that holds a key of `dpfa_jax.random`; one key is taken from it.

    Guarantee: S1, S2, S3, S5 and S7 (sensitivity.md).

    Example:
      >>> from dpfa_jax import SequenceRelease
      >>> rngs = nnx.Rngs(params=0, privacy=random.secure_key())
      >>> noise = SequenceRelease(noise_multiplier=1.0, clip_norm=1.0)
      >>> attend = PrivateAttention(noise, queries="private", rngs=rngs)
      >>> layer = nnx.MultiHeadAttention(2, 4, attention_fn=attend, decode=False, rngs=rngs)
      >>> layer(jnp.ones((1, 3, 4))).shape
      (1, 3, 4)
    """

    def __init__(
        self,
        mechanism: releases.Mechanism,
        *,
        queries: str,
        scale: float | None = None,
        is_causal: bool = False,
        local_window_size: int | tuple[int, int] | None = None,
        backend: str = "auto",
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        self.mechanism = mechanism
        self.queries = _check.choice("queries", queries, ("public", "private"))
        self.scale, self.local_window_size = scale, local_window_size
        self.is_causal = _check.flag("is_causal", is_causal)
        self.backend, self.precision = backend, precision
        self.key = PrivacyKey(random.key_data(_first_key(rngs)), tag=STREAM)
        self.count = PrivacyCount(jnp.uint32(0), tag=STREAM)
        self.seal = _Seal(self)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
        key_log_weights: Any = None,
        key_value_seq_lengths: Any = None,
    ) -> jax.Array:
        """The released answers; the parameters are those that Flax passes.

        Args:
          query: (batch..., T, N, H).
          key: (batch..., S, K, H), or batch axes of 1 for one memory.
          value: (batch..., S, K, h).
          bias: None; scores cannot be biased.
          mask: (batch..., N, T, S) with 1 where an axis is the same for all; boolean, or 0 and 1 as
            from `nnx.make_causal_mask`.
          broadcast_dropout: without effect.
          dropout_rng: without effect; dropout never shares the noise's key.
          dropout_rate: 0 unless `deterministic`.
          deterministic: whether dropout is off.
          dtype: of the operands and the answer; None takes their common type.
          precision: of the score product; None is the highest.
          module: None; weights cannot be sown.
          promote_dtype: without effect; see `dtype`.
          is_causal: query i sees keys j ≤ i, here or in the constructor.
          input_positions: None; rotate queries and keys before.
          key_log_weights: logarithms of row weights ≤ 0, as in `private_attention`.
          key_value_seq_lengths: (B,) integers, as in `private_attention`.

        Returns:
          (batch..., T, N, h).

        Raises:
          ValueError, TypeError: for arguments that do not fit, or a key that would repeat its
            noise.
        """
        del broadcast_dropout, dropout_rng, promote_dtype
        _flax.refuse_options(
            bias=bias,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            module=module,
            input_positions=input_positions,
        )
        private = not isinstance(self.mechanism, releases.NonPrivate)
        return _flax.attend(
            query,
            key,
            value,
            mechanism=self.mechanism,
            rng=_make_rng(self) if private else None,
            queries=self.queries,
            scale=self.scale,
            is_causal=self.is_causal or is_causal,
            local_window_size=self.local_window_size,
            mask=mask,
            key_log_weights=key_log_weights,
            key_value_seq_lengths=key_value_seq_lengths,
            dtype=dtype,
            precision=precision if self.precision is None else self.precision,
            backend=self.backend,
        )


class PrivateCrossAttention(nnx.Module):
    """Public queries over private memory rows: projections, private attention, output projection.

    Rows of the memory become keys and values one by one, so that record j stays record j. The
    projections are parameters: training them on the records without privacy leaks what they learn.

    Args:
      num_heads: N, heads of the queries.
      in_features: width of the queries.
      memory_features: width of the memory rows; None takes `in_features`.
      mechanism: what is added and charged, one of dpfa_jax's mechanisms.
      queries: "public", the caller's promise that no query depends on a private record except
        through released answers, or "private".
      num_kv_heads: K, heads of the memory; N is a multiple, None is N.
      qkv_features: N times the head width; None takes `in_features`.
      out_features: width of the result; None takes `in_features`.
      use_bias: whether projections add a bias.
      dtype: of the computation; None takes the inputs' and parameters' type.
      param_dtype: of the parameters.
      scale: factor of the scores; None is 1/√width.
      precision: of the projections and the score product.
      backend: as in `private_attention`.
      rngs: with streams "params" (or a default) and "privacy".

    Guarantee: S1, S2, S3, S5 and S7 (sensitivity.md).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        memory_features: int | None = None,
        *,
        mechanism: releases.Mechanism,
        queries: str,
        num_kv_heads: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale: float | None = None,
        precision: Any = None,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        heads = _check.integer("num_heads", num_heads, low=1)
        kv_heads = heads if num_kv_heads is None else num_kv_heads
        features = in_features if qkv_features is None else qkv_features
        width = _flax.head_width(features, heads, kv_heads)
        rows = in_features if memory_features is None else memory_features
        self.attention = PrivateAttention(
            mechanism, queries=queries, scale=scale, backend=backend, rngs=rngs
        )

        def project(inputs: Any, outputs: Any, axis: Any = -1):
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=axis,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.query = project(in_features, (heads, width))
        self.key = project(rows, (kv_heads, width))
        self.value = project(rows, (kv_heads, width))
        result = in_features if out_features is None else out_features
        self.out = project((heads, width), result, (-2, -1))
        self.dtype, self.precision = dtype, precision

    def __call__(
        self,
        inputs_q: jax.Array,
        memory: jax.Array,
        *,
        mask: Any = None,
        key_log_weights: Any = None,
        key_value_seq_lengths: Any = None,
    ) -> jax.Array:
        """The released answers, projected.

        Args:
          inputs_q: (batch..., T, in_features), public.
          memory: (S, features) or (1, S, features) for one memory, or (batch..., S, features).
          mask: (batch..., N, T, S) with 1 where an axis is the same for all.
          key_log_weights: logarithms of row weights ≤ 0: (S,), (B, S) or (B, S, K).
          key_value_seq_lengths: (B,) integers; rows at positions ≥ the length are not seen.

        Returns:
          (batch..., T, out_features).

        Raises:
          ValueError, TypeError: for arguments that do not fit, or a key that would repeat its
            noise.
        """
        _flax.refuse_self_attention(inputs_q, memory, self.attention.queries)
        answer = self.attention(
            self.query(inputs_q),
            self.key(memory),
            self.value(memory),
            mask=mask,
            dtype=self.dtype,
            precision=self.precision,
            key_log_weights=key_log_weights,
            key_value_seq_lengths=key_value_seq_lengths,
        )
        return self.out(answer)


def reseed(model: Any, rng: jax.Array) -> None:
    """Gives every private layer of a model a new key, in place: each its own, by its path.

    Call it after nnx.merge, nnx.clone or a checkpoint, and first inside a function under plain
    `jax.jit`, with a key that is the function's argument.

    Args:
      model: a module, or a pytree of modules.
      rng: one typed key, never used before.

    Raises:
      ValueError: if the key is a constant of the function being traced.
    """
    _flax.refuse_constant(rng, "Make the key an argument of the function.")
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, PrivateAttention):
            continue
        lead = jnp.shape(node.key.get_raw_value())[:-1]
        own = _flax.named_key(rng, "nnx", *(str(part) for part in path))
        node.key._renew(
            random.key_data(own) if not lead else jax.random.key_data(random.split(own, lead))
        )
        node.count._renew(jnp.zeros(lead, jnp.uint32))
        if not _count_comes_back(node):
            node.seal = _Seal(node)


def apply(model: Any, rng: jax.Array, *args: Any, **kwargs: Any) -> Any:
    """The model's output as a function of a key: for `jax.jit` and `accounting.events`.

    Args:
      model: a module; it is left as it is, so batch statistics and caches do not come back.
      rng: one typed key, a new one for every call.
      *args: the model's.
      **kwargs: the model's.

    Returns:
      What the model returns.

    Raises:
      ValueError: if the key is a constant of the function being traced.

    Example:
      >>> from dpfa_jax import SequenceRelease, accounting
      >>> noise = SequenceRelease(noise_multiplier=2.0, clip_norm=1.0)
      >>> rngs = nnx.Rngs(params=0, privacy=random.secure_key())
      >>> attend = PrivateAttention(noise, queries="private", rngs=rngs)
      >>> layer = nnx.MultiHeadAttention(2, 4, attention_fn=attend, decode=False, rngs=rngs)
      >>> str(accounting.events(apply, layer, random.secure_key(), jnp.ones((1, 3, 4))))
      'Gaussian release, noise multiplier 2, 12 noisy scalars'
    """
    copy = nnx.clone(model)
    reseed(copy, rng)
    return copy(*args, **kwargs)
