"""Specification of the ops kernels in NumPy."""

__all__: list[str] = []
