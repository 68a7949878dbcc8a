"""What every test needs set before torch is imported: one thread per process, and the environment's own programs.

Tests start several ranks on two cores, so more threads would only fight. DeepSpeed calls ninja by name; it lies
beside the interpreter, which need not be on PATH.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, prepared once: two sources, several shards each."""
    from tests.tiny_corpus import prepared

    return prepared(tmp_path_factory.mktemp("corpus"), shard_tokens=1500)
