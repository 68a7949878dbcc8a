"""Beam search: the answers with the largest summed log-probability, of several that grow side by side.

In: a prompt. Out: the best answers with their scores. Guarantee: answers and scores of transformers with the same
`num_beams`, `length_penalty` and `early_stopping=False`, by a test. Costs: one pass over the weights per token for all
beams, and a copy of the cache of each beam that splits.
"""

from dataclasses import dataclass

import torch

from bigmodel.config.user_error import UserError
from bigmodel.generation.cached_model import CachedModel, Prompt
from bigmodel.generation.far_labels import next_input

MOST_LENGTH_PENALTY = 20  # a million tokens to this power is far inside the range of a float


@dataclass(frozen=True)
class Answer:
    """ids with the end token, if the answer has one. score: summed log-probability / len(ids) ** length_penalty."""

    ids: list[int]
    score: float


def check_length_penalty(value: float) -> None:
    if not abs(value) <= MOST_LENGTH_PENALTY:
        raise UserError(f"length penalty {value}: must be from -{MOST_LENGTH_PENALTY} to {MOST_LENGTH_PENALTY}")


def beam_search(
    cache: CachedModel,
    prompt: Prompt,
    eos: int,
    num_beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    target_ahead: int = 1,
) -> list[Answer]:
    """At most `num_beams` answers, the best first. The cache is empty before and after, and has a slot for each beam.

    Ends when as many answers have ended and the best open beam scores no better than the worst of them. Raises
    `UserError` for fewer beams than one or more than slots, and for a length penalty outside its range. `target_ahead`:
    of the data that the model was trained on.
    """
    if not 1 <= num_beams <= cache.slots:
        raise UserError(f"{num_beams} beams: must be 1 to {cache.slots}")
    check_length_penalty(length_penalty)
    logits_BV = cache.prefill([prompt])
    beams, ended = [Answer([], 0.0)], list[Answer]()
    max_tokens = min(max_tokens, cache.max_positions - cache.lengths[0] + 1)
    for length in range(1, max_tokens + 1):
        summed_BV = logits_BV.log_softmax(-1) + torch.tensor([beam.score for beam in beams]).to(logits_BV)[:, None]
        best = summed_BV.flatten().topk(min(2 * num_beams, summed_BV.numel()))
        grown, parents = list[Answer](), list[int]()
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, summed_BV.shape[1])
            longer = [*beams[parent].ids, token]
            if token == eos or length == max_tokens:
                ended += [Answer(longer, score / length**length_penalty)] if rank < num_beams else []
            elif len(grown) < num_beams:
                grown.append(Answer(longer, score))
                parents.append(parent)
        ended = sorted(ended, key=lambda answer: -answer.score)[:num_beams]
        is_settled = len(ended) == num_beams and grown and grown[0].score / length**length_penalty <= ended[-1].score
        if not grown or is_settled:
            break
        cache.keep(parents)
        beams = grown
        logits_BV = cache.step([next_input(prompt.ids[0], beam.ids, target_ahead) for beam in beams])
    cache.keep([])
    return ended
