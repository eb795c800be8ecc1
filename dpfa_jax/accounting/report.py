"""What a set of releases costs, by every accountant that can tell."""

import dataclasses
import math

from dpfa_jax import _check
from dpfa_jax.accounting import charge, convert, pld
from dpfa_jax.accounting.event import Event


@dataclasses.dataclass(frozen=True)
class Report:
    """ε by several accountants; each is a valid upper bound by itself.

    Attributes:
      delta: δ of all of them.
      accounts: (accountant, ε) in the order of preference.
      missing: (accountant, why it has no number).
    """

    delta: float
    accounts: tuple[tuple[str, float], ...]
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def epsilon(self) -> float:
        """The ε to publish: that of the first accountant."""
        return self.accounts[0][1]

    @property
    def largest(self) -> float:
        """The largest ε that any accountant found."""
        return max(epsilon for _, epsilon in self.accounts)

    def __str__(self):
        lines = [f"({self.epsilon:.4g}, {self.delta:.3g})-differentially private"]
        lines += [f"  by {name}: epsilon = {epsilon:.6g}" for name, epsilon in self.accounts]
        lines += [f"  by {name}: {why}" for name, why in self.missing]
        return "\n".join(lines)


def report(event: Event, delta: float) -> Report:
    """ε of an event at δ by every accountant that can tell, the preferred one first.

    Gaussian releases alone are exact; otherwise the loss distribution comes first and the composed
    bound (RDP) stands beside it. The larger number is never left out.

    Args:
      event: what was released, a plan fixed in advance.
      delta: in (0, 1).

    Returns:
      Upper bounds.

    Raises:
      TypeError: if `event` is not an event.
      ValueError: for δ outside (0, 1).

    Guarantee: E1 (charge.md), P1 (pld.md).

    Example:
      >>> from dpfa_jax import accounting
      >>> print(report(accounting.Gaussian(3.7306316348159743), 1e-5))
      (1, 1e-05)-differentially private
        by exact Gaussian curve: epsilon = 1
        by RDP: epsilon = 1.09215
        by privacy loss distribution: epsilon = 1
    """
    tolerance = _check.real("delta", delta, low=0, high=1, open_low=True, open_high=True)
    profile = charge.profile_of(event)
    best = charge.epsilon(event, tolerance)
    missing = []
    try:
        published = [("privacy loss distribution", pld.epsilon(event, tolerance))]
    except NotImplementedError as error:
        published, missing = [], [("privacy loss distribution", str(error))]
    if not profile.others:
        left = charge.ideal_tolerance(profile, tolerance)
        accounts = [("exact Gaussian curve", best)]
        if profile.variation == 0.0:
            renyi = math.inf
            if left >= 0.0 and profile.mu < math.inf:
                renyi = convert.zcdp_epsilon(0.5 * profile.mu_squared, left)
            accounts.append(("RDP", renyi))
        accounts += published
    else:
        accounts = [*published, ("RDP", best)]
    return Report(tolerance, tuple(accounts), tuple(missing))
