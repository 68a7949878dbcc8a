"""Run first by every Python process of the tests: records accesses to the user's files.

The user's files are `data/` and `runs/` of the checkout, whether they exist or not: a test that reads them depends on
the user's data and runs. `TESTS_RECORD` names the file that gets a line per access; without it nothing is recorded.
tests/conftest.py puts this folder on PYTHONPATH and fails a test whose record grew. Files opened inside a compiled
library (pyarrow, safetensors) are not detected.
"""

import os
import sys
from typing import Any

CHECKOUT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), *[os.pardir] * 3))
FOLDERS = tuple(os.path.join(CHECKOUT, name) for name in ("data", "runs"))
EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"}


def is_the_user_s(path: Any) -> bool:
    try:
        whole = os.path.abspath(os.fsdecode(path))
    except (TypeError, ValueError, OSError):  # a file descriptor; no working directory
        return False
    return any(whole == folder or whole.startswith(folder + os.sep) for folder in FOLDERS)


def watch(record: str) -> None:
    """Append a line to `record` whenever this process opens, lists, makes or removes a user's file."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and is_the_user_s(arguments[0]):
            with open(record, "a", encoding="utf-8") as file:
                file.write(f"{event} {arguments[0]!s} by {' '.join(sys.orig_argv)[:200]!r}\n")

    sys.addaudithook(note)


if os.environ.get("TESTS_RECORD"):
    watch(os.environ["TESTS_RECORD"])
