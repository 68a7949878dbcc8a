"""SLURM's queue: the state of a job. Imports nothing of the project: `bigmodel watch` asks it."""

import shutil
import subprocess


def queue_state(job: str) -> str:
    """The state of a job in squeue, such as "RUNNING" or "PENDING (Resources)"; "" if it is not queued or unknown."""
    if not job or shutil.which("squeue") is None:
        return ""
    command = ["squeue", "-h", "-j", job, "-o", "%T (%r)"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip().removesuffix("(None)").strip() if answer.returncode == 0 else ""
