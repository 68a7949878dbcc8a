"""Many requests at once: each step takes waiting prompts in and gives every running request its next token.

In: requests. Out: steps, each one token of one request. Guarantees: a request's tokens do not depend on the others but
for rounding (a matrix product of more rows may round otherwise in the last bits of fp32); its draws are its own. Costs:
one pass over the weights for all running requests. Not for several threads: one thread adds, cancels and steps.

    engine = Engine(model, tokenizer, max_sequences=8, max_positions=1024)
    number = engine.add(Request([tokenizer.bos, *tokenizer.encode("Once").tolist()], max_tokens=20))
    while engine.busy:
        for step in engine.step():
            print(step.text, end="")
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from bigmodel.config.classification_settings import NO_TEXT
from bigmodel.config.user_error import UserError
from bigmodel.generation.cached_model import Prompt
from bigmodel.generation.far_labels import next_input
from bigmodel.generation.recurrent_cache import make_cache
from bigmodel.generation.sampling import Sampling, choose
from bigmodel.generation.text import Decoder, TextStream
from bigmodel.model.transformer import Transformer

PREFILL_TOKENS = 4096  # most tokens of prompts in one step, if there are several prompts: others wait for them
GREEDY = Sampling()
Finished = Literal["stop", "length"] | None


class BoundedDecoder(Decoder, Protocol):
    """What is needed of a `Tokenizer`."""

    eos: int


@dataclass(frozen=True)
class Request:
    """ids: the prompt with its begin token; of an encoder-decoder the decoder's, usually the begin token alone. source:
    ids that an encoder reads, with their end token. prefix: how many first ids attend to one another in both directions
    (prefix language models). stop: texts that end the answer and are cut off. stop_ids: tokens that end it, beside the
    tokenizer's end token. stands_alone: the answer is a text of its own, as in a chat, and does
    not go on in the prompt's."""

    ids: list[int]
    source: list[int] | None = None
    max_tokens: int = 100
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    prefix: int = 0
    stop_ids: tuple[int, ...] = ()
    stands_alone: bool = False


@dataclass(frozen=True)
class Step:
    """One token of a request. text: what became certain with it, maybe "". logprob and top: of the model itself, before
    temperature and the like."""

    number: int
    token: int
    text: str
    logprob: float
    top: list[tuple[int, float]]
    finished: Finished


@dataclass
class _Sequence:
    number: int
    request: Request
    text: TextStream
    generator: torch.Generator
    answer: list[int] = field(default_factory=list)


class Engine:
    """`max_sequences` run at once, the others wait. `max_positions`: of prompt and answer together; of mixed attention
    with the source. `target_ahead`: of the data that it was trained on. Raises `UserError` for a model that cannot
    generate, and for more positions than it has."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: BoundedDecoder,
        max_sequences: int,
        max_positions: int,
        device: torch.device | str = "cpu",
        target_ahead: int = 1,
    ) -> None:
        check_can_generate(model, max_positions)
        self._model, self._tokenizer = model.to(device).eval(), tokenizer
        self._cache = make_cache(model, max_sequences, max_positions)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # by slot
        self._next_number, self._target_ahead = 0, target_ahead

    def add(self, request: Request) -> int:
        """The request's number. Raises `UserError` for what the model cannot take."""
        self._check(request)
        generator = torch.Generator().manual_seed(request.sampling.seed)
        text = TextStream(self._tokenizer, request.stop, () if request.stands_alone else request.ids)
        self._waiting.append(_Sequence(self._next_number, request, text, generator))
        self._next_number += 1
        return self._next_number - 1

    def cancel(self, number: int) -> None:
        """Forget a request; one that is finished is no error."""
        self._waiting = deque(one for one in self._waiting if one.number != number)
        for slot, one in enumerate(self._running):
            if one.number == number:
                self._drop(slot)
                break

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def used_positions(self) -> int:
        """Cached positions of all running requests."""
        return sum(self._cache.lengths)

    def step(self) -> list[Step]:
        """The next token of every running request, then the first one of waiting requests that fit."""
        steps: list[Step] = []
        with torch.inference_mode():
            if self._running:
                logits_BV = self._cache.step(
                    [next_input(one.request.ids[0], one.answer, self._target_ahead) for one in self._running]
                )
                steps += self._choose(self._running, logits_BV)
            if admitted := self._admit():
                self._running += admitted
                logits_BV = self._cache.prefill([_prompt(one.request) for one in admitted])
                steps += self._choose(admitted, logits_BV)
        finished = {step.number for step in steps if step.finished}
        for slot in reversed(range(len(self._running))):
            if self._running[slot].number in finished:
                self._drop(slot)
        return steps

    def _admit(self) -> list[_Sequence]:
        admitted: list[_Sequence] = []
        tokens = 0
        while self._waiting and len(self._running) + len(admitted) < self._cache.slots:
            request = self._waiting[0].request
            tokens += len(request.ids) + len(request.source or ())
            if admitted and tokens > PREFILL_TOKENS:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _choose(self, sequences: Sequence[_Sequence], logits_BV: Tensor) -> list[Step]:
        likeliest_B = logits_BV.argmax(-1).tolist()
        tokens = [
            likeliest
            if one.request.sampling.is_greedy
            else choose(logits_V, one.request.sampling, [*one.request.ids, *one.answer], one.generator)
            for one, likeliest, logits_V in zip(sequences, likeliest_B, logits_BV, strict=True)
        ]
        chosen_B = torch.tensor(tokens, device=logits_BV.device)[:, None]
        log_sum_B = logits_BV.logsumexp(-1)
        logprobs = (logits_BV.gather(-1, chosen_B)[:, 0] - log_sum_B).tolist()
        lengths = self._cache.lengths[len(self._cache.lengths) - len(sequences) :]
        return [
            self._step(one, token, logprob, _top(logits_V, log_sum, one.request.top_logprobs), length)
            for one, token, logprob, logits_V, log_sum, length in zip(
                sequences, tokens, logprobs, logits_BV, log_sum_B, lengths, strict=True
            )
        ]

    def _step(self, one: _Sequence, token: int, logprob: float, top: list[tuple[int, float]], length: int) -> Step:
        one.answer.append(token)
        finished: Finished = None
        if token == self._tokenizer.eos or token in one.request.stop_ids:
            finished, text = "stop", ""
        else:
            text = one.text.add(token)
            if one.text.stopped:
                finished = "stop"
            elif len(one.answer) == one.request.max_tokens or length == self._cache.max_positions:
                finished = "length"
        if finished:
            text += one.text.end()
            if one.text.stopped:
                finished = "stop"
        return Step(one.number, token, text, logprob, top, finished)

    def _drop(self, slot: int) -> None:
        self._cache.drop(slot)
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last

    def _check(self, request: Request) -> None:
        settings, limit = self._model.settings, self._cache.max_positions
        rows = len(self._model.embedding.weight)
        if not request.ids:
            raise UserError("the prompt has no token; begin it with the tokenizer's begin token")
        if request.max_tokens < 1:
            raise UserError(f"max_tokens = {request.max_tokens}: must be at least 1")
        has_source = settings.has_source
        if request.source is None and has_source:
            raise UserError("the request has no source; an encoder-decoder needs one, the text that its encoder reads")
        if request.source is not None and not has_source:
            raise UserError("the request has a source; a decoder takes none: put the text into the prompt")
        if self._target_ahead > 1 and len(request.ids) > 1:
            raise UserError(
                f"the decoder's prompt has {len(request.ids)} tokens: with data.target_ahead = {self._target_ahead} an "
                "answer begins at the start token alone; give the text as the source"
            )
        for name, value, most in (
            ("prefix", request.prefix, len(request.ids)),
            ("top_logprobs", request.top_logprobs, 0),
        ):
            if value < 0 or (most and value > most):
                raise UserError(f"{name} = {value}: must be 0 {f'to {most}' if most else 'or more'}")
        if request.prefix and has_source:
            raise UserError("prefix: an encoder-decoder has no bidirectional prefix; give the text as the source")
        source = request.source or []
        is_mixed = settings.kind == "encoder_decoder" and settings.source_attention == "mixed"
        used = max(len(source), len(request.ids)) if not is_mixed else len(source) + len(request.ids)
        if used > limit:
            raise UserError(
                f"the prompt has {used} tokens; the context has {limit}: shorten the prompt, or allow more positions"
            )
        for token in (*request.ids, *source):
            if not 0 <= token < rows:
                raise UserError(f"token {token}: the model has {rows} tokens, from 0 on; use its own tokenizer")


def check_can_generate(model: Transformer, max_positions: int) -> None:
    settings = model.settings
    if settings.classification:
        raise UserError(NO_TEXT)
    if settings.kind == "encoder":
        raise UserError(
            f"model.kind = {settings.kind!r} cannot generate text; choose a run of a decoder or encoder-decoder"
        )
    if settings.position_embedding == "learned" and max_positions > settings.max_positions:
        raise UserError(
            f"{max_positions} positions: the model has learned model.max_positions = {settings.max_positions}; "
            "ask for at most these"
        )


def _prompt(request: Request) -> Prompt:
    return Prompt(request.ids, request.source, request.prefix)


def _top(logits_V: Tensor, log_sum: Tensor, number: int) -> list[tuple[int, float]]:
    """The likeliest tokens with their log-probabilities."""
    if not number:
        return []
    top = logits_V.topk(min(number, len(logits_V)))
    return list(zip(top.indices.tolist(), (top.values - log_sum).tolist(), strict=True))
