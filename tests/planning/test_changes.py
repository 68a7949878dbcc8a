"""Changed settings: a changed plan is that of the run whose files say so; what is offered fits and is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings
from bigmodel.planning.changes import Choice, bytes_of_gpu, choice_of, nearest, search, with_choice
from bigmodel.planning.context import Context, cluster_of_ranks, context_of
from bigmodel.planning.fit import fit_of
from bigmodel.planning.memory import memory_of
from tests.planning.test_activation_memory import MODEL, table_of

RANKS, TOKENS = 8, 4096
WIDE = MODEL | {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 4, "intermediate_size": 4096}
OWN = Choice(1, "none", 4, 1, False)


def run_of(folder: Path, choice: Choice, **model: Any) -> Context:
    """Of files that say all of the choice."""
    zero: dict[str, Any] = {"stage": choice.stage}
    if choice.offloads:
        zero["offload_optimizer"] = {"device": "cpu"}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": choice.micro_batch, "zero_optimization": zero}))
    table = table_of(WIDE | model, "bf16", choice.checkpointing)
    table["training"] |= {
        "sequence_parallel_ranks": choice.sharing,
        "global_batch_size": 64,
        "deepspeed": str(path),
    }
    return context_of(Settings.model_validate(table), cluster_of_ranks(RANKS), TOKENS)


@pytest.mark.parametrize(
    "choice",
    [
        OWN,
        Choice(2, "selective", 2, 1, False),
        Choice(1, "full", 2, 1, False),
        Choice(3, "full", 1, 4, False),
        Choice(1, "none", 8, 2, True),
        Choice(3, "none", 4, 1, True),
    ],
    ids=str,
)
def test_a_changed_plan_is_that_of_the_run_whose_files_say_so(tmp_path: Path, choice: Choice) -> None:
    written, changed = run_of(tmp_path, choice), with_choice(run_of(tmp_path, OWN), choice)
    assert changed is not None
    assert choice_of(written) == choice_of(changed) == choice
    assert memory_of(changed) == memory_of(written)
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert [changed.effective[key] for key in keys] == [written.effective[key] for key in keys]
    assert choice_of(run_of(tmp_path, OWN)) == OWN, "the run's own files are as they were"


def test_what_cannot_go_together_is_not_offered(tmp_path: Path) -> None:
    run = run_of(tmp_path, OWN)
    assert with_choice(run, OWN._replace(stage=0)) is None, "bf16 weights are not replicated"
    assert with_choice(run, OWN._replace(micro_batch=16)) is None, "a rank has 8 packed sequences in a step"
    assert with_choice(run, OWN._replace(sharing=3)) is None, "3 does not divide the heads"
    assert (
        with_choice(run_of(tmp_path, OWN, position_embedding="learned", max_positions=4096), OWN._replace(sharing=2))
        is None
    )
    assert with_choice(run, OWN._replace(sharing=8)) is not None, "twice the key-value heads"


def test_the_nearest_have_the_fewest_changes_and_the_smallest_steps(tmp_path: Path) -> None:
    run = run_of(tmp_path, OWN)
    needed = bytes_of_gpu(run)
    found = nearest(run, needed - 1)
    assert [choice.words(OWN) for choice, _ in found] == [
        "ZeRO 2", "activation checkpointing selective", "micro-batch 2", "sequence parallel 2",
    ]  # fmt: skip
    assert all(size == bytes_of_gpu(with_choice(run, choice) or run) < needed for choice, size in found)
    single = [OWN._replace(stage=stage) for stage in (2, 3)] + [OWN._replace(micro_batch=size) for size in (1, 2)]
    single += [OWN._replace(checkpointing="selective"), OWN._replace(checkpointing="full"), OWN._replace(offloads=True)]
    single += [OWN._replace(sharing=size) for size in (2, 4, 8)]
    least = min(bytes_of_gpu(with_choice(run, choice) or run) for choice in single)
    assert {choice.differences(OWN) for choice, _ in nearest(run, least)} == {1}
    pairs = nearest(run, least - 1)
    assert {choice.differences(OWN) for choice, _ in pairs} == {2}, "no single change fits"
    assert all(size < least for _, size in pairs)
    assert nearest(run, 2**20) == []


def test_words_of_the_verdict(tmp_path: Path) -> None:
    run = run_of(tmp_path, OWN)
    needed = bytes_of_gpu(run)
    assert fit_of(run, needed).words(OWN, "H100 SXM").startswith("fits: ")
    assert fit_of(run, needed).fits
    tight = fit_of(run, needed - 1)
    assert tight.fits is False
    assert tight.words(OWN).startswith("does not fit: ")
    assert "nearest that do: ZeRO 2 (" in tight.words(OWN)
    assert "does either" in fit_of(run, 2**20).words(OWN)
    assert fit_of(run, 0).fits is None
    assert "not compared" in fit_of(run, 0).words(OWN)


def test_the_search_lists_all_that_fit_the_fastest_first(tmp_path: Path) -> None:
    run = run_of(tmp_path, OWN)

    class Step:
        def __init__(self, context: Context) -> None:
            choice = choice_of(context)
            self.seconds = 1 / choice.micro_batch + choice.stage

    limit = bytes_of_gpu(run)
    found = search(run, limit, Step)
    assert all(bytes_of_gpu(with_choice(run, choice) or run) == size <= limit for choice, size, _ in found)
    assert [step.seconds for *_, step in found] == sorted(step.seconds for *_, step in found)
    assert OWN in [choice for choice, *_ in found]
    assert not any(choice.offloads for choice, *_ in found), "something fits without offload"
    assert {choice.stage for choice, *_ in found} == {1, 2, 3}
    offloaded = search(run, min(size for _, size, _ in found) - 1, Step)
    assert all(choice.offloads for choice, *_ in offloaded)
