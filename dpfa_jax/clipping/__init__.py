"""The only code that bounds a norm: of rows, of per-example gradients, and who vouches for it."""

from dpfa_jax.clipping.adaptive import adapt_clip_norm as adapt_clip_norm
from dpfa_jax.clipping.adaptive import threshold_event as threshold_event
from dpfa_jax.clipping.bounded import contributions as contributions
from dpfa_jax.clipping.bounded import shrinkage as shrinkage
from dpfa_jax.clipping.certificate import Clipped as Clipped
from dpfa_jax.clipping.certificate import Group as Group
from dpfa_jax.clipping.certificate import joint_clip_norm as joint_clip_norm
from dpfa_jax.clipping.gradients import clipped_grad as clipped_grad
from dpfa_jax.clipping.gradients import explain as explain
from dpfa_jax.clipping.groups import Groups as Groups
from dpfa_jax.clipping.groups import label_groups as label_groups
from dpfa_jax.clipping.groups import per_layer as per_layer
from dpfa_jax.clipping.packed import Unpacked as Unpacked
from dpfa_jax.clipping.packed import unpack as unpack
from dpfa_jax.clipping.partition import gather as gather
from dpfa_jax.clipping.rows import clip_rows as clip_rows
from dpfa_jax.clipping.rows import finite_rows as finite_rows
from dpfa_jax.clipping.rows import log_row_norms as log_row_norms
from dpfa_jax.clipping.rows import log_row_weights as log_row_weights
from dpfa_jax.clipping.rows import stable_sum as stable_sum
from dpfa_jax.clipping.two_pass import Report as Report
