"""Tasks of lm_eval on our model: the real harness, local task files, a real run, and lm_eval's own HFLM beside it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE
from bigmodel.run_directory import read_json_lines
from tests.support.example_batches import logits_of, model_of
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_corpus import NEWS
from tests.support.tiny_run import write_run

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.evaluation.command import TaskOptions, evaluate
from bigmodel.evaluation.harness_model import HarnessModel
from bigmodel.evaluation.shared_requests import SharedRequests
from bigmodel.evaluation.tasks import Tasks, to_lines
from bigmodel.exchange.export import export
from bigmodel.training.load_model import load_trained
from tests.system.test_guarantee_resume import learned
from tools.torchvision_operators import define_missing_torchvision_operators

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}, cache_dir: %s}
test_split: test
metadata: {version: 1.5}
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
num_fewshot: 1
metric_list: [{metric: acc}]
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = """
task: generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
# Two documents hold words of the training data in a row.
DOCUMENTS = [
    {"question": NEWS[row][:60] if row in (1, 4) else f"Row {row}:", "choices": ["time way", "day", "man"], "answer": 1}
    for row in range(8)
]


def write_tasks(folder: Path, **texts: str) -> Path:
    """A folder of task files with their dataset."""
    folder.mkdir()
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n")
    for name, content in (texts or {"choice": CHOICE, "rolling": ROLLING, "generate": GENERATE}).items():
        (folder / f"{name}.yaml").write_text(content + COMMON % (folder.parent / "cache"))
    return folder


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs on 2 ranks under ZeRO-3: `with` evaluates and scores tasks on the way, `without` not."""
    folder = tmp_path_factory.mktemp("runs")
    tasks = write_tasks(folder / "tasks")
    in_between = [
        "evaluation.every_steps=3", f'evaluation.tasks=["{tasks}"]', "evaluation.tasks_every_steps=2",
        "evaluation.tasks_limit=3",
    ]  # fmt: skip
    for name, overrides in {"with": in_between, "without": []}.items():
        run_file = write_run(folder, shards, stage=3, name=name)
        given = [word for one in [*overrides, "training.steps=6"] for word in ("--set", one)]
        run_ranks(2, command, ["train", str(run_file), *given], folder / "printed")
        shutil.copy(folder / "printed.0", folder / f"{name}.txt")
    return folder


def test_training_does_not_notice_evaluations_and_tasks(run: Path) -> None:
    lines = list(read_json_lines(run / "with" / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3]
    found = [line for line in lines if line["kind"] == "tasks"]
    assert [line["step"] for line in found] == [2, 4]
    assert {task: list(of) for task, of in found[0]["scores"].items()} == {
        "choice": ["acc"], "generate": ["exact_match"], "rolling": ["bits_per_byte"],
    }  # fmt: skip
    assert found[1]["scores"]["rolling"]["bits_per_byte"] < found[0]["scores"]["rolling"]["bits_per_byte"]
    assert "step 4: tasks: choice: acc " in (run / "with.txt").read_text()
    assert learned(run / "with.toml") == learned(run / "without.toml")


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, 0, metadata=("a task", 0, 1)) for given in arguments]


def test_answers_equal_those_of_lm_eval_s_model_of_the_export(run: Path, tmp_path: Path) -> None:
    define_missing_torchvision_operators()
    from lm_eval.models.huggingface import HFLM

    export(run / "with", tmp_path / "exported")
    trained = load_trained(run / "with")
    shared = SharedRequests(trained.forward, ALONE, trained.settings, trained.tokenizer)
    ours = HarnessModel(trained.settings, trained.tokenizer, shared.score, shared.generate)
    theirs, without_begin = (
        HFLM(pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=3, **more)
        for more in ({}, {"add_bos_token": False})
    )
    assert ours.max_length == theirs.max_length == 48
    pairs = [("Document 3: time", " year"), ("Document 3: time ", "year"), ("", "time year"), ("way " * 80, " day man")]
    likely = requests_of("loglikelihood", pairs)
    for mine, hers in zip(ours.loglikelihood(likely), theirs.loglikelihood(likely), strict=True):
        assert mine == (pytest.approx(hers[0], abs=1e-4), hers[1])
    # With its begin token, HFLM also counts the begin token's own likelihood after itself.
    texts = requests_of("loglikelihood_rolling", [("Document 3: time year " * 9,), ("school été",)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(without_begin.loglikelihood_rolling(texts), abs=1e-3)
    prompts = [("Document 3:", {"until": ["day"], "max_gen_toks": 12}), ("way " * 60, {"until": [], "max_gen_toks": 9})]
    written = requests_of("generate_until", prompts)
    assert ours.generate_until(written) == theirs.generate_until(written)


def test_a_continuation_longer_than_a_document_is_scored_in_pieces(run: Path) -> None:
    trained = load_trained(run / "with")
    shared = SharedRequests(trained.forward, ALONE, trained.settings, trained.tokenizer)
    ours = HarnessModel(trained.settings, trained.tokenizer, shared.score, shared.generate)
    long = "world child " * 30
    [(found, _)] = ours.loglikelihood(requests_of("loglikelihood", [("", long)]))
    assert found == pytest.approx(ours.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(long,)]))[0])
    assert found < -100


def test_an_encoder_decoder_reads_the_context_as_its_source(shards: Path) -> None:
    two_sides = {
        "max_document_length": 16,
        "sequence_length": 32,
        "source_sequence_length": 32,
        "max_source_length": 12,
    }
    settings = Settings.model_validate({"model": {"kind": "encoder_decoder"}, "data": two_sides})
    model = model_of(kind="encoder_decoder", encoder_num_layers=1).eval()
    tokenizer = Tokenizer.load(shards / "tokenizer.json", fast=False)
    forward = torch.no_grad()(model)
    shared = SharedRequests(forward, ALONE, settings, tokenizer)
    ours = HarnessModel(settings, tokenizer, shared.score, shared.generate)
    for context, said in (("Document 3: ", "time year"), ("way " * 50, " day"), ("school", " man" * 40)):
        [(found, _)] = ours.loglikelihood(requests_of("loglikelihood", [(context, said)]))
        spaces = context[len(context.rstrip()) :]  # lm_eval gives them to the continuation
        source = [*tokenizer.encode(context.rstrip()).tolist(), tokenizer.eos][-12:]
        labels, expected = tokenizer.encode(spaces + said).tolist(), 0.0
        for first in range(0, len(labels), 16):
            piece = labels[first : first + 16]
            inputs = [tokenizer.bos, *labels][: first + len(piece)][-16:]
            chances = logits_of(forward, inputs, source).log_softmax(-1)[-len(piece) :]
            expected += float(chances.gather(-1, torch.tensor(piece)[:, None]).double().sum())
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_folder_s_groups_and_functions_are_loaded(tmp_path: Path) -> None:
    tasks = write_tasks(
        tmp_path / "tasks", choice=CHOICE.replace('"{{question}}"', "!function mine.asked"), rolling=ROLLING
    )
    (tasks / "mine.py").write_text("def asked(document):\n    return 'What? ' + document['question']\n")
    (tasks / "all.yaml").write_text("group: everything\ntask: [choice]\naggregate_metric_list: [{metric: acc}]\n")
    found = Tasks([str(tasks)], Settings()).loaded
    assert (list(found["tasks"]), list(found["groups"])) == (["choice", "rolling"], ["everything"])
    assert found["tasks"]["choice"].doc_to_text(DOCUMENTS[0]) == "What? Row 0:"


def test_the_command_prints_scores_and_contamination_in_80_columns(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run / "with", TaskOptions([str(run / "tasks")], limit=6, ngram=5), tmp_path / "found.json")
    *printed, last = capsys.readouterr().out.splitlines()
    assert last == f"{tmp_path / 'found.json'}: written"
    assert max(map(len, printed)) <= 80
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["step"] == 6
    assert (found["versions"]["choice"], found["n-shot"]["choice"]) == (1.5, 1)
    assert 0 <= found["results"]["choice"]["acc_stderr,none"] < 1
    of_choice = found["contamination"]["tasks"]["choice"]
    assert (of_choice["num_documents"], of_choice["hits"], of_choice["too_short"]) == (6, [1, 4], 4)
    assert "choice: 2 of 6 (33.3%), 4 too short to tell" in printed
    parts = of_choice["clean_scores"]["acc"] * 4 + of_choice["hit_scores"]["acc"] * 2
    assert parts / 6 == pytest.approx(found["results"]["choice"]["acc,none"])


WRITES = GENERATE.replace("generation_kwargs: {", "generation_kwargs: {do_sample: true, ")
WRONG = {
    "no task": ({"a": "just: settings"}, "holds no task"),
    "broken YAML": ({"a": "task: [unclosed"}, r"a\.yaml: cannot be read as a task: while parsing"),
    "output type": ({"a": CHOICE.replace("multiple_choice", "fly")}, "task choice: cannot be loaded: .*'fly'"),
    "column": ({"a": CHOICE.replace("question", "nope")}, "task choice: cannot be loaded: UndefinedError: 'nope'"),
    "too many tokens": (
        {"a": GENERATE.replace("6}", "5000}")}, r"generates up to 5000 tokens \(max_gen_toks\), and documents"
    ),
    "two of a name": ({"a": CHOICE, "b": CHOICE}, r"task choice: both .*a\.yaml and .*b\.yaml hold it"),
    "no member": ({"a": "group: all\ntask: [nope]\n"}, "group all: there is no task nope"),
    "no answer": ({"a": CHOICE.replace("doc_to_target", "alias")}, r"a\.yaml: has no doc_to_target"),
    "no split": ({"a": CHOICE + "fewshot_split: train\n"}, "fewshot_split = 'train': the dataset has no such split"),
    "no module": ({"a": CHOICE.replace('"{{question}}"', "!function mine.f")}, "task choice: .*No module named 'mine'"),
    "no metric": ({"a": CHOICE.replace(": acc}", ": accc}")}, "'accc' is none of lm_eval's; did you mean 'acc'"),
    "another's metric": ({"a": CHOICE.replace(": acc}", ": bleu}")}, "names bleu, and output_type = multiple_choice"),
    "shots": ({"a": CHOICE.replace("fewshot: 1", "fewshot: -1")}, "num_fewshot = -1: must be at least 0"),
    "no tokens": ({"a": GENERATE.replace("6}", "0}")}, "max_gen_toks = 0: must be at least 1"),
    "tokens in words": ({"a": GENERATE.replace("6}", "six}")}, "generation_kwargs = .*'six'; correct the value"),
    "empty end": ({"a": GENERATE.replace("\\n", "")}, r"generation_kwargs.until = \[''\]: give texts"),
    "beams": ({"a": GENERATE.replace("6}", "6, num_beams: 4}")}, "generation_kwargs.num_beams = 4: not done here"),
    "cold": ({"a": WRITES.replace("6}", "6, temperature: -1}")}, r"temperature = -1\.0: must be a number from 0 on"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_task_is_named(name: str, tmp_path: Path) -> None:
    texts, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        Tasks([str(write_tasks(tmp_path / "tasks", **texts))], Settings())


def test_paths_with_commas_between_and_files_beside_a_broken_one_are_read(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", choice=CHOICE, rolling=ROLLING, broken="task: [unclosed")
    (tasks / "lost.yaml").write_text(
        (CHOICE + COMMON % tmp_path).replace("documents", "lost").replace("choice", "lost", 1)
    )
    found = Tasks([f"{tasks / 'choice.yaml'}, {tasks / 'rolling.yaml'}"], Settings())
    assert list(found.loaded["tasks"]) == ["choice", "rolling"]


def test_a_dataset_here_and_beside_the_task_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = write_tasks(tmp_path / "tasks", choice=CHOICE)
    shutil.copy(tasks / "documents.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"documents\.jsonl, which is in .* and beside the task too"):
        Tasks([str(tasks)], Settings())


def test_what_lm_eval_raises_on_the_way_names_the_task(run: Path, tmp_path: Path) -> None:
    shots = CHOICE.replace("num_fewshot: 1", "num_fewshot: 30")
    with pytest.raises(UserError, match="task choice: lm_eval cannot make its prompts or scores: ValueError: Sample"):
        evaluate(run / "with", TaskOptions([str(write_tasks(tmp_path / "shots", rolling=ROLLING, choice=shots))]))


def test_documents_without_a_right_answer_are_counted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(
        tmp_path / "tasks",
        choice=CHOICE,
        text=GENERATE.replace("{{choices[answer]}}", "{{answer}}"),
        rolling=ROLLING.replace("{{choices[0]}}", "{{answer}}"),
    )
    answers = [1, None, 7, -1, 0, 2]  # of three choices
    documents = [{**DOCUMENTS[row], "answer": answer} for row, answer in enumerate(answers)]
    (tasks / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    evaluate(run / "with", TaskOptions([str(tasks)], shots=0), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["without_answer"] == {"choice": 3, "generate": 1}
    printed = capsys.readouterr().out.splitlines()
    assert "choice: 3 documents without a right answer count as wrong" in printed
    (tasks / "choice.yaml").write_text((tasks / "choice.yaml").read_text().replace('"{{answer}}"', "answer"))
    with pytest.raises(UserError, match=r"task choice: lm_eval cannot .*: the right answer of a document is null; cor"):
        evaluate(run / "with", TaskOptions([str(tasks / "choice.yaml")], shots=0))


def test_scores_that_a_signal_prevented_come_at_the_next_start(shards: Path, tmp_path: Path) -> None:
    tasks, run = write_tasks(tmp_path / "tasks", choice=CHOICE), tmp_path / "run"
    changes = [
        "training.steps=1000", "checkpoint.every_steps=1000", "evaluation.every_steps=1", "evaluation.sequences=1",
        f'evaluation.tasks=["{tasks}"]', "evaluation.tasks_every_steps=1", "evaluation.tasks_limit=1",
    ]  # fmt: skip
    train = ["train", str(write_run(tmp_path, shards)), *(word for one in changes for word in ("--set", one))]
    steps = {}

    def find() -> dict[str, list[int]]:
        for kind in ("step", "evaluation", "tasks"):
            lines = read_json_lines(run / "metrics.jsonl")
            steps[kind] = [line["step"] for line in lines if line["kind"] == kind]
        return steps

    [rank] = start_ranks(1, command, train, tmp_path / "printed")
    while len(find()["tasks"]) < 2:
        assert rank.is_alive(), (tmp_path / "printed.0").read_text()
        time.sleep(0.01)
    os.kill(rank.pid or 0, signal.SIGTERM)
    assert finish([rank]) == [3]
    last = find()["step"][-1]
    assert steps["evaluation"] == steps["tasks"] == [*range(1, last)]
    run_ranks(1, command, [*train, "--set", f"training.steps={last + 1}"], tmp_path / "printed")
    assert find()["evaluation"] == steps["tasks"] == [*range(1, last + 1)]


def test_output_is_json_of_finite_numbers_in_a_file(run: Path, tmp_path: Path) -> None:
    function = (
        "process_results: !function mine.f\nmetric_list: [{metric: x, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = write_tasks(tmp_path / "tasks", choice=CHOICE.replace("metric_list: [{metric: acc}]\n", function))
    (tasks / "mine.py").write_text("def f(document, results):\n    return {'x': float('nan')}\n")
    evaluate(run / "with", TaskOptions([str(tasks)], limit=2), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert found["results"]["choice"]["x,none"] is None
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        evaluate(run / "with", TaskOptions(), tmp_path)


def test_the_table_has_80_columns_whatever_the_names_and_numbers() -> None:
    name = "a task of a name that is long beyond all measure"
    found = {
        "exact_match,strict-match": 0.5,
        "word_perplexity,none": 4.3e44,
        "x,none": -123456.7,
        "y,none": float("nan"),
    }
    table = {"results": {name: found}, "versions": {name: "Yaml"}, "n-shot": {name: 0}, "without_answer": {name: 2}}
    *lines, last = to_lines(table)
    assert [len(line) for line in lines] == [80] * 5
    assert len(last) <= 80
    assert [line.split()[-2:] for line in lines[1:3]] == [
        ["exact_ma...ct-match", "0.5000"],
        ["word_perplexity", "4.3e+44"],
    ]


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", choice=CHOICE)
    (tasks / "documents.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"choice\.yaml: dataset_kwargs\.data_files names documents\.jsonl, which is neither"
    ):
        Tasks([str(tasks)], Settings())


def test_what_a_model_or_training_cannot_answer_is_refused(tmp_path: Path) -> None:
    two_sides = {"model": {"kind": "encoder_decoder"}, "data": {"source_sequence_length": 64}}
    rolling = write_tasks(tmp_path / "rolling", rolling=ROLLING)
    with pytest.raises(UserError, match="task rolling: asks for the likelihood of a text alone"):
        Tasks([str(rolling)], Settings.model_validate(two_sides))
    drawn = write_tasks(tmp_path / "drawn", drawn=GENERATE.replace("6}", "6, do_sample: true, temperature: 0.7}"))
    assert list(Tasks([str(drawn / "drawn.yaml")], Settings()).loaded["tasks"]) == ["generate"]
    with pytest.raises(UserError, match="task generate: draws its texts at random"):
        Tasks([str(drawn)], Settings(), draws=False)
