"""What releases cost: events, ε and δ of them, and the noise a target needs."""

from dpfa_jax.accounting import convert as convert
from dpfa_jax.accounting import gdp as gdp
from dpfa_jax.accounting import rdp as rdp
from dpfa_jax.accounting import subsample as subsample
from dpfa_jax.accounting.calibrate import noise_multiplier as noise_multiplier
from dpfa_jax.accounting.charge import delta as delta
from dpfa_jax.accounting.charge import epsilon as epsilon
from dpfa_jax.accounting.charge import mu as mu
from dpfa_jax.accounting.charge import rdp_curve as rdp_curve
from dpfa_jax.accounting.event import BoundedRange as BoundedRange
from dpfa_jax.accounting.event import Composed as Composed
from dpfa_jax.accounting.event import DiscreteGaussian as DiscreteGaussian
from dpfa_jax.accounting.event import Event as Event
from dpfa_jax.accounting.event import ExponentialMechanism as ExponentialMechanism
from dpfa_jax.accounting.event import Gaussian as Gaussian
from dpfa_jax.accounting.event import Laplace as Laplace
from dpfa_jax.accounting.event import NonPrivate as NonPrivate
from dpfa_jax.accounting.event import NoRelease as NoRelease
from dpfa_jax.accounting.event import PoissonSampled as PoissonSampled
from dpfa_jax.accounting.event import RandomizedResponse as RandomizedResponse
from dpfa_jax.accounting.event import Repeated as Repeated
from dpfa_jax.accounting.event import SampledWithoutReplacement as SampledWithoutReplacement
from dpfa_jax.accounting.event import Skellam as Skellam
from dpfa_jax.accounting.event import TruncatedPoissonSampled as TruncatedPoissonSampled
from dpfa_jax.accounting.state import Ledger as Ledger
from dpfa_jax.accounting.trace import events as events
