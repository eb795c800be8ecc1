"""Memories that outlive a call: private records that answer for ever at a price fixed at the start.

`GaussianProcessMemory` (S5) and `FilteredMemory` (S4) answer adaptive queries and return the next
memory with every answer; `RandomFeatureMemory` (S6) is released once, can be saved and shipped, and
costs nothing afterwards.
"""

from dpfa_jax.memory.filtered import FilteredMemory as FilteredMemory
from dpfa_jax.memory.filtered import FilteredState as FilteredState
from dpfa_jax.memory.gaussian_process import GaussianProcessMemory as GaussianProcessMemory
from dpfa_jax.memory.gaussian_process import GaussianProcessState as GaussianProcessState
from dpfa_jax.memory.random_features import RandomFeatureMemory as RandomFeatureMemory
from dpfa_jax.memory.random_features import RandomFeatures as RandomFeatures
