"""`bigmodel generate`: what it prints, and what it refuses."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.store.tokenizer import BOS, EOS, Tokenizer
from bigmodel.data.store.word_tokenizer import train_words
from bigmodel.generation.command import Options, print_answer, print_answers, read_prompts
from bigmodel.generation.engine import Engine, Request
from bigmodel.generation.sampling import Sampling
from bigmodel.generation.served import Served, load_served, of_run
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training.load_model import Trained
from tests.support.model_folder import write_model
from tests.support.tiny_run import write_run

GREEDY = Sampling()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Served:
    """Initial weights, and a tokenizer of the shards."""
    settings = load_settings(write_run(tmp_path_factory.mktemp("run"), shards))
    tokenizer = Tokenizer.load(shards / "tokenizer.json", fast=False)
    model = Transformer(settings.model, tokenizer.vocabulary)
    init_weights(model, seed=1)
    return of_run(Trained(settings, 0, model.eval(), tokenizer, torch.device("cpu")), "run")


def test_a_streamed_answer_is_the_same_and_follows_its_prompt(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    print_answer(served, "Document", Options(8, GREEDY))
    whole = capsys.readouterr().out
    print_answer(served, "Document", Options(8, GREEDY, stream=True))
    assert capsys.readouterr().out == whole
    assert whole.startswith("Document")
    assert len(whole) > len("Document\n")


def test_the_answer_of_a_model_of_words_is_joined_to_its_prompt_by_a_space(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"w{number}" for number in range(200)]
    of_words = Tokenizer(train_words(words, 300, "punctuation", False, 1, (BOS, EOS)))
    model = Transformer(served.model.settings, of_words.vocabulary)
    init_weights(model, seed=1)
    served = replace(served, model=model.eval(), tokenizer=of_words)
    for options in (Options(4, GREEDY), Options(4, GREEDY, stream=True), Options(4, GREEDY, beams=2)):
        print_answer(served, "w1 w2", options)
        assert re.fullmatch("w1 w2( w[0-9]+){1,4}\n", capsys.readouterr().out)
    (tmp_path / "some.txt").write_text("w1 w2\nw3")
    for options in (Options(4, GREEDY), Options(4, GREEDY, beams=2)):
        print_answers(served, tmp_path / "some.txt", options)
        for line in map(json.loads, capsys.readouterr().out.splitlines()):
            texts = [answer["text"] for answer in line["answers"]] if options.beams else [line["text"]]
            assert all(re.fullmatch("( w[0-9]+){1,4}", text) for text in texts)


def test_prompts_of_a_file_are_answered_in_order_as_each_is_alone(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Document 1", "a", "three words here", ""]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, [*prompts[:3], {"prompt": ""}])) + "\n")
    print_answers(served, tmp_path / "some.jsonl", Options(8, Sampling(1.0, seed=4), batch=3))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for prompt, line in zip(prompts, lines, strict=True):
        print_answer(served, prompt, Options(8, Sampling(1.0, seed=4)))
        assert capsys.readouterr().out == prompt + line["text"] + "\n"
        assert line["finished"] in ("stop", "length")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert read_prompts(Path("-")) == ["one", "", "two"]


def test_a_hugging_face_folder_answers_within_its_own_context(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "tiny", shards, context=24)
    served = load_served(folder)
    print_answer(served, "Document", Options(100, GREEDY))
    found = capsys.readouterr().out.removeprefix("Document").removesuffix("\n")
    engine = Engine(served.model, served.tokenizer, 1, 24)
    ids = [served.tokenizer.bos, *served.tokenizer.encode("Document").tolist()]
    engine.add(Request(ids, max_tokens=24 - len(ids) + 1))
    steps = []
    while engine.busy:
        steps += engine.step()
    assert found == "".join(step.text for step in steps)
    assert found
    with pytest.raises(UserError, match=r"--best: .* is a Hugging Face folder"):
        load_served(folder, best=True)


def test_the_best_answers_of_beams_come_with_their_scores(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(served, "Document", Options(6, GREEDY, beams=3, answers=3))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = [answer["score"] for answer in answers]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    print_answer(served, "Document", Options(6, GREEDY, beams=3))
    assert capsys.readouterr().out == "Document" + answers[0]["text"] + "\n"


def test_a_prompt_beyond_the_context_is_refused(served: Served, tmp_path: Path) -> None:
    limit = served.context
    with pytest.raises(UserError, match=f"^the prompt has .* tokens; the context has {limit}: shorten"):
        print_answer(served, "word " * 2 * limit, Options(8, GREEDY))
    (tmp_path / "prompts.txt").write_text("short\n" + "word " * 2 * limit)
    with pytest.raises(UserError, match=r"^prompt 2 has "):
        print_answers(served, tmp_path / "prompts.txt", Options(8, GREEDY))


def test_a_prompt_that_is_not_unicode_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="half of a surrogate pair"):
        print_answer(served, "caf\udcff", Options(8, GREEDY))
    (tmp_path / "prompts.jsonl").write_text('"a\\ud800b"')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        print_answers(served, tmp_path / "prompts.jsonl", Options(8, GREEDY))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two"]


def test_an_answer_of_an_encoder_decoder_is_as_long_as_its_context_whatever_the_sources(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    settings = served.model.settings.model_copy(update={"kind": "encoder_decoder", "encoder_num_layers": 1})
    model = Transformer(settings, served.tokenizer.vocabulary)
    init_weights(model, seed=1)
    both = replace(served, model=model, context=12, max_source=96)
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
def test_a_file_without_prompts_is_refused(text: str | None, complaint: str, tmp_path: Path, served: Served) -> None:
    file = tmp_path / "prompts.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"--prompts {file}: {complaint}"):
        print_answers(served, file, Options(8, GREEDY))
    with pytest.raises(UserError, match="--stream and --prompts"):
        print_answers(served, file, Options(8, GREEDY, stream=True))
