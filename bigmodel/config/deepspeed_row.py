"""A row of the table of DeepSpeed's keys (`bigmodel.config.deepspeed_keys`): what becomes of a key, and its values."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bigmodel.config.deepspeed_values import ANYTHING, Value

AUTO = "auto"

# What becomes of a key.
USED = "given to DeepSpeed"
SETTING = "agrees with the run file"  # and given to DeepSpeed
OURS = "done by bigmodel"
IDLE = "no effect here"
REFUSED = "refused"


@dataclass(frozen=True)
class Key:
    """fate: one of the five above. note: for the user, more about it; for a refused key reason and remedy.
    asks: whether a value is refused. nullable: null means absent. inside: names of keys below a refused section.
    """

    fate: str
    value: Value
    note: str = ""
    asks: Callable[[Any], bool] = lambda value: False
    reason: str = ""
    nullable: bool = False
    inside: str = ""


def used(value: Value, note: str = "", nullable: bool = False) -> Key:
    return Key(USED, value, note, nullable=nullable)


def used_but(value: Value, refused_value: Any, reason: str) -> Key:
    """Given to DeepSpeed, except for one value, in any case."""

    def asks(written: Any) -> bool:
        folded = written.lower() if isinstance(written, str) else written
        return type(folded) is type(refused_value) and folded == refused_value

    return Key(USED, value, f"{json.dumps(refused_value)} is refused: {reason}", asks, reason)


def agrees(value: Value, note: str, nullable: bool = False) -> Key:
    return Key(SETTING, value, note, nullable=nullable)


def ours(value: Value, note: str, nullable: bool = False) -> Key:
    return Key(OURS, value, note, nullable=nullable)


def idle(value: Value, note: str, nullable: bool = False) -> Key:
    return Key(IDLE, value, note, nullable=nullable)


def refused(reason: str, asks: Callable[[Any], bool] | None = None, inside: str = "") -> Key:
    """A key that is an error where its value turns something on."""
    return Key(REFUSED, ANYTHING, reason, asks or turned_on, reason, nullable=True, inside=inside)


def only(*values: Any) -> Callable[[Any], bool]:
    """Accepted are these values alone; 0 is not false."""
    return lambda value: not any(type(value) is type(one) and value == one for one in values)


def turned_on(value: Any) -> bool:
    """Whether a value asks for something: false, 0, "none", {} and {"enabled": false} do not, nor do objects of
    such alone."""
    if isinstance(value, dict):
        if "enabled" in value:
            return value["enabled"] not in (False, AUTO, None)
        return any(turned_on(one) for one in value.values())
    return value not in (False, None, AUTO, "none", "None", "", [])


def enabled_by(name: str, *off: Any) -> Callable[[Any], bool]:
    """For a section that one key turns on."""

    def asks(section: Any) -> bool:
        if not isinstance(section, dict):
            return turned_on(section)
        return section.get("enabled", True) is not False and section.get(name, off[0]) not in (*off, AUTO, None)

    return asks


def unless_disabled(section: Any) -> bool:
    """For a section that is on where it stands."""
    return section.get("enabled", True) is not False if isinstance(section, dict) else turned_on(section)
