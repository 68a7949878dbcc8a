"""`bigmodel generate`: prompts in, text out.

In: a trained model, prompts and options. Out: lines on standard output: the text of one prompt, also while it is
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
from bigmodel.generation.cached_model import CachedModel, Prompt
from bigmodel.generation.engine import Engine, Request, check_can_generate
from bigmodel.generation.sampling import Sampling
from bigmodel.generation.text import readable
from bigmodel.training.load_model import Trained


@dataclass(frozen=True)
class Options:
    """tokens: most of an answer. context: most positions of prompt and answer; 0: the longest document of training.
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


def print_answer(trained: Trained, prompt: str, options: Options) -> None:
    """The prompt of a decoder with its continuation, or an encoder-decoder's answer."""
    shown = "" if trained.settings.model.kind == "encoder_decoder" else prompt
    if options.beams:
        ((_, answers),) = _searched(trained, [prompt], options)
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False) if options.answers > 1 else shown + answer["text"])
        return
    engine = _engine(trained, [prompt], options, slots=1)
    engine.add(_request(trained, prompt, options))
    sys.stdout.write(shown)
    pieces = (step.text for step in _steps(engine))
    for piece in pieces if options.stream else ["".join(pieces)]:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def print_answers(trained: Trained, file: Path, options: Options) -> None:
    """One JSON object for each prompt of a file: prompt, text and why it ended, or prompt and answers of the beams."""
    if options.stream:
        raise UserError("--stream and --prompts: only the text of one --prompt can be streamed; leave one out")
    prompts = read_prompts(file)
    if options.beams:
        for prompt, answers in _searched(trained, prompts, options):
            print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False), flush=True)
        return
    engine = _engine(trained, prompts, options, min(options.batch, len(prompts)))
    for prompt in prompts:
        engine.add(_request(trained, prompt, options))
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


def _prompt(trained: Trained, text: str) -> Prompt:
    tokenizer, ids = trained.tokenizer, trained.tokenizer.encode(text).tolist()
    if trained.settings.model.kind == "encoder_decoder":
        return Prompt([tokenizer.bos], [*ids, tokenizer.eos])
    return Prompt([tokenizer.bos, *ids])


def _request(trained: Trained, text: str, options: Options) -> Request:
    prompt = _prompt(trained, text)
    source = None if prompt.source is None else list(prompt.source)
    return Request(list(prompt.ids), source, _most_tokens(trained, prompt, options), options.sampling, options.stop)


def _engine(trained: Trained, prompts: Sequence[str], options: Options, slots: int) -> Engine:
    return Engine(trained.model, trained.tokenizer, slots, _positions(trained, prompts, options), trained.device)


def _positions(trained: Trained, prompts: Sequence[str], options: Options) -> int:
    """What the longest of the prompts and its answer can use. Raises `UserError` for a prompt beyond the context."""
    settings, read = trained.settings, [_prompt(trained, prompt) for prompt in prompts]
    own = _context(trained, options)
    other = options.context or settings.data.max_source_length or settings.data.source_sequence_length
    for number, prompt in enumerate(read, 1):
        length, limit = (len(prompt.ids), own) if prompt.source is None else (len(prompt.source), other)
        if length > limit:
            which = "the prompt" if len(read) == 1 else f"prompt {number}"
            raise UserError(
                f"{which} has {length} tokens; the context has {limit}: shorten it, or give a larger --context"
            )
    source = max(len(prompt.source or ()) for prompt in read)
    used = min(own, max(len(prompt.ids) for prompt in read) + options.tokens)
    is_mixed = source > 0 and settings.model.source_attention == "mixed"
    return used + source if is_mixed else max(used, source)


def _context(trained: Trained, options: Options) -> int:
    """Most tokens of a decoder: prompt and answer."""
    settings = trained.settings
    return options.context or settings.model.max_positions or settings.data.max_document_length


def _most_tokens(trained: Trained, prompt: Prompt, options: Options) -> int:
    """Of an answer; the last one is never read, so it needs no position."""
    return min(options.tokens, _context(trained, options) - len(prompt.ids) + 1)


def _searched(trained: Trained, prompts: Sequence[str], options: Options) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each prompt with its best answers, text and score."""
    positions = _positions(trained, prompts, options)
    check_can_generate(trained.model, positions)
    cache, eos = CachedModel(trained.model, options.beams, positions), trained.tokenizer.eos
    for text in prompts:
        prompt = _prompt(trained, text)
        most = _most_tokens(trained, prompt, options)
        found = beam_search(cache, prompt, eos, options.beams, most, options.length_penalty)
        texts = [readable(trained.tokenizer, [token for token in answer.ids if token != eos]) for answer in found]
        scored = zip(texts, (answer.score for answer in found), strict=True)
        yield text, [{"text": words, "score": score} for words, score in scored][: options.answers]
