"""What every test needs set before torch is imported: one thread per process, for several ranks share two cores."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("BIGMODEL_GPU_TESTS") != "1":  # for `pytest tests/gpu`; all other tests are about CPUs
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, prepared once: two sources, several shards each."""
    from tests.support.tiny_corpus import prepared

    return prepared(tmp_path_factory.mktemp("corpus"), shard_tokens=1500)
