"""Texts of the harness by the generation engine: with a key-value cache, several prompts at once, draws at random.

In: prompts. Out: their texts, in order.
"""

from collections.abc import Callable, Sequence
from typing import Any

from bigmodel.evaluation.packed_requests import TextRequest
from bigmodel.generation.engine import Engine, Request
from bigmodel.generation.sampling import Sampling
from bigmodel.training.load_model import Trained

AT_ONCE = {"cpu": 16, "cuda": 64}  # prompts


def write_texts(
    trained: Trained,
    prompts: Sequence[TextRequest],
    seeds: Sequence[int],
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[str]:
    """`seeds`: of the prompts' draws; `advance`: as of `SharedRequests`. Raises `UserError` for values that the engine
    refuses."""
    at_once = max(1, min(len(prompts), AT_ONCE[trained.device.type]))
    engine = Engine(trained.model, trained.tokenizer, at_once, _positions(trained), trained.device)
    texts = {engine.add(_request(prompt, seed)): "" for prompt, seed in zip(prompts, seeds, strict=True)}
    ended = 0
    while engine.busy:
        for step in engine.step():
            texts[step.number] += step.text
            ended += step.finished is not None
        advance("texts", ended, len(prompts))
    return list(texts.values())


def _request(prompt: TextRequest, seed: int) -> Request:
    given: dict[str, Any] = dict(prompt.sampling)
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    return Request(
        prompt.start.inputs, prompt.start.source, prompt.max_tokens, Sampling(**given, seed=seed), stop=prompt.stop,
        stands_alone=True,  # lm_eval decodes the new ids alone
    )  # fmt: skip


def _positions(trained: Trained) -> int:
    """Of a prompt and its text; of mixed attention with the source."""
    model, data = trained.settings.model, trained.settings.data
    if not model.has_source:
        return data.max_document_length
    if model.source_attention == "mixed":
        return data.longest_source + data.max_document_length
    return max(data.longest_source, data.max_document_length)
