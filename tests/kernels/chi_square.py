"""Do counts follow a distribution? Tests ask with fixed keys, so the answer is always the same."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def exceeds_chi_square(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> bool:
    """Whether one of a thousand honest samplers would be further from what is expected.

    Wilson and Hilferty's approximation of chi-square's 99.9 % point, over what is expected at least 5 times.
    """
    tested = expected >= 5
    statistic = ((counts[tested] - expected[tested]) ** 2 / expected[tested]).sum()
    freedom = int(tested.sum()) - 1
    return bool(statistic >= freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3)
