"""Numerical kernels, each behind one function."""
