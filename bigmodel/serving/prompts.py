"""From a checked body to requests of the engine: token ids, room in the context, seeds.

In: a body and what is served. Out: one prompt per text, and `n` requests for each. Guarantee: prompt and generated
tokens fit into the context; where the body names no number of tokens, it is what fits. Raises `ApiError` 400.
"""

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigmodel.config.user_error import UserError
from bigmodel.generation.engine import Request, Sampling
from bigmodel.serving.bodies import ChatBody, CompletionBody
from bigmodel.serving.errors import ApiError

if TYPE_CHECKING:
    from bigmodel.generation.served import Served

MAX_SEED = 1 << 63


@dataclass(frozen=True)
class Prompt:
    """ids: what the decoder reads first. source: what the encoder reads. text: for `echo`."""

    ids: list[int]
    source: list[int] | None
    text: str

    @property
    def num_tokens(self) -> int:
        return len(self.ids) if self.source is None else len(self.source)


def prompts_of(body: CompletionBody | ChatBody, served: "Served") -> list[Prompt]:
    try:
        if isinstance(body, ChatBody):
            return [_of_chat(body, served)]
        return [_of_completion(prompt, served) for prompt in body.prompt]
    except UserError as error:  # of the tokenizer, about a text
        raise ApiError(400, f"{error}.", _param(body)) from None


def _param(body: CompletionBody | ChatBody) -> str:
    return "messages" if isinstance(body, ChatBody) else "prompt"


def _of_completion(prompt: str | list[int], served: "Served") -> Prompt:
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt).tolist()
        return _placed([*ids, tokenizer.eos] if served.has_source else [tokenizer.bos, *ids], prompt, served)
    wrong = [token for token in prompt if not 0 <= token < tokenizer.vocabulary]
    if wrong:
        raise ApiError(
            400, f"prompt has the token id {wrong[0]}; this model's ids are 0 to {tokenizer.vocabulary - 1}.", "prompt"
        )
    return _placed(prompt, tokenizer.decode(prompt), served)


def _of_chat(body: ChatBody, served: "Served") -> Prompt:
    if served.has_source or served.chat_template is None:
        raise ApiError(
            400, f"{served.name} has no chat template (chat_template.jinja beside its tokenizer.json); use "
            "/v1/completions.", "messages", "no_chat_template",
        )  # fmt: skip
    return _placed(served.render([message.model_dump(exclude_none=True) for message in body.messages]), "", served)


def _placed(ids: list[int], text: str, served: "Served") -> Prompt:
    """On the side that reads it: a source, or the beginning of the decoder's text."""
    return Prompt([served.tokenizer.bos], ids, text) if served.has_source else Prompt(ids, None, text)


def requests_of(body: CompletionBody | ChatBody, prompts: list[Prompt], served: "Served", limit: int) -> list[Request]:
    """`n` for each prompt, in order. limit: most tokens that this server generates for a request."""
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
    asked = 0 if body.num_top is None else body.num_top
    is_chat = isinstance(body, ChatBody)
    ends = served.end_of_turn if is_chat else None
    stop_ids = () if ends is None else (ends,)
    requests: list[Request] = []
    for prompt in prompts:
        tokens = _room(body, prompt, served, limit)
        for _ in range(body.n):
            sampling = Sampling(
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                seed=(seed + len(requests)) % MAX_SEED,
            )
            requests.append(
                Request(
                    prompt.ids, prompt.source, tokens, sampling, tuple(body.stop), asked, stop_ids=stop_ids,
                    stands_alone=is_chat,
                )
            )  # fmt: skip
    return requests


def _room(body: CompletionBody | ChatBody, prompt: Prompt, served: "Served", limit: int) -> int:
    """Tokens to generate after a prompt."""
    wanted, param = body.wanted_tokens, _param(body)
    if prompt.source is not None and len(prompt.source) > served.max_source:
        raise _beyond(f"the prompt has {len(prompt.source)} tokens, and the encoder reads {served.max_source}", param)
    room = served.context - len(prompt.ids)
    if room < (wanted or 1):
        raise _beyond(
            f"the prompt has {len(prompt.ids)} tokens and {wanted or 1} are to be generated, and the context has "
            f"{served.context}", param,
        )  # fmt: skip
    if wanted is not None and wanted > limit:
        raise ApiError(400, f"max_tokens = {wanted}: this server generates {limit} at most.", "max_tokens")
    default = body.max_tokens if isinstance(body, CompletionBody) else limit
    return min(wanted or default or limit, room, limit)


def _beyond(what: str, param: str) -> ApiError:
    return ApiError(400, f"Beyond the context: {what}; shorten the prompt.", param, "context_length_exceeded")
