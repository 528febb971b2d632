"""What a stream of scores looks like: range, moments, quantiles, margins, ties, rounding error."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.scores.snapshot import Csr

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_SAMPLE = 1 << 22  # quantiles of larger stores come from an even sample of this size


class Summary:
    """Statistics of a stream of scores."""

    def __init__(self) -> None:
        self.count = 0
        self._low, self._high, self._sum, self._square = np.inf, -np.inf, 0.0, 0.0
        self._sample: list[NDArray[np.float32]] = []
        self._error_max, self._error_square = 0.0, 0.0
        self._margins = self._margin_sum = self._margin_square = 0.0
        self._ties = 0

    def add(self, scores: NDArray[np.floating], rounded: NDArray[np.floating]) -> None:
        """Count a block of scores and what rounding did to them."""
        if not scores.size:
            return
        values = scores.reshape(-1)
        self.count += len(values)
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._sum += float(values.sum(dtype=np.float64))
        self._square += float(np.square(values, dtype=np.float64).sum())
        self._sample.append(values[:: max(1, len(values) // _SAMPLE)].astype(np.float32))
        error = np.abs(values.astype(np.float64) - rounded.reshape(-1))
        self._error_max = max(self._error_max, float(error.max()))
        self._error_square += float(np.square(error).sum())

    def add_margins(self, csr: Csr) -> None:
        """Count margins: the best score of each list minus every other score of it."""
        starts, sizes = csr.offsets[:-1], np.diff(csr.offsets)
        margins = np.repeat(np.maximum.reduceat(csr.scores, starts), sizes) - csr.scores
        self._margins += float((sizes - 1).sum())
        self._margin_sum += float(margins.sum(dtype=np.float64))
        self._margin_square += float(np.square(margins, dtype=np.float64).sum())
        self._ties += int((np.add.reduceat(margins == 0, starts, dtype=np.int64) > 1).sum())

    def stats(self) -> dict[str, Any]:
        """min, max, mean, std, quantiles; margins where lists were counted."""
        if not self.count:
            return {}
        mean = self._sum / self.count
        sample = np.concatenate(self._sample)
        quantiles = np.quantile(sample, QUANTILES)
        out: dict[str, Any] = {
            "min": self._low,
            "max": self._high,
            "mean": mean,
            "std": float(np.sqrt(max(0.0, self._square / self.count - mean**2))),
            "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        }
        if self._margins:
            mean = self._margin_sum / self._margins
            variance = max(0.0, self._margin_square / self._margins - mean**2)
            out["margin"] = {"mean": mean, "std": float(np.sqrt(variance)), "lists_with_tied_best": self._ties}
        return out

    def quant_error(self) -> dict[str, float]:
        """Largest and root-mean-square difference between the parts and the snapshot."""
        rms = float(np.sqrt(self._error_square / self.count)) if self.count else 0.0
        return {"max": self._error_max, "rms": rms}
