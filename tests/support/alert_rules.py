"""The alerts of configs/prometheus/rules.yml with shorter times, so that real faults fire them within a test.

A time is a window such as `[5m]` or `[5m:15s]`, a duration after `for:`, or `N * 60` and `N * 3600` seconds. All times
of an alert are divided by one number; thresholds, labels and everything else stay.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parents[2] / "configs/prometheus/rules.yml"
SECONDS = {"s": 1, "m": 60, "h": 3600}


def alerts() -> dict[str, dict[str, Any]]:
    """Name -> rule, as it is written."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def shortened(rule: Mapping[str, Any], divisor: float) -> dict[str, Any]:
    """The alert with all its times divided."""
    expression = re.sub(
        r"([\[:])(\d+)([smh])(?=[:\]])", lambda found: found[1] + _duration(found[2], found[3], divisor), rule["expr"]
    )
    expression = re.sub(r"\b(\d+) \* (60|3600)\b", rf"\1 * \2 / {divisor:g}", expression)
    times = {"for": _duration(rule["for"][:-1], rule["for"][-1], divisor)} if "for" in rule else {}
    return {**rule, "expr": expression, **times}


def write_shortened(path: Path, divisors: Mapping[str, float]) -> None:
    """A rule file with the alerts of `divisors` only."""
    known = alerts()
    rules = [shortened(known[name], divisor) for name, divisor in divisors.items()]
    path.write_text(yaml.safe_dump({"groups": [{"name": "alerts", "rules": rules}]}))


def _duration(number: str, unit: str, divisor: float) -> str:
    return f"{round(1000 * int(number) * SECONDS[unit] / divisor)}ms"
