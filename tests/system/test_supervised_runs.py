"""Chats from a file to a trained model: the loss is that of transformers on the exported model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.settings import load_settings
from bigmodel.data.load.stream import Builder, Stream
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.shards import ShardStore
from bigmodel.exchange.export import export
from bigmodel.training.loop import train
from tests.support.chats import chat, tokenizer_folder
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run
from tools.torchvision_operators import define_missing_torchvision_operators

LIMIT = 48  # data.max_document_length of the run: chats of three turns lose their last one


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on chats with weights and text without, prepared and trained for 3 steps."""
    folder = tmp_path_factory.mktemp("run")
    records = [
        {"messages": chat(number, 1 + number % 3), "weight": (1.0, 0.5, 0.3)[number % 3]} for number in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "news.jsonl").write_text("".join(json.dumps({"text": f"what is {n} and four"}) + "\n" for n in range(30)))
    run = write_run(folder, folder / "data")
    run.write_text(
        run.read_text()
        .replace("at_end = false", "at_end = true")
        .replace("steps = 10", "steps = 3")
        .replace("lanes = 2", "lanes = 1")
        + f'[prepare]\ntokenizer = "{tokenizer_folder(folder / "tokenizer")}"\nvalidation_share = 0.2\nworkers = 1\n'
        f'[[prepare.sources]]\nname = "chats"\nfiles = ["{folder / "chats.jsonl"}"]\nmessages_column = "messages"\n'
        f'weight_column = "weight"\n[[prepare.sources]]\nname = "news"\nfiles = ["{folder / "news.jsonl"}"]\n'
    )
    settings = load_settings(run, [])
    prepare(settings, quiet())
    run_ranks(1, train_on_rank, run)
    return run


def train_on_rank(run: Path) -> None:
    assert train(load_settings(run, [])) == 0


def lines_of(run_file: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_file.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def expected_loss(run_file: Path, folder: Path) -> tuple[float, float]:
    """Mean loss of the validation split by transformers, one document at a time, and the sum of weights. The ids come
    from its own template, the trained ones from the text: from each answer's beginning to its <|im_end|>."""
    define_missing_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = load_settings(run_file, [])
    given = AutoTokenizer.from_pretrained(run_file.parent / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    store = ShardStore(settings.data.directory, "validation")
    asked = {tuple(store.document("chats", 0, row).tokens.tolist()) for row in range(len(store.lengths("chats", 0)))}
    nats = total = 0.0
    documents = []
    for line in (run_file.parent / "chats.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = given.apply_chat_template(record["messages"], return_dict=False)
        if tuple(ids) in asked:
            documents.append((ids, answers(given, ids), record["weight"]))
    assert len(documents) == len(asked) > 3
    for row in range(len(store.lengths("news", 0))):
        ids = store.document("news", 0, row).tolist()
        documents.append((ids, set(range(1, len(ids))), 1.0))
    for ids, trained, weight in documents:
        labels = torch.tensor([[one if place in trained else -100 for place, one in enumerate(ids)]])
        with torch.no_grad():
            mean = float(model(torch.tensor([ids]), labels=labels).loss)
        nats, total = nats + mean * len(trained) * weight, total + len(trained) * weight
    return nats / total, total


def answers(tokenizer: Any, ids: list[int]) -> set[int]:
    """Places of the tokens that the assistant says, in whole turns that end within the limit."""
    trained: set[int] = set()
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for start in [place for place, one in enumerate(ids) if one == begin]:
        stop = ids.index(end, start) + 1
        header = len(tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False))
        if tokenizer.decode(ids[start:stop]).startswith("<|im_start|>assistant\n") and stop - 1 <= LIMIT:
            trained |= set(range(start + header, stop))
    return trained


def test_the_validation_loss_is_that_of_transformers_with_masked_labels(run_file: Path, tmp_path: Path) -> None:
    exported = export(run_file.with_suffix(""), tmp_path / "exported")
    (line,) = lines_of(run_file, "evaluation")
    loss, weight = expected_loss(run_file, exported.folder)
    assert line["nats_per_token"] == pytest.approx(loss, abs=1e-6)
    assert weight != round(weight)


def test_a_step_divides_by_the_sum_of_its_weights(run_file: Path) -> None:
    for line in lines_of(run_file, "step"):
        nats = math.fsum(part["nats"] for part in line["parts"])
        weights = [part["weight"] or part["targets"] for part in line["parts"]]
        assert line["weight"] == pytest.approx(sum(weights), rel=1e-12)
        assert line["weight"] < line["targets"] < line["positions"]
        assert line["loss"] == pytest.approx(nats / line["weight"], rel=1e-12)
    assert {(part["objective"], part["source"]) for line in lines_of(run_file, "step") for part in line["parts"]} == {
        ("supervised", "chats"),
        ("causal", "news"),
    }


def test_any_number_of_ranks_divides_by_the_same_weights(run_file: Path) -> None:
    settings = load_settings(run_file, [])
    store = ShardStore.of_run(settings.data, "train")
    told = []
    for world_size in (1, 2):
        batches = []
        for rank in range(world_size):
            order = Order.of_run(store, settings)
            stream = Stream(store, order, settings.data, 1, Place.of_rank(rank, world_size, world_size, 1), 3)
            step = next(stream)
            stream.close()
            batches += step.micro_batches
        weights = sum(float(batch.weights.double().sum()) for batch in batches)
        assert weights == step.weight
        told.append((step.weight, step.num_labels, step.weights_by_group))
    assert told[0] == told[1]


def test_a_batch_of_documents_without_weights_has_none(run_file: Path) -> None:
    settings = load_settings(run_file, [])
    store = ShardStore.of_run(settings.data, "train")
    pack = Order.of_run(store, settings).next_step()[0]
    batch = Builder(store, settings.data, 3).build([pack], 0, [0])
    assert batch.weights is not None
    assert batch.prefixes is None
    assert ((batch.weights > 0) == (batch.labels != -100)).all()
