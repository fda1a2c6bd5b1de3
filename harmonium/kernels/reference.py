"""The kernels in plain NumPy: the specification that every instruction set is tested against.

Slow and clear. Arrays carry their dimension letters (docs/architecture.md) as suffixes.
"""

from harmonium.kernels.reference_matmul import *  # noqa: F403
from harmonium.kernels.reference_ops import *  # noqa: F403
from harmonium.kernels.reference_sampling import *  # noqa: F403
