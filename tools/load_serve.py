"""Load on `bigmodel serve`: mixed requests at once, some cut off, and whether each answer is the right one.

    python -m tools.load_serve RUN|FOLDER --requests 500 --concurrency 16 --cut 0.05 --rounds 3 --out result.json

In: what `bigmodel serve` takes. It starts the server, asks each greedy question once, alone, and then many at a time:
completions and chats (where there is a template), streamed and not, short and long. Out: one JSON object. Exit code 1
if an answer differs from the one given alone, a request fails, a slot stays taken, the server ends, or its memory grows
by more than `ALLOWED_GROWTH` from the first round to the last.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

ALLOWED_GROWTH = 1.02
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")
READY = re.compile(r"bigmodel: (\S+) at (http://\S+/v1)")


@dataclass(frozen=True)
class Question:
    """A greedy request. The same question has the same answer, whatever runs beside it."""

    text: str
    tokens: int
    is_chat: bool
    is_streamed: bool


def questions(number: int, with_chats: bool) -> list[Question]:
    """Different texts; lengths of prompts from 3 to 30 words, of answers from 1 to 60 tokens."""
    draw = random.Random(0)
    made = []
    for place in range(number):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 30)))
        kinds = with_chats and place % 3 == 0, place % 2 == 0
        made.append(Question(f"{place} {words}", draw.randint(1, 60), *kinds))
    return made


@contextmanager
def server(location: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, the name of its model and its address. It gets SIGTERM at the end, and must exit with 0."""
    command = [sys.executable, "-m", "bigmodel", "serve", location, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = next((found for line in process.stdout if (found := READY.match(line))), None)
        assert ready is not None, f"the server has ended with {process.wait()}"
        yield process, ready[1], ready[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


class Load:
    """Requests to one server, by the openai client without retries."""

    def __init__(self, address: str, model: str, token: str = "none") -> None:
        self._client = openai.AsyncOpenAI(base_url=address, api_key=token, max_retries=0, timeout=600)
        self._model = model
        self.outcomes: Counter[str] = Counter()
        self.first_token_seconds: list[float] = []

    async def ask(self, question: Question, is_cut: bool = False) -> str:
        """The answer's text. A cut one is left after its first chunk, or after 20 ms."""
        sent = time.monotonic()
        if not question.is_streamed:
            async with asyncio.timeout(0.02 if is_cut else None):
                return _text((await self._send(question, False)).choices[0])
        parts: list[str] = []
        stream = await self._send(question, True)
        async for chunk in stream:
            if not parts:
                self.first_token_seconds.append(time.monotonic() - sent)
            parts.append(_text(chunk.choices[0]))
            if is_cut:
                break
        await stream.close()
        return "".join(parts)

    async def _send(self, question: Question, is_streamed: bool) -> Any:
        common = {"model": self._model, "temperature": 0, "stream": is_streamed, "max_tokens": question.tokens}
        if question.is_chat:
            messages = [{"role": "user", "content": question.text}]
            return await self._client.chat.completions.create(messages=messages, **common)  # type: ignore[call-overload]
        return await self._client.completions.create(prompt=question.text, **common)  # type: ignore[call-overload]

    async def ask_many(
        self, asked: list[Question], expected: dict[Question, str], concurrency: int, cut: float
    ) -> None:
        """All questions, `concurrency` at a time; counts outcomes: right, wrong, cut, failed."""
        slots, draw = asyncio.Semaphore(concurrency), random.Random(1)

        async def one(question: Question, is_cut: bool) -> None:
            async with slots:
                self.outcomes[await self._outcome(question, expected[question], is_cut)] += 1

        await asyncio.gather(*(one(question, draw.random() < cut) for question in asked))

    async def _outcome(self, question: Question, expected: str, is_cut: bool) -> str:
        try:
            text = await self.ask(question, is_cut)
        except TimeoutError:
            return "cut"
        except openai.APIError as error:
            print(f"failed: {question}: {error!r}", file=sys.stderr)
            return "failed"
        if is_cut and expected.startswith(text):
            return "cut"
        if text != expected:
            print(f"wrong: {question}: {text!r}, alone {expected!r}", file=sys.stderr)
        return "right" if text == expected else "wrong"

    async def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", await asyncio.to_thread(self._page), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def _page(self) -> str:
        address = str(self._client.base_url).removesuffix("/v1/") + "/metrics"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {self._client.api_key}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.read().decode()


def _text(choice: Any) -> str:
    if hasattr(choice, "text"):
        return choice.text
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def resident_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


async def has_chats(load: Load) -> bool:
    try:
        await load.ask(Question("?", 1, True, False))
    except openai.BadRequestError:
        return False
    return True


async def all_slots_free(load: Load) -> bool:
    """Within ten seconds after the last request."""
    for _ in range(100):
        busy = [await load.metric(f"bigmodel_serving_{state}_sequences") for state in ("running", "waiting")]
        if busy == [0, 0]:
            return True
        await asyncio.sleep(0.1)
    return False


async def measure(process: int, address: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    load = Load(address, model)
    asked = questions(options.requests, await has_chats(load))
    began = time.monotonic()
    expected = {question: await load.ask(question) for question in asked}
    alone_seconds = time.monotonic() - began
    rounds, resident = [], []
    load.first_token_seconds.clear()
    for _ in range(options.rounds):
        began = time.monotonic()
        tokens = await load.metric("bigmodel_serving_generated_tokens_total")
        await load.ask_many(asked, expected, options.concurrency, options.cut)
        seconds = time.monotonic() - began
        tokens = await load.metric("bigmodel_serving_generated_tokens_total") - tokens
        rounds.append({"seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)})
        resident.append(resident_bytes(process))
    return {
        "requests": options.requests, "concurrency": options.concurrency, "cut_share": options.cut,
        "distinct_answers": len(set(expected.values())),
        "outcomes": dict(load.outcomes),
        "alone_seconds": round(alone_seconds, 2), "rounds": rounds, "resident_bytes_after_rounds": resident,
        "first_token_seconds_median": round(statistics.median(load.first_token_seconds), 4),
        "slots_free": await all_slots_free(load),
    }  # fmt: skip


def complaints(result: dict[str, Any]) -> list[str]:
    """What is wrong with a result; empty when nothing is."""
    bad = [f"{result['outcomes'][name]} {name}" for name in ("wrong", "failed") if result["outcomes"].get(name)]
    resident = result["resident_bytes_after_rounds"]
    growth = resident[-1] / resident[0]
    bad += [f"memory grew by a factor of {growth:.3f}"] if growth > ALLOWED_GROWTH else []
    bad += [] if result["outcomes"].get("cut") else ["no request was cut off"]
    return bad if result["slots_free"] else [*bad, "a slot stays taken"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("location")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--cut", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with server(options.location) as (process, model, address):
        result = asyncio.run(measure(process.pid, address, model, options))
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if bad := complaints(result):
        sys.exit(f"load_serve: {'; '.join(bad)}")


if __name__ == "__main__":
    main()
