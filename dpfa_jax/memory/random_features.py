"""A memory that is released once and attended for ever (S6).

The softmax kernel e^{−γ‖q̂−k̂‖²/2} is, in the mean, the product φ(q̂)·φ(k̂) of public random features,
so the records enter once, as S = Σ_j u_j φ(k̂_j) ⊗ (v_j, 1), and every later query is a product with
the noisy S: no key, no event, no count. It can be saved, shipped and differentiated.
"""

import dataclasses
import functools
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from dpfa_jax import (
    _check,
    _primitives,
    accounting,
    clipping,
    gaussian_process,
    random,
    reference,
    sensitivity,
)
from dpfa_jax._typing import Spec
from dpfa_jax.accounting.event import Event
from dpfa_jax.adjacency import ZERO_OUT, Adjacency
from dpfa_jax.doubleword import add_word, grid_step, round_after, to_grid
from dpfa_jax.memory import rows

_FORMAT = 1


@dataclasses.dataclass(frozen=True, repr=False)
class RandomFeatures:
    """Gaussian noise on the random-feature sums of a memory, once.

    Attributes:
      noise_multiplier: σ/Δ > 0; the release is 1/noise_multiplier-GDP.
      value_bound: Cv > 0, the norm of values that enter with weight 1.
      key_bound: public norm of keys that enter with weight 1, > 0: shorter keys have the weight
        their score says, longer ones are weighted down.
      features: frequencies r ≥ 1, two features each; the kernel's error is about r^(−1/2).
      denominator_weight: c ≥ 0; None takes Cv·h^(−1/4); 0 releases no denominator.
      key_scale: t > 0, public: keys times t, queries over t.
      floor: smallest denominator, > 0; None takes one standard deviation of its noise.
      adjacency: ZERO_OUT, REPLACE_ONE (which costs twice: features may point in opposite
        directions) or GROUP(rows).

    Guarantee: S6 (sensitivity.md), M3 (random_features.md).
    """

    noise_multiplier: float
    value_bound: float
    key_bound: float
    features: int
    denominator_weight: float | None = None
    key_scale: float = 1.0
    floor: float | None = None
    adjacency: Adjacency = ZERO_OUT

    def __post_init__(self):
        for name in ("noise_multiplier", "value_bound", "key_bound", "key_scale"):
            checked = _check.real(name, getattr(self, name), low=0, open_low=True)
            object.__setattr__(self, name, checked)
        object.__setattr__(self, "features", _check.integer("features", self.features, low=1))
        for name in ("denominator_weight", "floor"):
            if getattr(self, name) is not None:
                checked = _check.real(name, getattr(self, name), low=0, open_low=name == "floor")
                object.__setattr__(self, name, checked)
        if not isinstance(self.adjacency, Adjacency):
            raise TypeError(f"Expected adjacency to be an Adjacency, got {self.adjacency!r}.")
        if self.adjacency.kind == "SEQUENCE":
            raise ValueError("Expected adjacency ZERO_OUT, REPLACE_ONE or GROUP, got SEQUENCE.")

    def weight(self, value_dim: int) -> float:
        """The public weight c of the denominator column; 0 says that it is not released.

        Args:
          value_dim: h, the width of a value row.

        Returns:
          c, an equality.
        """
        if self.denominator_weight is not None:
            return self.denominator_weight
        # Δ is proportional to √(Cv²+c²) under every adjacency, so what suits ZERO_OUT suits all.
        return sensitivity.default_denominator_weight(
            value_bound=self.value_bound, value_dim=value_dim, adjacency=ZERO_OUT
        )

    def l2_sensitivity(self, *, kv_heads: int, value_dim: int) -> float:
        """Δ of the exact sums of all heads together, in the unit of the values.

        Args:
          kv_heads: K; one record enters all of them.
          value_dim: h.

        Returns:
          Upper bound, reached where the features are.

        Guarantee: S6 (sensitivity.md), M3 (random_features.md).
        """
        return sensitivity.random_features(
            clip_norm=math.hypot(self.value_bound, self.weight(value_dim)),
            adjacency=self.adjacency,
            memories=kv_heads,
        )

    def event(self, *, kv_heads: int, value_dim: int) -> Event:
        """What the release is charged as; queries add nothing.

        Args:
          kv_heads: K.
          value_dim: h.
        """
        columns = value_dim + (1 if self.weight(value_dim) > 0 else 0)
        return accounting.Gaussian(self.noise_multiplier, 2 * self.features * columns * kv_heads)

    def process(
        self, *, gamma: float, keys: int, kv_heads: int, value_dim: int
    ) -> gaussian_process.Process:
        """The numbers of one release, rounding included; it has no covariance and no jitter.

        Args:
          gamma: γ > 0, the factor of the scores.
          keys: S.
          kv_heads: K.
          value_dim: h.

        Guarantee: M3 (random_features.md).
        """
        weight = self.weight(value_dim)
        delta = self.l2_sensitivity(kv_heads=kv_heads, value_dim=value_dim)
        noise_std = self.noise_multiplier * delta * (1 + reference.rounding(keys))
        floor = self.floor
        if floor is None:
            floor = noise_std / weight if weight > 0 else 1.0
        return gaussian_process.Process(
            gamma=gamma,
            key_scale=self.key_scale,
            key_bound=self.key_bound,
            value_bound=self.value_bound,
            denominator_weight=weight,
            noise_std=noise_std,
            jitter=0.0,
            jitter_error=0.0,
            floor=floor,
        )

    def __repr__(self):
        fields = ", ".join(
            f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self)
        )
        return (
            f"RandomFeatures({fields}): Gaussian noise on the random-feature sums of the records, "
            "once; every query afterwards is post-processing (S6). Not protected: the number and "
            "positions of the records, K/V that earlier layers mixed over records, and anything "
            "computed from the rows elsewhere."
        )


@dataclasses.dataclass(frozen=True)
class _Settings:
    mechanism: RandomFeatures
    scale: float
    keys: int
    kv_heads: int
    query_dim: int
    value_dim: int

    @property
    def process(self) -> gaussian_process.Process:
        return self.mechanism.process(
            gamma=self.scale, keys=self.keys, kv_heads=self.kv_heads, value_dim=self.value_dim
        )

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        columns = self.value_dim + (1 if self.mechanism.weight(self.value_dim) > 0 else 0)
        return self.kv_heads, 2 * self.mechanism.features, columns


def feature_map(rows: jax.Array, frequencies: jax.Array) -> jax.Array:
    """φ(x) = r^(−1/2)[cos Wx, sin Wx], of norm 1 up to rounding.

    Args:
      rows: float32 (..., H).
      frequencies: float32 (r, H), W.

    Returns:
      float32 (..., 2r).

    Guarantee: M3 (random_features.md).
    """
    angles = jnp.einsum("...h,rh->...r", rows, frequencies, precision=lax.Precision.HIGHEST)
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return features * frequencies.shape[0] ** -0.5


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("sums", "frequencies"),
    meta_fields=("settings",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class RandomFeatureMemory:
    """Records released once as noisy random-feature sums; attending to them costs nothing.

    A pytree that holds nothing private: everything in it may be published.

    Attributes:
      sums: (K, 2r, h + 1) float32, noisy; without the last column where c = 0.
      frequencies: (r, H) float32, the public feature matrix.
      settings: the public numbers.

    Guarantee: S6 (sensitivity.md), M3 (random_features.md).

    Example:
      >>> import jax, jax.numpy as jnp, dpfa_jax
      >>> noise = RandomFeatures(
      ...     noise_multiplier=1.0, value_bound=1.0, key_bound=1.0, features=16)
      >>> rows = jnp.ones((9, 1, 4))
      >>> memory = RandomFeatureMemory.release(
      ...     rows, rows, mechanism=noise, rng=jax.random.key(0), feature_rng=jax.random.key(1))
      >>> memory.attend(jnp.ones((2, 1, 4))).shape
      (2, 1, 4)
    """

    sums: Any
    frequencies: Any
    settings: Any

    @classmethod
    def release(
        cls,
        key: jax.Array,
        value: jax.Array,
        *,
        mechanism: RandomFeatures,
        rng: jax.Array,
        feature_rng: jax.Array,
        scale: float | None = None,
    ) -> "RandomFeatureMemory":
        """The one release; `accounting.events` counts it here.

        Args:
          key: (S, K, H); row j must depend on record j alone. Not finite: the record is NULL.
          value: (S, K, h).
          mechanism: RandomFeatures.
          rng: one typed key, for the noise: secret, never used twice.
          feature_rng: another typed key, for the features: public, chosen without the data. The
            same key for both is refused; inside `jit`, where keys cannot be compared, it gives
            NaN.
          scale: factor of the scores, > 0; None is 1/√H.

        Raises:
          TypeError, ValueError: for arguments that do not fit, saying what to pass.
        """
        if not isinstance(mechanism, RandomFeatures):
            raise TypeError(f"Expected mechanism to be RandomFeatures, got {mechanism!r}.")
        data, public = random.key_data(rng), random.key_data(feature_rng)
        same = jnp.all(data == public)
        if not isinstance(same, Tracer) and bool(same):
            raise ValueError(
                "Expected feature_rng to differ from rng: the features are public, and whoever "
                "knows their key would know the noise. Pass a fixed public key, such as "
                "jax.random.key(0), and a secret rng."
            )
        key, value, log_weights = rows.records(key, value)
        keys, kv_heads, width = key.shape
        scale = width**-0.5 if scale is None else scale
        scale = _check.real("scale", scale, low=0, open_low=True)
        settings = _Settings(mechanism, scale, keys, kv_heads, width, value.shape[2])
        _primitives.refuse_constant(rng, "Pass the key as an argument of that function.")
        data = _primitives.stream_key(data, key, value, log_weights)
        shape = (mechanism.features, width)
        frequencies = random.normal(random.wrap_key_data(public), shape) * math.sqrt(scale)
        sums = _release(key, value, log_weights, data, frequencies, settings)
        sums = jnp.where(same, jnp.nan, sums)
        event = mechanism.event(kv_heads=kv_heads, value_dim=settings.value_dim)
        return cls(_primitives.private_release(sums, event), frequencies, settings)

    @property
    def event(self) -> Event:
        """What the release is charged as, for ever."""
        settings = self.settings
        return settings.mechanism.event(kv_heads=settings.kv_heads, value_dim=settings.value_dim)

    def attend(self, query: jax.Array) -> jax.Array:
        """The answers to some queries, which may be private themselves: nothing is released.

        Args:
          query: (T, N, H) or (B, T, N, H), N a multiple of the memory's kv heads.

        Returns:
          Answers (T, N, h) or (B, T, N, h) in the query's dtype, differentiable in the query. A
          query that is not finite has a NaN answer of its own.

        Raises:
          ValueError: if the shape does not fit.

        Guarantee: S6 (sensitivity.md).
        """
        settings = self.settings
        shaped, finite = rows.queries(query, kv_heads=settings.kv_heads, width=settings.query_dim)
        answer = _attend(self.sums, self.frequencies, shaped, finite, settings)
        return answer.reshape(*query.shape[:-1], settings.value_dim)

    def guarantee(self, *, delta: float | None = None) -> str:
        """The guarantee as sentences.

        Args:
          delta: δ ∈ (0, 1) at which ε is stated, or None.
        """
        said = (
            f"RandomFeatureMemory of {self.settings.mechanism!r} It was released from "
            f"{self.settings.keys:,} records and is charged as: {self.event}."
        )
        if delta is None:
            return said
        epsilon = accounting.epsilon(self.event, delta)
        return f"{said} Alone it is (ε = {epsilon:.4g}, δ = {delta:g})."

    def __repr__(self):
        return self.guarantee()

    def save(self, path: str | os.PathLike) -> None:
        """Writes one .npz file: the noisy sums, the public features, the numbers, the guarantee.

        Args:
          path: of the file, written as named.
        """
        settings = dataclasses.asdict(self.settings)
        arrays = {
            "sums": np.asarray(self.sums),
            "frequencies": np.asarray(self.frequencies),
            "settings": np.array(json.dumps({"format": _FORMAT, **settings})),
            "event": np.array(str(self.event)),
            "guarantee": np.array(self.guarantee()),
        }
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RandomFeatureMemory":
        """The memory that `save` wrote.

        Args:
          path: of the file.

        Raises:
          ValueError: if the file is not such a memory, or holds numbers that are not finite.
        """
        with np.load(path, allow_pickle=False) as file:
            names = {"sums", "frequencies", "settings", "event", "guarantee"}
            if set(file.files) != names:
                raise ValueError(f"Expected a file of {sorted(names)}, got {sorted(file.files)}.")
            arrays = {name: file[name] for name in names}
        numbers = json.loads(str(arrays["settings"]))
        if numbers.pop("format", None) != _FORMAT:
            raise ValueError(f"Expected a random-feature memory of format {_FORMAT}.")
        fields = numbers.pop("mechanism")
        fields["adjacency"] = Adjacency(**fields["adjacency"])
        settings = _Settings(RandomFeatures(**fields), **numbers)
        shapes = {
            "sums": settings.sums_shape,
            "frequencies": (settings.mechanism.features, settings.query_dim),
        }
        for name, shape in shapes.items():
            array = arrays[name]
            fits = array.shape == shape and array.dtype == np.float32
            if not (fits and np.isfinite(array).all()):
                raise ValueError(
                    f"Expected {name} to be finite float32 of shape {shape}, got {array.dtype} of "
                    f"shape {array.shape}."
                )
        return cls(jnp.asarray(arrays["sums"]), jnp.asarray(arrays["frequencies"]), settings)


@functools.partial(jax.jit, static_argnames="settings")
def _release(key, value, log_weights, data, frequencies, settings):
    process, mechanism = settings.process, settings.mechanism
    if mechanism.adjacency.kind == "REPLACE_ONE":
        value = clipping.clip_rows(value, mechanism.value_bound)
    key = key * process.key_scale
    usable = gaussian_process.squares(key, process.gamma) <= gaussian_process.MAX_SQUARE
    log_weights = jnp.where(usable, log_weights, -jnp.inf)
    key = jnp.where(usable[..., None], key, 0.0)
    log_weights += gaussian_process.log_record_weights(key, value, process)
    if process.denominator_weight > 0:
        value = jnp.concatenate([value, jnp.ones((*value.shape[:-1], 1))], axis=-1)
    keys, tile = key.shape[0], reference.TILE
    tiles = -(-max(keys, 1) // tile)

    def tiled(array, fill=0.0):
        widths = [(0, tiles * tile - keys)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, widths, constant_values=fill)
        return padded.reshape(tiles, tile, *array.shape[1:])

    def step(carry, part):
        key, value, log_weights = part
        features = feature_map(key, frequencies)
        # What is clipped is the norm of the features as computed, not the 1 that they should have.
        log_weights = log_weights - clipping.log_row_norms(features)
        features = jnp.where(
            (log_weights > -jnp.inf)[..., None], features * jnp.exp(log_weights)[..., None], 0.0
        )
        total = jnp.einsum("skf,skc->kfc", features, value, precision=lax.Precision.HIGHEST)
        high, low = carry
        return add_word(high, low, total), None

    start = jnp.zeros(settings.sums_shape)
    parts = (tiled(key), tiled(value), tiled(log_weights, -jnp.inf))
    start, data, *parts = _primitives.vary_alike(start, data, *parts)
    (high, low), _ = lax.scan(step, (start, start), tuple(parts))
    heads, width, columns = settings.sums_shape
    noise = random.matrix_normals(
        data, jnp.uint32(0), jnp.arange(heads)[:, None], jnp.arange(width)[None, :], columns
    )
    spread = np.full(columns, process.noise_std, np.float32)
    if process.denominator_weight > 0:
        spread[-1] = process.noise_std / process.denominator_weight
    steps = np.array([grid_step(float(std)) for std in spread], np.float32)
    return to_grid(round_after(high, low, spread * noise), steps)


@functools.partial(jax.jit, static_argnames="settings")
def _attend(sums, frequencies, query, finite, settings):
    process = settings.process
    batch, length, heads, width = query.shape
    grouped = query.astype(jnp.float32) / process.key_scale
    grouped = grouped.reshape(batch, length, settings.kv_heads, heads // settings.kv_heads, width)
    features = feature_map(grouped, frequencies)
    noisy = jnp.einsum("btkgf,kfc->btkgc", features, sums, precision=lax.Precision.HIGHEST)
    noisy = noisy.reshape(batch, length, heads, -1)
    spec = Spec(
        scale=settings.scale,
        score_cap=None,
        noise="sums",
        floor=process.floor,
        ball=settings.mechanism.value_bound,
        denominator_std=1.0 if process.denominator_weight > 0 else math.inf,
    )
    numerator = noisy[..., : settings.value_dim]
    answer = reference.answer(spec, numerator, noisy[..., -1])
    return jnp.where(finite[..., None], answer, jnp.nan).astype(query.dtype)
