"""Kernels that compute the sums of private attention, imported only when one is asked for."""
