"""Attacks on a mechanism and the bounds that its runs prove. Imports nothing of what it audits."""

from dpfa_jax.auditing import attacks as attacks
from dpfa_jax.auditing import bounds as bounds
