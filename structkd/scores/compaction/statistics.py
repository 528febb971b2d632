"""What a stream of scores looks like: range, moments, quantiles, margins, ties, rounding error."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.scores.layout.snapshot import Csr

FLOAT16_MAX = 65_504.0
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_SAMPLE = 1 << 20  # quantiles come from an even sample of this size of each block


class Summary:
    """Statistics of a stream of scores.

    Attributes:
        count: scores added.
        lists: queries whose margins were added.
    """

    def __init__(self) -> None:
        self.count = 0
        self._low, self._high, self._sum, self._square = np.inf, -np.inf, 0.0, 0.0
        self._sample: list[NDArray[np.float32]] = []
        self._error_max, self._error_square = 0.0, 0.0
        self._margins = self._margin_sum = self._margin_square = 0.0
        self._ties = self.lists = 0

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
        if rounded is scores:
            return
        error = np.abs(values.astype(np.float64) - rounded.reshape(-1))
        self._error_max = max(self._error_max, float(error.max()))
        self._error_square += float(np.square(error).sum())

    def add_margins(self, files: Sequence[Csr]) -> None:
        """Count margins: the best score of each query minus every other score of it, in whichever file it stands."""
        files = [csr for csr in files if len(csr)]
        highest = max((int(csr.query_rows[-1]) for csr in files), default=-1) + 1
        best = np.full(highest, -np.inf, dtype=np.float32)
        for csr in files:
            rows = csr.query_rows.astype(np.int64)
            best[rows] = np.maximum(best[rows], np.maximum.reduceat(csr.scores, csr.offsets[:-1]))
        ties = np.zeros(highest, dtype=np.int64)
        for csr in files:
            rows, starts = csr.query_rows.astype(np.int64), csr.offsets[:-1]
            margins = np.repeat(best[rows], np.diff(csr.offsets)) - csr.scores
            self._margins += float(len(margins))
            self._margin_sum += float(margins.sum(dtype=np.float64))
            self._margin_square += float(np.square(margins, dtype=np.float64).sum())
            ties[rows] += np.add.reduceat(margins == 0, starts, dtype=np.int64)
        self._margins -= float((ties > 0).sum())  # the best itself is no margin
        self._ties += int((ties > 1).sum())
        self.lists += int((ties > 0).sum())

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

    def add_error(self, error: dict[str, float], count: int) -> None:
        """Count the rounding error of scores that were rounded before."""
        self._error_max = max(self._error_max, error["max"])
        self._error_square += count * error["rms"] ** 2

    def quant_error(self) -> dict[str, float]:
        """Largest and root-mean-square difference between the parts and the snapshot."""
        rms = float(np.sqrt(self._error_square / self.count)) if self.count else 0.0
        return {"max": self._error_max, "rms": rms}
