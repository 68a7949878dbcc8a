"""`bigmodel generate`: what it prints, and what it refuses."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.generation.command import Options, print_answer, print_answers, read_prompts
from bigmodel.generation.sampling import Sampling
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training.load_model import Trained
from tests.support.tiny_run import write_run

GREEDY = Sampling()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Trained:
    """Initial weights, and a tokenizer of the shards."""
    settings = load_settings(write_run(tmp_path_factory.mktemp("run"), shards))
    tokenizer = Tokenizer.load(shards / "tokenizer.json", fast=False)
    model = Transformer(settings.model, tokenizer.vocabulary)
    init_weights(model, seed=1)
    return Trained(settings, 0, model.eval(), tokenizer, torch.device("cpu"))


def test_a_streamed_answer_is_the_same_and_follows_its_prompt(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    print_answer(trained, "Document", Options(8, GREEDY))
    whole = capsys.readouterr().out
    print_answer(trained, "Document", Options(8, GREEDY, stream=True))
    assert capsys.readouterr().out == whole
    assert whole.startswith("Document")
    assert len(whole) > len("Document\n")


def test_prompts_of_a_file_are_answered_in_order_as_each_is_alone(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Document 1", "a", "three words here", ""]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, [*prompts[:3], {"prompt": ""}])) + "\n")
    print_answers(trained, tmp_path / "some.jsonl", Options(8, Sampling(1.0, seed=4), batch=3))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for prompt, line in zip(prompts, lines, strict=True):
        print_answer(trained, prompt, Options(8, Sampling(1.0, seed=4)))
        assert capsys.readouterr().out == prompt + line["text"] + "\n"
        assert line["finished"] in ("stop", "length")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert read_prompts(Path("-")) == ["one", "", "two"]


def test_the_best_answers_of_beams_come_with_their_scores(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(trained, "Document", Options(6, GREEDY, beams=3, answers=3))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = [answer["score"] for answer in answers]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    print_answer(trained, "Document", Options(6, GREEDY, beams=3))
    assert capsys.readouterr().out == "Document" + answers[0]["text"] + "\n"


def test_a_prompt_beyond_the_context_is_refused(trained: Trained, tmp_path: Path) -> None:
    limit = trained.settings.data.max_document_length
    with pytest.raises(UserError, match=f"^the prompt has .* tokens; the context has {limit}: shorten"):
        print_answer(trained, "word " * 2 * limit, Options(8, GREEDY))
    (tmp_path / "prompts.txt").write_text("short\n" + "word " * 2 * limit)
    with pytest.raises(UserError, match=r"^prompt 2 has "):
        print_answers(trained, tmp_path / "prompts.txt", Options(8, GREEDY))


def test_a_prompt_that_is_not_unicode_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="half of a surrogate pair"):
        print_answer(trained, "caf\udcff", Options(8, GREEDY))
    (tmp_path / "prompts.jsonl").write_text('"a\\ud800b"')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        print_answers(trained, tmp_path / "prompts.jsonl", Options(8, GREEDY))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two"]


def test_an_answer_of_an_encoder_decoder_is_as_long_as_its_context_whatever_the_sources(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, settings = tmp_path / "prompts.txt", trained.settings
    model_settings = settings.model.model_copy(update={"kind": "encoder_decoder", "encoder_num_layers": 1})
    data = settings.data.model_copy(update={"max_document_length": 12, "source_sequence_length": 96})
    model = Transformer(model_settings, trained.tokenizer.vocabulary)
    init_weights(model, seed=1)
    both = replace(trained, settings=settings.model_copy(update={"model": model_settings, "data": data}), model=model)
    answers = []
    for prompts in ("a", "a\n" + "word " * 20):
        file.write_text(prompts)
        print_answers(both, file, Options(40, Sampling(1.0, seed=4)))
        answers.append(json.loads(capsys.readouterr().out.splitlines()[0]))
    assert answers[0] == answers[1]
    assert answers[0]["finished"] == "length"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"beams": 2, "stop": (".",)}, "--beams 2 and --stop"),
        ({"beams": 2, "stream": True}, "--beams 2 and --stream"),
        ({"answers": 2}, "--answers 2: beam search has --beams 0"),
        ({"length_penalty": 2.0}, "--length-penalty 2: has an effect only with --beams"),
    ],
)
def test_options_that_exclude_one_another_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Options(8, GREEDY, **changes)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(None, "cannot be read"), ("", "has no prompt"), ('"a"\n{"text": 1}\n', "line 2 is neither a JSON string nor")],
)
def test_a_file_without_prompts_is_refused(text: str | None, complaint: str, tmp_path: Path, trained: Trained) -> None:
    file = tmp_path / "prompts.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"--prompts {file}: {complaint}"):
        print_answers(trained, file, Options(8, GREEDY))
    with pytest.raises(UserError, match="--stream and --prompts"):
        print_answers(trained, file, Options(8, GREEDY, stream=True))
