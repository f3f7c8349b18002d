"""How many distinct pages random writes reach."""

import math
from typing import NamedTuple


class Distinct(NamedTuple):
    """The mean of a count of distinct pages, and its standard deviation."""

    mean: float
    deviation: float


def distinct_pages(pages: int, writes: int) -> Distinct:
    """For ``writes`` writes, each to any of ``pages`` pages with equal probability.

    A page stays unwritten with probability (1 - 1/n)**k, and two given pages both with (1 - 2/n)**k.
    """
    one, two = (1 - 1 / pages) ** writes, (1 - 2 / pages) ** writes
    variance = pages * one + pages * (pages - 1) * two - (pages * one) ** 2
    return Distinct(pages * (1 - one), math.sqrt(max(variance, 0.0)))
