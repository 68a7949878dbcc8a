"""Saves against failures: the interval that loses the least time, and the share of the time that remains. Imports no
torch.

Example: a save costs 10 s, failures come every 24 h on average: save every 22 minutes; with 5 minutes to detect and
restart 98.1% of the time counts.
"""

import math


def best_interval_seconds(cost: float, mean_between_failures: float) -> float:
    """Time between two saves that loses the least time: Daly 2006, eq. 37; its first term is Young 1974.

    sqrt(2CM) * (1 + sqrt(C/2M)/3 + (C/2M)/9) - C; M if C >= 2M. C (cost): seconds that a save pauses training;
    M: mean seconds between failures.
    """
    ratio = cost / (2 * mean_between_failures)
    if ratio >= 1:
        return mean_between_failures
    return math.sqrt(2 * cost * mean_between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def expected_ratio(interval: float, pause: float, write: float, recovery: float, mean_seconds: float) -> float:
    """Goodput of an endless run: productive seconds over all; closed form, failures with exponential times at any time,
    also in a recovery.

    A save n counts if the run lives until it is written; between two resumptions lie M e^(R/M) seconds on average:

        interval * e^(-(interval + write) / M) / ((1 - e^(-cycle / M)) * M * e^(R / M))

    With write = pause it is the model of Daly 2006, interval / (M e^(R/M) (e^((interval + pause)/M) - 1)),
    whose best interval is sqrt(2 * pause * M) in first order: Young 1974.
    """
    cycle = max(interval + pause, write)
    reached = math.exp(-(interval + write) / mean_seconds) / -math.expm1(-cycle / mean_seconds)
    return interval * reached / (mean_seconds * math.exp(recovery / mean_seconds))
