"""Beam search gives the answers and scores of transformers."""

import pytest
import torch

from bigmodel.config.settings import UserError
from bigmodel.generation.beams import beam_search
from bigmodel.generation.cached_model import CachedModel, Prompt
from tests.model.test_huggingface import made, ours_of

PROMPT = [5, 9, 33, 12]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_answers_and_scores_are_those_of_transformers(kind: str) -> None:
    theirs = made(kind)
    cache, num_ended = CachedModel(ours_of(theirs), 4, 30), 0
    prompt, starts = (Prompt([0], PROMPT), 1) if kind == "t5" else (Prompt(PROMPT), len(PROMPT))
    for num_beams, length_penalty in ((4, 1.0), (3, -0.5), (4, 2.0), (1, 1.0)):
        endless = beam_search(cache, prompt, -1, num_beams, 9, length_penalty)
        for eos in (endless[0].ids[2], endless[-1].ids[6]):  # a token that beams meet
            found = theirs.generate(
                torch.tensor([PROMPT]), num_beams=num_beams, length_penalty=length_penalty, max_new_tokens=9,
                num_return_sequences=num_beams, eos_token_id=eos, pad_token_id=2, decoder_start_token_id=0,
                do_sample=False, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            ours = beam_search(cache, prompt, eos, num_beams, 9, length_penalty)
            for answer, ids in zip(ours, found.sequences[:, starts:].tolist(), strict=True):
                assert answer.ids == ids[: len(answer.ids)]
                assert set(ids[len(answer.ids) :]) <= {2}
            if num_beams > 1:
                assert [answer.score for answer in ours] == pytest.approx(found.sequences_scores.tolist(), abs=1e-4)
            num_ended += sum(answer.ids[-1] == eos for answer in ours)
    assert num_ended > 2


def test_a_number_of_beams_without_slots_is_refused() -> None:
    cache = CachedModel(ours_of(made("llama")), 2, 30)
    with pytest.raises(UserError, match="3 beams: must be 1 to 2"):
        beam_search(cache, Prompt(PROMPT), 7, 3, 9)


@pytest.mark.parametrize("penalty", [1000.0, -1000.0, float("nan"), float("inf")])
def test_a_length_penalty_whose_power_is_no_number_is_refused(penalty: float) -> None:
    with pytest.raises(UserError, match=r"length penalty .*: must be from -20 to 20"):
        beam_search(CachedModel(ours_of(made("llama")), 2, 30), Prompt(PROMPT), 7, 2, 9, penalty)
