"""Settings of all tests, made before torch is imported; no test depends on the user or the machine.

One thread per process, because several ranks share two cores. Variables, terminal widths and languages of the user
are removed. A test that opens `data/` or `runs/` of the checkout fails (tests/support/guard/sitecustomize.py).
"""

import os
import re
import runpy
import signal
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import pytest

GUARD = Path(__file__).parent / "support" / "guard"
KEPT = {"BIGMODEL_GPU_TESTS", "BIGMODEL_TRANSFORMERS_5"}
USER_S = re.compile(
    r"(BIGMODEL|AWS|AZURE|GOOGLE|GCS|HF|HUGGINGFACE|WANDB|SLURM|SLURMD|SBATCH|SRUN|OMPI|PMI|PMIX|MPI|MV2|TORCHELASTIC|"
    r"NCCL|GLOO|TORCH|DS|TRITON|RICH|TYPER|LAUNCH)_\w+|(LOCAL_|GROUP_|NODE_|ROLE_)?(RANK|SIZE)|(LOCAL_)?WORLD_SIZE|"
    r"MASTER_(ADDR|PORT)|COLUMNS|LINES|LANG|LANGUAGE|LC_\w+|(NO|FORCE|CLICOLOR|PY)_?COLORS?|CLICOLOR_FORCE|TTY_\w+|"
    r"CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|OMP_\w+|MKL_\w+|HADOOP_\w+|CLASSPATH|TOKENIZERS_PARALLELISM"
)
FIXED = {
    "COLUMNS": "80", "LINES": "25", "TERM": "dumb", "LC_ALL": "C.UTF-8", "TZ": "UTC", "OMP_NUM_THREADS": "1",
    # No configuration from a home folder; no credentials from a cloud's metadata address.
    "MATPLOTLIBRC": os.devnull, "MPLBACKEND": "agg", "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HOME": os.devnull, "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def make_independent(environment: MutableMapping[str, str]) -> None:
    """Remove the user's variables; set those that a result may depend on."""
    for name in [name for name in environment if USER_S.fullmatch(name) and name not in KEPT]:
        del environment[name]
    environment.update(FIXED)
    if environment.get("BIGMODEL_GPU_TESTS") != "1":  # set for `pytest tests/gpu`; all other tests use CPUs
        environment.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    for name in ("no_proxy", "NO_PROXY"):  # the tests' servers are on this machine
        environment[name] = ",".join([*filter(None, [environment.get(name)]), "127.0.0.1", "localhost"])


# Removed if the user set it; tests/support/interpreted.py sets it for the pytest that it starts.
interpreted = os.environ.get("TRITON_INTERPRET") if "TESTS_RECORD" in os.environ else None
make_independent(os.environ)
if interpreted:
    os.environ["TRITON_INTERPRET"] = interpreted
time.tzset()
for number in (signal.SIGINT, signal.SIGHUP):  # `make test &` and nohup ignore them, and children inherit that
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

_descriptor, _record = tempfile.mkstemp(prefix="tests-record-")
os.close(_descriptor)
os.environ["TESTS_RECORD"] = _record
os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])])
runpy.run_path(str(GUARD / "sitecustomize.py"))
_seen = 0


def pytest_unconfigure() -> None:
    Path(_record).unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _nothing_of_the_user_s_is_opened() -> Iterator[None]:
    """Fixtures of a module count too: the first test after them fails."""
    global _seen
    yield
    opened = Path(_record).read_text(encoding="utf-8")[_seen:]
    _seen += len(opened)
    assert not opened, f"tests must not depend on data/ and runs/ of the checkout:\n{opened}"


@pytest.fixture(autouse=True)
def _variables_of_a_test_end_with_it() -> Iterator[None]:
    """A trainer in this process sets some, such as the network interface; processes of later tests would inherit it."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, prepared once: two sources, several shards each."""
    from tests.support.tiny_corpus import prepared

    return prepared(tmp_path_factory.mktemp("corpus"), shard_tokens=1500)
