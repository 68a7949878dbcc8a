"""Runs test files in a separate process, with or without Triton's interpreter.

Triton decides at the import of a kernel's file whether it is interpreted, so a test session cannot change it.
pytest does not collect tests in files named interpreted_*.py; `run_interpreted` runs them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(arguments: list[str], interpret: bool) -> str:
    """Run python in the repository's root; return its output. Fails with the output if python fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_interpreted(file: str) -> int:
    """Run the tests of a file under the interpreter; return the number of passed tests."""
    printed = run_python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", file], interpret=True)
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None, printed
    return int(passed.group(1))
