"""The one statistic that a report computes by itself: how sure a mean over seeds is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit


def interval(values: NDArray[Any], confidence: float = 0.95) -> float | None:
    """Half the width of Student's confidence interval of the mean (Student 1908); None for one value."""
    count = len(values)
    if count < 2:
        return None
    quantile, deviation = float(stdtrit(count - 1, (1 + confidence) / 2)), float(np.std(values, ddof=1))
    half: float = quantile * deviation / count**0.5
    return half
