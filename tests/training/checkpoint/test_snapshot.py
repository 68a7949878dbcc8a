"""The snapshot of a save has the bytes of the safetensors library; a later snapshot reuses its memory."""

import hashlib
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from bigmodel.config.settings import Settings
from bigmodel.distributed.world import ALONE
from bigmodel.training.checkpoint.saver import Saver
from bigmodel.training.checkpoint.snapshot import Snapshot
from tools.torture import Weights


class Held(Weights):
    """Tensors by name, one key; `start` is 0."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(1, {})
        self.state = {name: {"weight": tensor} for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name]["weight"].shape)

    def owned(self, name: str) -> dict[str, tuple[int, Tensor]]:
        return {"weight": (0, self.state[name]["weight"])}


def taken(tensors: dict[str, Tensor]) -> Snapshot:
    snapshot = Snapshot()
    snapshot.take(Held(tensors))
    return snapshot


def library(tensors: dict[str, Tensor]) -> bytes:
    return to_safetensors({f"weight.{name}@0": tensor.float().flatten() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"one": torch.arange(3.0)},
        {"b": torch.arange(5.0), "a.10": torch.ones(1), "a.9": torch.zeros(2, 3), "a": torch.full((2,), -0.0)},
        {name: torch.ones(1) for name in ("Zoë", "z", 'quote" \\ \n\x01\x7f', "😀", "ﬀ")},
        {"half": torch.arange(8, dtype=torch.bfloat16), "columns": torch.arange(6.0).view(2, 3).t()},
        {f"layer{number}": torch.full((number + 1,), float("nan")) for number in range(300)},
    ],
    ids=["nothing", "one", "order", "signs", "converted", "many"],
)  # fmt: skip
def test_the_bytes_are_those_of_the_library(tensors: dict[str, Tensor]) -> None:
    assert taken(tensors).content.tobytes() == library(tensors)


def test_a_saved_file_has_the_hash_of_the_library_s_file(tmp_path: Path) -> None:
    weights = Weights(4)
    saved = Saver(tmp_path / "checkpoints", Settings(), ALONE).save(weights, {"step": 4})
    file = saved.path / "rank-00000.safetensors"
    with safe_open(file, framework="pt") as read:
        tensors = {name: read.get_tensor(name) for name in read.keys()}  # noqa: SIM118 - no dict
    content = file.read_bytes()
    assert hashlib.sha256(to_safetensors(tensors)).digest() == hashlib.sha256(content).digest()
    assert len(tensors) == 12


def test_later_changes_of_the_state_do_not_reach_it() -> None:
    tensors = {"a": torch.ones(4)}
    snapshot = taken(tensors)
    tensors["a"].zero_()
    assert snapshot.tensors["weight.a@0"].tolist() == [1.0] * 4


@pytest.fixture
def large() -> dict[str, Tensor]:
    """9,668 pages of 4,096 bytes; malloc returns blocks above 32 MiB to the system at once. As in an engine, the names
    are not sorted: in their own order, offsets have more digits and the header more bytes."""
    layers = {f"layer{number:03d}": torch.full((30_000,), float(number)) for number in range(320)}
    return {"output": torch.ones(300_000)} | layers


def page_faults_of(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_prepared_memory_has_its_pages_and_is_that_of_the_snapshot(large: dict[str, Tensor]) -> None:
    assert page_faults_of(partial(Snapshot().take, Held(large))) > 9000
    snapshot = Snapshot()
    snapshot.prepare(Held(large))
    assert page_faults_of(partial(snapshot.take, Held(large))) < 1000
    assert snapshot.content.tobytes() == library(large)
    snapshot.prepare(Held({}))  # nothing: it is there
    assert snapshot.content.tobytes() == library(large)


def test_prepared_memory_of_another_size_is_replaced() -> None:
    """An average of the weights begins later, and a frozen weight has no moments."""
    snapshot = Snapshot()
    snapshot.prepare(Held({"a": torch.ones(40)}))
    larger = {"a": torch.ones(4000), "c": torch.zeros(2)}
    snapshot.take(Held(larger))
    assert snapshot.content.tobytes() == library(larger)


def test_a_step_without_a_save_prepares_the_first_one(tmp_path: Path, large: dict[str, Tensor]) -> None:
    weights, settings = Held(large), Settings.model_validate({"checkpoint": {"every_steps": 2}})
    saver = Saver(tmp_path / "checkpoints", settings, ALONE)
    assert list(saver.step(weights, 1, 0.0, False, lambda: {"step": 1})) == []
    assert page_faults_of(lambda: list(saver.step(weights, 2, 0.0, False, lambda: {"step": 2}))) < 1000
    saved = saver.finish()
    assert saved is not None
    assert (saved.path / "rank-00000.safetensors").stat().st_size > 320 * 30_000 * 4


def test_a_second_snapshot_takes_the_memory_of_the_first_and_one_of_another_size_its_own() -> None:
    snapshot = taken({"a": torch.ones(4), "b": torch.zeros(2)})
    place = snapshot.tensors["weight.a@0"].data_ptr()
    snapshot.take(Held({"a": torch.full((4,), 2.0), "b": torch.ones(2)}))
    assert snapshot.tensors["weight.a@0"].data_ptr() == place
    assert snapshot.tensors["weight.a@0"].tolist() == [2.0] * 4
    larger = {"a": torch.ones(4000), "c": torch.zeros(2)}
    snapshot.take(Held(larger))
    assert snapshot.content.tobytes() == library(larger)
    assert sorted(snapshot.tensors) == ["weight.a@0", "weight.c@0"]
