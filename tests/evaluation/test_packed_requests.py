"""Packed requests: the same results as one request at a time, by logits of the whole document."""

import random

import pytest
import torch

from bigmodel.config.settings import DataSettings
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.packed_requests import Continuation, Forward, continue_greedily, make_batch, score
from tests.support.example_batches import logits_of, model_of

ONE_SIDE = {"max_document_length": 24, "sequence_length": 48, "max_documents": 5}
TWO_SIDES = {**ONE_SIDE, "source_sequence_length": 40, "max_source_length": 20}
KINDS = {
    "decoder": (ONE_SIDE, {}),
    "decoder with learned positions": (ONE_SIDE, {"position_embedding": "learned", "max_positions": 24}),
    "cross": (TWO_SIDES, {"kind": "encoder_decoder", "encoder_num_layers": 1}),
    "mixed": (TWO_SIDES, {"kind": "encoder_decoder", "encoder_num_layers": 1, "source_attention": "mixed"}),
}


def requests_of(data: DataSettings, number: int = 12) -> list[Continuation]:
    draw = random.Random(4)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 400) for _ in range(draw.randint(least, most))]

    found = []
    for _ in range(number):
        inputs = ids(1, data.max_document_length)
        labels = ids(1, len(inputs))[: len(inputs)]
        found.append(Continuation(inputs, labels, ids(0, 20) if data.source_sequence_length else None))
    return found


def made(kind: str) -> tuple[Forward, DataSettings]:
    data, model = KINDS[kind]
    model = model_of(num_heads=4, num_kv_heads=2, **model).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from even chances
    return torch.no_grad()(model), DataSettings(**data)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_are_those_of_one_request_at_a_time(kind: str) -> None:
    forward, data = made(kind)
    requests = requests_of(data)
    found = score(forward, ALONE, requests, data, packs_per_micro_batch=2)
    greedy = 0
    for request, one in zip(requests, found, strict=True):
        logits = logits_of(forward, request.inputs, request.source)[-len(request.labels) :]
        expected = float(logits.log_softmax(-1).gather(-1, torch.tensor(request.labels)[:, None]).double().sum())
        assert one.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert one.is_greedy == (logits.argmax(-1).tolist() == request.labels)
        choice = Continuation(request.inputs, logits.argmax(-1).tolist(), request.source)
        greedy += score(forward, ALONE, [choice], data)[0].is_greedy
    assert greedy == len(requests)


@pytest.mark.parametrize("kind", ["decoder", "cross"])
def test_packed_greedy_texts_are_those_of_one_prompt_at_a_time(kind: str) -> None:
    forward, data = made(kind)
    prompts = [Continuation(one.inputs[:12], [], one.source) for one in requests_of(data, 5)]
    lengths = [3, 6, 1, 5, 2]
    found = continue_greedily(forward, ALONE, prompts, data, lambda number, ids: len(ids) == lengths[number])
    for prompt, length, ids in zip(prompts, lengths, found, strict=True):
        inputs = list(prompt.inputs)
        for _ in range(length):
            inputs.append(int(logits_of(forward, inputs, prompt.source)[-1].argmax()))
        assert ids == inputs[len(prompt.inputs) :]


def test_a_batch_of_requests_has_the_shape_of_the_run_s_batches() -> None:
    data = DataSettings(max_document_length=6, sequence_length=6, max_documents=3)
    batch = make_batch([Continuation([1, 5, 6], [6, 8]), Continuation([1, 7], [9])], data)
    assert batch.tokens.tolist() == [1, 5, 6, 1, 7, 0]
    assert batch.labels.tolist() == [-100, 6, 8, -100, 9, -100]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 6]
