"""What every Python of the tests runs first: it records which files of the user's the process opens.

The user's are `data/` and `runs/` of the checkout, whether they exist or not. A test that reads them passes or fails by
what the user has prepared and trained. `TESTS_RECORD` names the file that takes a line for each opened path; without it
nothing is watched. tests/conftest.py puts this folder on PYTHONPATH and fails the test whose record grew. Files that a
compiled library opens by itself (pyarrow, safetensors) are not seen.
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
    """Append a line to `record` whenever this process opens, lists, makes or removes something of the user's."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and is_the_user_s(arguments[0]):
            with open(record, "a", encoding="utf-8") as file:
                file.write(f"{event} {arguments[0]!s} by {' '.join(sys.orig_argv)[:200]!r}\n")

    sys.addaudithook(note)


if os.environ.get("TESTS_RECORD"):
    watch(os.environ["TESTS_RECORD"])
