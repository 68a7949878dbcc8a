"""What Python runs first where this folder is on PYTHONPATH: a trainer then records what enters its model.

That is how a trainer that srun, ssh or torchrun started, several processes away from the test, is looked into.
"""

import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "guard" / "sitecustomize.py"))  # Python runs one of this name

if sys.orig_argv[1:4] == ["-m", "bigmodel", "train"]:
    from tests.support.launched import record_batches

    record_batches(Path(sys.orig_argv[4]))
