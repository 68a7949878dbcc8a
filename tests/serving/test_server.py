"""A real server process and the real openai client: answers, streams, errors, token, metrics, load, shutdown.

One process serves the tests of this file, in their order; the last one ends it.
"""

import asyncio
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bigmodel.data.store.chat_template import DEFAULT_TEMPLATE
from bigmodel.generation.engine import Engine, Request
from bigmodel.generation.served import Served, load_served
from tests.metrics.test_recorder import until
from tests.support.model_folder import write_model
from tools import load_serve

TOKEN = "a-token-of-the-tests"
CONTEXT = 2048
PROMPTS = ("Document 3: time", "Document 41: school year", "world")


@dataclass
class Running:
    process: subprocess.Popen[str]
    address: str
    client: openai.OpenAI
    served: Served

    def text(self, prompt: str, tokens: int) -> str:
        """What the engine says to a prompt, alone and in this process."""
        engine = Engine(self.served.model, self.served.tokenizer, 1, self.served.positions)
        ids = [self.served.tokenizer.bos, *self.served.tokenizer.encode(prompt).tolist()]
        engine.add(Request(ids, max_tokens=tokens))
        parts = []
        while engine.busy:
            parts += [step.text for step in engine.step()]
        return "".join(parts)

    def metric(self, name: str, **labels: str) -> float:
        page = self.raw("GET", "/metrics")[1]
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        found = [
            one.value
            for one in samples
            if one.name == f"bigmodel_serving_{name}" and labels.items() <= one.labels.items()
        ]
        return sum(found)  # 0: a label that no request had yet

    def raw(self, method: str, path: str, content: bytes = b"", **headers: str) -> tuple[int, str]:
        """Status and text of an answer."""
        with closing(self.sent(method, path, content, **headers)) as connection:
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def sent(self, method: str, path: str, content: bytes = b"", **headers: str) -> http.client.HTTPConnection:
        """A connection with a request, before its answer."""
        given = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers
        connection = http.client.HTTPConnection(self.address.split("/")[2], timeout=60)
        connection.request(method, path, content, given)
        return connection

    def settles(self) -> bool:
        """Within a minute no sequence runs or waits."""
        for _ in range(600):
            if not self.metric("running_sequences") + self.metric("waiting_sequences"):
                return True
            time.sleep(0.1)
        return False


@pytest.fixture(scope="module")
def running(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_model(
        tmp_path_factory.mktemp("serving") / "tiny", shards, context=CONTEXT, template=DEFAULT_TEMPLATE
    )
    command = [sys.executable, "-m", "bigmodel", "serve", str(folder), "--port", "0", "--max-sequences", "4"]
    environment = os.environ | {"BIGMODEL_SERVE_TOKEN": TOKEN}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = load_serve.READY.match(line)
        assert ready is not None, line
        client = openai.OpenAI(base_url=ready[2], api_key=TOKEN, max_retries=0, timeout=60)
        yield Running(process, ready[2], client, load_served(folder))
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_streamed_or_not_is_what_the_engine_says(running: Running, prompt: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0}
    whole = running.client.completions.create(**asked)
    chunks = list(running.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    expected = running.text(prompt, 20)
    assert len(expected) > 5
    assert whole.choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(running.served.tokenizer.encode(prompt)) + 1
    assert whole.usage == chunks[-1].usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_chat_streamed_or_not_continues_the_rendered_template(running: Running) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What time"}, {"type": "text", "text": " is it?"}]},
    ]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 15, "temperature": 0}
    whole = running.client.chat.completions.create(**asked)
    chunks = list(running.client.chat.completions.create(**asked, stream=True))
    expected = running.text("System: Be brief.\nUser: What time is it?\nAssistant:", 15)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_several_prompts_choices_and_echo_are_in_order(running: Running) -> None:
    ids = running.served.tokenizer.encode("world").tolist()
    answer = running.client.completions.create(
        model="tiny", prompt=["time", "school"], n=2, max_tokens=6, temperature=0, echo=True
    )
    expected = [prompt + running.text(prompt, 6) for prompt in ("time", "time", "school", "school")]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    by_ids = running.client.completions.create(
        model="tiny", prompt=[running.served.tokenizer.bos, *ids], max_tokens=6, temperature=0
    )
    assert by_ids.choices[0].text == running.text("world", 6)


def test_a_seed_gives_the_same_text_again_and_choices_differ(running: Running) -> None:
    def texts(seed: int | None) -> list[str]:
        answer = running.client.completions.create(model="tiny", prompt="time", n=3, max_tokens=12, seed=seed)
        return [choice.text for choice in answer.choices]

    assert texts(5) == texts(5)
    assert texts(5) != texts(6)
    assert texts(None) != texts(None)
    assert len(set(texts(5))) == 3


def test_a_stop_text_ends_the_answer_and_is_left_out(running: Running) -> None:
    whole = running.text("time", 20)
    stop = whole[6:9]
    assert stop
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "time",
        "max_tokens": 20,
        "temperature": 0,
        "stop": [stop, "none"],
    }
    answer = running.client.completions.create(**asked).choices[0]
    streamed = "".join(chunk.choices[0].text for chunk in running.client.completions.create(**asked, stream=True))
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert streamed == answer.text


def test_log_probabilities_name_each_token_and_its_alternatives(running: Running) -> None:
    completion = running.client.completions.create(
        model="tiny", prompt="time", max_tokens=8, temperature=0, logprobs=3
    ).choices[0]
    chat = running.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "time"}], max_tokens=8, temperature=0,
        logprobs=True, top_logprobs=2,
    ).choices[0]  # fmt: skip
    assert completion.logprobs is not None
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert len(completion.logprobs.tokens or []) == len(completion.logprobs.text_offset or []) == 8
    for token, logprob, top in zip(
        completion.logprobs.tokens or [], completion.logprobs.token_logprobs or [],
        completion.logprobs.top_logprobs or [], strict=True,
    ):  # fmt: skip
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())  # greedy
    assert b"".join(bytes(one.bytes or []) for one in chat.logprobs.content).decode(errors="replace") == (
        chat.message.content
    )
    assert [len(one.top_logprobs) for one in chat.logprobs.content] == [2] * 8


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "said"),
    [
        ("completions", b"{", 400, None, "The body is no JSON"),
        ("completions", b"[1]", 400, None, "must be a JSON object"),
        ("completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400, None, "The body is no JSON"),
        ("completions", {"prompt": "a"}, 400, "model", "You must provide model"),
        ("completions", {"model": "gpt-9", "prompt": "a"}, 404, "model", "The model 'gpt-9' does not exist"),
        ("completions", {"model": "tiny"}, 400, "prompt", "You must provide prompt"),
        ("completions", {"model": "tiny", "prompt": 3}, 400, "prompt", "must be a text, a list of texts"),
        ("completions", {"model": "tiny", "prompt": []}, 400, "prompt", "must not be empty"),
        ("completions", {"model": "tiny", "prompt": [1, 99999]}, 400, "prompt", "the token id 99999"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal"),
        ("completions", {"model": "tiny", "prompt": "a", "temperature": 3}, 400, "temperature", "less than or equal"),
        ("completions", {"model": "tiny", "prompt": "a", "n": 200}, 400, "n", "less than or equal to 128"),
        ("completions", {"model": "tiny", "prompt": ["a"] * 90}, 400, "n", "takes 68 sequences at once"),
        ("completions", {"model": "tiny", "prompt": "a", "stop": ["", "b"]}, 400, "stop", "none of them empty"),
        ("completions", {"model": "tiny", "prompt": "a", "topp": 1}, 400, "topp", "Unrecognized request argument"),
        ("completions", {"model": "tiny", "prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias", "not supported"),
        ("completions", {"model": "tiny", "prompt": "a", "presence_penalty": 1}, 400, "presence_penalty",
         "use repetition_penalty"),
        ("completions", {"model": "tiny", "prompt": "a", "echo": True, "logprobs": 1}, 400, "logprobs",
         "leave out echo"),
        ("completions", {"model": "tiny", "prompt": "a", "stream_options": {}}, 400, "stream_options", "no effect"),
        ("completions", {"model": "tiny", "prompt": "a " * 3000}, 400, "prompt", "the context has 2048"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 5000}, 400, "prompt", "the context has 2048"),
        ("completions", {"model": "tiny", "prompt": "a" * (1 << 20)}, 413, None, "larger than 1048576 bytes"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages", "at least 1 item"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, 400, "messages.0.content",
         "You must provide messages.0.content"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "king", "content": "a"}]}, 400,
         "messages.0.role", "'user'"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400,
         "tools", "not supported"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
         400, "top_logprobs", "needs logprobs"),
        ("nothing", {}, 404, None, "Not Found"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_is_wrong(
    running: Running, path: str, body: Any, status: int, param: str | None, said: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    code, text = running.raw("POST", f"/v1/{path}", content)
    assert code == status, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]


def test_what_asks_for_nothing_is_passed_over(running: Running) -> None:
    body = {
        "model": "tiny", "prompt": "a", "max_tokens": 2, "user": "me", "presence_penalty": 0, "logit_bias": None,
        "best_of": 1, "suffix": None, "stop": None, "seed": None,
    }  # fmt: skip
    assert running.raw("POST", "/v1/completions", json.dumps(body).encode())[0] == 200


def test_only_the_token_opens_all_but_health(running: Running) -> None:
    stranger = running.client.with_options(api_key="another-token-of-tests")
    with pytest.raises(openai.AuthenticationError, match="Authorization must be `Bearer`"):
        stranger.models.list()
    for path in ("/v1/models", "/metrics", "/v1/completions"):
        assert running.raw("GET", path, Authorization="Bearer")[0] == 401
    assert running.raw("GET", "/health", Authorization="")[0] == 200
    assert [model.id for model in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")


def test_a_body_that_is_no_json_by_its_header_is_refused(running: Running) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    assert running.raw("POST", "/v1/completions", body, **{"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slot_at_once(running: Running, is_streamed: bool) -> None:
    """64 answers of 2,000 tokens, four at once, would take a minute. It goes when the server is at work."""
    before = running.metric("requests_total", status="499")
    asked: dict[str, Any] = {"model": "tiny", "prompt": "time", "n": 64, "max_tokens": 2000}
    if is_streamed:
        with running.client.completions.create(**asked, stream=True) as stream:
            next(iter(stream))
    else:
        with closing(running.sent("POST", "/v1/completions", json.dumps(asked).encode())):
            until(lambda: running.metric("running_sequences") > 0, "the server to begin", 60)
    generated = running.metric("generated_tokens_total")
    assert running.settles()
    assert running.metric("generated_tokens_total") < generated + 4 * 1000
    until(lambda: running.metric("requests_total", status="499") == before + 1, "its end to be counted", 60)


def test_metrics_count_requests_tokens_and_times(running: Running) -> None:
    def numbers() -> list[float]:
        names = ("requests_total", "prompt_tokens_total", "generated_tokens_total", "first_token_seconds_count")
        labels = {"endpoint": "/v1/completions", "status": "200"}
        return [running.metric(names[0], **labels), *(running.metric(name) for name in names[1:])]

    assert running.settles()
    before, between = numbers(), running.metric("token_seconds_count")
    answer = running.client.completions.create(model="tiny", prompt="time", max_tokens=7, temperature=0)
    assert answer.usage is not None
    tokens = answer.usage.completion_tokens
    assert [now - then for now, then in zip(numbers(), before, strict=True)] == [
        1,
        answer.usage.prompt_tokens,
        tokens,
        1,
    ]
    assert running.metric("token_seconds_count") - between == tokens - 1
    assert running.metric("cache_capacity_positions") == 4 * CONTEXT
    assert running.metric("cache_positions") == 0


def test_mixed_requests_at_once_get_the_answers_that_they_get_alone(running: Running) -> None:
    async def both() -> load_serve.Load:
        load = load_serve.Load(running.address, "tiny", TOKEN)
        asked = load_serve.questions(60, with_chats=True)
        expected = {question: await load.ask(question) for question in asked}
        assert len(set(expected.values())) > 50
        await load.ask_many(asked, expected, concurrency=16, cut=0.1)
        return load

    outcomes = asyncio.run(both()).outcomes
    assert outcomes["cut"] > 0
    assert outcomes["right"] + outcomes["cut"] == 60, outcomes
    assert running.settles()


def test_the_examples_of_the_document_work(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    given = {"http://127.0.0.1:8000/v1": running.address, '"mine"': '"tiny"', "the token, if the server has one": TOKEN}
    for theirs, ours in given.items():
        page = page.replace(theirs, ours)
    curl, python = (re.search(rf'title="{title}"\n(.*?)```', page, re.DOTALL) for title in ("curl", "openai"))
    assert curl is not None
    assert python is not None
    exec(compile(python[1], "serving.md", "exec"), {})
    assert capsys.readouterr().out.startswith(running.text("The ", 20))
    if shutil.which("curl") is None:
        pytest.skip("curl is not there; the example in Python works")
    words = [*shlex.split(curl[1].replace("\\\n", " ")), "--silent", "-H", f"Authorization: Bearer {TOKEN}"]
    answer = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["text"] == running.text("The ", 20)


def test_a_signal_ends_the_server_after_what_runs(running: Running) -> None:
    with running.client.completions.create(model="tiny", prompt="time", max_tokens=300, stream=True, seed=1) as stream:
        chunks = iter(stream)
        next(chunks)
        running.process.send_signal(signal.SIGTERM)
        rest = list(chunks)
    assert rest[-1].choices[0].finish_reason in ("length", "stop")
    assert len(rest) > 20
    assert running.process.wait(60) == 0
    with pytest.raises(openai.APIConnectionError):
        running.client.models.list()
