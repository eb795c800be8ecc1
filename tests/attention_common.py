"""Arrays, mechanisms and compiled calls that the tests of private_attention share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import dpfa_jax

B, T, N, K, H, WIDTH, S = 2, 4, 2, 1, 4, 3, 20
KEY = jax.random.key(11)


def arrays(seed=0, keys=S, memories=B):
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
def compiled(mechanism, options=()):
    def attend(query, key, value, rng):
        return dpfa_jax.private_attention(
            query, key, value, mechanism=mechanism, rng=rng, queries="public", **dict(options)
        )

    return jax.jit(attend)


def ask(mechanism, query, key, value, rng=KEY, **options):
    return compiled(mechanism, tuple(options.items()))(query, key, value, rng)
