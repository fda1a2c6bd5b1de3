"""Specification of the matmul kernels in NumPy."""

__all__: list[str] = []
