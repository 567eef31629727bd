"""When requests are sent: a schedule that is fixed before the first of them."""

from __future__ import annotations

import math
import random
from itertools import accumulate


def parse_rate(text: str) -> float | None:
    """Reads requests per second; `inf`, that is all at once, is None.

    Raises:
        ValueError: when it is neither `inf` nor a number above 0.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ValueError(f"rate {text!r}: write requests per second, as 2.5, or inf to send all at once")
    return None if math.isinf(rate) else rate


def schedule(rate: float | None, count: int, seed: int) -> list[float]:
    """Arrival times in seconds, the first at 0; the same for the same seed.

    Args:
        rate: Requests per second on average, with the exponential gaps of a Poisson process; None sends all at once.
        count: How many requests.
        seed: Chooses the gaps.
    """
    if rate is None:
        return [0.0] * count
    chance = random.Random(f"arrivals {seed}")
    gaps = (chance.expovariate(rate) for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))
