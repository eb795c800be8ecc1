"""What private training carries from step to step, and how ε is read from it."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax import _check, accounting, random, sampling
from dpfa_jax.accounting import subsample, upward

_SHARES = (2.0**-12, 2.0**-8, 2.0**-4, 0.5)  # of δ that truncation may take, to be tried


class PrivateState(NamedTuple):
    """The state of `privatize`: arrays only, so that every checkpoint format can hold it.

    Attributes:
      key_data: uint32[8], the key of the noise to come, renewed by every step. A secret: whoever
        has it can take the noise of later steps away. Never a typed key: those of a custom
        implementation can be saved but not restored.
      accountant: an `accounting.Ledger` of what was released, or a `ScheduledLedger`.
      plan: uint32[4], digest of what a step is charged as. A checkpoint that was restored into
        another configuration is found out by it.
    """

    key_data: Any
    accountant: Any
    plan: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduledLedger:
    """The account of a run whose noise multiplier follows a schedule. A pytree.

    Attributes:
      ledger: an `accounting.traced.TracedLedger`, RDP at fixed orders.
      sampling: the sampler; static.

    Guarantee: O2 (account.md).
    """

    ledger: Any
    sampling: Any = dataclasses.field(metadata={"static": True})

    def epsilon(self, delta: float) -> float:
        """ε of everything released, on the host.

        Args:
          delta: in [0, 1).

        Returns:
          Upper bound, ∞ where nothing is guaranteed.

        Guarantee: O2 (account.md).
        """
        tolerance = _check.real("delta", delta, low=0, high=1, open_high=True)
        overflow = truncation(self.sampling) * max(int(np.asarray(self.ledger.count)), 0)
        if overflow == 0.0:
            return self.ledger.epsilon(tolerance)
        found = 0.0
        for _ in range(200):  # ε = f(ε) with f growing: from below
            left = tolerance - (1.0 + math.exp(min(found, 700.0))) * overflow * (1.0 + 2.0**-50)
            needed = self.ledger.epsilon(left) if left > 0.0 else math.inf
            if needed <= found:
                return found
            if needed == math.inf:
                return math.inf
            found = needed * (1.0 + 1e-12)
        return math.inf

    def traced_epsilon(self, delta: float) -> jax.Array:
        """ε of everything released, inside jit.

        Args:
          delta: static, in [0, 1).

        Returns:
          float32 upper bound, a few per mille above `epsilon`; ∞ where nothing is guaranteed.

        Guarantee: O2 (account.md).
        """
        overflow = truncation(self.sampling)
        if overflow == 0.0:
            return self.ledger.traced_epsilon(delta)
        steps = jnp.asarray(self.ledger.count, jnp.float32) * (1.0 + 2.0**-20)
        found = jnp.float32(jnp.inf)
        for share in _SHARES:
            each = self.ledger.traced_epsilon(delta * (1.0 - share))
            lost = (1.0 + jnp.exp(each)) * steps * upward.at_least(overflow) * (1.0 + 2.0**-12)
            fits = lost <= np.float32(delta * share * (1.0 - 2.0**-20))
            found = jnp.minimum(found, jnp.where(fits, each, jnp.inf))
        return found


def truncation(sampler: sampling.Sampler) -> float:
    """What one draw of a sampler differs from an untruncated one.

    Args:
      sampler: one of `sampling`.

    Returns:
      Upper bound of the total variation distance; 0 where nothing is cut off.

    Guarantee: O2 (account.md).
    """
    if not isinstance(sampler, sampling.TruncatedPoisson):
        return 0.0
    return subsample.poisson_overflow(sampler.records, sampler.sampling_rate, sampler.capacity)


def digest(*parts: Any) -> np.ndarray:
    """128 bits of the SHA-256 of how the parts are written, as uint32[4].

    Args:
      *parts: frozen values whose `repr` says all of them.

    Returns:
      The words.
    """
    written = hashlib.sha256("\0".join(map(repr, parts)).encode()).digest()
    return np.frombuffer(written[:16], ">u4").astype(np.uint32)


def plan_of(accountant: Any) -> np.ndarray:
    """The digest that belongs to an accountant's static part.

    Args:
      accountant: an `accounting.Ledger` or a `ScheduledLedger`.

    Returns:
      uint32[4].

    Raises:
      TypeError: for anything else.
    """
    if isinstance(accountant, ScheduledLedger):
        return digest("scheduled", accountant.sampling)
    if isinstance(accountant, accounting.Ledger):
        return digest("fixed", *(_with_multiplier(each) for each in accountant.events))
    raise TypeError(f"Expected an accountant of privatize, got {accountant!r}.")


def _with_multiplier(event: accounting.Event) -> tuple:
    # Written field by field: __str__ and __repr__ of an event may round for people.
    fields = dataclasses.fields(event)  # pyright: ignore[reportArgumentType]
    values = (getattr(event, field.name) for field in fields)
    return (
        type(event).__name__,
        *(_with_multiplier(v) if isinstance(v, accounting.Event) else v for v in values),
    )


def _is_private(node: Any) -> bool:
    return isinstance(node, PrivateState)


def _raw(tree: Any) -> Any:
    """The tree with nnx Variables replaced by what they hold."""

    def is_variable(node):
        return hasattr(node, "get_value")

    return jax.tree.map(
        lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, tree, is_leaf=is_variable
    )


def _private_states(opt_state: Any) -> list[PrivateState]:
    nodes = jax.tree.leaves(_raw(opt_state), is_leaf=_is_private)
    found = [node for node in nodes if _is_private(node)]
    if not found:
        raise ValueError(
            "Expected an optimizer state with a PrivateState of optim.privatize inside, got none. "
            "Pass the state itself (a restored checkpoint needs the structure of tx.init(params))."
        )
    return found


def _accountants(opt_state: Any) -> list[Any]:
    accountants = []
    for state in _private_states(opt_state):
        written = np.asarray(state.plan)
        expected = plan_of(state.accountant)
        if written.shape != expected.shape or not np.array_equal(written, expected):
            raise ValueError(
                "Expected the state of the run that made it, got one whose steps were charged as "
                "something else: the checkpoint was restored into another sampler, noise "
                "multiplier or model. Restore it with the transformation that wrote it."
            )
        accountants.append(state.accountant)
    return accountants


def event(opt_state: Any) -> accounting.Event:
    """Everything that a run with a constant noise multiplier has released, as one event.

    Args:
      opt_state: an optimizer state, or anything that holds one (a TrainState, `nnx.Optimizer`'s
        opt_state), on the host.

    Returns:
      An event for `accounting.epsilon`, `accounting.pld.epsilon` or a report.

    Raises:
      ValueError: if there is no PrivateState in it, or one of another configuration.
      TypeError: for a run with a noise schedule, whose cost is known and not its steps' noise.

    Example:
      >>> import optax
      >>> from dpfa_jax import optim
      >>> sampler = sampling.Poisson(records=100, sampling_rate=0.1)
      >>> tx = optim.privatize(noise_multiplier=2.0, sampling=sampler, rng=jax.random.key(0))
      >>> event(optax.chain(tx, optax.adam(1e-3)).init({"w": jnp.zeros(3)}))
      NoRelease()
    """
    parts = []
    for accountant in _accountants(opt_state):
        if not isinstance(accountant, accounting.Ledger):
            raise TypeError(
                "Expected a constant noise multiplier, got a run with a schedule. Ask "
                "optim.epsilon(opt_state, delta)."
            )
        parts.append(accountant.event)
    return parts[0] if len(parts) == 1 else accounting.Composed(tuple(parts))


def epsilon(opt_state: Any, delta: float, *, method: str = "rdp") -> float:
    """ε of everything an optimizer state has released; on the host, outside jit.

    Args:
      opt_state: an optimizer state, or anything that holds one; chains are searched.
      delta: in [0, 1).
      method: "rdp" (Rényi curves, also for schedules), or "pld" (loss distributions by
        dp_accounting: tighter, for a constant noise multiplier and Poisson sampling).

    Returns:
      Upper bound in [0, ∞]. It is about all that was released so far. Under `target` the run as a
      whole has the target.

    Raises:
      ValueError: if there is no PrivateState in it, or one of another configuration, or a bad δ.
      TypeError: where the method does not apply.

    Guarantee: E1 (charge.md), L1 (state.md), P1 (pld.md), O2 (account.md).
    """
    _check.choice("method", method, ("rdp", "pld"))
    accountants = _accountants(opt_state)
    if method == "pld":
        return accounting.pld.epsilon(event(opt_state), delta)
    scheduled = [each for each in accountants if isinstance(each, ScheduledLedger)]
    if scheduled and len(accountants) > 1:
        raise TypeError(
            "Expected one accountant, got a schedule beside another: their curves cannot be added "
            "here. Use one privatize for the whole tree."
        )
    if scheduled:
        return scheduled[0].epsilon(delta)
    return accounting.epsilon(event(opt_state), delta)


def traced_epsilon(opt_state: Any, delta: float) -> jax.Array:
    """ε of everything an optimizer state has released, inside jit: for a progress bar or a stop.

    Args:
      opt_state: an optimizer state with one `PrivateState` inside.
      delta: static, in [0, 1).

    Returns:
      float32 upper bound, above `epsilon` by a few per mille; ∞ for a state of another
      configuration.

    Raises:
      ValueError: if there is not exactly one PrivateState in it.

    Guarantee: L1 (state.md), O2 (account.md).
    """
    states = _private_states(opt_state)
    if len(states) > 1:
        raise ValueError(f"Expected one PrivateState, got {len(states)}. Ask optim.epsilon.")
    (state,) = states
    same = jnp.all(jnp.asarray(state.plan) == plan_of(state.accountant))
    return jnp.where(same, state.accountant.traced_epsilon(delta), jnp.inf)


def fork(opt_state: Any, rng: Any) -> Any:
    """The optimizer state with new noise: for everyone who goes on from the same checkpoint again.

    Two runs from one checkpoint add the same noise to different sums, and the difference of what
    they release has none. ε of both together is that of the steps before the fork and of both runs
    after it.

    Args:
      opt_state: an optimizer state with a `PrivateState` inside.
      rng: a new key.

    Returns:
      The same state with keys made from `rng`; the account is unchanged.

    Raises:
      ValueError: if there is no PrivateState in it.
      TypeError: for anything but a typed key.
    """
    _private_states(opt_state)
    data = random.key_data(rng)
    count = iter(range(1 << 30))

    def renew(node):
        if not _is_private(node):
            return node
        return node._replace(key_data=first_key_data(data, next(count)))

    return jax.tree.map(renew, opt_state, is_leaf=_is_private)


def first_key_data(data: jax.Array, index: int = 0) -> jax.Array:
    """Key data of the first step, apart from every other use of the same key.

    Args:
      data: uint32[8] key data of the caller's key.
      index: which of several states.

    Returns:
      uint32[8].
    """
    tagged = random.fold_in_data(data, jnp.uint32(0x6E6F6973))
    return random.fold_in_data(tagged, jnp.uint32(index))


type Schedule = Callable[[Any], Any]
