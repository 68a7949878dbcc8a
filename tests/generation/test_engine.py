"""Many requests at once: each has the tokens that it has alone, and its text comes in whole characters."""

import pytest
import tokenizers as library
import torch

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.store import tokenizer as tokenizers
from bigmodel.generation.beams import beam_search
from bigmodel.generation.cached_model import CachedModel, Prompt
from bigmodel.generation.engine import Engine, Request, Step
from bigmodel.generation.far_labels import predicts_next_token, target_ahead_of
from bigmodel.generation.prompts import pack
from bigmodel.generation.sampling import Sampling
from bigmodel.generation.text import TextStream, continuation, readable
from bigmodel.model.transformer import Transformer
from tests.support.example_batches import model_of

SIDES = {"kind": "encoder_decoder", "encoder_num_layers": 1}


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    """256 bytes and four words; begin 0, end 1."""
    return tokenizers.Tokenizer(tokenizers.train(["one two three " * 50], 262), fast=False)


def sharp_model(**changes: object) -> Transformer:
    """Far from ties: rounding does not decide."""
    model = model_of(vocabulary=270, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def answers(engine: Engine) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = {}
    while engine.busy:
        for step in engine.step():
            found.setdefault(step.number, []).append(step)
    return found


def requests(has_source: bool) -> list[Request]:
    """30, of different lengths; two of three draw."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 262, (length,), generator=draw).tolist()

    return [
        Request(
            [0] if has_source else [0, *ids(number % 17)],
            ids(number % 13) if has_source else None,
            max_tokens=10 + number % 7,
            sampling=Sampling(0.9 if number % 3 else 0, number % 5 * 10, 0.9 if number % 2 else 1, seed=number),
        )
        for number in range(30)
    ]


@pytest.mark.parametrize(
    "changes", [{}, SIDES, {**SIDES, "source_attention": "mixed"}], ids=["decoder", "cross", "mixed"]
)
def test_a_request_has_the_same_tokens_alone_and_among_others(
    changes: dict[str, object], tokenizer: tokenizers.Tokenizer
) -> None:
    model, wanted = sharp_model(**changes), requests(bool(changes))
    engine = Engine(model, tokenizer, 8, 60)
    for request in wanted:
        engine.add(request)
    together = answers(engine)
    alone = Engine(model, tokenizer, 1, 60)
    for number, request in enumerate(wanted):
        number_alone = alone.add(request)
        expected = answers(alone)[number_alone]
        assert [step.token for step in together[number]] == [step.token for step in expected]
        ids = [step.token for step in together[number] if step.token != tokenizer.eos]
        assert "".join(step.text for step in together[number]) == readable(tokenizer, ids)
        assert len(expected) == request.max_tokens or expected[-1].finished == "stop"


@pytest.mark.parametrize("source_attention", ["cross", "mixed"])
def test_a_model_with_labels_k_ahead_reads_its_own_answer_k_tokens_late(
    source_attention: str, tokenizer: tokenizers.Tokenizer
) -> None:
    """Engine and a beam of one, against whole passes over inputs that are written out."""
    model, source = sharp_model(**SIDES, source_attention=source_attention).eval(), [7, 9, 30, 1]
    for ahead in (2, 3, 50):
        expected: list[int] = []
        while len(expected) < 12 and 1 not in expected:
            inputs = ([0] * ahead + expected)[: len(expected) + 1]
            with torch.no_grad():
                expected.append(int(model(pack([inputs], [source]), "logits")[-1].argmax()))
        engine = Engine(model, tokenizer, 2, 60, target_ahead=ahead)
        number = engine.add(Request([0], source, max_tokens=12))
        assert [step.token for step in answers(engine)[number]] == expected
        (best, *_) = beam_search(CachedModel(model, 1, 60), Prompt([0], source), 1, 1, 12, target_ahead=ahead)
        assert best.ids == expected
    with pytest.raises(UserError, match=r"decoder's prompt has 2 tokens: with data\.target_ahead = 50"):
        engine.add(Request([0, 5], source))


def test_a_decoder_that_never_predicts_the_next_token_does_not_generate() -> None:
    far = {"kind": "causal", "ahead": 3}
    settings = Settings.model_validate({"data": {"objectives": [far]}})
    assert not predicts_next_token(settings)
    with pytest.raises(UserError, match="trained to predict the token 3 ahead, never the next one"):
        target_ahead_of(settings)
    assert target_ahead_of(Settings.model_validate({"data": {"objectives": [far, {"kind": "causal"}]}})) == 1


def test_the_probability_is_that_of_the_model(tokenizer: tokenizers.Tokenizer) -> None:
    model = sharp_model()
    engine = Engine(model, tokenizer, 2, 30)
    number = engine.add(Request([0, 7], max_tokens=3, sampling=Sampling(1.5, top_k=3), top_logprobs=4))
    (first, *_) = answers(engine)[number]
    with torch.no_grad():
        expected = model(pack([[0, 7]]), "logits")[-1].log_softmax(-1)
    assert first.logprob == pytest.approx(float(expected[first.token]), abs=1e-4)
    assert [token for token, _ in first.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)


def test_a_cancelled_request_leaves_the_others_alone(tokenizer: tokenizers.Tokenizer) -> None:
    model = sharp_model()
    alone = Engine(model, tokenizer, 1, 40)
    expected = []
    for token in (5, 9, 60):
        number = alone.add(Request([0, token], max_tokens=12))
        expected.append([step.token for step in answers(alone)[number]])
    engine = Engine(model, tokenizer, 2, 40)
    numbers = [engine.add(Request([0, token], max_tokens=12)) for token in (5, 9, 60)]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for turn in range(40):
        if turn == 3:
            engine.cancel(numbers[0])
        for step in engine.step():
            found[step.number].append(step.token)
    assert found[numbers[0]] == expected[0][:3]
    assert [found[number] for number in numbers[1:]] == expected[1:]
    assert not engine.busy
    assert engine.used_positions == 0


def test_an_answer_ends_where_the_positions_end(tokenizer: tokenizers.Tokenizer) -> None:
    engine = Engine(sharp_model(), tokenizer, 1, 8)
    number = engine.add(Request([0, 7, 8], max_tokens=50))
    steps = answers(engine)[number]
    assert (len(steps), steps[-1].finished) == (6, "length")  # 8 positions are read, the last token is not


def test_a_stop_token_ends_an_answer(tokenizer: tokenizers.Tokenizer) -> None:
    engine = Engine(sharp_model(), tokenizer, 1, 30)
    number = engine.add(Request([0, 7], max_tokens=9))
    tokens = [step.token for step in answers(engine)[number]]
    number = engine.add(Request([0, 7], max_tokens=9, stop_ids=(tokens[4],)))
    steps = answers(engine)[number]
    assert [step.token for step in steps] == tokens[: tokens.index(tokens[4]) + 1]
    assert steps[-1].finished == "stop"


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Request([]), "the prompt has no token"),
        (Request([0] * 31), "the prompt has 31 tokens; the context has 30"),
        (Request([0, 270]), "token 270: the model has 270 tokens"),
        (Request([0], max_tokens=0), "max_tokens = 0: must be at least 1"),
        (Request([0], [5]), "the request has a source; a decoder takes none"),
        (Request([0], stop=("",)), "a stop string is empty"),
        (Request([0], prefix=-1), "prefix = -1: must be 0 to 1"),
        (Request([0], top_logprobs=-1), "top_logprobs = -1: must be 0 or more"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    request_: Request, complaint: str, tokenizer: tokenizers.Tokenizer
) -> None:
    with pytest.raises(UserError, match=complaint):
        Engine(model_of(vocabulary=270), tokenizer, 1, 30).add(request_)


def test_a_model_that_cannot_generate_is_refused(tokenizer: tokenizers.Tokenizer) -> None:
    with pytest.raises(UserError, match="kind = 'encoder' cannot generate"):
        Engine(model_of(kind="encoder"), tokenizer, 1, 30)
    with pytest.raises(UserError, match=r"31 positions: the model has learned model.max_positions = 30"):
        Engine(model_of(position_embedding="learned", max_positions=30), tokenizer, 1, 31)
    with pytest.raises(UserError, match="the request has no source"):
        Engine(model_of(**SIDES), tokenizer, 1, 30).add(Request([0]))
    with pytest.raises(UserError, match="prefix: an encoder-decoder"):
        Engine(model_of(**SIDES), tokenizer, 1, 30).add(Request([0], [1], prefix=1))


def test_text_comes_in_whole_characters(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("aß漢 two").tolist()
    pieces = [stream.add(token) for token in ids] + [stream.end()]
    assert "".join(pieces) == "aß漢 two"
    assert pieces[:6] == ["a", "", "ß", "", "", "漢"]
    unfinished = TextStream(tokenizer)
    assert ["".join(map(unfinished.add, ids[:2])), unfinished.end()] == ["a", "\ufffd"]


def test_a_text_goes_on_in_that_of_its_prompt_but_not_in_half_a_character() -> None:
    made = library.Tokenizer(library.models.WordLevel({"?": 0, "▁a": 1, "▁b": 2, "<0xC3>": 3, "<0x9F>": 4}, "?"))
    made.add_special_tokens(["<s>", "</s>"])
    decoders = library.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = tokenizers.Tokenizer(made.to_str())
    for prompt, ids, text in (
        ([tokenizer.bos, 1], [2, 3, 4, 1], " bß a"),
        ([tokenizer.bos], [2, 1], "b a"),
        ([1, 3, 4], [2], " b"),
        ([1, 3], [4, 2], "\ufffd b"),
        ([1, tokenizer.bos], [2], " b"),
    ):
        stream = TextStream(tokenizer, prompt=prompt)
        assert "".join(map(stream.add, ids)) + stream.end() == text == continuation(tokenizer, prompt, ids)


def test_text_ends_before_a_stop_string_that_crosses_tokens(tokenizer: tokenizers.Tokenizer) -> None:
    stream = TextStream(tokenizer, ("wo!", "o t", "zzz"))
    pieces = [stream.add(token) for token in tokenizer.encode("one two").tolist()]
    assert not stream.stopped
    pieces += [stream.add(token) for token in tokenizer.encode(" three").tolist() if not stream.stopped]
    assert "".join(pieces) + stream.end() == "one tw"
    assert stream.stopped
    held = TextStream(tokenizer, ("wo!",))
    pieces = [held.add(token) for token in tokenizer.encode("tw").tolist()]
    assert ("".join(pieces), held.end(), held.stopped) == ("t", "w", False)
