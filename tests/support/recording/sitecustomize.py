"""Run first by Python with this folder on PYTHONPATH: a trainer then records the inputs of its model.

It reaches trainers that srun, ssh or torchrun start several processes away from the test.
"""

import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "guard" / "sitecustomize.py"))  # Python runs only one sitecustomize

if sys.orig_argv[1:4] == ["-m", "bigmodel", "train"]:
    from tests.support.batches import record_batches

    record_batches(Path(sys.orig_argv[4]))
