"""Limits, failures and addresses of the server, in this process: the real application, batcher and engine."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from bigmodel.config.settings import UserError
from bigmodel.generation.engine import Engine, Request, Step
from bigmodel.generation.served import Served, load_served
from bigmodel.serving.application import application
from bigmodel.serving.batcher import Batcher
from bigmodel.serving.options import TOKEN, Options, bound, open_for_clients, read_token
from bigmodel.serving.server import Server, batcher_of
from tests.support.model_folder import write_model

LIMITS = Options(max_sequences=2, max_queue=1, max_tokens=40)


@pytest.fixture(scope="module")
def served(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = write_model(tmp_path_factory.mktemp("limits") / "tiny", shards, context=64)
    return load_served(folder)


@contextmanager
def client_of(served: Served, options: Options = LIMITS, token: str = "") -> Iterator[tuple[TestClient, Batcher]]:
    def engine() -> Engine:
        return Engine(served.model, served.tokenizer, options.max_sequences, served.positions)

    batcher = Batcher(engine, options.max_sequences, options.max_queue)
    with TestClient(application(served, batcher, options, token), "http://localhost") as client:
        yield client, batcher


def ask(client: TestClient, **changes: Any) -> Any:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "time", "max_tokens": 4, **changes})


def problem(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def test_an_encoder_decoder_reads_the_prompt_as_its_source(shards: Path, tmp_path: Path) -> None:
    served = load_served(write_model(tmp_path / "tiny", shards, "t5"))
    tokenizer = served.tokenizer
    engine = Engine(served.model, tokenizer, 1, served.positions)
    engine.add(Request([tokenizer.bos], [*tokenizer.encode("time").tolist(), tokenizer.eos], max_tokens=9))
    expected = ""
    while engine.busy:
        expected += "".join(step.text for step in engine.step())
    with client_of(served) as (client, _):
        answer = ask(client, max_tokens=9, temperature=0).json()
        long = problem(ask(client, prompt="a " * 600))
        chat = client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
        )
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode("time")) + 1
    assert long[:2] == (400, "context_length_exceeded")
    assert "the encoder reads 512" in long[2]
    assert problem(chat)[:2] == (400, "no_chat_template")


def test_what_the_server_does_not_hold_is_answered_with_429_and_when_to_try_again(served: Served) -> None:
    go_on = threading.Event()
    held = served.model.embedding.register_forward_pre_hook(lambda *_: (go_on.wait(60), None)[1])
    with client_of(served, replace(LIMITS, max_sequences=1, max_queue=1)) as (client, batcher):
        batcher.submit([Request([served.tokenizer.bos], max_tokens=60)] * 2)
        answer = ask(client)
        assert problem(answer)[:2] == (429, "overloaded")
        assert answer.headers["Retry-After"] == "1"
        held.remove()
        go_on.set()
        while ask(client).status_code == 429:
            time.sleep(0.01)
        assert ask(client).status_code == 200
        assert problem(ask(client, n=3))[:2] == (400, None)


def test_a_request_beyond_its_time_ends_with_504_or_an_error_event(served: Served) -> None:
    with client_of(served, replace(LIMITS, timeout_seconds=0.001)) as (client, batcher):
        answer = ask(client, max_tokens=40)
        assert problem(answer)[:2] == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        events = ask(client, max_tokens=40, stream=True).text.split("\n\n")
        assert '"code": "timeout"' in events[-2]
        assert "[DONE]" not in events[-2]
        assert open_sequences(batcher) == 0


def open_sequences(batcher: Batcher) -> int:
    for _ in range(6000):
        if batcher.num_running + batcher.num_waiting == 0:
            break
        time.sleep(0.01)
    return batcher.num_running + batcher.num_waiting


def test_more_tokens_than_the_server_gives_are_refused_and_are_its_default_for_chats(served: Served) -> None:
    with_template = replace(served, chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with client_of(with_template, replace(LIMITS, max_tokens=5)) as (client, _):
        assert "generates 5 at most" in problem(ask(client, max_tokens=6))[2]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "time"}], "temperature": 0}
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert answer["usage"]["completion_tokens"] <= 5
        refused = client.post(
            "/v1/chat/completions", json=asked | {"messages": [{"role": "user", "content": "a " * 99}]}
        )
        assert problem(refused)[:2] == (400, "context_length_exceeded")


def test_a_message_that_the_template_refuses_is_answered_with_its_reason(served: Served) -> None:
    refusing = replace(served, chat_template="{{ raise_exception('no system messages') }}")
    with client_of(refusing) as (client, _):
        messages = [{"role": "system", "content": "a"}]
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert "no system messages" in answer.json()["error"]["message"]


def test_a_failure_of_the_engine_is_an_error_and_the_next_request_is_served(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    with client_of(served) as (client, _):
        expected = ask(client, temperature=0).json()["choices"]
        table = served.model.embedding.weight
        whole = table.data
        table.data = whole[:, :3]  # every step raises
        try:
            assert ask(client).status_code == 500
            streamed = ask(client, stream=True)
        finally:
            table.data = whole
        assert "The server failed on this request" in streamed.text
        assert ask(client, temperature=0).json()["choices"] == expected
        assert client.get("/health").json() == {"status": "ok"}
    assert "a new engine goes on" in capsys.readouterr().err


def test_the_end_of_the_server_ends_what_still_runs_with_503(served: Served) -> None:
    with client_of(served) as (client, batcher):
        threading.Timer(0.0, batcher.close).start()
        while (answer := ask(client, max_tokens=40)).status_code == 200:
            pass
        assert problem(answer)[:2] == (503, "shutting_down")
        batcher.join(10)
        assert client.get("/health").status_code == 503


def test_without_a_token_only_names_of_this_machine_are_answered(served: Served) -> None:
    with client_of(served) as (client, _):
        for host, status in (
            ("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200), ("LOCALHOST:1", 200),
            ("example.org", 403), ("localhost.example.org:80", 403),
        ):  # fmt: skip
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host
    with client_of(served, token="secret-token") as (client, _):
        headers = {"Host": "example.org", "Authorization": "bearer secret-token"}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_server_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert [read_token(host) for host in ("127.0.0.1", "localhost", "::1")] == [""] * 3
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(UserError, match=f"{TOKEN} is not set; set it"):
            read_token(host)
    monkeypatch.setenv(TOKEN, "a-long-token")
    assert read_token("0.0.0.0") == "a-long-token"
    for token in ("", "short", "with a space in it", "with-ümlaut"):
        monkeypatch.setenv(TOKEN, token)
        with pytest.raises(UserError, match=f"{len(token)} characters; a token has at least 8"):
            read_token("127.0.0.1")
    monkeypatch.delenv(TOKEN)
    with pytest.raises(UserError, match=r"--host no\.such\.host\.invalid: has no address"):
        read_token("no.such.host.invalid")


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be opened: Address already in use"):
            bound("127.0.0.1", port)


def test_an_address_that_another_server_opens_meanwhile_is_told_too() -> None:
    with bound("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with bound("127.0.0.1", port) as ours:
            other.listen()
            with pytest.raises(UserError, match=f"--port {port}: cannot be opened: Address already in use"):
                open_for_clients(ours, "127.0.0.1", port)


def test_a_connection_without_a_whole_head_is_closed(served: Served) -> None:
    options = replace(LIMITS, port=0)
    batcher = batcher_of(served, options)
    config = uvicorn.Config(
        application(served, batcher, options, ""), log_config=None, http="h11", timeout_keep_alive=1
    )
    server = Server(config, batcher, "", 1.0)
    with bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        address = listening.getsockname()
        with socket.create_connection(address) as silent, socket.create_connection(address) as half:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")  # one whole, one half
            for one in (silent, half):
                one.settimeout(20)
                while one.recv(1000):
                    pass
        server.should_exit = True
        thread.join()


def test_a_folder_that_cannot_be_served_is_told_why(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run directory"):
        load_served(tmp_path)
    folder = write_model(tmp_path / "tiny", shards)
    with pytest.raises(UserError, match="needs a run file"):
        load_served(folder, ["model.dropout=0"])
    assert load_served(folder, max_positions=32).context == 32
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 300', '"vocab_size": 200'))
    with pytest.raises(UserError, match=r"tokenizer.json has 300 ids and vocab_size of config.json is 200"):
        load_served(folder)


def test_a_cache_that_does_not_fit_into_memory_is_told_with_the_options(served: Served) -> None:
    with pytest.raises(UserError, match="--max-sequences 2: a key-value cache of 100000000000 positions for each"):
        batcher_of(replace(served, context=10**11), LIMITS)


def test_steps_of_a_cancelled_group_end_before_the_next_step(served: Served) -> None:
    async def run() -> tuple[int, int]:
        batcher = Batcher(lambda: Engine(served.model, served.tokenizer, 2, 64), 2, 8)
        batcher.start()
        first = batcher.submit([Request([served.tokenizer.bos], max_tokens=60)] * 3)
        second = batcher.submit([Request([served.tokenizer.bos], max_tokens=5)])
        seen: list[Step] = []
        async for _, step in batcher.steps(first, asyncio.get_running_loop().time() + 30, 30):
            seen.append(step)
            if len(seen) == 4:
                break
        batcher.cancel(first)
        rest = [step async for _, step in batcher.steps(second, asyncio.get_running_loop().time() + 30, 30)]
        batcher.close()
        batcher.join(10)
        return len(seen), len(rest)

    seen, rest = asyncio.run(run())
    assert seen == 4
    assert 1 <= rest <= 5
