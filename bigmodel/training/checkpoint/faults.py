"""Faults for tests: a kill at a named point of a save."""

import os
import signal

FAULT_VARIABLE = "BIGMODEL_FAULT"  # "POINT@STEP" kills the process at that point of the save of that step


def fault(point: str, step: int) -> None:
    if os.environ.get(FAULT_VARIABLE) == f"{point}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)
