"""Ranks that gather keys: the loss, gradient and update of one rank, at any number of ranks, heads and ZeRO stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.settings import Settings, UserError
from bigmodel.training.zero.context_parallel import require_causal
from tests.support.engine_worker import batch_of, launch, oracle, settings_table
from tests.support.exactness import BALANCED, failures, job_of, with_sequence

pytestmark = pytest.mark.timeout(600)  # all ranks run in the first test's set-up
STEPS = 3
CASE = {"stage": 1, "optimizer": "adamw", "activation_checkpointing": "none", "offload": "none", "packs_at_once": 2}
CASE |= {"precision": "fp32", "persistence": 0, "ema": 0.0, "groups": False, "tied": False}
# Ranks -> ranks that share, changes of the case. The model has four heads, two key-value heads and dropout everywhere.
EXACT: dict[int, list[tuple[int, dict[str, Any]]]] = {
    2: [
        (2, {"stage": 0}),
        (2, {"packs_at_once": 3, "activation_checkpointing": "selective"}),
        (2, {"stage": 2, "tied": True, "precision": "bf16"}),
        (2, {"stage": 3, "activation_checkpointing": "full"}),
    ],
    4: [(4, {"stage": 1}), (4, {"stage": 3, "persistence": 100})],
}
Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """One launch on four ranks, which save, and one on two, which go on."""
    folder = tmp_path_factory.mktemp("context")
    found: Jobs = {}
    for ranks, more in ((4, saved(folder)), (2, others(folder) | moved(folder))):
        jobs = {
            f"{ranks} ranks, {sharing} share, {changes}": with_sequence(
                job_of(CASE | changes, folder, STEPS), sharing, "all_gather"
            )
            for sharing, changes in EXACT[ranks]
        } | more
        outcome = launch(list(jobs.values()), ranks, folder)
        found |= {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}
    return found


def others(folder: Path) -> Jobs:
    """A sliding layer and a full one. Experts: the oracle computes in float64; one process in fp32 is 6.6e-6 off."""
    window = {"norms": {"sliding_window": 5, "full_attention_every": 2}}
    found = {}
    for name, more, wide in (("window", window, False), ("experts", {"experts": BALANCED["balanced by loss"]}, True)):
        path = folder / f"{name}.safetensors"
        seen = oracle(Settings.model_validate(settings_table(folder, 1, "fp32", 6, **more)), STEPS, path, wide=wide)
        table = settings_table(folder, 2, "fp32", 2, **more)
        job = {"settings": table, "steps": STEPS, "oracle": str(path), "seen": seen, "allowed": {}}
        found[name] = with_sequence(job, 2, "all_gather")
    return found


def saved(folder: Path) -> Jobs:
    """Four steps with a save after two, and the last two again from there."""
    job = job_of(CASE, folder, STEPS) | {"steps": 4, "checkpoints": str(folder / "saved")}
    job = {key: job[key] for key in ("settings", "steps", "checkpoints")}
    whole, again = job | {"save_at": 2}, job | {"resume": True}
    return {"whole": with_sequence(whole, 4, "all_gather"), "again": with_sequence(again, 4, "all_gather")}


def moved(folder: Path) -> Jobs:
    """The last two steps by others: keys of two ranks at stage 3, heads of two, none shared."""
    jobs = {"keys of two": (2, "all_gather", 3), "heads of two": (2, "ulysses", 2), "alone": (1, "ulysses", 1)}
    found = {}
    for name, (ranks, method, stage) in jobs.items():
        table = job_of(CASE | {"stage": stage}, folder, STEPS)["settings"]
        job = {"settings": table, "steps": 4, "checkpoints": str(folder / "saved"), "resume": True}
        found[name] = with_sequence(job, ranks, method)
    return found


def test_gradient_norm_loss_and_weights_are_those_of_one_process_of_plain_torch(results: Jobs) -> None:
    exact = {name: one for name, one in results.items() if "seen" in one}
    assert len(exact) == 8
    assert [f"{name}: {found}" for name, one in exact.items() if (found := failures(one))] == []


def test_a_resume_repeats_every_bit(results: Jobs) -> None:
    whole, again = results["whole"], results["again"]
    assert again["losses"] == whole["losses"][2:]
    assert again["digest"] == whole["digest"]


@pytest.mark.parametrize("name", ["keys of two", "heads of two", "alone"])
def test_a_checkpoint_goes_on_at_other_degrees_methods_and_stages(results: Jobs, name: str) -> None:
    assert results[name]["losses"] == pytest.approx(results["whole"]["losses"][2:], rel=1e-5)


def test_pairs_as_a_prefix_lm_are_refused() -> None:
    """Their mask shows a position the rest of its prefix; the run file does not say that the data have pairs."""
    batch = replace(batch_of(0, range(1)), prefixes=torch.zeros(5, dtype=torch.int32))
    with pytest.raises(UserError, match=r"bidirectional_prefix = true and pairs of texts in the data: .* = false$"):
        require_causal(batch)
