"""Differentially private flash attention for JAX."""
