"""Our model as EleutherAI's lm_eval sees it: its `LM`, over packed requests.

In: requests of lm_eval (texts). Out: log-likelihoods and generated texts, in the order of the requests. Texts are split
into context and continuation, and truncated from the left, as by lm_eval's own classes; log-likelihoods equal those of
its HFLM for the exported model (1e-4 in fp32). A text gets the ends that it has in training: a begin token before it;
for an encoder-decoder the context is the source and gets an end token, and the continuation is the target.

Two differences, on purpose. `loglikelihood_rolling` does not count the begin token itself as predicted, as HFLM does
where the tokenizer adds one. The name of a special token in a text stays text, as in training.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.evaluation.packed_requests import Continuation, Score, TextRequest
from bigmodel.generation.sampling import Sampling

MAX_GENERATED = 256  # lm_eval's own, for tasks that do not say
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
GENERATION = ("until", "do_sample", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", *SAMPLING)


class HarnessModel(TemplateLM):
    """`score` gives the scores of continuations, `generate` the texts after prompts."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        score: Callable[[Sequence[Continuation]], list[Score]],
        generate: Callable[[Sequence[TextRequest]], list[str]],
    ) -> None:
        super().__init__()
        self.settings, self.text_tokenizer = settings, tokenizer
        self._score, self._generate = score, generate
        self.backend = "seq2seq" if settings.model.has_source else "causal"

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self.text_tokenizer.bos

    @property
    def max_length(self) -> int:
        """Most inputs of a context and its continuation; of a source, for an encoder-decoder."""
        data = self.settings.data
        return data.longest_source if self.backend == "seq2seq" else data.max_document_length

    @property
    def max_gen_toks(self) -> int:
        return MAX_GENERATED

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids; with the begin token, for a source with the end token, unless `add_special_tokens` is False. A text that
        begins with the begin token's name gets one, not two."""
        tokenizer = self.text_tokenizer
        if add_special_tokens is False:
            return tokenizer.encode(string).tolist()
        if self.backend == "seq2seq":
            return [*tokenizer.encode(string).tolist(), tokenizer.eos]
        return [tokenizer.bos, *tokenizer.encode(string.removeprefix(tokenizer.token_of(tokenizer.bos))).tolist()]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._sums([self._pieces(context, labels) for _, context, labels in requests])
        for (texts, _, _), one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def _sums(self, requests: Sequence[Sequence[Continuation]]) -> list[Score]:
        """The scores of requests in pieces."""
        scores = iter(self._score([piece for pieces in requests for piece in pieces]))
        found = []
        for pieces in requests:
            mine = [next(scores) for _ in pieces]
            found.append(Score(math.fsum(one.log_likelihood for one in mine), all(one.is_greedy for one in mine)))
        return found

    def _pieces(self, context: list[int], labels: list[int]) -> list[Continuation]:
        """A context that is too long loses its beginning. Labels that alone are too long are scored in pieces, each
        after as many ids as fit."""
        source, longest = None, self.max_length
        if self.backend == "seq2seq":
            source, longest = context[-self.max_length :], self.settings.data.max_document_length
            context = [self.text_tokenizer.bos]
        ids, pieces = context + labels, []
        for first in range(0, len(labels), longest):
            piece = labels[first : first + longest]
            end = len(context) + first + len(piece)
            pieces.append(Continuation(ids[max(0, end - longest - 1) : end - 1], piece, source))
        return pieces

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that predict each token once."""
        if self.backend == "seq2seq":
            raise no_rolling(requests[0].task_name or "")
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [one.log_likelihood for one in self._sums([self._windows(ids) for ids in texts])]

    def _windows(self, ids: list[int]) -> list[Continuation]:
        pairs = get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [piece for pair in pairs for piece in self._pieces(*make_disjoint_window(pair))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts after the contexts, without the stop texts."""
        prompts = [self._prompt(request) for request in requests]
        texts = self._generate(prompts)
        return [
            postprocess_generated_text(text, stop=list(prompt.stop), think_end_token=None)
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _prompt(self, request: Instance) -> TextRequest:
        context, given = request.args
        wanted = check_generation(request.task_name or "", given, self.settings)
        end = self.text_tokenizer.token_of(self.eot_token_id)
        stop = tuple(handle_stop_sequences(wanted.get("until"), eos=end))
        max_tokens = wanted["max_gen_toks"]
        ids = self.tok_encode(context)
        start = Continuation([self.text_tokenizer.bos], [], ids[-self.max_length :])
        if self.backend == "causal":
            start = Continuation(ids[max_tokens - self.max_length :], [])
        return TextRequest(start, max_tokens, stop, sampling_of(wanted))


def check_generation(name: str, given: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The settings of a task's texts with lm_eval's defaults. Raises `UserError` if they are of another kind than ours
    or do not fit a document."""
    for key, value in given.items():
        if key not in GENERATION and not (key == "num_beams" and value == 1):
            raise UserError(
                f"task {name}: generation_kwargs.{key} = {value!r}: not done here; remove it in a copy of the task's "
                f"file, or choose of {', '.join(GENERATION)}"
            )
    until = given.get("until")
    if not all(isinstance(end, str) and end for end in (until if isinstance(until, list) else [until or "-"])):
        raise UserError(f"task {name}: generation_kwargs.until = {until!r}: give texts, none of them empty")
    try:
        wanted = dict(normalize_gen_kwargs(given, MAX_GENERATED))
        sampling_of(wanted)
    except (TypeError, ValueError) as error:
        raise UserError(f"task {name}: generation_kwargs = {given}: {error}; correct the value") from None
    max_tokens, longest = wanted["max_gen_toks"], settings.data.max_document_length
    if max_tokens < 1:
        raise UserError(f"task {name}: generation_kwargs.max_gen_toks = {max_tokens}: must be at least 1")
    if max_tokens + (not settings.model.has_source) > longest:
        raise UserError(
            f"task {name}: generates up to {max_tokens} tokens (max_gen_toks), and documents of this model have "
            f"data.max_document_length = {longest}; set generation_kwargs.max_gen_toks in a copy of the task's file"
        )
    return wanted


def sampling_of(wanted: dict[str, Any]) -> dict[str, float]:
    """The settings of the draws; none: greedy. Raises `ValueError`, `UserError` among them, for a bad value."""
    asked = {name: float(wanted[name]) for name in SAMPLING if wanted.get(name) is not None}
    Sampling(**asked)  # type: ignore[arg-type]
    return asked if wanted["do_sample"] else {}


def no_rolling(name: str) -> UserError:
    return UserError(
        f"task {name}: asks for the likelihood of a text alone (loglikelihood_rolling), which an encoder-decoder, a "
        "model of a target given a source, does not have; leave the task out"
    )
