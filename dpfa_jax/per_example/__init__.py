"""Norms of per-example gradients, of parameters used in matrix products and look-ups.

The loss of ONE row is traced to a jaxpr. A parameter is followed from its input through reshapes,
transposes and casts, which keep norms, to where it meets the row. Where that is a matrix product
Y = X·W, the gradient is XᵀdY, and its norm needs X and dY only; for a look-up likewise. The place
is then replaced by a function with a derivative of its own, whose probe, a zero scalar, has the
squared norm as cotangent. Cotangents add, so the probe's is the sum over all places; `vmap` over
rows makes it one number a row.
"""

from dpfa_jax.per_example.evaluate import pairs as pairs
from dpfa_jax.per_example.evaluate import pull_back as pull_back
from dpfa_jax.per_example.evaluate import squared_norms as squared_norms
from dpfa_jax.per_example.evaluate import weighted_sum as weighted_sum
from dpfa_jax.per_example.norms import look_up_norm as look_up_norm
from dpfa_jax.per_example.norms import not_below_0 as not_below_0
from dpfa_jax.per_example.norms import product_norm as product_norm
from dpfa_jax.per_example.norms import sum_of_squares as sum_of_squares
from dpfa_jax.per_example.plan import Cost as Cost
from dpfa_jax.per_example.plan import Plan as Plan
from dpfa_jax.per_example.plan import Use as Use
from dpfa_jax.per_example.plan import costs as costs
from dpfa_jax.per_example.plan import equation_at as equation_at
from dpfa_jax.per_example.plan import plan as plan
from dpfa_jax.per_example.plan import without as without
from dpfa_jax.per_example.rules import pair_cross as pair_cross
from dpfa_jax.per_example.rules import pair_norm as pair_norm
from dpfa_jax.per_example.rules import pair_product as pair_product
from dpfa_jax.per_example.rules import pair_sum as pair_sum
from dpfa_jax.per_example.rules import product_sum as product_sum
