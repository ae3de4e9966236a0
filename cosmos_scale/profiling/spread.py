"""A number measured several times: its middle, and how far apart its values lie."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """The median of several values, and their lower and upper quartile."""

    median: float
    low: float
    high: float

    def clear_of(self, other: "Spread") -> bool:
        """Tell whether the middle halves of both lie apart: then the difference of the medians is no noise."""
        return self.low > other.high or self.high < other.low


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value; quartiles between values are interpolated."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, low, high)
