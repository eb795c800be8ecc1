"""Private attention for flax.linen: a module instance for `attention_fn=`, and a layer of its own.

Noise comes from the stream "privacy", passed as `rngs={"privacy": key}`. Each layer folds its path
in the model and the number of the call into the key, so that layers, repeated calls and other
streams made from the same key never share noise. A key that is a constant of traced code (closed
over by a jitted function, broadcast into a scan, in a branch of nn.cond) is refused: every run of
that code would add the same noise. Nothing can tell that two calls of `apply` got one key: split.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpfa_jax import _check, _flax, releases

STREAM = "privacy"

_PASS_IT = (
    'Pass rngs={"privacy": rng} to apply, with a new rng for every call; the first is '
    "dpfa_jax.random.secure_key()"
)
_LIFT_IT = (
    'nn.scan and nn.vmap need split_rngs={"params": ..., "privacy": True}; nn.cond, nn.switch and '
    "nn.while_loop close over their keys and take no private layer"
)


def _make_rng(module: nn.Module) -> jax.Array:
    """The key of this call of this module."""
    scope = module.scope
    assert scope is not None
    if not module.has_rng(STREAM):
        where = "/".join(scope.path)
        raise ValueError(
            f'Expected a PRNG stream "privacy" for the layer {where!r}, got '
            f"{sorted(scope.rngs) or 'none'}; Flax would take another stream's key. {_PASS_IT}. "
            f"{_LIFT_IT}."
        )
    given: Any = scope.rngs[STREAM]
    _flax.refuse_constant(
        getattr(given, "rng", given), f"Pass it through jit as an argument. {_LIFT_IT}."
    )
    rng = module.make_rng(STREAM)
    return _flax.named_key(rng, "linen", *scope.path, scope.rng_counters[STREAM])


class PrivateAttention(nn.Module):
    """Private attention as `attention_fn=` of `nn.MultiHeadDotProductAttention`.

    An instance, not a function: Flax passes a mask only to parameters it can see, and only a module
    has a PRNG stream. It has no parameters. `init` needs no "privacy" stream, releases nothing and
    sees zeros where the answer would be.

    In `MultiHeadDotProductAttention(x)` every token is a query as well as a record: that takes
    `queries="private"` and SequenceRelease. `queries="public"` is for `(inputs_q, inputs_k)` with
    public `inputs_q`, or use `PrivateCrossAttention`.

    Attributes:
      mechanism: what is added and charged, one of dpfa_jax's mechanisms.
      queries: "public", the caller's promise that no query depends on a private record except
        through released answers, or "private".
      scale: factor of the scores; None is 1/√width.
      is_causal: query i sees keys j ≤ i.
      local_window_size: w or (left, right) ≥ 0.
      backend: as in `private_attention`.
      precision: of the score product, "fp8" for instance; None takes that of the layer around.

    Guarantee: S1, S2, S3, S5 and S7 (sensitivity.md).

    Example:
      >>> from dpfa_jax import SequenceRelease, random
      >>> attend = PrivateAttention(SequenceRelease(noise_multiplier=1.0, clip_norm=1.0), "private")
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attend)
      >>> x = jnp.ones((1, 3, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x, rngs={"privacy": random.secure_key()}).shape
      (1, 3, 4)
    """

    mechanism: releases.Mechanism
    queries: str
    scale: float | None = None
    is_causal: bool = False
    local_window_size: int | tuple[int, int] | None = None
    backend: str = "auto"
    precision: Any = None

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
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
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
            from `nn.make_causal_mask`.
          broadcast_dropout: without effect.
          dropout_rng: without effect; dropout never shares the noise's key.
          dropout_rate: 0 unless `deterministic`.
          deterministic: whether dropout is off.
          dtype: of the operands and the answer; None takes their common type.
          precision: of the score product; None is the highest.
          module: None; weights cannot be sown.
          force_fp32_for_softmax: without effect; weights are always float32.
          einsum_dot_general: None.
          qk_attn_weights_einsum: None.
          attn_weights_value_einsum: None.
          key_log_weights: logarithms of row weights ≤ 0, as in `private_attention`.
          key_value_seq_lengths: (B,) integers, as in `private_attention`.

        Returns:
          (batch..., T, N, h); zeros while the model is initialised.

        Raises:
          ValueError, TypeError: for arguments that do not fit, a missing stream, or a key that
            would repeat its noise.
        """
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        _flax.refuse_options(
            bias=bias,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        rng = None
        if not self.is_initializing() and not isinstance(self.mechanism, releases.NonPrivate):
            rng = _make_rng(self)

        def attend(query, key, value):
            return _flax.attend(
                query,
                key,
                value,
                mechanism=self.mechanism,
                rng=jax.random.key(0) if self.is_initializing() else rng,
                queries=self.queries,
                scale=self.scale,
                is_causal=self.is_causal,
                local_window_size=self.local_window_size,
                mask=mask,
                key_log_weights=key_log_weights,
                key_value_seq_lengths=key_value_seq_lengths,
                dtype=dtype,
                precision=precision if self.precision is None else self.precision,
                backend=self.backend,
            )

        if self.is_initializing():
            # The same checks, no noise and no release.
            shape = jax.eval_shape(attend, query, key, value)
            return jnp.zeros(shape.shape, shape.dtype)
        return attend(query, key, value)


class PrivateCrossAttention(nn.Module):
    """Public queries over private memory rows: projections, private attention, output projection.

    Rows of the memory become keys and values one by one, so that record j stays record j. The
    projections are parameters: training them on the records without privacy leaks what they learn.

    Attributes:
      num_heads: N, heads of the queries.
      mechanism: what is added and charged, one of dpfa_jax's mechanisms.
      queries: "public", the caller's promise that no query depends on a private record except
        through released answers, or "private".
      num_kv_heads: K, heads of the memory; N is a multiple, None is N. Each costs as its mechanism
        says.
      qkv_features: N times the head width; None takes the queries' width.
      out_features: width of the result; None takes the queries' width.
      use_bias: whether projections add a bias.
      dtype: of the computation; None takes the inputs' and parameters' type.
      param_dtype: of the parameters.
      kernel_init: initialiser of the projections.
      bias_init: initialiser of the biases.
      scale: factor of the scores; None is 1/√width.
      precision: of the projections and the score product.
      backend: as in `private_attention`.

    Guarantee: S1, S2, S3, S5 and S7 (sensitivity.md).
    """

    num_heads: int
    mechanism: releases.Mechanism
    queries: str
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    scale: float | None = None
    precision: Any = None
    backend: str = "auto"

    @nn.compact
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
          inputs_q: (batch..., T, features), public.
          memory: (S, features) or (1, S, features) for one memory, or (batch..., S, features).
          mask: (batch..., N, T, S) with 1 where an axis is the same for all.
          key_log_weights: logarithms of row weights ≤ 0: (S,), (B, S) or (B, S, K).
          key_value_seq_lengths: (B,) integers; rows at positions ≥ the length are not seen.

        Returns:
          (batch..., T, out_features).

        Raises:
          ValueError, TypeError: for arguments that do not fit, a missing stream, or a key that
            would repeat its noise.
        """
        _flax.refuse_self_attention(inputs_q, memory, self.queries)
        heads = _check.integer("num_heads", self.num_heads, low=1)
        kv_heads = heads if self.num_kv_heads is None else self.num_kv_heads
        features = inputs_q.shape[-1] if self.qkv_features is None else self.qkv_features
        head_dim = _flax.head_width(features, heads, kv_heads)

        def project(name, heads, inputs):
            return nn.DenseGeneral(
                (heads, head_dim),
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                precision=self.precision,
                name=name,
            )(inputs)

        query, key, value = (
            project("query", heads, inputs_q),
            project("key", kv_heads, memory),
            project("value", kv_heads, memory),
        )
        answer = PrivateAttention(
            mechanism=self.mechanism,
            queries=self.queries,
            scale=self.scale,
            backend=self.backend,
            name="attention",
        )(
            query,
            key,
            value,
            mask=mask,
            dtype=self.dtype,
            precision=self.precision,
            key_log_weights=key_log_weights,
            key_value_seq_lengths=key_value_seq_lengths,
        )
        return nn.DenseGeneral(
            inputs_q.shape[-1] if self.out_features is None else self.out_features,
            axis=(-2, -1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            precision=self.precision,
            name="out",
        )(answer)
