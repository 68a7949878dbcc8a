"""`bigmodel generate`: prompts in, text out.

In: a model, prompts and options. Out: lines on standard output: the text of one prompt, also while it is
generated, or one JSON object for each line of a file of prompts, in their order. Raises `UserError` for prompts beyond
the context and for options that exclude one another.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.config.user_error import UserError
from bigmodel.generation.beams import beam_search, check_length_penalty
from bigmodel.generation.cached_model import Prompt
from bigmodel.generation.engine import Engine, Request, check_can_generate
from bigmodel.generation.recurrent_cache import make_cache
from bigmodel.generation.sampling import Sampling
from bigmodel.generation.served import Served
from bigmodel.generation.text import continuation


@dataclass(frozen=True)
class Options:
    """tokens: most of an answer. context: most positions of prompt and answer; 0: the model's own.
    batch: prompts at once. beams: 0 draws tokens by `sampling`; answers: how many of the beams' answers to print."""

    tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    context: int = 0
    batch: int = 8
    beams: int = 0
    length_penalty: float = 1.0
    answers: int = 1
    stream: bool = False

    def __post_init__(self) -> None:
        if self.beams and (self.stop or self.stream):
            other = "--stop" if self.stop else "--stream"
            raise UserError(
                f"--beams {self.beams} and {other}: beam search knows its text only at its end; leave one out"
            )
        if self.length_penalty != 1 and not self.beams:
            raise UserError(f"--length-penalty {self.length_penalty:g}: has an effect only with --beams; give both")
        check_length_penalty(self.length_penalty)
        if self.answers > max(1, self.beams):
            raise UserError(f"--answers {self.answers}: beam search has --beams {self.beams} answers; give more beams")


def print_answer(served: Served, prompt: str, options: Options) -> None:
    """The prompt of a decoder with its continuation, or an encoder-decoder's answer."""
    shown = "" if served.has_source else prompt
    if options.beams:
        ((_, answers),) = _searched(served, [prompt], options)
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False) if options.answers > 1 else shown + answer["text"])
        return
    engine = _engine(served, [prompt], options, slots=1)
    engine.add(_request(served, prompt, options))
    sys.stdout.write(shown)
    pieces = (step.text for step in _steps(engine))
    for piece in pieces if options.stream else ["".join(pieces)]:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def print_answers(served: Served, file: Path, options: Options) -> None:
    """One JSON object for each prompt of a file: prompt, text and why it ended, or prompt and answers of the beams."""
    if options.stream:
        raise UserError("--stream and --prompts: only the text of one --prompt can be streamed; leave one out")
    prompts = read_prompts(file)
    if options.beams:
        for prompt, answers in _searched(served, prompts, options):
            print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False), flush=True)
        return
    engine = _engine(served, prompts, options, min(options.batch, len(prompts)))
    for prompt in prompts:
        engine.add(_request(served, prompt, options))
    texts, done, printed = [""] * len(prompts), dict[int, str](), 0
    for step in _steps(engine):
        texts[step.number] += step.text
        if step.finished:
            done[step.number] = step.finished
        while printed in done:
            line = {"prompt": prompts[printed], "text": texts[printed], "finished": done[printed]}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            printed += 1


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; in a .jsonl file a JSON string, or an object with "prompt". "-": standard input."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        text = text.removeprefix("\ufeff")  # the byte order mark of some editors
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise UserError(f"--prompts {file}: has no prompt; write one a line")
    return [_parsed(file, number, line) for number, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines


def _parsed(file: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    found = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise UserError(f'--prompts {file}: line {number} is neither a JSON string nor an object with a "prompt"')
    return found


def _steps(engine: Engine) -> Iterator[Any]:
    while engine.busy:
        yield from engine.step()


def _prompt(served: Served, text: str) -> Prompt:
    tokenizer, ids = served.tokenizer, served.tokenizer.encode(text).tolist()
    if served.has_source:
        return Prompt([tokenizer.bos], [*ids, tokenizer.eos])
    return Prompt([tokenizer.bos, *ids])


def _request(served: Served, text: str, options: Options) -> Request:
    prompt = _prompt(served, text)
    source = None if prompt.source is None else list(prompt.source)
    return Request(list(prompt.ids), source, _most_tokens(served, prompt, options), options.sampling, options.stop)


def _engine(served: Served, prompts: Sequence[str], options: Options, slots: int) -> Engine:
    positions = _positions(served, prompts, options)
    return Engine(served.model, served.tokenizer, slots, positions, served.device, served.target_ahead)


def _positions(served: Served, prompts: Sequence[str], options: Options) -> int:
    """What the longest of the prompts and its answer can use. Raises `UserError` for a prompt beyond the context."""
    read, own = [_prompt(served, prompt) for prompt in prompts], _context(served, options)
    for number, prompt in enumerate(read, 1):
        length, limit = len(prompt.ids), own
        if prompt.source is not None:
            length, limit = len(prompt.source), options.context or served.max_source
        if length > limit:
            which = "the prompt" if len(read) == 1 else f"prompt {number}"
            raise UserError(
                f"{which} has {length} tokens; the context has {limit}: shorten it, or give a larger --context"
            )
    source = max(len(prompt.source or ()) for prompt in read)
    used = min(own, max(len(prompt.ids) for prompt in read) + options.tokens)
    return used + source if served.shares_positions else max(used, source)


def _context(served: Served, options: Options) -> int:
    """Most tokens of a decoder: prompt and answer."""
    return options.context or served.context


def _most_tokens(served: Served, prompt: Prompt, options: Options) -> int:
    """Of an answer; the last one is never read, so it needs no position."""
    return min(options.tokens, _context(served, options) - len(prompt.ids) + 1)


def _searched(served: Served, prompts: Sequence[str], options: Options) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each prompt with its best answers, text and score."""
    positions = _positions(served, prompts, options)
    check_can_generate(served.model, positions)
    cache, eos = make_cache(served.model, options.beams, positions), served.tokenizer.eos
    for text in prompts:
        prompt = _prompt(served, text)
        most = _most_tokens(served, prompt, options)
        asked = options.beams, most, options.length_penalty, served.target_ahead
        found = beam_search(cache, prompt, eos, *asked)
        answers = ([token for token in answer.ids if token != eos] for answer in found)
        texts = [continuation(served.tokenizer, prompt.ids, ids) for ids in answers]
        scored = zip(texts, (answer.score for answer in found), strict=True)
        yield text, [{"text": words, "score": score} for words, score in scored][: options.answers]
