"""Runs test files under Triton's interpreter, or without it, in a process of their own.

Whether a kernel is interpreted is decided when its file is imported, so it cannot change within a test session.
Files named interpreted_*.py hold tests that pytest does not collect by itself; `run_interpreted` runs them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(arguments: list[str], interpret: bool) -> str:
    """Runs python in the repository's root; gives what it printed. Fails with that text if it failed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_interpreted(file: str) -> int:
    """Runs the tests of a file under the interpreter; gives how many passed."""
    printed = run_python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", file], interpret=True)
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None, printed
    return int(passed.group(1))
