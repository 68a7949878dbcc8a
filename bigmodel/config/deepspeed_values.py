"""What may stand at a key of the DeepSpeed JSON: a type and a range, in words and as a function.

whole(1).read(5e8)       # 500000000: JSON has one type of numbers
whole(1).read("5e8")     # ValueError: quotes make it a text
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LARGEST = 2**63 - 1  # sys.maxsize, which DeepSpeed uses for "no limit"
LARGEST_FLOAT = 3e38  # of fp32
LONGEST = 80  # letters of a value in a message


@dataclass(frozen=True)
class Value:
    """words: completes "must be ...". read: gives the value as it is used, or raises ValueError."""

    words: str
    read: Callable[[Any], Any]


def whole(least: int = 0, most: int = LARGEST, multiple_of: int = 1) -> Value:
    """A whole number; 5e8 is one, too."""

    def read(value: Any) -> int:
        _refuse_unless(isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most)
        _refuse_unless(value == int(value) and int(value) % multiple_of == 0)
        return int(value)

    name = "an even number" if multiple_of == 2 else "a whole number"
    return Value(f"{name} of at least {least}{_up_to(most, LARGEST)}", read)


def number(least: float = 0, most: float = math.inf) -> Value:
    """A finite number."""

    def read(value: Any) -> Any:
        _refuse_unless(isinstance(value, int | float) and not isinstance(value, bool))
        _refuse_unless(abs(value) <= LARGEST_FLOAT and least <= value <= most)  # NaN fails, too
        return value if abs(value) <= LARGEST else float(value)

    return Value(f"a number of at least {least:g}{_up_to(most, math.inf)}", read)


def rate() -> Value:
    """A finite number above 0."""

    def read(value: Any) -> float:
        _refuse_unless(number().read(value) > 0)
        return float(value)

    return Value("a number above 0", read)


def below_one() -> Value:
    """From 0 to below 1, as the decay of a moment."""

    def read(value: Any) -> float:
        _refuse_unless(0 <= number().read(value) < 1)
        return float(value)

    return Value("a number from 0 to below 1", read)


def choice(*names: str | int) -> Value:
    """One of a few names, in any case, or numbers."""

    def read(value: Any) -> Any:
        folded = value.lower() if isinstance(value, str) else value
        _refuse_unless(
            not isinstance(value, bool) and any(type(one) is type(folded) and one == folded for one in names)
        )
        return folded

    words = [json.dumps(name) for name in names]
    return Value(" or ".join(filter(None, [", ".join(words[:-1]), words[-1]])), read)


def _of_type(words: str, *types: type) -> Value:
    def read(value: Any) -> Any:
        _refuse_unless(isinstance(value, types))
        return value

    return Value(words, read)


def _texts(value: Any) -> Any:
    _refuse_unless(isinstance(value, list) and all(isinstance(one, str) for one in value))
    return value


FLAG = _of_type("true or false", bool)
TEXT = _of_type("a text", str)
OBJECT = _of_type("an object {...}", dict)
ANYTHING = _of_type("anything", object)
TEXTS = Value("a list of texts", _texts)


def shown(value: Any) -> str:
    """A value as it stands in the JSON; a long one is cut."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def unquoted(value: Any) -> str:
    """The remedy for a number or a truth value in quotes; empty for other values."""
    try:
        inside = json.loads(value.strip().lower()) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return ""
    if not isinstance(inside, int | float) or not abs(inside) <= LARGEST:
        return ""
    short = int(inside) if isinstance(inside, float) and inside == int(inside) else inside
    return f"; write {json.dumps(short)} without quotes"


def _up_to(most: float, none: float) -> str:
    return "" if most == none else f" and at most {most:g}"


def _refuse_unless(fits: bool) -> None:
    if not fits:
        raise ValueError
