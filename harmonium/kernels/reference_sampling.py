"""Specification of the sampling kernels in NumPy."""

__all__: list[str] = []
