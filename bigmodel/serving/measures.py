"""Counts and times of the server, for /metrics. Each counter belongs to one thread, or has the lock."""

import bisect
import threading
from collections import Counter

from bigmodel.metrics.exporter import Samples
from bigmodel.metrics.metric_table import TOKEN_BUCKETS_SECONDS


class Histogram:
    """Counts of values by bucket, the last without an upper bound, and their sum."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(TOKEN_BUCKETS_SECONDS) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(TOKEN_BUCKETS_SECONDS, value)] += 1
        self.total += value


class Measures:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._prompt_tokens = self._generated_tokens = 0
        self._first_token, self._between_tokens = Histogram(), Histogram()

    def count_request(self, endpoint: str, status: int) -> None:
        with self._lock:
            self._requests[endpoint, str(status)] += 1

    def count_prompt(self, tokens: int) -> None:
        with self._lock:
            self._prompt_tokens += tokens

    def count_first_token(self, seconds: float) -> None:
        """seconds: since the request arrived, waiting included."""
        with self._lock:
            self._generated_tokens += 1
            self._first_token.observe(seconds)

    def count_token(self, seconds: float) -> None:
        """seconds: since the token before."""
        with self._lock:
            self._generated_tokens += 1
            self._between_tokens.observe(seconds)

    def samples(self, running: int, waiting: int, positions: int, capacity: int) -> Samples:
        """For bigmodel/metrics/exporter.py, by names of the table."""
        with self._lock:
            return {
                "serving_requests": [[list(labels), count] for labels, count in sorted(self._requests.items())],
                "serving_prompt_tokens": [[[], self._prompt_tokens]],
                "serving_generated_tokens": [[[], self._generated_tokens]],
                "serving_running_sequences": [[[], running]],
                "serving_waiting_sequences": [[[], waiting]],
                "serving_cache_positions": [[[], positions]],
                "serving_cache_capacity_positions": [[[], capacity]],
                "serving_first_token_seconds": [[[], [[*self._first_token.counts], self._first_token.total]]],
                "serving_token_seconds": [[[], [[*self._between_tokens.counts], self._between_tokens.total]]],
            }
