"""No test depends on who runs it: not on the user's data and runs, variables, width of terminal or language."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FIXED, make_independent

CHECKOUT = Path(__file__).parents[1]
FORCED = "BIGMODEL_FAULT=x AWS_ENDPOINT_URL=x HF_TOKEN=x SLURM_JOB_ID=1 RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=x "
FORCED += "TORCHELASTIC_RUN_ID=x NCCL_DEBUG=x LANG=de_DE.UTF-8 LC_NUMERIC=de_DE NO_COLOR=1 FORCE_COLOR=1 WANDB_MODE=x"


def test_variables_of_the_user_are_removed_and_the_rest_stays() -> None:
    environment = dict(word.split("=", 1) for word in FORCED.split())
    environment |= {"COLUMNS": "200", "TERM": "xterm-256color", "TZ": "Asia/Tokyo", "no_proxy": "a.example"}
    environment |= {"PATH": "/bin", "HOME": "/home/me", "PIP_INDEX_URL": "https://index.example", "PYTHONPATH": "/my"}
    make_independent(environment)
    kept = {name: value for name, value in environment.items() if name not in FIXED}
    assert kept == {
        "PATH": "/bin",
        "HOME": "/home/me",
        "PIP_INDEX_URL": "https://index.example",
        "PYTHONPATH": "/my",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "no_proxy": "a.example,127.0.0.1,localhost",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    assert environment["COLUMNS"] == "80"


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        (CHECKOUT / "data" / "manifest.json", True),
        ("runs/tiny/metrics.jsonl", True),
        ("tests/../data/tiny/manifest.json", True),
        (CHECKOUT / "data.toml", False),
        ("bigmodel/data/plan/order.py", False),
    ],
)
@pytest.mark.parametrize("call", ["open(sys.argv[1])", "os.open(sys.argv[1], os.O_RDONLY)", "os.listdir(sys.argv[1])"])
def test_a_child_process_that_opens_the_user_s_files_is_recorded(
    tmp_path: Path, path: str | Path, seen: bool, call: str
) -> None:
    """Whether the file exists or not. The record is one of this test's own, so that the guard itself stays quiet."""
    record = tmp_path / "record"
    code = f"import os, sys\ntry: {call}\nexcept OSError: pass"
    environment = {**os.environ, "TESTS_RECORD": str(record)}
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=CHECKOUT, env=environment, check=True, timeout=60)
    assert record.exists() == seen
    assert not seen or str(path) in record.read_text()


def test_this_process_is_watched() -> None:
    """Of the guard in pytest's own process: the record is emptied again, or this test would fail."""
    record = Path(os.environ["TESTS_RECORD"])
    before = record.read_text()
    assert not (CHECKOUT / "data" / "no such file").exists()  # looking is no opening
    assert record.read_text() == before
    with pytest.raises(FileNotFoundError):
        (CHECKOUT / "data" / "no such file").read_text()
    assert record.read_text() != before
    record.write_text(before)
