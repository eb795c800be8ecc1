"""Private training with optax: noise, its scale and its account in one transformation.

Import it by name, `from dpfa_jax import optim`: `import dpfa_jax` loads no optax.
"""

from dpfa_jax.optim.account import PrivateState as PrivateState
from dpfa_jax.optim.account import ScheduledLedger as ScheduledLedger
from dpfa_jax.optim.account import epsilon as epsilon
from dpfa_jax.optim.account import event as event
from dpfa_jax.optim.account import fork as fork
from dpfa_jax.optim.account import traced_epsilon as traced_epsilon
from dpfa_jax.optim.accumulation import AccumulateState as AccumulateState
from dpfa_jax.optim.accumulation import accumulate as accumulate
from dpfa_jax.optim.noise import privatize as privatize
from dpfa_jax.optim.noise import with_certificate as with_certificate
