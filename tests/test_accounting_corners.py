"""The sampled Gaussian curve at its extreme corners: the defining integral, and the rival's list.

The rival's numbers are pinned where dp_accounting 0.6.0 is more than 1e-9 away, on either side, so
that an upgrade shows.
"""

import itertools
import math

import mpmath
import pytest
from dp_accounting.rdp import rdp_privacy_accountant as rival_rdp

from dpfa_jax.accounting import rdp, subsample

RATES, MULTIPLIERS, ORDERS = (1e-7, 1e-3, 0.5, 0.999), (0.1, 1.0, 100.0), (1.01, 2.5, 1e4)
CORNERS = tuple(itertools.product(RATES, MULTIPLIERS, ORDERS))


def rate_integral(rate, noise_multiplier, order):
    """ln E(1 − q + q·e^w)^α/(α − 1) by mpmath, the linear part taken off, over windows.

    The integrand is e^(α·ln(1 + q(e^w − 1)) − u²/2), so its logarithm has slope −u + α·s(u)/z with
    the share s in (0, 1) growing from 0 to 1 once: it peaks where u = α·s(u)/z. Each window reaches
    16 widths beyond such a point (a Gaussian tail of e^(−128)).
    """
    with mpmath.workdps(50):
        q, mu, a = mpmath.mpf(rate), 1 / mpmath.mpf(noise_multiplier), mpmath.mpf(order)

        def share(u):
            weight = q * mpmath.exp(mu * u - mu * mu / 2)
            return weight / (1 - q + weight)

        def excess(u):
            y = q * mpmath.expm1(mu * u - mu * mu / 2)
            return mpmath.npdf(u) * (mpmath.powm1(1 + y, a) - a * y)

        centers = [mpmath.mpf(0), 2 * mu]
        for start in (mpmath.mpf(0), a * mu):
            for _ in range(100):
                start = a * mu * share(start)
            centers.append(start)
        turn = (mpmath.log((1 - q) / q) + mu * mu / 2) / mu
        if -20 < turn < a * mu + 20:
            centers.append(turn)
        starts = sorted(float(center) - 16 for center in centers)
        total, low, high = mpmath.mpf(0), starts[0], starts[0]
        for start in starts:
            if start > high:
                total += _window(excess, low, high)
                low = start
            high = start + 32
        return mpmath.log1p(total + _window(excess, low, high)) / (a - 1)


def _window(integrand, low, high):
    pieces = max(8, math.ceil((high - low) / 2))
    points = mpmath.linspace(low, high, pieces + 1)
    return mpmath.quad(integrand, points, method="gauss-legendre", maxdegree=4)


@pytest.mark.parametrize("rate", [1e-7, 0.999])
def test_poisson_gaussian_equals_the_integral_in_the_outermost_corners(rate):
    for multiplier, order in itertools.product((0.1, 100.0), (1.01, 9999.5)):
        check_corner(rate, multiplier, order)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "multiplier", "order"), CORNERS)
def test_poisson_gaussian_equals_the_integral_in_every_corner(rate, multiplier, order):
    check_corner(rate, multiplier, order)


def check_corner(rate, multiplier, order):
    exact = rate_integral(rate, multiplier, order)
    found = subsample.poisson_gaussian(multiplier, rate, order)[0]
    assert exact <= found <= exact * (1 + mpmath.mpf(2e-10)), (rate, multiplier, order)
    assert found <= rdp.gaussian(multiplier, order)[0]


# q, noise multiplier, order, dp_accounting's curve over the integral, to two digits.
DISAGREE = (
    # Too small: more privacy is claimed than there is.
    (1e-7, 100.0, 1.5, 1 - 4.5e-4),
    (1e-7, 100.0, 2.0, 1 - 1.7e-4),
    (1e-7, 100.0, 1000.5, 1 - 1.2e-4),
    (1e-7, 10.0, 2.0, 1 - 1.7e-6),
    (1e-7, 0.5, 7.5, 1 - 1.8e-6),
    (1e-3, 100.0, 7.5, 1 - 9.0e-9),
    # Too large: loose bounds at real orders, and no number at all.
    (1e-7, 100.0, 1.001, 1 + 5.6e-1),
    (1e-3, 0.5, 1.5, 1 + 9.9e-2),
    (1e-3, 100.0, 1.001, 1 + 6.7),
    (0.3, 100.0, 1.001, 1 + 4.3e3),
    (0.3, 10.0, 7.5, 1 + 4.6e-5),
    (0.3, 1.0, 1.5, math.inf),
    (0.3, 10.0, 9999.5, math.inf),
    (0.999, 1.0, 9999.5, math.inf),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rate", "multiplier", "order", "ratio"), DISAGREE)
def test_dp_accounting_disagrees_where_it_is_known_to(rate, multiplier, order, ratio):
    rival = float(rival_rdp._compute_rdp_poisson_subsampled_gaussian(rate, multiplier, [order])[0])
    ours = subsample.poisson_gaussian(multiplier, rate, order)[0]
    if ratio == math.inf:
        assert rival == math.inf and ours < math.inf
    else:
        assert rival / ours - 1 == pytest.approx(ratio - 1, rel=0.05)
    if order < 1000:  # which of the two is right, the integral says
        exact = rate_integral(rate, multiplier, order)
        assert exact <= ours <= exact * (1 + mpmath.mpf(2e-10))
