"""Differentially private flash attention for JAX."""

from dpfa_jax import accounting as accounting
from dpfa_jax import random as random
from dpfa_jax.adjacency import GROUP as GROUP
from dpfa_jax.adjacency import REPLACE_ONE as REPLACE_ONE
from dpfa_jax.adjacency import SEQUENCE as SEQUENCE
from dpfa_jax.adjacency import ZERO_OUT as ZERO_OUT
from dpfa_jax.adjacency import Adjacency as Adjacency
from dpfa_jax.attention import private_attention as private_attention
from dpfa_jax.attention import sampled_attention as sampled_attention
from dpfa_jax.releases import ClippedContributions as ClippedContributions
from dpfa_jax.releases import GaussianProcessNoise as GaussianProcessNoise
from dpfa_jax.releases import IndependentNoise as IndependentNoise
from dpfa_jax.releases import NonPrivate as NonPrivate
from dpfa_jax.releases import SequenceRelease as SequenceRelease
from dpfa_jax.releases import SoftmaxNoise as SoftmaxNoise
