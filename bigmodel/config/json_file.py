"""Reads a JSON file that others wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmodel.config.user_error import UserError


def read_json(path: Path, remedy: str = "", keys: Sequence[str] = ()) -> Any:
    """The value of a JSON file. Raises `UserError` with the file's name, and `remedy`, if it is damaged or unreadable.

    keys: the value must be an object with these. Python reads about a thousand brackets inside one another.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if lacking := [key for key in keys if not isinstance(value, dict) or key not in value]:
            raise ValueError(f"no {lacking[0]!r} in it")
        return value
    except (OSError, ValueError, RecursionError) as error:
        reason = "its brackets are nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: cannot be read as JSON: {reason}{remedy and '; '}{remedy}") from None
