"""Tokens per CPU second of generation, beside transformers' `generate` of the same weights.

    python -m tools.bench_generate --output benchmarks/bench_generate.json

A decoder of 24 M weights, random, goes through transformers' Llama: 10 layers of 384, 6 heads, vocabulary 16,384, tied.
Greedy, prompts of 32 tokens, fp32, one thread, in one process. Pairs alternate, and each side goes first in half of
them; the ratio of a pair is ours / theirs in tokens per CPU second, and the result is the median. Both models stand
ready before a pair. `--whole N` also times N tokens with the cache and by whole forward passes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigmodel.generation.engine import Engine, Request
from bigmodel.generation.prompts import pack
from bigmodel.model.huggingface.weights import from_transformers
from bigmodel.model.transformer import Transformer
from tools.measure import hardware
from tools.torchvision_operators import define_missing_torchvision_operators

SIZE: dict[str, Any] = {
    "vocab_size": 16_384, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
    "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
PROMPT = 32
EVERY = 32


class Ids:
    """A tokenizer whose text is the ids; no token ends a text."""

    eos = -1
    vocabulary: int = SIZE["vocab_size"]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)


def models() -> tuple[Any, Transformer]:
    """The same weights, theirs and ours."""
    define_missing_torchvision_operators()
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).eval()
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    ours = Transformer(settings, SIZE["vocab_size"]).eval()
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(weights[name])
    return theirs, ours


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def generated(engine: Engine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    numbers = [engine.add(Request(prompt, max_tokens=tokens)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.busy:
        for step in engine.step():
            answers[step.number].append(step.token)
    return list(answers.values())


def compare(theirs: Any, ours: Transformer, batch: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Median ratio over the pairs, and each side's tokens per CPU second."""
    prompts = torch.randint(0, SIZE["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    engine = Engine(ours, Ids(), batch, PROMPT + tokens)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": tokens, "do_sample": False}
    sides = {
        "theirs": lambda: theirs.generate(prompts, **options)[:, PROMPT:].tolist(),
        "ours": lambda: generated(engine, prompts.tolist(), tokens),
    }
    same = sum(one == other for one, other in zip(sides["theirs"](), sides["ours"](), strict=True))  # also warms up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in sides if pair % 2 else reversed(sides):
            rates[name].append(batch * tokens / seconds(sides[name])[0])
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True)]
    medians = {f"{name}_tokens_per_cpu_second": round(statistics.median(found), 1) for name, found in rates.items()}
    ratio = round(statistics.median(ratios), 2)
    spread = [round(min(ratios), 2), round(max(ratios), 2)]
    return {"batch": batch, "tokens": tokens, "pairs": pairs, "ratio": ratio, "ratios": spread, "same": same} | medians


def against_whole_passes(ours: Transformer, tokens: int) -> dict[str, Any]:
    """One continuation with the cache, and by one whole forward pass per token, of which every 32nd is timed. The
    tokens of the timed passes are compared."""
    prompt = list(range(PROMPT))
    engine = Engine(ours, Ids(), 1, PROMPT + tokens)
    cached, answer = seconds(lambda: generated(engine, [prompt], tokens)[0])
    whole, same = 0.0, 0
    for length in range(0, tokens, EVERY):
        batch = pack([prompt + answer[:length]])
        with torch.no_grad():
            took, logits_TV = seconds(partial(ours.__call__, batch, "logits"))
        whole += took * EVERY
        same += int(logits_TV[-1].argmax()) == answer[length]
    return {
        "tokens": tokens, "cached_seconds": round(cached, 2), "whole_seconds": round(whole, 2),
        "ratio": round(whole / cached, 1), "same": same, "compared": len(range(0, tokens, EVERY)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--whole", type=int, default=0, help="tokens of a continuation by whole forward passes")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theirs, ours = models()
    rows = [compare(theirs, ours, batch, arguments.tokens, arguments.pairs) for batch in (1, 8)]
    result: dict[str, Any] = {"hardware": hardware("cpu"), "against_transformers": rows}
    if arguments.whole:
        result["against_whole_passes"] = against_whole_passes(ours, arguments.whole)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
