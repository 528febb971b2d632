"""Numba kernels over compressed rows and half edges, on CPU."""
